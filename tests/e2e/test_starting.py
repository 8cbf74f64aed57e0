"""A project of somebody who has the wheel and no clone: `mode init`, `dvc repro`, the pages, an upgrade."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from flows import graph
from mode.paths import Paths
from mode.stages.starting import PRESETS, start_project
from tests.e2e.conftest import REPOSITORY, SMALL, SmallProject, every_stage, give_database
from tests.e2e.flows.conftest import Page
from tests.stages.test_starting import write_task

pytestmark = pytest.mark.e2e

STAGES = {
    *(
        "names",
        "data@base",
        "tasks",
        "index@base",
        "embedder",
        "embed@base",
        "cluster@base",
        "assign@base",
        "seed",
        "dense",
    ),
    *("dense-long", "expert@expert-0", "expert@expert-1", "ensemble", "evaluate", "variants", "report"),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The wheel, installed into a folder of its own that comes before everything else, and no clone on the path."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    site = folder / "site"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site))
        yield site


#: All stages but the last, as `mode stage` runs them, in one process of the wheel: each imports what it needs there.
RUN = """
import sys
from pathlib import Path
from mode.stages import run_stage
for stage in sys.argv[1:]:
    name, _, key = stage.partition("@")
    run_stage(name, key or None, Path.cwd(), Path("params.yaml"))
"""


@pytest.fixture(scope="module")
def started(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallProject:
    """A project as `mode init` of the wheel makes it, with small numbers and all results; the last ones of DVC."""
    root = tmp_path_factory.mktemp("started") / "my project"
    subprocess.run([installed / "bin/mode", "init", str(root)], check=True, cwd=root.parent)
    project = SmallProject(root)
    content = project.params()
    for section, changes in SMALL.items():
        content[section] |= changes
    content["experts"] = {f"expert-{n}": {"source": "base", "cluster": n} for n in range(2)}
    content["baselines"]["dense_long"] = False
    project.set_params(content)
    *stages, last = every_stage(root)
    project.run(sys.executable, "-c", RUN, *stages)
    project.run("dvc", "commit", "--force", *stages)
    assert f"Running stage '{last}'" in project.run("dvc", "repro").stdout
    return project


def test_the_wheel_alone_is_enough(installed: Path, started: SmallProject) -> None:
    where = started.run(sys.executable, "-c", "import mode; print(mode.__file__)").stdout.strip()
    assert where == str(installed / "mode/__init__.py")
    assert (installed / "mode/evaluation/classes.yaml").is_file()
    assert started.stages_to_run() == set()
    assert "ensemble" in started.run("mode", "results").stdout
    metrics = json.loads((started.root / "reports/metrics.json").read_text())
    assert {"seed", "dense", "expert-1", "ensemble"} <= metrics["zeroshot"]["mean"].keys()
    lock = yaml.safe_load((started.root / "dvc.lock").read_text())["stages"]
    assert lock.keys() == STAGES
    assert lock["seed"]["params"]["mode-version.yaml"].keys() >= {"code.training", "code.data/loading"}
    # What a commit takes is what a person writes, and what DVC notes of the rest.
    lines = started.run("git", "status", "--porcelain", "--untracked-files=all").stdout.splitlines()
    listed = {line[3:] for line in lines if not line[3:].startswith(("experiments/", "flows/", "reports/"))}
    assert listed == {
        *(".dvc/.gitignore", ".dvc/config", ".dvcignore", ".gitignore", "arrivals.json", "dvc.lock", "dvc.yaml"),
        *("leakage.json", "mlruns/.gitignore", "mode-version.yaml", "params.yaml", "prefect.yaml", "watch.yaml"),
    }


def test_the_pages_run_it(started: SmallProject, prefect_database: Path) -> None:
    give_database(Paths(started.root).prefect_home, prefect_database)
    with Page(started, "--no-mlflow") as page:
        run = page.start("pipeline")
        state = page.await_end(run)
        assert (state.type, state.message) == ("COMPLETED", f"1 stages run, {len(STAGES) - 1} cached"), page.text(run)


def test_an_upgrade_runs_what_other_code_computes(installed: Path, started: SmallProject) -> None:
    rules = installed / "mode/ensemble/rules.py"
    code = rules.read_text()
    rules.write_text(f"{code}\n# other\n")
    try:
        failed = started.run("dvc", "repro", check=False)
        [line] = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
        assert failed.returncode != 0
        assert "this project is of another mode 0.1.0 than the one installed (other code: ensemble)" in line
        assert "other code: ensemble\n" in started.run("mode", "init", "--upgrade", ".").stdout
        # The built-in tasks take moments, and depend on the file as a whole.
        changed = {"tasks", "ensemble", "evaluate", "variants", "report"}
        assert json.loads(started.run("dvc", "status", "--json").stdout).keys() == changed | {"names"}
        assert started.stages_to_run() == changed
    finally:
        rules.write_text(code)
    started.run("mode", "init", "--upgrade", ".")
    assert started.stages_to_run() == set()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("under_git", [True, False])
def test_dvc_reads_a_project_of_each_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, under_git: bool
) -> None:
    write_task(tmp_path / "my")
    monkeypatch.chdir(tmp_path)
    if not under_git:
        monkeypatch.setenv("PATH", os.devnull)
    seed = "ViT-B-16:laion2b_s34b_b88k" if preset == "finetune" else None
    start_project(Path("new"), preset, shards="my/shards", tasks=["my/chess"], seed_model=seed)
    monkeypatch.chdir("new")  # DVC's addresses are relative to the current folder
    pipeline, stale = graph.read(Path.cwd())
    expected = STAGES - {"data@base"} | {"watch@base", "watch-tasks@tasks", "expert@expert-2", "expert@expert-3"}
    assert (set(pipeline), stale) == (expected, expected)
    assert graph.in_order(pipeline)[-1] == "report"
    assert pipeline.has_edge("embedder", "seed") == (preset == "finetune")  # whose text tower it is
