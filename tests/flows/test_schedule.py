"""Which stages take a device. How they run side by side is in tests/e2e/flows, with the real Prefect and DVC."""

from __future__ import annotations

import pytest

from flows.schedule import takes_device


@pytest.mark.parametrize(
    "stage", ["seed", "dense", "dense-long", "expert@expert-0", "embedder", "ensemble", "evaluate"]
)
@pytest.mark.parametrize("engine", ["", "local", "dask", "tcp://host:8786"])
def test_what_computes_takes_a_device(stage: str, engine: str) -> None:
    assert takes_device(stage, engine)


@pytest.mark.parametrize("stage", ["names", "data@base", "index@base", "cluster@base", "assign@base", "report"])
def test_what_only_reads_and_writes_takes_none(stage: str) -> None:
    assert not takes_device(stage, "local")


@pytest.mark.parametrize(("engine", "here"), [("", True), ("dask", True), ("tcp://host:8786", False)])
def test_captions_that_are_embedded_elsewhere_take_none_here(engine: str, here: bool) -> None:
    assert takes_device("embed@base", engine) is here
