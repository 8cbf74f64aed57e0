"""The page of the experiments in a real browser: each of its tables sorts by its own columns."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Page as Tab

from mode.experiments.book import write_book
from tests.e2e.conftest import keep
from tests.experiments.conftest import make_project

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium"),
]


def test_tables_sort_and_pictures_are_shown(tab: Tab, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    write_book(project)
    tab.goto(project.book_page.as_uri())
    rows = tab.locator("#experiment-length table").first

    def shown() -> list[str]:
        return rows.locator("tbody th").all_inner_texts()

    assert shown() == ["dense 1x", "MoDE 1x", "dense 8x", "MoDE 8x"]
    head = rows.locator("thead th", has_text="training samples")
    head.click()  # 12 k, 8 k, 1.5 k, 1 k
    assert shown() == ["MoDE 8x", "dense 8x", "MoDE 1x", "dense 1x"]
    head.press("Enter")
    assert shown() == ["dense 1x", "MoDE 1x", "dense 8x", "MoDE 8x"]
    claims = tab.locator("#experiment-length table").last
    claims.locator("thead th", has_text="difference").click()
    assert claims.locator("tbody th").all_inner_texts()[-1] == "MoDE 1x minus dense 1x"  # -2.99
    assert tab.locator("img").evaluate_all("all => all.every(image => image.complete && image.naturalWidth > 0)")
    keep(tab, "book", tmp_path)
    tab.emulate_media(color_scheme="dark")
    keep(tab, "book-dark", tmp_path)
    tab.locator("#overview a").first.click()
    assert tab.url.endswith("#experiment-retrieval")
