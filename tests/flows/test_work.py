"""What a flow tells its stages of the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.parameters import Machine
from flows.work import engine_for

PARAMS = """
sources: {base: {shards: glyphs}}
experts: {}
model: {name: ViT-B-32}
machine: {engine: "tcp://host:8786"}
"""


@pytest.mark.parametrize(
    ("form", "environment", "expected"),
    [("local", "dask", "local"), ("", "dask", "dask"), ("", "", "tcp://host:8786")],
)
def test_the_form_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, environment: str, expected: str
) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.setenv("MODE_ENGINE", environment)
    assert engine_for(tmp_path, Machine(engine=form)) == expected
