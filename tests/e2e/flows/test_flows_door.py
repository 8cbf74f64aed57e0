"""Prefect's and MLflow's pages beside a page that is not ours, in a real browser; and where the secret is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import psutil
import pytest
from playwright.sync_api import Page as Tab
from prefect.client.schemas.actions import WorkPoolUpdate

from flows.ui import COMMAND, POOL
from mode.paths import Paths
from tests.e2e.calls import Calls
from tests.e2e.flows.conftest import Page, ToyProject
from tests.e2e.intruder import intrude, status_of

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium"),
]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Calls:
    """Whom the pages, and the runs that they start, have called."""
    return Calls(tmp_path_factory.mktemp("calls") / "calls")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, calls: Calls) -> Iterator[Page]:
    """Both pages of a project of this module's own."""
    project = ToyProject(tmp_path_factory.mktemp("door") / "project")
    project.create()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in calls.settings.items():
            patch.setenv(name, value)
        patch.delenv("DO_NOT_TRACK", raising=False)
        page = Page(project)
    with page:
        yield page


def test_no_other_page_reaches_prefect(pages: Page, tab: Tab) -> None:
    tab.goto(pages.log_in)
    tab.get_by_text("Event Feed").wait_for()  # the browser has the secret now
    deployment = pages.client.read_deployment_by_name("evaluate/evaluate").id
    intrude(
        *(tab, pages.prefect, "/api/admin/version", f"/api/deployments/{deployment}/create_flow_run"),
        '{"job_variables": {"command": "touch intruded"}, "state": {"type": "SCHEDULED"}}',
    )
    assert pages.client.read_flow_runs() == []
    tab.goto(f"{pages.prefect}/deployments")  # and its own page is still there
    tab.get_by_text("add-expert").first.wait_for()


def test_no_other_page_reaches_mlflow(pages: Page, tab: Tab) -> None:
    intrude(tab, pages.mlflow, "/ajax-api/2.0/mlflow/experiments/get?experiment_id=0", CREATE, '{"name": "intruded"}')
    known = pages.mlflow + "/api/2.0/mlflow/experiments/get-by-name?experiment_name="
    assert status_of(known + "intruded", {}) == 404
    assert status_of(known + "mode", {}) == 200
    tab.goto(pages.mlflow)
    tab.get_by_text("Experiments").first.wait_for()


#: Where MLflow's page makes an experiment.
CREATE = "/ajax-api/2.0/mlflow/experiments/create"


def test_prefect_asks_for_its_secret(pages: Page) -> None:
    for secret in ("", "Basic bW9kZTo=", f"Bearer {pages.secret}"):
        assert status_of(f"{pages.prefect}/api/admin/version", {"Authorization": secret}) == 401


def test_no_run_chooses_what_is_started(pages: Page) -> None:
    """Nor does one of a pool that an earlier version has made."""
    template = pages.client.read_work_pool(POOL).base_job_template
    assert template["job_configuration"]["command"] == COMMAND
    assert not {"command", "env", "working_dir"} & template["variables"]["properties"].keys()
    deployment = pages.client.read_deployment_by_name("evaluate/evaluate").id
    chosen = {"command": "touch intruded", "env": {"PYTHONPATH": "/nowhere"}, "working_dir": "/nowhere"}
    machine = {"devices": "cpu", "retry_delay": 0}
    run = pages.client.create_flow_run_from_deployment(
        deployment, parameters={"machine": machine}, job_variables=chosen
    )
    pages.await_end(run.id)
    assert "stages" in pages.text(run.id)  # of the flow itself
    assert not (pages.root / "intruded").exists()


@pytest.fixture(scope="module")
def has_run(pages: Page) -> None:
    """A run of all stages."""
    pages.await_end(pages.start("pipeline"))


def test_the_secret_is_in_no_file_and_no_command_line(pages: Page, has_run: None) -> None:
    _, _, secret = pages.secret.partition(":")
    kept = [path for path in pages.root.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert Paths(pages.root).logs / "worker.log" in kept
    assert [str(path) for path in kept if secret.encode() in path.read_bytes()] == []
    for process in psutil.process_iter(["cmdline"]):
        assert secret not in " ".join(process.info["cmdline"] or [])


def test_neither_pages_nor_runs_call_anyone(has_run: None, calls: Calls) -> None:
    assert calls.hosts() == []


def test_a_pool_of_an_earlier_version_is_mended(pages: Page) -> None:
    """The last test here: it ends the pages."""
    template = pages.client.read_work_pool(POOL).base_job_template
    template["job_configuration"] |= {"command": "{{ command }}", "env": "{{ env }}"}
    template["variables"]["properties"] |= {
        "command": {"type": "string", "default": "touch intruded"},
        "env": {"type": "object", "default": {"TUNED": "1"}},
    }
    pages.client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template, concurrency_limit=7))
    pages.stop()
    with Page(pages.project, "--no-mlflow") as page:
        pool = page.client.read_work_pool(POOL)
        assert pool.base_job_template["job_configuration"]["command"] == COMMAND
        assert pool.base_job_template["job_configuration"]["env"] == {"TUNED": "1"}
        assert pool.concurrency_limit == 7
        assert page.secret != pages.secret
