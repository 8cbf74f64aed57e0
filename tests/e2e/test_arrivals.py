"""Shards keep arriving, in a real project: only what is new is made, and an expert is trained on with it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from mode.data.glyphs.dataset import write_glyph_shards
from mode.params import GlyphParams
from mode.stages import run_stage
from tests.e2e.conftest import SmallProject, make_project, run_here
from tests.e2e.test_recording import declarations, record, undeclared

pytestmark = pytest.mark.e2e

#: The stages that every change of a model makes run.
EVALUATION = {"ensemble", "evaluate", "variants", "report"}


@pytest.fixture
def project(tmp_path: Path) -> SmallProject:
    """A project whose shards lie elsewhere, after its first run."""
    project = make_project(tmp_path / "project")
    write_glyph_shards(GlyphParams(pairs=1500, shard_pairs=500, per_family=4), tmp_path / "drawn", 0, workers=1)
    (tmp_path / "tars").mkdir()
    for name in ("00000.tar", "00002.tar"):
        shutil.copy2(tmp_path / "drawn" / name, tmp_path / "tars")
    content = project.params()
    content["sources"]["base"]["shards"] = str(tmp_path / "tars")
    content["baselines"]["dense_long"] = False
    project.set_params(content)
    # The list of shards, which tells DVC that they lie elsewhere; then all stages that follow from it.
    run_stage("data", "base", project.root, project.root / "params.yaml")
    run_here(project)
    return project


def made(project: SmallProject) -> dict[str, str]:
    """Checksums of what the trainings and all before them have made."""
    folders = [project.root / "data", *(project.root / "models").glob("[!e]*"), *project.root.glob("models/expert-*")]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(project.root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def ran(project: SmallProject, *targets: str) -> set[str]:
    """The stages that `dvc repro` ran, but for the looks that it always takes and what only evaluates."""
    printed = project.run("dvc", "repro", *targets).stdout
    stages = {line.split("'")[1] for line in printed.splitlines() if line.startswith("Running stage")}
    return {stage for stage in stages if stage != "names" and not stage.startswith("watch@")} - EVALUATION


def routed(project: SmallProject) -> set[str]:
    """The models that `evaluate` has routed tasks to."""
    figures = json.loads((project.root / "reports/metrics.json").read_text())
    return set(next(iter(figures["routing"].values())))


def test_only_what_is_new_is_made(project: SmallProject, tmp_path: Path) -> None:
    before = made(project)
    assert routed(project) == {"expert-0", "expert-1"}
    refused = project.run("mode", "drift", check=False)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    # Its name sorts between those of the others.
    shutil.copy2(tmp_path / "drawn/00001.tar", tmp_path / "tars")
    stopped = project.run("dvc", "repro", check=False)
    assert stopped.returncode != 0
    assert "source 'base' has 1 new shard" in stopped.stderr
    assert {**made(project), "data/names.txt": before["data/names.txt"]} == before  # DVC has removed that one
    assert "1 new shard of 'base'" in project.run("mode", "arrivals", "base", "--look").stdout
    project.run("mode", "arrivals", "base")
    assert ran(project, "assign@base-2") == {"index@base-2", "embed@base-2", "assign@base-2"}
    assert "far captions" in project.run("mode", "drift").stdout

    done = project.run("mode", "update-expert", "expert-1")
    assert "added expert-1-v2" in done.stdout
    assert ran(project) == {"update@expert-1-v2"}  # and none of the models, which might read what has arrived
    assert {name: made(project)[name] for name in before} == before
    assert 'id="drift"' in (project.root / "reports/index.html").read_text()
    figures = json.loads((project.root / "reports/metrics.json").read_text())
    assert routed(project) == {"expert-0", "expert-1-v2"}
    assert {"expert-0", "expert-1-v2"} <= set(figures["zeroshot"]["mean"])
    assert "expert-1" not in figures["zeroshot"]["mean"]
    cards = {name: json.loads((project.root / f"models/{name}/card.json").read_text()) for name in ("seed", "expert-0")}
    updated = json.loads((project.root / "models/expert-1-v2/card.json").read_text())
    seen = updated["total"]["samples_seen"] + cards["expert-0"]["own"]["samples_seen"]
    assert figures["cost"]["ensemble"]["samples_seen"] == seen
    assert "none damaged" in project.run("mode", "check").stdout
    assert project.stages_to_run() <= {"watch@base", "watch@base-2"}

    # Every stage of what has arrived declares all that it reads.
    stages = ["watch@base-2", "index@base-2", "embed@base-2", "assign@base-2", "update@expert-1-v2"]
    declared = declarations(project.root)
    seen_by = record(project, *(stage.replace("watch@", "data@") for stage in stages))
    for stage in stages:
        assert undeclared(seen_by[stage.replace("watch@", "data@")], declared[stage]) == [], stage
    assert "data/clusters/base/SHA256SUMS" in seen_by["assign@base-2"]["files"]
    assert "arrivals.json" in seen_by["data@base-2"]["files"]
    assert "updates.expert-1-v2.source" in seen_by["update@expert-1-v2"]["params"]

    project.run("mode", "remove-expert", "expert-1-v2")
    assert not (project.root / "models/expert-1-v2").exists()
    assert project.stages_to_run() - {"watch@base", "watch@base-2"} == EVALUATION
    for stage in ("ensemble", "evaluate"):
        run_stage(stage, None, project.root, project.root / "params.yaml")
    assert routed(project) == {"expert-0", "expert-1"}
