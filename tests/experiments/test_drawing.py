"""Figures of the book show the figures of the chapter."""

from __future__ import annotations

import math

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mode.experiments.drawing import WORD_COLOURS, differences_figure, experiment_figure
from mode.paths import Paths
from mode.reporting.plots import svg, theme
from tests.experiments.conftest import lines_of, save
from tests.experiments.test_chapter import chapter


def axes_of(figure: Figure | None) -> Axes:
    assert figure is not None
    [axes] = figure.axes
    return axes


def points_of(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points of each line by its name, and the ends of its bars."""
    return {
        str(container.get_label()): [tuple(point) for point in container.lines[0].get_xydata()]
        for container in axes.containers
    }


def test_a_line_per_arm_over_the_runs(project: Paths) -> None:
    axes = axes_of(experiment_figure(chapter(project, "length")))
    points = points_of(axes)
    assert points["MoDE"] == [(1, pytest.approx(47.11)), (8, pytest.approx(62.11))]
    assert points["dense"] == [(1, pytest.approx(50.1)), (8, pytest.approx(60.1))]
    [bars] = axes.containers[0].lines[2]
    assert [end for _, end in bars.get_segments()[0]] == [pytest.approx(47.0), pytest.approx(47.22)]
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "length")


def test_a_dot_per_row_at_its_cost(project: Paths) -> None:
    axes = axes_of(experiment_figure(chapter(project, "retrieval")))
    points = [container.lines[0].get_xydata()[0].tolist() for container in axes.containers]
    assert points == [[1e9, 50], [1.5e9, 52]]
    assert axes.get_xlabel() == "training, FLOPs"
    assert {text.get_text() for text in axes.texts} == {"dense", "MoDE-4"}


def test_samples_where_operations_are_not_known(project: Paths) -> None:
    frame = lines_of("retrieval", ["m"], [0], recall=True)
    frame.loc[frame["arm"] == "dense", "flops"] = math.nan
    save(project.experiment_results, frame)
    axes = axes_of(experiment_figure(chapter(project, "retrieval")))
    assert [container.lines[0].get_xdata()[0] for container in axes.containers] == [1_000, 1_500]
    assert axes.get_xlabel() == "training, samples"


def test_differences_have_their_intervals_and_the_colour_of_the_word(project: Paths) -> None:
    claims = chapter(project, "length").claims
    axes = axes_of(differences_figure(claims))
    intervals, means = axes.lines[0:6:2], axes.lines[1:6:2]
    for claim, interval, mean in zip(claims, intervals, means, strict=True):
        assert tuple(interval.get_xdata()) == (claim.difference.low, claim.difference.high)
        assert mean.get_xdata() == [claim.difference.mean]
        assert mean.get_color() == WORD_COLOURS[claim.difference.word]
    assert axes.get_yticklabels()[0].get_text() == "MoDE 1x minus dense 1x"


def test_nothing_is_drawn_of_nothing(project: Paths) -> None:
    file = project.experiments / "length.yaml"
    text = file.read_text()
    file.write_text(text.replace("{MoDE: ensemble, dense: dense}", "{MoDE: absent}"))
    assert experiment_figure(chapter(project, "length")) is None
    file.write_text(text[: text.index("figure:")])
    assert experiment_figure(chapter(project, "length")) is None
    assert differences_figure([]) is None


def test_a_label_is_no_formula_and_the_same_figures_are_the_same_bytes(project: Paths) -> None:
    file = project.experiments / "length.yaml"
    file.write_text(file.read_text().replace("label: length", r"label: $\evil$").replace("MoDE 8x", r"$\8x$"))
    with theme(dark=False):
        drawn = [
            svg(figure)
            for _ in range(2)
            for found in [chapter(project, "length")]
            for figure in (experiment_figure(found), differences_figure(found.claims))
            if figure
        ]
    assert len(drawn) == 4
    assert drawn[:2] == drawn[2:]
