from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mode.data.images import to_png
from mode.data.leakage import Leakage, TaskLeakage
from mode.reporting.page import render_page
from mode.reporting.plots import save_plots
from mode.reporting.summary import Cluster, FineCluster, percent
from mode.results import Results

VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects table rows, ids and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids += [given["id"]] if "id" in given else []
        self.loaded += [given[name] for name in ("src", "srcset", "href") if name in given]
        if tag == "table":
            self.rows = self.tables[given["class"].split()[0]] = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def text(results: Results, clusters: list[Cluster], curves: Mapping[str, list[tuple[float, float]]]) -> str:
    return render_page(results, clusters, curves)


def test_the_page_is_well_formed_and_loads_nothing(text: str) -> None:
    page = Page(text)
    assert page.loaded
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.loaded)
    assert "url(" not in text
    assert "@import" not in text
    for address in page.loaded:
        assert b"<svg" in base64.b64decode(address.partition(",")[2])
    assert len(page.ids) == len(set(page.ids))
    assert {"comparison", "accuracy", "cost", "clusters", "routing", "tasks", "training", "provenance"} <= set(page.ids)


def test_what_was_looked_at_while_training_is_on_the_page(results: Results) -> None:
    looks = {"loss": {"seed": [(0.0, 3.0), (10.0, 2.0)]}, "accuracy": {"seed": [(0.0, 0.1), (10.0, 0.4)]}}
    page = Page(render_page(results, validation=looks))
    assert {"validation-loss", "validation-accuracy"} <= set(page.ids)


def test_its_numbers_are_those_of_the_results(text: str, results: Results) -> None:
    tables = Page(text).tables
    comparison = {line[0]: line for line in tables["comparison"]}
    for model, accuracy in results.zeroshot.mean.items():
        assert comparison[model][1] == percent(accuracy)
    heads, *lines = tables["tasks"]
    assert [line[0] for line in lines[:52]] == list(results.zeroshot.tasks)
    for line in lines[:52]:
        for model, shown in zip(heads[1:-1], line[1:-1], strict=True):
            assert shown == percent(results.zeroshot.tasks[line[0]][model])
    assert lines[52][0] == "flickr8k, image recall@10"


def test_clusters_and_provenance_are_told(text: str, results: Results, clusters: list[Cluster]) -> None:
    for cluster in clusters:
        assert f"{cluster.size:,} pairs" in text
        assert all(f"<li>{word}</li>" in text for word in cluster.words)
    assert f"<dd>{results.provenance['commit']}</dd>" in text
    assert "<dt>packages.torch</dt><dd>2.15.0</dd>" in text


def test_light_and_dark_are_different_drawings(text: str) -> None:
    light = re.findall(r'<img src="([^"]+)"', text)
    dark = re.findall(r'prefers-color-scheme: dark\)" srcset="([^"]+)"', text)
    assert len(light) == len(dark) > 3
    assert not set(light) & set(dark)


def test_words_from_data_are_text_not_markup() -> None:
    evil = "<script>alert(1)</script>"
    accuracy = {"dense": 0.5, evil: 0.4}
    found = {"zeroshot": {"mean": accuracy, "tasks": {evil: accuracy}}, "provenance": {evil: evil}}
    page = render_page(
        Results.model_validate({**found, "routing": {evil: {evil: 1.0}}}),
        [Cluster("base", 0, 3, [evil, "$title", "{{ c }}"])],
        title=evil,
    )
    Page(page)
    assert evil not in page
    assert "<li>$title</li><li>{{ c }}</li>" in page


@pytest.mark.parametrize(
    "results",
    [{}, {"zeroshot": {"mean": {}, "tasks": {}}}, {"zeroshot": {"mean": {"seed": None}}}, {"cost": {"seed": {}}}],
)
def test_a_page_of_little_is_a_page(results: dict[str, Any]) -> None:
    Page(render_page(Results.model_validate(results)))


def test_the_same_run_gives_the_same_page(few: Results, clusters: list[Cluster], tmp_path: Path) -> None:
    """Also if it is given the light drawings."""
    saved = [path for path in save_plots(tmp_path, few, clusters) if path.suffix == ".svg"]
    light = {path.stem: path.read_text(encoding="utf-8") for path in saved}
    assert render_page(few, clusters, light=light) == render_page(few, clusters)


def test_sample_images_and_the_map_are_inside_the_page(few: Results) -> None:
    image = to_png(np.full((3, 4, 4), 200, np.uint8))
    fine = [FineCluster(0.2, 0.3, 10, ["dog", "run"]), FineCluster(0.8, 0.1, 5, ["cat"])]
    page = render_page(few, [Cluster("base", 0, 15, ["dog"], "expert-0", fine, [image, image])])
    assert page.count(f'src="data:image/png;base64,{base64.b64encode(image).decode()}"') == 2
    assert "expert-0: dog, run (10 captions)" in page
    without = render_page(few, [Cluster("base", 0, 15, ["dog"], "expert-0")])
    assert 'id="map"' not in without
    assert 'class="samples"' not in without


@pytest.mark.parametrize(
    ("leakage", "dropped", "told"),
    [
        (None, False, None),
        (Leakage(), False, "Nobody has looked for them"),
        (Leakage(distance=4, tasks={"a": TaskLeakage(images=9)}), False, "None of any task"),
        (
            Leakage(distance=4, tasks={"a": TaskLeakage(images=9, leaked=["x"])}),
            False,
            "the models were trained on them",
        ),
        (Leakage(distance=4, tasks={"a": TaskLeakage(images=9, leaked=["x"])}), True, "trained without them"),
    ],
)
def test_test_images_among_the_training_images_are_told(
    leakage: Leakage | None, dropped: bool, told: str | None
) -> None:
    page = render_page(Results(), leakage=leakage, dropped=dropped)
    Page(page)
    assert ('id="leakage"' in page) == (told is not None)
    assert told is None or told in page
    assert ("<li>a: 1 of 9</li>" in page) == bool(leakage and any(task.leaked for task in leakage.tasks.values()))


def test_doubts_stand_with_the_verdict() -> None:
    assert "<p>seed &lt;has learnt nothing</p>" in render_page(Results(), doubts=["seed <has learnt nothing"])
