"""The flows on real trainings of a very small model: the same results as `dvc repro`, experts by task, a new source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Page as Tab

from benchmarks.orchestration import lock_differences
from mode.data.glyphs.dataset import write_glyph_shards
from mode.params import GlyphParams
from mode.paths import Paths
from tests.e2e.conftest import REPOSITORY, SmallProject, give_database, keep, make_project, take_cache
from tests.waiting import wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def flowing(
    finished_project: SmallProject,
    tmp_path_factory: pytest.TempPathFactory,
    open_page: Callable[..., Any],
    prefect_database: Path,
) -> Iterator[tuple[Any, Any]]:
    """A small project in which nothing has run, and its page with MLflow's.

    DVC has all but one expert in its cache, and what is always made anew: evaluation and report.
    """
    project = make_project(tmp_path_factory.mktemp("real") / "project")
    take_cache(finished_project, project, but={"models/expert-1", "reports/index.html"})
    shutil.copytree(REPOSITORY / "flows", project.root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "prefect.yaml", project.root)
    give_database(Paths(project.root).prefect_home, prefect_database)
    page = open_page(project)
    yield project, page
    page.stop()


def lock_of(project: SmallProject) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((project.root / "dvc.lock").read_text())
    return dict(content["stages"])


def test_experts_by_task_leave_what_dvc_repro_leaves(
    flowing: tuple[SmallProject, Any], finished_project: SmallProject
) -> None:
    project, page = flowing
    run = page.start("pipeline", order="by_task", task="dice", machine={"workers": 2})
    assert page.await_end(run).type == "COMPLETED", page.text(run)
    assert lock_differences(finished_project.root, project.root) == []
    assert project.stages_to_run() == set()

    order = json.loads((project.root / ".mode/order.json").read_text())
    metrics = json.loads((project.root / "reports/metrics.json").read_text())
    assert order == pytest.approx(metrics["routing"]["dice"])
    assert list(order) == metrics["growth"]["tasks"]["dice"]["order"]
    timed = {"dense", "dense-long", *(f"expert@{expert}" for expert in order)}
    wait_until(lambda: timed <= set(page.tasks(run)))
    starts = {name: task.start_time for name, task in page.tasks(run).items()}
    first, second = (starts[f"expert@{expert}"] for expert in order)
    assert first <= second < max(starts["dense"], starts["dense-long"])

    artifacts = page.artifacts(run)
    assert "| ensemble |" in artifacts["comparison"].replace("**", "")
    assert "data:image/" in artifacts["routing"]
    assert page.mlflow in artifacts["mlflow-ensemble"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_mlflow_compares_all_models_in_one_click(flowing: tuple[SmallProject, Any], tab: Tab, tmp_path: Path) -> None:
    _, page = flowing
    [address] = [line.split()[1] for line in page.output if line.startswith("Compare")]
    tab.set_viewport_size({"width": 1800, "height": 900})
    tab.goto(address)
    for role in ("ensemble", "dense", "expert", "seed"):
        tab.get_by_text(f"Group: {role}").wait_for()
    tab.get_by_text("Sort: zeroshot/mean").wait_for()
    tab.get_by_role("link", name="expert-1").wait_for()
    keep(tab, "comparison", tmp_path)


def test_a_source_added_later_touches_nothing_old(
    flowing: tuple[SmallProject, Any],
    finished_project: SmallProject,
    tmp_path: Path,
) -> None:
    project, page = flowing
    before, files = lock_of(project), contents(project)
    shards = tmp_path / "later"
    write_glyph_shards(GlyphParams(pairs=400, shard_pairs=200), shards, random_seed=9)
    wrong = page.start("add-expert", name="later", shards=str(tmp_path / "nowhere"))
    assert page.await_end(wrong).type == "FAILED"
    assert "nowhere" in page.state(wrong).message
    assert lock_of(project) == before

    run = page.start("add-expert", name="later", shards=str(shards))
    assert page.await_end(run).type == "COMPLETED", page.text(run)
    after = lock_of(project)
    new = {"watch@later", "index@later", "embed@later", "cluster@later", "assign@later", "expert@expert-2"}
    assert set(after) - set(before) == new
    changed = {stage for stage in before if after[stage].get("outs") != before[stage].get("outs")}
    assert changed == {"ensemble", "evaluate", "report"}

    def ran() -> set[str]:
        return {name for name, task in page.tasks(run).items() if task.state.name == "Completed"}

    # Prefect's server notes the states of tasks a moment after they were sent.
    wait_until(lambda: ran() - {"add source later", "names"} == new | changed, ran)
    assert contents(project) == files
    metrics = json.loads((project.root / "reports/metrics.json").read_text())
    assert set(metrics["routing"]["dice"]) == {"expert-0", "expert-1", "expert-2"}
    assert metrics["stand_ins"] == {}


def contents(project: SmallProject) -> dict[str, bytes]:
    """Every byte of the old models, clusters and assignments."""
    folders = [*(project.root / "models").glob("[!e]*"), *(project.root / "models").glob("expert-[01]")]
    folders += [project.root / "data" / name / "base" for name in ("clusters", "index")]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    files.append(project.root / "data/assignment/base.parquet")
    assert len(files) > 15
    return {str(file.relative_to(project.root)): file.read_bytes() for file in files}
