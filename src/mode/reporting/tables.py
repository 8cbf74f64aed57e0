"""The comparison as a table: on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mode.reporting.summary import (
    best,
    comparison,
    duration,
    percent,
    quantity,
    recall_names,
    rows,
    task_figures,
    times,
)
from mode.reporting.terminal import wide_console
from mode.results import Results
from mode.roles import ENSEMBLE

#: With more tasks than this the terminal shows the means only; the page has them all.
TASKS_ON_TERMINAL = 12
COST_NOTE = "cost: of the training, from nothing; multiples are of the dense model's FLOPs; best in a column marked *"


def comparison_cells(results: Results) -> pd.DataFrame:
    """The comparison as text, a row per model, a column per head.

    Columns for which no model has a figure are left out. The best accuracy and recalls begin with `*`.
    """
    table = comparison(results)
    marked = {"zero-shot %": "zeroshot"} | {f"{name.replace('_', ' ')} %": name for name in recall_names(table)}
    shown = {head: (table[name].map(percent), table[name]) for head, name in marked.items()} | {
        "samples seen": (table["samples_seen"].map(quantity), table["samples_seen"]),
        "FLOPs": (table["flops"].map(quantity), table["flops"]),
        "cost": (table["multiple"].map(times), table["multiple"]),
        "time": (table["seconds"].map(duration), table["seconds"]),
    }
    cells = pd.DataFrame({head: text for head, (text, values) in shown.items() if values.notna().any()}, table.index)
    for head in cells.columns.intersection([*marked]):
        cells[head] = cells[head].where(~best(shown[head][1], table), "*" + cells[head])
    return cells


def comparison_table(results: Results) -> Table:
    """One row per model, for `rich`."""
    cells = comparison_cells(results)
    shown = Table(caption=COST_NOTE, caption_justify="left", title_justify="left", header_style="bold", box=None)
    shown.add_column("model", no_wrap=True)
    for head in cells.columns:
        shown.add_column(head, justify="right")
    previous = None
    for row, line in zip(rows(comparison(results)), cells.to_numpy(), strict=True):
        if previous and row.role.kind != previous and row.role.kind in ("expert", "ensemble"):
            shown.add_section()
        marked = [f"[green]{cell}[/green]" if cell.startswith("*") else escape(cell) for cell in line]
        shown.add_row(escape(row.model), *marked, style="bold" if row.role == ENSEMBLE else "dim" if row.single else "")
        previous = row.role.kind
    return shown


def task_table(results: Results) -> Table:
    """One row per task: every model's accuracy or recall (percent), and where the task is routed."""
    figures = task_figures(results)
    shown = Table(header_style="bold", box=None)
    shown.add_column("task, %")
    for model in figures.columns:
        shown.add_column(model, justify="right")
    if results.routing:
        shown.add_column("routed to")
    for (task, label), line, highest in zip(figures.index, figures.to_numpy(), figures.max(axis=1), strict=True):
        cells = [f"[green]{percent(value)}[/green]" if value == highest else percent(value) for value in line]
        routing = [escape(routed(results.routing.get(task, {})))] if results.routing else []
        shown.add_row(escape(label), *cells, *routing)
    return shown


def routed(weights: Mapping[str, float | None]) -> str:
    """The expert with the largest weight, such as `expert-2 0.71`."""
    known = {expert: weight for expert, weight in weights.items() if weight is not None}
    expert = max(known, key=lambda name: known[name], default="")
    return f"{expert} {known[expert]:.2f}" if expert else ""


def markdown(results: Results) -> str:
    """The comparison as a Markdown table; the best figures are bold."""
    cells = comparison_cells(results).reset_index(names="model")
    bold = [
        [f"**{cell[1:]}**" if cell.startswith("*") else cell.replace("|", r"\|") for cell in line]
        for line in cells.to_numpy()
    ]
    rule = ["---", *("---:" for _ in cells.columns[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in [list(cells.columns), rule, *bold])


def print_results(results: Results, console: Console | None = None) -> None:
    """Print the comparison, and the figures of each task where there are few."""
    console = console or wide_console()
    if not results.models:
        console.print("no results yet")
        return
    console.print(comparison_table(results))
    if 0 < len(task_figures(results)) <= TASKS_ON_TERMINAL or results.suite:
        console.print()
        console.print(task_table(results))
