"""What was found by an experiment, `experiments/results/NAME.parquet` and `NAME.json`, checked at the door."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ValidationError

from mode.errors import ModeError, first_fault
from mode.experiments.definition import Of
from mode.experiments.table import COSTS, load_table

#: The mean over the classification tasks, as a column of a table.
ZERO_SHOT = "zero-shot"
#: What tells a line from all others.
KEY = ["run", "random_seed", "arm", "task", "metric"]
_RECALL = re.compile(r"(image|text)_recall@\d+")
_ADVICE = "run the experiment again"


class Record(BaseModel):
    """How a table came about: the JSON file beside it.

    Attributes:
        command: that made it.
        runs: run -> the parameters that make it what it is, by dotted key.
        identities: run -> random seed -> `PlannedRun.identity`.
    """

    command: str
    runs: dict[str, dict[str, Any]]
    identities: dict[str, dict[str, str]] = {}


@dataclass(frozen=True)
class Findings:
    """A table with its record.

    Attributes:
        frame: with the columns of `mode.experiments.table.SCHEMA`; `value` is within 0..1, NaN where undefined.
        record: of how it was made.
    """

    frame: pd.DataFrame
    record: Record

    @property
    def commits(self) -> list[str]:
        """Of the pipeline, each once, in the table's order."""
        return [*dict.fromkeys(self.frame["commit"])]

    @property
    def devices(self) -> list[str]:
        """What models were trained on, each once, in the table's order."""
        return [*dict.fromkeys(self.frame["device"])]

    def figures(self, row: Of, metric: str) -> pd.DataFrame:
        """What was measured of a row: [random seeds, tasks], 0..1; empty where nothing was.

        Args:
            row: run and arm.
            metric: `zero-shot`, a classification task, several (`TASK, TASK, ...`), or `TASK METRIC`.

        Raises:
            ModeError: a task was scored in two ways, and the metric does not say which is meant.
        """
        lines = self._of(row)
        recall = lines["metric"].str.fullmatch(_RECALL)
        task, _, name = metric.rpartition(" ")
        tasks = metric.split(", ")
        if metric == ZERO_SHOT:
            lines = lines[~recall]
        elif {*tasks} <= {*lines["task"][~recall]}:
            lines = lines[~recall & lines["task"].isin(tasks)]
        else:
            lines = lines[(lines["task"] == task) & (lines["metric"] == name)]
        twice = lines.duplicated(["random_seed", "task"])
        if twice.any():
            which = lines["task"][twice].iloc[0]
            raise ModeError(f"'{metric}' is not one figure: task '{which}' has several", f"name one: `{which} METRIC`")
        return lines.pivot(index="random_seed", columns="task", values="value")

    def cost(self, row: Of, column: str) -> float:
        """One of `COSTS` of a row, the mean over random seeds; NaN where one is not known."""
        return float(self._of(row).groupby("random_seed")[column].first().mean(skipna=False))

    def _of(self, row: Of) -> pd.DataFrame:
        return self.frame[(self.frame["run"] == row.run) & (self.frame["arm"] == row.arm)]


def read_findings(path: Path) -> Findings:
    """Read `NAME.parquet` and `NAME.json`, which lie side by side.

    Raises:
        ModeError: one of them is missing, damaged, or not what it should be.
    """
    frame = load_table(path)
    fault = _fault(frame, path.stem)
    if fault:
        raise ModeError(f"{path}: {fault}", _ADVICE)
    return Findings(frame, _read_record(path.with_suffix(".json")))


def figures_of_runs(folder: Path, own: str) -> dict[str, pd.DataFrame]:
    """Identity of a run -> its lines, of all tables in a folder: what need not be made again to be known.

    Args:
        folder: of the tables.
        own: name of the experiment whose table goes before all others, which may have a run from another commit.

    Raises:
        ModeError: as `read_findings`.
    """
    known = {}
    for path in sorted(folder.glob("*.parquet"), key=lambda path: (path.stem == own, path)):
        found = read_findings(path)
        for (run, seed), lines in found.frame.groupby(["run", "random_seed"], sort=False):
            if identity := found.record.identities.get(str(run), {}).get(str(seed)):
                known[identity] = lines
    return known


def _fault(frame: pd.DataFrame, name: str) -> str:
    """What is wrong with the values of a table; empty: nothing."""
    if frame.empty:
        return "has no lines"
    lacking = frame.columns[frame.isna().any()].difference(["value", *COSTS])
    if len(lacking):
        return f"column '{lacking[0]}' has lines without a value"
    others = frame["experiment"][frame["experiment"] != name]
    if len(others):
        return f"is of another experiment, '{others.iloc[0]}'"
    outside = frame["value"][~frame["value"].isna() & ~frame["value"].between(0, 1)]
    if len(outside):
        return f"value {outside.iloc[0]:g} is not within 0..1"
    for column in COSTS:
        if ((frame[column] < 0) | np.isinf(frame[column])).any():
            return f"column '{column}' has a negative or infinite value"
    twice = frame.duplicated(KEY)
    if twice.any():
        return f"is there twice: {', '.join(str(value) for value in frame.loc[twice, KEY].iloc[0])}"
    return ""


def _read_record(path: Path) -> Record:
    try:
        return Record.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ModeError(f"{path}: no such file", _ADVICE) from None
    except ValidationError as error:
        raise ModeError(f"{path}: {first_fault(error)}", _ADVICE) from None
    except (ValueError, RecursionError) as error:
        raise ModeError(f"{path}: damaged, or no JSON: {error}", _ADVICE) from None
