"""What a run leaves on its page."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from flows.artifacts import MLFLOW_ADDRESS, comparison, embedded, mlflow_pages
from mode.reporting.tables import markdown
from mode.results import Results

RESULTS = Results.model_validate({"zeroshot": {"mean": {"seed": 0.25, "ensemble": 0.5}}})


def test_table_is_that_of_the_report() -> None:
    assert comparison(RESULTS, []) == markdown(RESULTS)


def test_table_says_where_the_seed_stands_in() -> None:
    assert comparison(RESULTS, ["expert-1", "expert-2"]).endswith("**The seed stands in for expert-1, expert-2**.\n")


def test_picture_is_embedded(tmp_path: Path) -> None:
    path = tmp_path / "routing.png"
    path.write_bytes(b"\x89PNG bytes")
    assert embedded(path) == f"![routing](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})"


def test_no_page_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MLFLOW_ADDRESS, raising=False)
    assert mlflow_pages(tmp_path) == {}
    monkeypatch.setenv(MLFLOW_ADDRESS, "http://127.0.0.1:5000")
    assert mlflow_pages(tmp_path) == {}
