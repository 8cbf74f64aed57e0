"""Rows and comparisons of an experiment, worked out by hand."""

from __future__ import annotations

import math

import pytest
import yaml

from mode.errors import ModeError
from mode.experiments.chapter import Chapter, work_out
from mode.experiments.definition import load_experiment
from mode.experiments.findings import read_findings
from mode.experiments.wording import warnings
from mode.paths import Paths


def chapter(project: Paths, name: str) -> Chapter:
    definition = load_experiment(project.experiments / f"{name}.yaml")
    return work_out(name, definition, read_findings(project.experiment_results / f"{name}.parquet"))


def test_rows_are_means_over_tasks_and_seeds_with_their_costs(project: Paths) -> None:
    found = chapter(project, "length")
    dense, ensemble = found.lines[:2]
    assert (dense.label, dense.seeds, dense.samples, dense.seconds, dense.models) == ("dense 1x", 3, 1_000, 100, 1)
    # Seeds 0, 1 and 2 add 0, 0.11 and 0.22 points to 47.
    figures = ensemble.figures["zero-shot"]
    assert (figures.mean, figures.sd) == (pytest.approx(47.11), pytest.approx(0.11))
    assert (figures.seeds, figures.tasks) == (3, 2)
    assert found.dense == dense
    assert found.seeds == [0, 1, 2]


def test_comparisons_are_paired_and_judged_by_what_was_expected(project: Paths) -> None:
    short, long, plain = chapter(project, "length").claims
    assert (short.difference.mean, long.difference.mean) == (pytest.approx(-2.99), pytest.approx(2.01))
    assert (short.difference.word, short.ordering) == ("worse", "does not hold")
    assert (long.difference.word, long.ordering) == ("better", "holds")
    assert (plain.difference.word, plain.ordering) == ("better", "")


def test_a_comparison_is_made_by_each_metric(project: Paths) -> None:
    zeroshot, recall = chapter(project, "retrieval").claims
    assert (zeroshot.metric, zeroshot.difference.mean, zeroshot.ordering) == ("zero-shot", 2, "holds")
    assert (recall.metric, recall.difference.mean, recall.ordering) == ("flickr image_recall@1", 1, "undecided")


def test_a_comparison_is_made_by_the_metrics_that_it_names(project: Paths) -> None:
    file = project.experiments / "retrieval.yaml"
    content = yaml.safe_load(file.read_text())
    content["metrics"] += ["cards"]
    content["compare"][0]["metrics"] = ["cards"]
    file.write_text(yaml.safe_dump(content))
    [claim] = chapter(project, "retrieval").claims
    assert (claim.metric, claim.difference.tasks) == ("cards", 1)


def test_a_mean_is_over_its_tasks_alone(project: Paths) -> None:
    file = project.experiments / "length.yaml"
    file.write_text(file.read_text() + "means: {games: [cards], both: [chess, cards]}\nmetrics: [games, both, cards]\n")
    for line in chapter(project, "length").lines:
        games, both, cards = (line.figures[metric].mean for metric in ("games", "both", "cards"))
        assert games == cards == pytest.approx(both - 1)  # chess lies a point above the mean, cards one below


def test_a_row_that_is_not_there_yet_is_not_measured(project: Paths) -> None:
    file = project.experiments / "length.yaml"
    file.write_text(file.read_text().replace("MoDE 8x: [x8, ensemble]", "MoDE 8x: [x8, top-1]"))
    found = chapter(project, "length")
    assert found.lines[3].seeds == 0
    assert math.isnan(found.lines[3].samples)
    assert [claim.ordering for claim in found.claims] == ["does not hold", "not measured", ""]
    assert [line.label for line in found.measured_lines] == [line.label for line in found.lines if line.seeds]
    assert len(found.measured_claims) == 1
    assert warnings(found) == ["Not measured yet: MoDE 8x."]


def test_an_experiment_without_metrics_is_refused(project: Paths) -> None:
    file = project.experiments / "length.yaml"
    file.write_text(file.read_text() + "metrics: []\n")
    with pytest.raises(ModeError, match="experiment 'length' has no metrics"):
        chapter(project, "length")
