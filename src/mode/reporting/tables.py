"""What the commands print: the comparison (in Markdown too), two runs, predictions, the account of shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mode.errors import printable
from mode.reporting.summary import (
    baselines,
    best,
    comparison,
    duration,
    multiples,
    percent,
    quantity,
    recall_names,
    rows,
    task_figures,
    times,
)
from mode.results import Results
from mode.roles import ENSEMBLE, UNIFORM

if TYPE_CHECKING:
    from mode.clustering.drift import Drift
    from mode.data.leakage import Leakage
    from mode.data.shards.account import IndexReport
    from mode.tracking.runs import Comparison

#: With more tasks than this the terminal shows the means only; the page has them all.
TASKS_ON_TERMINAL = 12
COST_NOTE = (
    "cost: of the training, from nothing or a pretrained seed; multiples are of the dense model's FLOPs; best in a"
    " column marked *"
)


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


def variant_cells(variants: Results, beside: Results) -> pd.DataFrame:
    """Other ways to use the models, a row each, below the models that they are to be compared with.

    Args:
        variants: of `mode.evaluation.variants`.
        beside: of the evaluation itself.
    """
    known = comparison(beside)
    own = pd.DataFrame({"zeroshot": pd.Series(variants.zeroshot.mean, dtype=float)}, [*variants.encoders])
    recalls = [pd.DataFrame(figures).T for figures in variants.retrieval.tasks.values()]
    if recalls:
        own = own.join(pd.concat(recalls).astype(float).groupby(level=0).mean())
    costs = pd.DataFrame({name: cost.model_dump() for name, cost in {**beside.cost, **variants.cost}.items()}).T
    own["multiple"] = multiples(costs.astype(float))
    own["encoders"] = pd.Series(variants.encoders)
    shown = known[[role in (*baselines(), UNIFORM, ENSEMBLE) for role in known["role"]]].copy()
    shown["encoders"] = [len(beside.experts) if role.kind == "ensemble" else 1 for role in shown["role"]]
    names = ["zeroshot", *recall_names(shown)]
    table = pd.concat([shown[[*names, "encoders", "multiple"]], own.reindex(columns=[*names, "encoders", "multiple"])])
    heads = {name: f"{'zero-shot' if name == 'zeroshot' else name.replace('_', ' ')} %" for name in names}
    cells = {head: table[name].map(percent) for name, head in heads.items() if table[name].notna().any()}
    encoders = table["encoders"].map(lambda count: f"{count:.2f}".rstrip("0").rstrip("."))
    return pd.DataFrame({**cells, "encoders per image": encoders, "cost": table["multiple"].map(times)})


def print_variants(variants: Results, beside: Results, console: Console | None = None) -> None:
    """Print the variants, below the models that they are to be compared with."""
    console = console or wide_console()
    if not variants.encoders:
        console.print("no variants: name some under `variants.arms` in params.yaml, then `dvc repro variants`")
        return
    shown = Table(header_style="bold", box=None)
    shown.add_column("variant", no_wrap=True)
    cells = variant_cells(variants, beside)
    for head in cells.columns:
        shown.add_column(head, justify="right")
    for name, line in zip(cells.index, cells.to_numpy(), strict=True):
        label = f"{name} (an oracle: the test labels choose)" if name == "best-by-label" else str(name)
        if name == next(iter(variants.encoders)):
            shown.add_section()
        shown.add_row(escape(label), *line)
    console.print(shown)


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


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print two MLflow runs: parameters that differ, then all metrics with their difference.

    Parameters that only one of them has, such as all of a training beside an ensemble, are named by section alone.
    """
    console = console or wide_console()
    first, second = (f"{name} {run[:8]}" for name, run in zip(comparison.names, comparison.runs, strict=True))
    shared = {key: pair for key, pair in comparison.params.items() if None not in pair}
    if shared:
        table = Table("parameter", first, second, header_style="bold", box=None)
        for key, (one, other) in shared.items():
            table.add_row(escape(key), escape(one or ""), escape(other or ""))
        console.print(table)
    else:
        console.print("no parameter differs")
    for place, run in enumerate((first, second)):
        if own := Counter(key.partition(".")[0] for key, pair in comparison.params.items() if pair[1 - place] is None):
            sections = ", ".join(f"{section} ({count})" if count > 1 else section for section, count in own.items())
            console.print(f"only {run} has: {sections}", markup=False)
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
        table.add_row(escape(printable(file.path)), f"{file.images:,}", f"{file.pairs:,}", *bad)
    console.print(table)
    console.print(f"{report.images:,} images, {report.pairs:,} pairs, {report.bad:,} problems", highlight=False)
    for problem in report.problems[:details]:
        place = f"{problem.file}: {problem.key}" if problem.key else problem.file
        console.print(f"{escape(place)}: {problem.kind}: {escape(problem.detail)}", highlight=False, soft_wrap=True)
    if report.bad > details:
        console.print(f"... and {report.bad - details:,} more", highlight=False)


def print_leakage(found: Leakage, console: Console | None = None) -> None:
    """Print for each task how many of its images are among the training images."""
    console = console or wide_console()
    table = Table("task", header_style="bold", box=None)
    for head in ("images", "among the training images"):
        table.add_column(head, justify="right")
    for name, task in found.tasks.items():
        table.add_row(escape(name), f"{task.images:,}", f"{len(task.leaked):,}")
    console.print(table)
    looked = sum(found.images.values())
    console.print(f"{len(found.leaks):,} of {looked:,} training images look like one of them", highlight=False)


def print_drift(found: Sequence[Drift], console: Console | None = None) -> None:
    """Print how each arrival differs from the source that it continues: in figures, and in words."""
    console = console or wide_console()
    table = Table("source", header_style="bold", box=None)
    clusters = max((len(each.clusters) for each in found), default=0)
    for head in ("pairs", "far captions %", *(f"cluster {number} %" for number in range(clusters))):
        table.add_column(head, justify="right")
    for source, pairs, cells in drift_rows(found):
        table.add_row(escape(source), pairs, *cells)
    console.print(table)
    for each in found:
        for sentence in each.sentences():
            console.print(escape(sentence), highlight=False)


def drift_rows(found: Sequence[Drift]) -> list[tuple[str, str, list[str]]]:
    """(source, pairs, share of far captions and of each cluster) of what arrived, before it of what it continues."""
    rows: dict[str, tuple[str, list[str]]] = {}
    for each in found:
        rows.setdefault(each.continues, ("", ["", *(percent(cluster.share) for cluster in each.clusters)]))
        shares = [each.far_share, *(cluster.new_share for cluster in each.clusters)]
        rows[each.source] = (f"{each.pairs:,}", [percent(share) for share in shares])
    return [(source, pairs, cells) for source, (pairs, cells) in rows.items()]


def wide_console() -> Console:
    """A terminal's own width; elsewhere (a log, a pipe) wide enough that no row breaks."""
    console = Console()
    return console if console.is_terminal else Console(width=160)
