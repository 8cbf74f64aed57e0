"""A run started from the form in Prefect's page, in a real browser."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from playwright.sync_api import Page as Tab

from tests.e2e.conftest import keep

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium"),
]


def test_run_started_from_the_form_completes(project: Any, page: Any, tab: Tab, tmp_path: Path) -> None:
    project.fresh()
    deployment = page.client.read_deployment_by_name("pipeline/pipeline").id
    tab.goto(page.log_in)
    tab.get_by_text("Event Feed").wait_for()  # logged in
    tab.goto(f"{page.prefect}/deployments/deployment/{deployment}/run")
    tab.get_by_text("Trainings side by side on the CPU").wait_for()
    keep(tab, "form", tmp_path)
    with tab.expect_response("**/create_flow_run") as answer:
        tab.get_by_role("button", name="Submit").click()
    run = UUID(answer.value.json()["id"])
    tab.wait_for_url(f"**/deployment/{deployment}?**")  # the page goes back to the deployment
    assert page.await_end(run).type == "COMPLETED", page.text(run)
    tab.goto(f"{page.prefect}/runs/flow-run/{run}")
    tab.get_by_text("Completed", exact=True).first.wait_for()
    tab.get_by_text("expert@expert-3").first.wait_for()
    keep(tab, "run", tmp_path)
    assert {event["stage"] for event in project.events("end")} >= {"seed", "expert-0", "expert-3", "evaluate", "report"}
    tab.get_by_text("Artifacts", exact=True).first.click()
    tab.get_by_text("comparison").first.wait_for()
    keep(tab, "artifacts", tmp_path)
