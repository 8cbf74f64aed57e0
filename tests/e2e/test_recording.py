"""dvc.yaml names all that decides a stage's result: every stage is run under observation (`recording.py`), and what it
read is compared with what it declares.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from mlflow import MlflowClient

from mode.cli import main
from mode.stages import run_stage
from tests.e2e.conftest import SmallProject

pytestmark = pytest.mark.e2e

RECORDING = Path(__file__).with_name("recording.py")
WEIGHTS = "models/expert-1/open_clip_model.safetensors"

#: Code that decides no result, and why it need not be declared.
GLUE = {
    "src/mode/cli.py": "parses the command line",
    "src/mode/errors.py": "words of errors",
    "src/mode/progress.py": "shows progress",
    "src/mode/processes.py": "asks things of Linux",
    "src/mode/parallel.py": "the same results from one process or many",
    "src/mode/engine.py": "the same results from one process or many",
    "src/mode/files.py": "whole files or none, and their checksums",
    "src/mode/checksums.py": "checksums beside results, which change none",
    "src/mode/sealed_parquet.py": "checksums in Parquet files, which change no result",
    "src/mode/columns.py": "opens files of columns, or refuses them",
    "src/mode/vectors.py": "opens a file of vectors, or refuses it",
    "src/mode/integrity.py": "refuses models that do not belong together",
    "src/mode/params.py": "checks values that are declared",
    "src/mode/roles.py": "names; what a training does with one is code of its own",
    "src/mode/paths.py": "names of files, which are declared",
    "src/mode/stages/__init__.py": "calls the stage",
    "src/mode/stages/project.py": "names of files, which are declared",
    "src/mode/stages/machine.py": "processes and engines, which change no result",
    "src/mode/stages/beside.py": "looks on at a training, and keeps models of the way",
    "src/mode/stages/sources.py": "keeps watch.yaml, which DVC reads itself",
    "src/mode/stages/version.py": "refuses a project of another mode than the one that runs",
    "src/mode/tracking/": "MLflow: no stage reads from it",
}
#: Files of the project that are no input.
NOT_INPUT = ("params.yaml", "watch.yaml", "dvc.lock", ".git/", ".mode/", "mlruns/", "checkpoints/")


def covered(read: str, declared: Iterable[str], separator: str) -> bool:
    """Whether something that was read is declared, itself or with what it is a part of."""
    return any(read == each or read.startswith(each.rstrip(separator) + separator) for each in declared)


def undeclared(seen: Mapping[str, list[str]], declared: Mapping[str, Any]) -> list[str]:
    """What a stage read and does not declare, each with its kind.

    Args:
        seen: `params`, `code`, `files`, as `recording.py` writes them.
        declared: `params`, `deps` and `outs` of the stage, paths from the project folder.
    """
    paths = [*declared["deps"], *declared["outs"]]
    unfinished = tuple(f"{out}." for out in declared["outs"])  # what an interrupted run of the same stage has left
    files = [path for path in seen["files"] if not path.startswith(unfinished)]
    return [
        *(f"parameter {key}" for key in seen["params"] if not covered(key, [*declared["params"], "machine"], ".")),
        *(f"code {path}" for path in seen["code"] if not covered(path, [*paths, *GLUE], "/")),
        *(f"file {path}" for path in files if not covered(path, [*paths, *NOT_INPUT], "/")),
    ]


def declarations(root: Path) -> dict[str, dict[str, list[str]]]:
    """Every stage of dvc.yaml, in an order in which they can run, and what it declares."""
    found = {}
    with chdir(root), Repo(str(root)) as repo:  # addresses are relative to the working folder
        for stage in repo.index.stages:
            params = [key for dep in stage.deps if getattr(dep, "params", None) for key in dep.params]
            found[stage.addressing] = {
                "params": params,
                "deps": [dep.def_path for dep in stage.deps if not getattr(dep, "params", None)],
                "outs": [out.def_path for out in stage.outs],
            }
    return found


def record(project: SmallProject, *stages: str, planted: Path | None = None) -> dict[str, dict[str, list[str]]]:
    """Run stages under observation; what each read."""
    output = project.root.parent / "seen.json"
    project.run(sys.executable, str(planted or RECORDING), str(output), *stages)
    seen: dict[str, dict[str, list[str]]] = json.loads(output.read_text())
    return seen


def test_every_stage_declares_all_that_it_reads(finished_project: SmallProject) -> None:
    declared = declarations(finished_project.root)
    seen = record(finished_project, *declared)
    missing = [f"{stage}: {what}" for stage in declared for what in undeclared(seen[stage], declared[stage])]
    assert missing == []
    # And it looked: these are read for certain.
    assert "training.lr" in seen["seed"]["params"]
    assert "branch.outside_share" in seen["expert@expert-0"]["params"]
    assert "src/mode/data/loading/loader.py" in seen["expert@expert-0"]["code"]
    assert "data/assignment/base.parquet" in seen["expert@expert-0"]["files"]
    assert "models/seed/open_clip_model.safetensors" in seen["dense"]["files"]


#: A stage that has nothing to do by default, and a training that nobody looks at.
CHANGES = {
    "variants": {
        "arms": ["top-1", "merged-seed-0.3", "published", "coarse", "by-class", "by-range", "probe", "merged-layers"]
    },
    "training": {
        "validate": {"every": 8, "tasks": ["chess", "data/tasks/dice"]},
        "keep_checkpoints": {"every": 7},
    },
}


@dataclass(frozen=True)
class Changed:
    """A finished project with other parameters, and what `expert@expert-1` and `variants` then read."""

    project: SmallProject
    seen: dict[str, dict[str, list[str]]]
    weights_before: bytes


@pytest.fixture(scope="module")
def changed(finished_project: SmallProject, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Changed]:
    project = SmallProject(tmp_path_factory.mktemp("changed") / "project")
    shutil.copytree(finished_project.root, project.root, symlinks=True)
    weights = (project.root / WEIGHTS).read_bytes()
    content = project.params()
    for section, changes in CHANGES.items():
        content[section] |= changes
    project.set_params(content)
    assert {"seed", "expert@expert-0", "variants"} <= project.stages_to_run()  # their folders would hold other curves
    yield Changed(project, record(project, "expert@expert-1", "variants"), weights)
    shutil.rmtree(project.root, ignore_errors=True)


def test_variants_declare_all_that_they_read(changed: Changed) -> None:
    declared = declarations(changed.project.root)["variants"]
    assert "variants" in declared["params"]
    assert undeclared(changed.seen["variants"], declared) == []
    assert "src/mode/evaluation/arms.py" in changed.seen["variants"]["code"]
    assert "top-1" in changed.project.run("mode", "results", "--variants").stdout
    figures = json.loads((changed.project.root / "reports/variants.json").read_text())
    assert list(figures["zeroshot"]["mean"])[:3] == ["top-1", "merged-seed-0.3", "published"]


#: `index`, and beside it what dvc.yaml does not name for it.
PLANTED = """
import sys
sys.path.insert(0, {folder!r})
import recording
from mode import stages
from mode.reporting.summary import percent

index = stages.KEYED_STAGES["index"]

def planted(project, key):
    project.params.routing.divisor
    percent(0.5)
    (project.root / "data/vectors/base.npy").open("rb").close()
    index(project, key)

stages.KEYED_STAGES["index"] = planted
recording.main(recording.Path(sys.argv[1]), sys.argv[2:])
"""


def test_an_undeclared_read_is_named(finished_project: SmallProject, tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(PLANTED.format(folder=str(RECORDING.parent)))
    declared = declarations(finished_project.root)["index@base"]
    seen = record(finished_project, "index@base", planted=planted)["index@base"]
    assert undeclared(seen, declared) == [
        "parameter routing.divisor",
        "code src/mode/reporting/summary.py",
        "file data/vectors/base.npy",
    ]


#: What a training that is looked at reads besides, and does not declare: by-products, on which no weight depends.
LOOKED_AT = ("src/mode/evaluation/", "src/mode/ensemble/", "src/mode/results.py", "data/tasks/")


def test_a_training_that_is_looked_at_is_the_same_and_reads_the_tasks_besides(
    changed: Changed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = changed.project
    declared = declarations(project.root)["expert@expert-1"]
    besides = [line.split()[1] for line in undeclared(changed.seen["expert@expert-1"], declared)]
    assert [path for path in besides if not path.startswith((*LOOKED_AT, "evaluation."))] == []
    assert any(path.startswith("data/tasks/chess/") for path in besides)
    assert (project.root / WEIGHTS).read_bytes() == changed.weights_before

    table = list(csv.DictReader((project.root / "models/expert-1/validation.csv").read_text().splitlines()))
    assert [look["samples"] for look in table] == ["960", "1024", "1280", "1536", "1600"]
    kept = sorted((project.root / "checkpoints/expert-1").rglob("open_clip_model.safetensors"))
    assert [str(file.parent.relative_to(project.root)) for file in kept] == [
        f"checkpoints/expert-1/kept/{step}" for step in (35, 42, 49)
    ]
    assert "kept/42" in project.run("mode", "check").stdout
    monkeypatch.chdir(project.root)
    figures = tmp_path / "figures.json"
    tasks = ("--tasks", "data/tasks/chess", "data/tasks/dice")
    for checkpoint, which in ((str(kept[0].parent), ()), ("models/expert-1", tasks)):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", "--checkpoint", checkpoint, *which, "--output", str(figures)])
        assert not ended.value.code
        assert (len(json.loads(figures.read_text())["zeroshot"]["tasks"]) > 2) == (not which)
    last = json.loads(figures.read_text())["zeroshot"]["tasks"]
    for task in ("chess", "dice"):
        assert float(table[-1][f"zeroshot/{task}"]) == pytest.approx(last[task]["expert-1"], abs=1e-6)

    run_stage("report", None, project.root, project.root / "params.yaml")
    page = (project.root / "reports/index.html").read_text()
    assert 'id="validation-accuracy"' in page
    assert 'id="validation-loss"' not in page
    database = f"sqlite:///{project.root / 'mlruns/mlflow.db'}"
    client = MlflowClient(database, registry_uri=database)
    run = json.loads((project.root / "models/expert-1/card.json").read_text())["mlflow_run"]
    history = client.get_metric_history(run, "validate/zeroshot/chess")
    assert [(each.step, each.value) for each in history] == [
        (int(look["samples"]), pytest.approx(float(look["zeroshot/chess"]), abs=1e-6)) for look in table
    ]
