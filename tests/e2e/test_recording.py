"""dvc.yaml names all that decides a stage's result: every stage is run under observation (`recording.py`), and what it
read is compared with what it declares.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from mlflow import MlflowClient

from tests.e2e.conftest import SmallProject

pytestmark = pytest.mark.e2e

RECORDING = Path(__file__).with_name("recording.py")

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


def test_variants_declare_all_that_they_read(finished_project: SmallProject, tmp_path: Path) -> None:
    """By default the stage has nothing to do."""
    project = SmallProject(tmp_path / "project")
    shutil.copytree(finished_project.root, project.root, symlinks=True)
    content = project.params()
    content["variants"]["arms"] = ["top-1", "merged-seed-0.3", "published", "coarse", "by-class", "by-range", "probe"]
    project.set_params(content)
    assert "variants" in declarations(project.root)["variants"]["params"]
    seen = record(project, "variants")["variants"]
    assert undeclared(seen, declarations(project.root)["variants"]) == []
    assert "src/mode/evaluation/arms.py" in seen["code"]
    assert "top-1" in project.run("mode", "results", "--variants").stdout
    figures = json.loads((project.root / "reports/variants.json").read_text())
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
    finished_project: SmallProject, tmp_path: Path
) -> None:
    project = SmallProject(tmp_path / "project")
    shutil.copytree(finished_project.root, project.root, symlinks=True)
    weights = project.root / "models/expert-1/open_clip_model.safetensors"
    before = weights.read_bytes()
    content = project.params()
    content["training"] |= {
        "validate": {"every": 8, "tasks": ["chess", "data/tasks/dice"]},
        "keep_checkpoints": {"every": 7},
    }
    project.set_params(content)
    assert {"seed", "expert@expert-0"} <= project.stages_to_run()  # their folders would hold other curves

    declared = declarations(project.root)["expert@expert-1"]
    seen = record(project, "expert@expert-1")["expert@expert-1"]
    besides = [line.split()[1] for line in undeclared(seen, declared)]
    assert [path for path in besides if not path.startswith((*LOOKED_AT, "evaluation."))] == []
    assert any(path.startswith("data/tasks/chess/") for path in besides)
    assert weights.read_bytes() == before

    table = list(csv.DictReader((project.root / "models/expert-1/validation.csv").read_text().splitlines()))
    assert [look["samples"] for look in table] == ["960", "1024", "1280", "1536", "1600"]
    kept = sorted((project.root / "checkpoints/expert-1").rglob("open_clip_model.safetensors"))
    assert [str(file.parent.relative_to(project.root)) for file in kept] == [
        f"checkpoints/expert-1/kept/{step}" for step in (35, 42, 49)
    ]
    assert "kept/42" in project.run("mode", "check").stdout
    figures = tmp_path / "figures.json"
    project.run("mode", "evaluate", "--checkpoint", str(kept[0].parent), "--output", str(figures))
    tasks = json.loads(figures.read_text())["zeroshot"]["tasks"]
    assert len(tasks) > 2
    project.run("mode", "evaluate", "--checkpoint", "models/expert-1", "--output", str(figures))
    last = json.loads(figures.read_text())["zeroshot"]["tasks"]
    for task in ("chess", "dice"):
        assert float(table[-1][f"zeroshot/{task}"]) == pytest.approx(last[task]["expert-1"], abs=1e-6)

    project.run("mode", "stage", "report")
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
