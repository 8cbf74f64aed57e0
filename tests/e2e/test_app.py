"""`mode app` in a real browser, on the models of a real run."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page as Tab
from playwright.sync_api import expect

from mode.evaluation.tasks import open_task
from tests.e2e.conftest import PATIENCE, SmallProject, environment, keep
from tests.e2e.intruder import intrude

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium"),
]


@pytest.fixture
def address(finished_project: SmallProject) -> Iterator[str]:
    process = subprocess.Popen(
        ["mode", "app", "--port", "0"],
        cwd=finished_project.root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("open "):
            break
    else:
        raise AssertionError("".join(lines))
    yield line.split()[1]
    process.send_signal(signal.SIGINT)
    process.communicate()


def test_an_image_and_classes_give_an_answer(
    finished_project: SmallProject, address: str, tab: Tab, tmp_path: Path
) -> None:
    picture = tmp_path / "glyph.png"
    picture.write_bytes(open_task(finished_project.root / "data/tasks/chess").images[0].read())
    tab.goto(address)
    tab.get_by_test_id("image").get_by_test_id("file-upload").set_input_files(picture)
    tab.get_by_label("Classes, one a line").fill("white chess king\nblack chess queen\ndie face six")
    tab.get_by_role("button", name="Ask the ensemble").click()
    for expert in ("expert-0", "expert-1"):
        expect(tab.get_by_role("gridcell", name=expert)).to_be_visible(timeout=PATIENCE)
    said = re.compile("white chess king|black chess queen|die face six")
    expect(tab.get_by_test_id("label-output-value")).to_have_text(said)
    keep(tab, "app", tmp_path)

    tab.get_by_label("Classes, one a line").fill("")
    tab.get_by_role("button", name="Ask the ensemble").click()
    expect(tab.get_by_text("needs at least one name")).to_be_visible(timeout=PATIENCE)


def test_no_other_page_asks_and_no_upload_stays(address: str, tab: Tab, tmp_path: Path) -> None:
    intrude(tab, address, "/config", "/gradio_api/run/ask", '{"data": []}')
    large = tmp_path / "large.png"
    large.write_bytes(bytes(21 * 2**20))
    tab.goto(address)
    tab.get_by_test_id("image").get_by_test_id("file-upload").set_input_files(large)
    expect(tab.get_by_text("exceed").first).to_be_visible(timeout=PATIENCE)
    kept = [path for folder in Path(tempfile.gettempdir()).glob("mode-app-*") for path in folder.rglob("*.png")]
    assert kept == []
