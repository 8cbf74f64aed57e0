"""Figures of the book: an experiment's own, and the differences of its comparisons with their intervals."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from mode.experiments.chapter import Chapter, Claim, Line
from mode.experiments.definition import FigureOf, Of
from mode.experiments.findings import ZERO_SHOT
from mode.experiments.statistics import Summary, Word, summary
from mode.reporting.plots import WIDTH, label_axes, label_points, new_axes, series_colour
from mode.reporting.summary import quantity

#: Of Okabe and Ito, as all colours of the plots.
WORD_COLOURS: dict[Word, str] = {"better": "#009e73", "worse": "#d55e00", "undecided": "#8a8f98"}
MARKERS = "osD^vPX"
#: Characters of a line of a label.
LABEL = 34


def experiment_figure(chapter: Chapter) -> Figure | None:
    """The figure that the definition asks for; `None` if it asks for none, or there is nothing to draw."""
    asked = chapter.definition.figure
    if asked is None:
        return None
    return _lines(chapter, asked) if asked.x else _costs(chapter.lines, asked, chapter.definition.metrics[0])


def differences_figure(claims: Sequence[Claim]) -> Figure | None:
    """A dot per comparison with its 95% interval, coloured by the word; `None` if nothing was measured."""
    measured = [claim for claim in claims if claim.difference.pairs]
    if not measured:
        return None
    several = len({claim.metric for claim in measured}) > 1
    labels = [
        "\n".join(
            textwrap.wrap(_text(f"{claim.compared.row} minus {claim.compared.than}"), LABEL)
            + ([_text(claim.metric.replace("_", " "))] if several else [])
        )
        for claim in measured
    ]
    heights = [0.2 + 0.19 * (label.count("\n") + 1) for label in labels]
    figure, axes = new_axes(WIDTH, 0.8 + sum(heights))
    places = [sum(heights[:position]) + height / 2 for position, height in enumerate(heights)]
    for place, claim in zip(places, measured, strict=True):
        found, colour = claim.difference, WORD_COLOURS[claim.difference.word]
        if not math.isnan(found.low):
            axes.plot((found.low, found.high), (place, place), color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(found.mean, place, "o", color=colour, markersize=7)
    axes.axvline(0, color=mpl.rcParams["text.color"], linewidth=0.8)
    axes.set_yticks(places, labels)
    axes.set_ylim(sum(heights), 0)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", alpha=0.7)
    axes.set_xlabel("difference in percentage points, 95% interval")
    return figure


def _lines(chapter: Chapter, asked: FigureOf) -> Figure | None:
    """A line per arm over the runs; bars are the standard deviation over random seeds."""
    metric = chapter.definition.metrics[0]
    tasks = chapter.definition.measured(metric)
    places = sorted(asked.x.items(), key=lambda item: item[1])
    lines = {
        name: [(place, summary(chapter.table.figures(Of(run, arm), tasks))) for run, place in places]
        for name, arm in asked.lines.items()
    }
    if all(math.isnan(figures.mean) for points in lines.values() for _, figures in points):
        return None
    figure, axes = new_axes(WIDTH, 4.0)
    for position, (name, points) in enumerate(lines.items()):
        drawn = [(place, figures) for place, figures in points if not math.isnan(figures.mean)]
        axes.errorbar(
            [place for place, _ in drawn],
            [figures.mean for _, figures in drawn],
            yerr=[_bar(figures) for _, figures in drawn],
            label=_text(name),
            color=series_colour(position),
            marker=MARKERS[position % len(MARKERS)],
            markersize=5,
            capsize=3,
        )
    if asked.log:
        axes.set_xscale("log")
    measured = sorted({place for points in lines.values() for place, figures in points if not math.isnan(figures.mean)})
    axes.set_xticks(measured, [f"{place:g}" for place in measured])
    axes.minorticks_off()
    label_axes(axes, _text(asked.label), _metric_label(metric))
    axes.legend(fontsize=9)
    return figure


def _costs(lines: Sequence[Line], asked: FigureOf, metric: str) -> Figure | None:
    """A dot per row at the operations that its training took, or at its samples where those are not known."""
    cost = "samples" if any(math.isnan(line.flops) for line in lines) else "flops"
    drawn = [
        (line, spent)
        for line in lines
        if not math.isnan(line.figures[metric].mean)
        and not math.isnan(spent := getattr(line, cost))
        and (spent > 0 or not asked.log)
    ]
    if not drawn:
        return None
    figure, axes = new_axes(WIDTH, 4.0)
    for position, (line, spent) in enumerate(drawn):
        figures = line.figures[metric]
        axes.errorbar(
            spent,
            figures.mean,
            yerr=_bar(figures),
            color=series_colour(position),
            marker=MARKERS[position % len(MARKERS)],
            markersize=8,
            capsize=3,
        )
    axes.margins(x=0.22, y=0.14)
    if asked.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: quantity(value) if value else "0")
    unit = "FLOPs" if cost == "flops" else "samples"
    label_axes(axes, f"{_text(asked.label) or 'training'}, {unit}", _metric_label(metric))
    label_points(axes, [(spent, line.figures[metric].mean, _text(line.label)) for line, spent in drawn])
    return figure


def _bar(figures: Summary) -> float:
    return 0.0 if math.isnan(figures.sd) else figures.sd


def _metric_label(metric: str) -> str:
    return "mean zero-shot accuracy, %" if metric == ZERO_SHOT else f"{_text(metric.replace('_', ' '))}, %"


def _text(label: str) -> str:
    """A label that matplotlib takes for no formula."""
    return label.replace("$", r"\$")
