"""A plan of a project in which nothing but the shards is there, against what a run then writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mode.planning.account import Plan
from mode.planning.measure import bytes_of
from tests.e2e.conftest import SmallProject, make_project

pytestmark = pytest.mark.e2e


def output_of(root: Path, stage: str) -> Path:
    """Where a stage of the plan writes."""
    kind, _, name = stage.partition("@")
    files = {"embed": f"vectors/{name}.npy", "cluster": f"clusters/{name}", "assign": f"assignment/{name}.parquet"}
    if kind in ("data", "index"):
        return root / "data" / ("shards" if kind == "data" else kind) / name
    if kind == "embedder":
        return root / "data/embedder"
    return root / "data" / files[kind] if kind in files else root / "models" / (name or kind)


def test_disk_is_what_a_run_then_takes(finished_project: SmallProject, tmp_path: Path) -> None:
    planned_in = make_project(tmp_path / "planned")
    shutil.copytree(finished_project.root / "data/shards", planned_in.root / "data/shards", symlinks=False)
    printed = planned_in.run("mode", "plan", "--measure", "--json").stdout
    plan = Plan.model_validate_json(printed)
    expected = {stage.stage: stage.disk_bytes for stage in plan.stages if stage.disk_bytes}
    found = {stage: bytes_of(output_of(finished_project.root, stage)) for stage in expected}
    assert len(found) == 12
    assert expected == {stage: pytest.approx(size, rel=0.1) for stage, size in found.items()}
    assert plan.disk_bytes == pytest.approx(sum(found.values()), rel=0.05)
    # What was measured is kept, and used again.
    again = Plan.model_validate_json(planned_in.run("mode", "plan", "--json").stdout)
    assert again == plan
    assert again.rates["training_samples_per_second"].source == "measured here"
