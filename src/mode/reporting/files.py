"""Data files of the plots that `dvc plots` draws and compares between commits."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mode.reporting.plots import Curves
from mode.reporting.summary import routing, rows, zeroshot_tasks


def write_plot_data(folder: Path, metrics: Mapping[str, Any], curves: Curves | None = None) -> list[Path]:
    """Write the figures behind the plots as csv, one observation per line; all of them, be they empty.

    Files:
        accuracy.csv: model, zeroshot (0..1), cost (multiple of the dense model's), in the table's order.
        tasks.csv: task, model, zeroshot (0..1).
        routing.csv: task, expert, weight.
        training.csv: model, samples, loss.
        growth.csv: order (by_task, reversed), experts (how many are trained), zeroshot (mean, 0..1).
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = [row for row in rows(metrics) if row.zeroshot is not None]
    content: dict[str, tuple[Sequence[str], Iterable[Sequence[object]]]] = {
        "accuracy.csv": (("model", "zeroshot", "cost"), [(row.model, row.zeroshot, row.multiple) for row in table]),
        "tasks.csv": (
            ("task", "model", "zeroshot"),
            [(task, model, value) for task, given in zeroshot_tasks(metrics).items() for model, value in given.items()],
        ),
        "routing.csv": (
            ("task", "expert", "weight"),
            [(task, expert, weight) for task, given in routing(metrics).items() for expert, weight in given.items()],
        ),
        "training.csv": (
            ("model", "samples", "loss"),
            [(model, samples, loss) for model, curve in (curves or {}).items() for samples, loss in curve],
        ),
        "growth.csv": (("order", "experts", "zeroshot"), _growth_lines(metrics.get("growth", {}).get("mean") or {})),
    }
    for name, (heads, lines) in content.items():
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(heads)
            writer.writerows([_short(cell) for cell in line] for line in lines)
    return [folder / name for name in content]


def _growth_lines(mean: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    return [
        (order, count, value)
        for order, values in mean.items()
        if order != "experts"
        for count, value in zip(mean["experts"], values, strict=True)
    ]


def _short(cell: object) -> object:
    """Six significant digits: enough, and equal results stay equal text."""
    return f"{cell:.6g}" if isinstance(cell, float) else "" if cell is None else cell
