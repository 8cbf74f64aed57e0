"""The script for half an hour of a GPU, as far as a CPU can tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


def test_what_can_run_here_is_measured_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--quick", "--device", "cpu", "--only", "nearest,nccl,attention", "--out", str(out)]) == 0
    measured = json.loads(out.read_text())
    assert list(measured) == ["nearest", "nccl", "attention"]
    assert measured["nccl"]["on"].startswith("CPU, ")
    assert measured["attention"]["rows"] == [{"kernel": "math", "lengths": 3, "not_finite_at": "[]", "not_taken": "[]"}]
    assert [row["side"] for row in measured["nearest"]["rows"]] == ["cpu"]
    assert measured["nearest"]["rows"][0]["vectors_per_second"] > 0
    assert [row["what"] for row in measured["nccl"]["rows"]] == ["gather 64 features", "reduce 150,000 gradients"]
    capsys.readouterr()
    gpu.main(["--quick", "--device", "cpu", "--only", "nccl", "--out", str(out)])
    assert "| side |" not in capsys.readouterr().out
    gpu.main(["--quick", "--device", "cpu", "--minutes", "0", "--only", "nearest", "--out", str(out)])
    assert "what was measured before stays" in capsys.readouterr().err
    gpu.main(["--table", "--out", str(out)])
    assert "| side | vectors per second |" in capsys.readouterr().out  # it is kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would not fail")
def test_one_that_fails_costs_itself_alone(tmp_path: Path) -> None:
    """Here, for want of a GPU."""
    out = tmp_path / "gpu.json"
    assert gpu.main(["--quick", "--only", "nccl", "--out", str(out)]) == 1
    (row,) = json.loads(out.read_text())["nccl"]["rows"]
    assert "CUDA" in row["failed"]


def test_what_does_not_fit_into_the_time_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--minutes", "0", "--only", "device", "--out", str(tmp_path / "gpu.json")]) == 0
    assert "not run: no time was left" in capsys.readouterr().out


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(
        SystemExit, match="error: no measurement is called warp; there are: device, batches, attention, train"
    ):
        gpu.main(["--only", "warp"])


def test_tables_have_a_column_for_each_figure() -> None:
    rows = [{"batch": 128, "samples_per_second": 1234.5678}, {"batch": 256, "note": "does not fit"}]
    kept = {"batches": {"title": "Steps", "on": "a GPU, 2026-01-02", "seconds": 12.0, "rows": rows}}
    assert gpu.markdown(kept).splitlines() == [
        "**Steps** (a GPU, 2026-01-02; 12 s)",
        "",
        "| batch | samples per second | note |",
        "|---|---|---|",
        "| 128 | 1,235 | – |",
        "| 256 | – | does not fit |",
    ]


def test_of_a_traceback_the_line_that_names_the_error_is_told() -> None:
    told = "Traceback:\n  File x\ntorch._inductor.exc.InductorError: no compiler\n\nSet THIS for more\n"
    assert gpu._reason(told) == "torch._inductor.exc.InductorError: no compiler"
    assert gpu._reason("killed\n") == "killed"
    assert gpu._reason("") == ""
