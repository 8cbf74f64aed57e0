"""The comparison as a table: on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mode.reporting.summary import (
    Row,
    best,
    duration,
    percent,
    quantity,
    recall_names,
    retrieval_tasks,
    routing,
    rows,
    times,
    zeroshot_tasks,
)

if TYPE_CHECKING:
    from mode.data.shards.account import IndexReport
    from mode.tracking.runs import Comparison

#: With more tasks than this the terminal shows the means only; the page has them all.
TASKS_ON_TERMINAL = 12
STYLES = {"ensemble": "bold", "expert": "dim"}
COST_NOTE = "cost: of the training, from nothing; multiples are of the dense model's FLOPs; best in a column marked *"


def columns(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]], list[Row]]:
    """The comparison as text.

    Returns:
        (heads, one list of cells per model, the rows they come from). Columns for which no model has a figure are
        left out. The best accuracy and recalls begin with `*`.
    """
    table = rows(metrics)
    shown: list[tuple[str, Callable[[Row], float | None], Callable[[float | None], str], bool]] = [
        ("zero-shot %", lambda row: row.zeroshot, percent, True)
    ]
    for name in recall_names(metrics):
        shown.append((f"{name.replace('_', ' ')} %", _recall(name), percent, True))
    shown += [
        ("samples seen", lambda row: row.cost.samples, quantity, False),
        ("FLOPs", lambda row: row.cost.flops, quantity, False),
        ("cost", lambda row: row.multiple, times, False),
        ("time", lambda row: row.cost.seconds, duration, False),
    ]
    shown = [column for column in shown if any(column[1](row) is not None for row in table)]
    winners = {
        head: best(table, {row.model: value(row) for row in table}) for head, value, _, marked in shown if marked
    }
    cells = [
        [row.model, *(_star(row, winners.get(head)) + text(value(row)) for head, value, text, _ in shown)]
        for row in table
    ]
    return ["model", *(head for head, *_ in shown)], cells, table


def comparison_table(metrics: Mapping[str, Any]) -> Table:
    """One row per model, for `rich`."""
    heads, cells, table = columns(metrics)
    result = Table(caption=COST_NOTE, caption_justify="left", title_justify="left", header_style="bold", box=None)
    for position, head in enumerate(heads):
        result.add_column(head, justify="left" if position == 0 else "right", no_wrap=position == 0)
    previous = None
    for row, line in zip(table, cells, strict=True):
        group = "expert" if row.kind == "experts" else row.kind
        if previous not in (None, group) and group in ("expert", "uniform"):
            result.add_section()
        marked = [f"[green]{cell}[/green]" if cell.startswith("*") else escape(cell) for cell in line]
        result.add_row(*marked, style=STYLES.get(row.kind, ""))
        previous = group
    return result


def task_table(metrics: Mapping[str, Any]) -> Table:
    """One row per task: every model's accuracy or recall (percent), and where the task is routed."""
    models = [row.model for row in rows(metrics) if row.kind != "experts"]
    weights = routing(metrics)
    result = Table(header_style="bold", box=None)
    result.add_column("task, %")
    for model in models:
        result.add_column(model, justify="right")
    if weights:
        result.add_column("routed to")
    for name, figures in task_lines(metrics):
        highest = max(figures.values(), default=None)
        line = [escape(name)]
        for model in models:
            text = percent(figures.get(model))
            line.append(f"[green]{text}[/green]" if figures.get(model) == highest else text)
        if weights:
            line.append(escape(routed(weights.get(name.partition(",")[0], {}))))
        result.add_row(*line)
    return result


def task_lines(metrics: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """(task, figure by model), classification first; for retrieval one line per recall, `TASK, image recall@10`."""
    lines = list(zeroshot_tasks(metrics).items())
    chosen = recall_names(metrics)
    for task, models in retrieval_tasks(metrics).items():
        for name in chosen:
            figures = {model: recalls[name] for model, recalls in models.items() if name in recalls}
            lines.append((f"{task}, {name.replace('_', ' ')}", figures))
    return lines


def routed(weights: Mapping[str, float]) -> str:
    """The expert with the largest weight, such as `expert-2 0.71`."""
    if not weights:
        return ""
    expert = max(weights, key=lambda name: weights[name])
    return f"{expert} {weights[expert]:.2f}"


def markdown(metrics: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table; the best figures are bold."""
    heads, cells, _ = columns(metrics)
    bold = [
        [f"**{cell[1:]}**" if cell.startswith("*") else cell.replace("|", r"\|") for cell in line] for line in cells
    ]
    rule = ["---", *("---:" for _ in heads[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rule, *bold]) + "\n"


def print_results(metrics: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the comparison, and the figures of each task where there are few."""
    console = console or _console()
    if not rows(metrics):
        console.print("no results yet")
        return
    console.print(comparison_table(metrics))
    if 0 < len(task_lines(metrics)) <= TASKS_ON_TERMINAL or "suite" in metrics:
        console.print()
        console.print(task_table(metrics))


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print two MLflow runs: parameters that differ, then all metrics with their difference."""
    console = console or _console()
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
    console = console or _console()
    shown = min(5, len(classes))
    table = Table("image", header_style="bold", box=None)
    for place in range(shown):
        table.add_column("class" if place == 0 else "")
        table.add_column("%", justify="right")
    for image, row in zip(images, probabilities, strict=True):
        best = sorted(range(len(classes)), key=lambda column: -row[column])[:shown]
        cells = [cell for column in best for cell in (escape(classes[column]), percent(row[column]))]
        table.add_row(escape(image), *cells)
    console.print(table)
    used = {expert: weight for expert, weight in weights.items() if weight > 0}
    console.print("weights: " + ", ".join(f"{expert} {weight:.2f}" for expert, weight in used.items()), style="dim")


def print_index_report(report: IndexReport, details: int = 20, console: Console | None = None) -> None:
    """Print the account of shards: pairs per file, what is bad by kind, and the first `details` bad members."""
    console = console or _console()
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


def _console() -> Console:
    """A terminal's own width; elsewhere (a log, a pipe) wide enough that no row breaks."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _recall(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.recalls.get(name)


def _star(row: Row, winners: set[str] | None) -> str:
    return "*" if winners and row.model in winners else ""
