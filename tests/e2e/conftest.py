"""A small copy of the project, on which the real DVC runs the real stages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from playwright.sync_api import Page as Tab
from playwright.sync_api import sync_playwright
from xdist.scheduler import LoadFileScheduling

from mode.stages import run_stage
from tests.once import made_once

REPOSITORY = Path(__file__).parent.parent.parent
#: A ViT: batch norm on a CPU sees its own process's share only.
VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 1},
}
#: Milliseconds for what a page is to show: for what never comes, for a busy machine may take long.
PATIENCE = 600_000

#: What the browser's name server says.
REBOUND = "MAP evil.example 127.0.0.1"

#: Changes to the project's params.yaml that make everything small.
SMALL: dict[str, dict[str, Any]] = {
    "glyphs": {"pairs": 1500, "shard_pairs": 500, "test_images": 1},
    "embedding": {"dimensions": 16},
    "clustering": {"fine": 8, "coarse": 2},
    "training": {
        "epoch_samples": 320,
        "epochs": 5,
        "seed_epochs": 3,
        "batch_size": 32,
        "warmup": 2,
    },
    "routing": {"calibration_captions": 256},
}


#: The file that takes longest, and needs no finished project.
LONGEST = "test_slurm.py"
#: Files that one process runs, for what their tests share takes a core ten seconds to start: the servers of a page
#: (`flows/conftest.py`), which go on costing for as long as they run; a process to fork stages from (`trust/tiny.py`).
TOGETHER = {
    "page": re.compile(r"test_flows_(browser|remote|run|stop)\.py$"),
    "forks": re.compile(r"\btests/trust/"),
}


class ByFile(LoadFileScheduling):
    """A file's tests in one process, as `--dist loadfile` has it, and those of files that share something."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return next((name for name, files in TOGETHER.items() if files.search(file)), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    """Who runs which tests, where processes share them out by file and are given the files by name (`make test`)."""
    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order in which processes that share them out are done soonest.

    The longest comes first, and last come those that need the finished project: one process makes it, and by then the
    others have something else to do.
    """
    waiting = {item.path for item in items if "finished_project" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: (item.path.name != LONGEST, item.path in waiting))


@dataclass
class SmallProject:
    """A project folder under git and DVC."""

    root: Path

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the project, with its tools first on the path."""
        done = subprocess.run(command, cwd=self.root, env=environment(), capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in the project, in a process group of its own."""
        return subprocess.Popen(
            command, cwd=self.root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def params(self) -> dict[str, Any]:
        """Parsed params.yaml."""
        content: dict[str, Any] = yaml.safe_load((self.root / "params.yaml").read_text())
        return content

    def set_params(self, content: dict[str, Any]) -> None:
        """Replace params.yaml."""
        (self.root / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def stages_to_run(self) -> set[str]:
        """Stages that the next `dvc repro` would run, but for the check of names, which it always runs."""
        printed = self.run("dvc", "repro", "--dry").stdout
        return {line.split("'")[1] for line in printed.splitlines() if line.startswith("Running stage")} - {"names"}


def environment() -> dict[str, str]:
    """The environment of a user who works in the project's virtual environment, with no shell of choice.

    DVC then starts stages with `/bin/sh`, as it does in a container; of the usual shells that one does least.
    """
    kept = {key: value for key, value in os.environ.items() if key != "SHELL"}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def make_project(root: Path) -> SmallProject:
    """Copy the project's pipeline to `root`, with small numbers, and put it under git and DVC."""
    root.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "src", root / "src", ignore=ignore)
    shutil.copytree(REPOSITORY / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    for name in ("dvc.yaml", "watch.yaml", "arrivals.json", "leakage.json", ".dvcignore", ".gitignore"):
        shutil.copy(REPOSITORY / name, root / name)
    project = SmallProject(root)
    content = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    for section, changes in SMALL.items():
        content[section] |= changes
    content["experts"] = {f"expert-{n}": {"source": "base", "cluster": n} for n in range(2)}
    project.set_params(content)
    project.run("git", "init", "--quiet")
    return project


def run_here(project: SmallProject, *stages: str) -> None:
    """Run stages in this process, and have DVC note what they made: for a project that is only where a test begins.

    It saves the start of DVC's and the stages' processes, most of what `dvc repro` of so small a project costs.

    Args:
        stages: in an order in which they can run; default all.
    """
    with chdir(project.root):
        for stage in stages or every_stage(project.root):
            name, _, key = stage.partition("@")
            # Stages that look at files elsewhere have one key, or are called otherwise.
            name, key = ("data", key) if name == "watch" else (name, "" if name.startswith("watch-") else key)
            run_stage(name, key or None, project.root, project.root / "params.yaml")
    project.run("dvc", "commit", "--force", *stages)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own of a few megabytes."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        folder.rmdir()
        pytest.skip("needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def every_stage(root: Path) -> list[str]:
    """Addresses of the stages of a project's dvc.yaml, in an order in which they can run."""
    with chdir(root), Repo(str(root)) as repo:  # addresses are relative to the working folder
        return [stage.addressing for stage in repo.index.stages]


def give_database(home: Path, database: Path) -> None:
    """Put `prefect_database` where Prefect is going to look for its own: in its home, of a project or another."""
    home.mkdir(parents=True, mode=0o700)
    shutil.copy(database, home)


def take_cache(giver: SmallProject, taker: SmallProject, but: set[str]) -> None:
    """Give a project what DVC has kept of another's runs, to take over; `but` of the runs that made these files."""
    cache = taker.root / ".dvc/cache"
    shutil.copytree(giver.root / ".dvc/cache", cache)
    for run in (cache / "runs").glob("*/*/*"):
        if but & {output["path"] for output in yaml.safe_load(run.read_text())["outs"]}:
            shutil.rmtree(run.parent)  # an empty folder is more than DVC can bear


@pytest.fixture(scope="session")
def prefect_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of Prefect's with nothing in it, as its own command makes it; not to be touched.

    Its migrations are more than half of what the first start of a server costs. In `flows/test_flows_door.py` a server
    makes its database by itself.
    """

    def make(home: Path) -> None:
        command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
        subprocess.run(command, env=environment() | {"PREFECT_HOME": str(home)}, check=True, capture_output=True)

    return made_once(tmp_path_factory, "prefect", make) / "prefect.db"


@pytest.fixture(scope="module")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallProject]:
    """A project after its first `dvc repro`, shared by the tests of a file: leave it as it was found."""
    first = made_once(tmp_path_factory, "finished", lambda root: make_project(root).run("dvc", "repro"))
    project = SmallProject(tmp_path_factory.mktemp("pipeline") / "project")
    shutil.copytree(first, project.root, symlinks=True)
    yield project
    shutil.rmtree(project.root, ignore_errors=True)


@pytest.fixture
def new_project(tmp_path: Path) -> SmallProject:
    """A project in which nothing has run yet."""
    return make_project(tmp_path / "project")


@pytest.fixture
def tab() -> Iterator[Tab]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            # A name that leads to this machine, as someone's name server may have it.
            args=[*("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"), f"--host-resolver-rules={REBOUND}"],
        )
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        tab.set_default_timeout(PATIENCE)
        yield tab
        browser.close()


def keep(tab: Tab, name: str, tmp_path: Path) -> None:
    """A screenshot, in the folder that `MODE_SCREENSHOTS` names."""
    folder = Path(os.environ.get("MODE_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=folder / f"{name}.png")
