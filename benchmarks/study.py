"""What the studies share: clones that DVC runs in, finished projects, their figures, and tables over random seeds."""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from flows import clones
from mode.evaluation.tasks import Task, open_tasks
from mode.results import Results

REPOSITORY = Path(__file__).parent.parent
#: With more classification tasks than this, tables show only their mean.
FEW_TASKS = 6

#: Figures by the head of their column; and rows by their name.
Row = dict[str, float]
Rows = dict[str, Row]


def clone(folder: Path) -> Path:
    """A fresh clone of what is committed here; it uses this environment's tools and its own sources."""
    clones.git(REPOSITORY, "clone", "--quiet", str(REPOSITORY), str(folder.absolute()))
    return folder


def environment(root: Path) -> dict[str, str]:
    """Settings of commands in a clone, or in a project of `mode init`, which has no sources of its own."""
    return clones.environment(root, REPOSITORY) | {"DVC_NO_ANALYTICS": "true"}


def dvc(root: Path, *arguments: str) -> dict[str, float]:
    """Run DVC in a clone, and show what it prints on standard error.

    Returns:
        The stages that ran, in order, with their seconds.
    """
    command = [sys.executable, "-m", "dvc", *arguments]
    process = subprocess.Popen(command, cwd=root, env=environment(root), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    begun: dict[str, float] = {}
    for line in process.stdout:
        print(line, end="", file=sys.stderr, flush=True)
        if found := re.match(r"Running stage '(.*)'", line):
            begun[found[1]] = time.monotonic()
    if process.wait():
        sys.exit(f"error: dvc {' '.join(arguments)} failed in {root}")
    ends = [*begun.values(), time.monotonic()][1:]
    return {stage: end - start for (stage, start), end in zip(begun.items(), ends, strict=True)}


def set_params(changes: Mapping[str, Any]) -> list[str]:
    """Arguments of `dvc exp run` that change parameters: `training.epochs`, or `FILE:KEY` in another file."""
    values = {key: json.dumps(value, ensure_ascii=False) for key, value in changes.items()}
    return [part for key, value in values.items() for part in ("--set-param", f"{key}={value}")]


def figures(results: Results, most_tasks: float = FEW_TASKS) -> Rows:
    """Figures of every model in 0..1: `zero-shot` (the mean), each task (where they are few), and all recalls."""
    tasks = results.zeroshot.tasks
    columns = {"zero-shot": results.zeroshot.mean, **(tasks if len(tasks) <= most_tasks else {})}
    for task, models in results.retrieval.tasks.items():
        for name in next(iter(models.values())):
            columns[f"{task} {name.replace('_', ' ')}"] = {model: recalls[name] for model, recalls in models.items()}
    rows: Rows = defaultdict(dict)
    for head, column in columns.items():
        for model, value in column.items():
            rows[model][head] = math.nan if value is None else value
    return dict(rows)


def mean_row(rows: Sequence[Row]) -> Row:
    """The mean of every figure that all rows have."""
    heads = [head for head in rows[0] if all(head in row for row in rows)]
    return {head: statistics.fmean(row[head] for row in rows) for head in heads}


def row_of(accuracies: Row, others: Row) -> Row:
    """Figures of one model as `figures` has them."""
    mean = {"zero-shot": statistics.fmean(accuracies.values())} if accuracies else {}
    return mean | (accuracies if len(accuracies) <= FEW_TASKS else {}) | others


def compare_projects(
    description: str | None,
    measure: Callable[[Path, list[Task]], Rows],
    digits: Mapping[str, int] | None = None,
    percent: bool = True,
) -> list[list[Rows]]:
    """The command of a study of finished projects: measure each, print a table an experiment, keep the figures.

    Args:
        description: of the command.
        measure: rows of a project, from its folder and its tasks.
        digits, percent: of the table, see `spreads`.

    Returns:
        Rows of each project, by experiment: projects with the same tasks differ in the random seed only.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("projects", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="keep all figures there, as JSON")
    arguments = parser.parse_args()
    experiments: dict[tuple[str, ...], list[Rows]] = defaultdict(list)
    kept = {}
    for root in arguments.projects:
        print(root, file=sys.stderr)
        tasks = open_tasks([root / task for task in json.loads((root / "data/tasks/tasks.json").read_text())])
        kept[str(root)] = measure(root, tasks)
        experiments[tuple(sorted(task.name for task in tasks))].append(kept[str(root)])
    for runs in experiments.values():
        print(markdown(spreads(runs, digits, percent)), end="\n\n")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return list(experiments.values())


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Mean ± standard deviation of the values that are there."""
    known = pd.Series(values, dtype=float).dropna()
    if known.empty:
        return "–"
    deviation = f" ± {known.std():.{digits}f}" if len(known) > 1 else ""
    return f"{known.mean():.{digits}f}{deviation}"


def spreads(runs: Sequence[Rows], digits: Mapping[str, int] | None = None, percent: bool = True) -> pd.DataFrame:
    """Mean ± standard deviation over runs, as text: rows and columns of all of them, in the order of the first.

    Args:
        runs: figures of each random seed.
        digits: behind the point, by column; default 1.
        percent: the figures are in 0..1; else they are shown as they are.
    """
    figures = pd.concat(pd.DataFrame.from_dict(run, orient="index", dtype=float) for run in runs)
    by_row = (100 * figures if percent else figures).groupby(level=0, sort=False)
    return by_row.agg({head: partial(spread, digits=(digits or {}).get(str(head), 1)) for head in figures})


def markdown(cells: pd.DataFrame) -> str:
    """A Markdown table (by `tabulate`, which comes with DVC); the cells are text, and stay as they are."""
    aligned = ["left", *["right"] * len(cells.columns)]
    return cells.to_markdown(colalign=aligned, disable_numparse=True)
