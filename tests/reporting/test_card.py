"""The model card says what the run was, where it loses included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mode.params import load_params
from mode.reporting.card import model_card
from mode.reporting.summary import Cluster
from mode.results import Results, ZeroShot

REPOSITORY = Path(__file__).parents[2]
SOURCES = {"base": {"shards": "/data/shards", "images": 1200, "pairs": 3400, "bad": {"undecodable": 3}}}


def parameters() -> dict[str, Any]:
    return load_params(REPOSITORY / "params.yaml").model_dump()


def test_what_it_was_made_from(results: Results, clusters: list[Cluster]) -> None:
    card = model_card(results, clusters, SOURCES, parameters())
    head = yaml.safe_load(card.split("---")[1])
    assert head["pipeline_tag"] == "zero-shot-image-classification"
    assert "| base | `/data/shards` | 1,200 | 3,400 | 3 undecodable |" in card
    for cluster in clusters:
        assert f"| {cluster.name} | base | {cluster.size:,} | {', '.join(cluster.words)} |" in card
    assert "Seed: 27 epochs" in card
    assert results.provenance["commit"] in card


def test_where_it_loses(few: Results, clusters: list[Cluster]) -> None:
    tasks = {task: {**figures, "dense": 0.1, "ensemble": 0.5} for task, figures in few.zeroshot.tasks.items()}
    first = next(iter(tasks))
    tasks[first]["dense"] = 0.6
    zeroshot = ZeroShot(mean={**few.zeroshot.mean, "dense-long": 0.9, "dense": 0.1, "ensemble": 0.5}, tasks=tasks)
    losing = few.model_copy(update={"zeroshot": zeroshot, "stand_ins": {"expert-1": "seed"}})
    card = model_card(losing, clusters, SOURCES, parameters())
    assert f"| {first} | 60.0 | " in card
    assert "- `dense-long` is better in the mean over the tasks." in card
    assert "- `dense` is better" not in card
    assert f"- Worse than the dense model on 1 tasks: {first}." in card
    assert "- expert-1 is not trained: seed answers for it." in card


def test_a_run_without_figures_still_has_a_card() -> None:
    card = model_card(Results(), [], {}, parameters())
    assert "## Limits" in card
    assert "## Provenance" not in card
