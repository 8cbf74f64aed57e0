"""Data files of the plots that `dvc plots` draws and compares between commits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from mode.reporting.plots import Curves
from mode.reporting.summary import comparison
from mode.results import Results


def write_plot_data(folder: Path, results: Results, curves: Curves | None = None) -> list[Path]:
    """Write the figures behind the plots as csv, one observation per line; all of them, be they empty.

    Files:
        accuracy.csv: model, zeroshot (0..1), cost (multiple of the dense model's), in the table's order.
        tasks.csv: task, model, zeroshot (0..1).
        routing.csv: task, expert, weight.
        training.csv: model, samples, loss.
        growth.csv: order (by_task, reversed), experts (how many are trained), zeroshot (mean, 0..1).
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = comparison(results).dropna(subset="zeroshot").rename(columns={"multiple": "cost"})
    mean = results.growth.mean
    growth = pd.DataFrame({"experts": mean.experts, "by_task": mean.by_task, "reversed": mean.reversed})
    content = {
        "accuracy.csv": table.reset_index(names="model")[["model", "zeroshot", "cost"]],
        "tasks.csv": _long(results.zeroshot.tasks, ("task", "model", "zeroshot")),
        "routing.csv": _long(results.routing, ("task", "expert", "weight")),
        "training.csv": pd.DataFrame(
            [(model, *point) for model, curve in (curves or {}).items() for point in curve],
            columns=["model", "samples", "loss"],
        ),
        "growth.csv": growth.melt("experts", var_name="order", value_name="zeroshot")[["order", "experts", "zeroshot"]],
    }
    for name, lines in content.items():
        # Six significant digits: enough, and equal results stay equal text.
        lines.to_csv(folder / name, index=False, float_format="%.6g", lineterminator="\n")
    return [folder / name for name in content]


def _long(table: Mapping[str, Mapping[str, float | None]], heads: Iterable[str]) -> pd.DataFrame:
    """A line per figure that there is."""
    lines = [(row, column, value) for row, figures in table.items() for column, value in figures.items()]
    return pd.DataFrame(lines, columns=[*heads]).dropna()
