"""Tables and sentences of the book: the same for its Markdown and for its page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from mode.experiments.chapter import Chapter, Claim, Line
from mode.experiments.findings import ZERO_SHOT
from mode.experiments.statistics import Difference, Summary
from mode.reporting.summary import duration, quantity, times

#: Where there is no figure.
DASH = "–"
#: Heads of columns that are words, not figures.
WORDS = ("of the paper", "claim", "word", "expected ordering", "metric", "measured on", "the paper", "known before")


#: What a training costs: its name, and how it is written.
_COSTS = {"samples": ("samples", quantity), "flops": ("FLOPs", quantity), "seconds": ("time", duration)}


class Cell(NamedTuple):
    """A cell's text, the number to sort it by where the text does not begin with that, and a section it leads to."""

    text: str
    number: float = math.nan
    link: str = ""


class Sheet(NamedTuple):
    """A table: the first column names the lines."""

    heads: list[str]
    lines: list[list[Cell]]


def overview(chapters: Sequence[Chapter]) -> Sheet:
    """Every claim of every experiment that was measured, with the word on it."""
    return Sheet(
        ["experiment", "of the paper", "claim", "difference, points", "word", "expected ordering"],
        [
            [
                Cell(chapter.definition.title, link=f"experiment-{chapter.name}"),
                Cell(chapter.definition.item or DASH),
                Cell(claimed(claim)),
                Cell(signed(claim.difference.mean)),
                Cell(judged(claim.difference)),
                Cell(claim.ordering or DASH),
            ]
            for chapter in chapters
            for claim in chapter.measured_claims
        ],
    )


def rows_sheet(chapter: Chapter) -> Sheet:
    """The rows in the shape of the paper's tables: a column per metric, then what the training took."""
    dense, metrics = chapter.dense, chapter.definition.metrics
    # Times of different machines say nothing about the rows.
    shown = [cost for cost in _COSTS if cost != "seconds" or len(chapter.table.devices) == 1]
    return Sheet(
        [
            "row",
            *(f"{metric.replace('_', ' ')}, %" for metric in metrics),
            *(f"training {_COSTS[cost][0]}" for cost in shown),
            "encoders per image",
            "seeds",
        ],
        [
            [
                Cell(line.label),
                *(Cell(spread(line.figures[metric])) for metric in metrics),
                *(_cost(line, dense, cost) for cost in shown),
                Cell(DASH if math.isnan(line.models) else f"{line.models:.3g}"),
                Cell(str(line.seeds)),
            ]
            for line in chapter.measured_lines
        ],
    )


def claims_sheet(chapter: Chapter) -> Sheet:
    """The comparisons with their intervals."""
    several = chapter.definition.metrics != [ZERO_SHOT]
    return _without_empty_columns(
        [
            "comparison",
            *(["metric"] if several else []),
            "difference, points",
            "95% interval",
            "word",
            "expected ordering",
            "the paper" if chapter.definition.item else "known before",
            "sd over seeds",
            "measured on",
        ],
        [
            [
                Cell(f"{claim.compared.row} minus {claim.compared.than}"),
                *([Cell(claim.metric.replace("_", " "))] if several else []),
                Cell(signed(claim.difference.mean)),
                Cell(interval(claim.difference)),
                Cell(judged(claim.difference)),
                Cell(claim.ordering or DASH),
                Cell(claim.compared.paper or DASH),
                Cell(plain(claim.difference.sd)),
                Cell(measured_on(claim.difference)),
            ]
            for claim in chapter.measured_claims
        ],
    )


def provenance(chapter: Chapter) -> list[tuple[str, str]]:
    """How the figures came about: what it is, and its text."""
    record = chapter.table.record
    return [
        ("command", record.command),
        ("commit of the pipeline", ", ".join(chapter.table.commits) or DASH),
        ("random seeds", ", ".join(map(str, chapter.seeds))),
        ("trained on", "; ".join(chapter.table.devices)),
    ]


def sentences(chapter: Chapter) -> list[str]:
    """Whether each ordering that was expected is found."""
    of_paper = bool(chapter.definition.item)
    return [_sentence(claim, of_paper) for claim in chapter.measured_claims if claim.compared.expect]


def warnings(chapter: Chapter) -> list[str]:
    """What is missing from the figures."""
    expected, found = chapter.definition.seeds, chapter.seeds
    lacking = [str(seed) for seed in expected if seed not in found]
    said = [f"Without results as yet: random seed {', '.join(lacking)}."] if lacking else []
    for line in chapter.lines:
        said += [
            f"{line.label}, {metric}: {_count(figures.left_out, 'task')} left out that not every random seed has."
            for metric, figures in line.figures.items()
            if figures.left_out
        ]
    if waiting := [line.label for line in chapter.lines if not line.seeds]:
        said.append(f"Not measured yet: {', '.join(waiting)}.")
    return said


def claimed(claim: Claim) -> str:
    """A comparison as the claim that is put to the test."""
    verb = f"{claim.compared.expect} than" if claim.compared.expect else "against"
    metric = "" if claim.metric == ZERO_SHOT else f" ({claim.metric.replace('_', ' ')})"
    return f"{claim.compared.row} {verb} {claim.compared.than}{metric}"


def judged(found: Difference) -> str:
    """The word on a difference, with the flag that only one random seed is behind it."""
    return f"{found.word} (one seed)" if found.one_seed else found.word


def interval(found: Difference) -> str:
    """The 95% interval."""
    return DASH if math.isnan(found.low) else f"{plain(found.low)} to {plain(found.high)}"


def measured_on(found: Difference) -> str:
    """How many seeds and tasks, what the interval is over if that is not both, and what only one of the rows has."""
    if not found.pairs:
        return DASH
    lacking = found.seeds * found.tasks - found.pairs
    notes = [f"{_count(found.seeds, 'seed')} × {_count(found.tasks, 'task')}"]
    notes += [f"interval over {found.over} alone"] if found.over in ("seeds", "tasks") else []
    notes += [f"{lacking} without a pair"] if lacking else []
    notes += [f"{found.dropped} dropped, which one row alone has"] if found.dropped else []
    return "; ".join(notes)


def spread(figures: Summary) -> str:
    """Mean ± standard deviation over random seeds, in percent.

    >>> spread(Summary(61.234, 0.312, 3, 52, 0)), spread(Summary(61.234, math.nan, 1, 52, 0))
    ('61.2 ± 0.3', '61.2')
    """
    if math.isnan(figures.mean):
        return DASH
    return f"{figures.mean:.1f}" if math.isnan(figures.sd) else f"{figures.mean:.1f} ± {figures.sd:.1f}"


def signed(points: float) -> str:
    """A difference with its sign.

    >>> signed(1.924), signed(-0.5), signed(-0.001), signed(math.nan)
    ('+1.92', '-0.50', '0.00', '–')
    """
    return plain(points) if math.isnan(points) or not round(points, 2) else f"{points:+.2f}"


def plain(points: float) -> str:
    """Points with two decimals, a dash where there are none."""
    return DASH if math.isnan(points) else f"{round(points, 2) + 0.0:.2f}"


def _sentence(claim: Claim, of_paper: bool) -> str:
    found = claim.difference
    extent = f"95% interval {interval(found)}" if not math.isnan(found.low) else "no interval"
    figures = f"{signed(found.mean)} points, {extent}; {measured_on(found)}"
    whose = "the paper's ordering" if of_paper else "the expected ordering"
    undecided = f"whether {whose} holds here is undecided"
    verdict = undecided if claim.ordering == "undecided" else f"{whose} {claim.ordering} here"
    lone = ", as far as one seed tells" if found.one_seed else ""
    return f"{claimed(claim)}: {verdict}{lone} ({figures})."


def _cost(line: Line, dense: Line | None, cost: str) -> Cell:
    """What a row's training took, and how many times what the dense model's did."""
    value = getattr(line, cost)
    multiple = value / of_dense if dense and (of_dense := getattr(dense, cost)) else math.nan
    text = _COSTS[cost][1](value)
    return Cell(text if math.isnan(multiple) else f"{text}, {times(multiple)}", value)


def _without_empty_columns(heads: Sequence[str], lines: Sequence[Sequence[Cell]]) -> Sheet:
    """A table without the columns in which no line has anything."""
    kept = [place for place in range(len(heads)) if any(line[place].text != DASH for line in lines)]
    return Sheet([heads[place] for place in kept], [[line[place] for place in kept] for line in lines])


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
