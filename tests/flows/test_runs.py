"""Runs of an experiment: what DVC is told, and what is printed and kept. tests/e2e makes real ones."""

from __future__ import annotations

import math
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from flows.overrides import set_params
from flows.runs import folders, main, parser, runs_side_by_side, show_plan, with_starts
from mode.errors import ModeError
from mode.experiments.definition import Experiment
from mode.experiments.plan import overridden, plan_runs
from tests.flows.definitions import CONTENT, REPOSITORY, made_of


@pytest.mark.parametrize(
    "overrides",
    [
        {"clustering.coarse": 2, "training.lr": 0.5, "image.flip": True, "glyphs.per_family": None},
        {"experts": {"expert-0": {"source": "base", "cluster": 0, "epochs": 3}}, "full": ["expert-0"], "new": []},
        {"sources.base.shards": {"/a b/c(1)": 1.0, "/data/{0..9}.tar": 0.5, "/x:y,z=w\\": 2.0}},
        {"training.adapter": {"rank": 4}, "model": {}, "model.name": "ViT-B-32"},
        {"x": "a, {b} [c] \"d\" 'e' $f: \\ #"},
        {"x": 'quote after a backslash \\"'},
        {"x": "ends with a backslash\\"},
        {"x": "two\nlines", "y": "é", "z": "1", "u": "null", "v": "{photos}"},
    ],
)
def test_dvc_reads_back_what_it_is_told(tmp_path: Path, overrides: dict[str, Any]) -> None:
    path = tmp_path / "params.yaml"
    shutil.copy(REPOSITORY / "params.yaml", path)
    apply_overrides(path, set_params(overrides)[1::2])
    assert yaml.safe_load(path.read_text()) == overridden(CONTENT, overrides)


@pytest.mark.parametrize("value", ["${x}", 1e-06, math.inf, {"é": 1}, {"~a": 1}, [{"a": 1e-7}], date(2026, 1, 1), b"x"])
def test_what_dvc_cannot_be_told_is_one_line(value: object) -> None:
    with pytest.raises(ModeError, match=r"^a\.b: [^\n]* cannot be passed on to DVC"):
        set_params({"a.b": value})


@pytest.mark.parametrize("key", ["", "a..b", "a=1,b", "a b", "a.[0]", "~a", "a\nb"])
def test_keys_that_dvc_cannot_be_told_are_refused(key: str) -> None:
    with pytest.raises(ModeError, match="cannot be passed on to DVC as a key"):
        set_params({key: 1})


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    assert folders([f"photos={tmp_path}/a=b"]) == {"photos": tmp_path / "a=b"}
    for wrong in ("photos", f"photos={tmp_path}/none", "photos="):
        with pytest.raises(ModeError, match="no folder"):
            folders([wrong])


def test_the_plan_as_text() -> None:
    made = Experiment.model_validate({"title": "t", "question": "q", "runs": {"a": {}, "b": {}}, "rows": {}})
    shown = show_plan(plan_runs("x", made, CONTENT, {}, [0]), [], None, 2)
    assert "all, 2 side by side" in shown
    assert "0 of 2 done" in shown
    assert shown.endswith("the first finished run will tell how long; stages in common are made once")


def test_what_is_chosen_has_what_it_starts_from() -> None:
    made = made_of(a={}, b={"starts_from": ["a", "dense"]}, c={"starts_from": ["b", "dense"]}, d={})
    assert with_starts(made, ["c"]) == {"a", "b", "c"}
    assert with_starts(made, ["d"]) == {"d"}


@pytest.mark.parametrize(
    "arguments", [["--seeds", "-1"], ["--seeds", "x"], ["--seeds", "4294967296"], ["--jobs", "0"], ["--jobs", "-1"]]
)
def test_numbers_that_are_none_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["table5", *arguments])
    assert f"{arguments[1]} is no whole number from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "jobs", "devices"),
    [
        ("", 3, ["cpu", "cpu", "cpu"]),
        ("0,1", None, ["cuda:0", "cuda:1"]),
        ("0,1", 1, ["cuda:0"]),
        ("0,1", 3, ["cuda:0", "cuda:1", "cuda:0"]),
        ("0", 12, ["cuda:0"] * 12),
    ],
)
def test_more_runs_than_gpus_share_them(
    gpus: str, jobs: int | None, devices: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    places = runs_side_by_side(jobs, tmp_path)
    assert [place.device for place in places] == devices
    assert len({place.locks for place in places}) == len(places)


def test_a_name_is_no_path(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(REPOSITORY)
    for name in ("../params", "results/../table5", "/etc/passwd", "..", "nothing"):
        assert main([name, "--plan"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
