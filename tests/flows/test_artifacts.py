"""What a run leaves on its page."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from flows.artifacts import MAX_PICTURE, MLFLOW_ADDRESS, comparison, heat_map, mlflow_pages
from mode.paths import Paths
from mode.reporting.tables import markdown
from mode.results import Results

RESULTS = Results.model_validate({"zeroshot": {"mean": {"seed": 0.25, "ensemble": 0.5}}})


def test_table_is_that_of_the_report() -> None:
    assert comparison(RESULTS, []) == markdown(RESULTS)


def test_table_says_where_the_seed_stands_in() -> None:
    assert comparison(RESULTS, ["expert-1", "expert-2"]).endswith("**The seed stands in for expert-1, expert-2**.\n")


def test_picture_is_embedded(tmp_path: Path) -> None:
    assert heat_map(tmp_path) == ""
    figures = Paths(tmp_path).reports / "figures"
    figures.mkdir(parents=True)
    for name, content, kind in (("routing.svg", b"<svg/>", "svg+xml"), ("routing.png", b"\x89PNG bytes", "png")):
        (figures / name).write_bytes(content)
        assert heat_map(tmp_path) == f"![routing](data:image/{kind};base64,{base64.b64encode(content).decode()})"
    (figures / "routing.png").write_bytes(b"\x89PNG" + bytes(MAX_PICTURE))
    assert "svg+xml" in heat_map(tmp_path)


def test_no_page_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MLFLOW_ADDRESS, raising=False)
    assert mlflow_pages(tmp_path) == {}
    monkeypatch.setenv(MLFLOW_ADDRESS, "http://127.0.0.1:5000")
    assert mlflow_pages(tmp_path) == {}
