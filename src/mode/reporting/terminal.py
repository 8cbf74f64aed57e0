"""What the commands print beside results: two runs side by side, predictions, the account of shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from mode.data.shards.account import IndexReport
    from mode.tracking.runs import Comparison


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print two MLflow runs: parameters that differ, then all metrics with their difference."""
    console = console or wide_console()
    first, second = (f"{name} {run[:8]}" for name, run in zip(comparison.names, comparison.runs, strict=True))
    if comparison.params:
        table = Table("parameter", first, second, header_style="bold", box=None)
        for key, (one, other) in comparison.params.items():
            table.add_row(escape(key), escape(one or "–"), escape(other or "–"))
        console.print(table)
    else:
        console.print("no parameter differs")
    if comparison.metrics:
        table = Table("metric", header_style="bold", box=None)
        for head in (first, second, "difference"):
            table.add_column(head, justify="right")
        for key, (left, right) in comparison.metrics.items():
            gap = "" if left is None or right is None else f"{right - left:+.4g}"
            table.add_row(escape(key), *("–" if value is None else f"{value:.6g}" for value in (left, right)), gap)
        console.print()
        console.print(table)


def print_predictions(
    images: Sequence[str],
    classes: Sequence[str],
    probabilities: Sequence[Sequence[float]],
    weights: Mapping[str, float],
    console: Console | None = None,
) -> None:
    """Print for each image its most probable classes, five at most, and below how the experts were weighed."""
    console = console or wide_console()
    shown = min(5, len(classes))
    table = Table("image", header_style="bold", box=None)
    for place in range(shown):
        table.add_column("class" if place == 0 else "")
        table.add_column("%", justify="right")
    for image, row in zip(images, probabilities, strict=True):
        best = sorted(range(len(classes)), key=lambda column: -row[column])[:shown]
        cells = [cell for column in best for cell in (escape(classes[column]), f"{100 * row[column]:.1f}")]
        table.add_row(escape(image), *cells)
    console.print(table)
    used = {expert: weight for expert, weight in weights.items() if weight > 0}
    console.print("weights: " + ", ".join(f"{expert} {weight:.2f}" for expert, weight in used.items()), style="dim")


def print_index_report(report: IndexReport, details: int = 20, console: Console | None = None) -> None:
    """Print the account of shards: pairs per file, what is bad by kind, and the first `details` bad members."""
    console = console or wide_console()
    kinds = sorted(report.counts)
    table = Table("file", header_style="bold", box=None)
    for head in ("images", "pairs", *kinds):
        table.add_column(head, justify="right")
    for file in report.files:
        bad = [f"{file.bad[kind]:,}" if kind in file.bad else "" for kind in kinds]
        table.add_row(escape(file.path), f"{file.images:,}", f"{file.pairs:,}", *bad)
    console.print(table)
    console.print(
        f"{report.images:,} images, {report.pairs:,} pairs, {len(report.problems):,} problems", highlight=False
    )
    for problem in report.problems[:details]:
        place = f"{problem.file}: {problem.key}" if problem.key else problem.file
        console.print(f"{escape(place)}: {problem.kind}: {escape(problem.detail)}", highlight=False, soft_wrap=True)
    if len(report.problems) > details:
        console.print(f"... and {len(report.problems) - details:,} more", highlight=False)


def wide_console() -> Console:
    """A terminal's own width; elsewhere (a log, a pipe) wide enough that no row breaks."""
    console = Console()
    return console if console.is_terminal else Console(width=160)
