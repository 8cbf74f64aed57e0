"""The figures of runs as one tidy table: a row for each run, arm, task and metric, with what the arm cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mode.errors import ModeError
from mode.files import write_aside
from mode.results import Cost, Results
from mode.roles import EXPERT, FULL, UNIFORM_FULL, role_of

#: Columns and their types; `samples` and `seconds` are those of training, from nothing; `models` the image encoders
#: that run per image.
SCHEMA = pa.schema(
    [
        ("experiment", pa.string()),
        ("run", pa.string()),
        ("random_seed", pa.int64()),
        ("arm", pa.string()),
        ("task", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("samples", pa.float64()),
        ("seconds", pa.float64()),
        ("models", pa.float64()),
        ("commit", pa.string()),
    ]
)
_FIGURES = ("task", "metric", "value")
Figure = tuple[str, str, float]


def tidy(
    results: Results,
    variants: Results | None,
    *,
    experiment: str,
    run: str,
    random_seed: int,
) -> pd.DataFrame:
    """The rows of one run.

    Args:
        results: of the evaluation.
        variants: of other ways to use the same models, whose names are arms as well.
        experiment, run, random_seed: what they are of.
    """
    experts, copies = len(results.experts), sum(role_of(model) is FULL for model in results.models)
    costs = results.costs
    together = costs.get("ensemble", Cost())
    rows = []
    figures = {model: list(_figures(results, model)) for model in results.models}
    own = [model for model in results.models if role_of(model) is EXPERT]
    if own:
        figures[EXPERT.mean] = _mean([figures[model] for model in own])
        costs[EXPERT.mean] = costs.get(own[0], Cost())
    for arm, found in figures.items():
        many = copies if arm == UNIFORM_FULL.name else experts if role_of(arm).kind == "ensemble" else 1
        rows += [(arm, *figure, costs.get(arm, Cost()), float(many)) for figure in found]
    for arm in variants.models if variants else ():
        assert variants is not None
        own_cost = variants.costs.get(arm) or together
        rows += [
            (arm, *figure, own_cost, variants.encoders.get(arm, float("nan"))) for figure in _figures(variants, arm)
        ]
    table = pd.DataFrame(
        [(*row[:4], _number(row[4].samples_seen), _number(row[4].seconds), row[5]) for row in rows],
        columns=["arm", *_FIGURES, "samples", "seconds", "models"],
    )
    commit = str(results.provenance.get("commit") or "")
    named = table.assign(experiment=experiment, run=run, random_seed=random_seed, commit=commit)
    return named.reindex(columns=SCHEMA.names)


def save_table(table: pd.DataFrame, path: Path) -> None:
    """Write a tidy table as parquet, as a whole or not at all; the same rows give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as temporary:
        arrow = pa.Table.from_pandas(table[SCHEMA.names], schema=SCHEMA, preserve_index=False).replace_schema_metadata()
        pq.write_table(arrow, temporary, compression="zstd")


def load_table(path: Path) -> pd.DataFrame:
    """Read a tidy table.

    Raises:
        ModeError: there is none, it is damaged, or has other columns.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise ModeError(f"{path}: no such file", "`mode experiment NAME` makes it") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ModeError(f"{path}: no table of results: {' '.join(str(error).split())[:200]}") from None
    if table.schema.remove_metadata() != SCHEMA:
        raise ModeError(f"{path}: not the columns of a table of results: {', '.join(table.schema.names)[:200]}")
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _figures(results: Results, model: str) -> Iterator[Figure]:
    """(task, metric, value) of all that is known of a model."""
    for task, models in results.zeroshot.tasks.items():
        value = models.get(model)
        if value is not None:
            yield task, _metric(results, task), value
    for task, of_models in results.retrieval.tasks.items():
        for metric, value in (of_models.get(model) or {}).items():
            if value is not None:
                yield task, metric, value


def _metric(results: Results, task: str) -> str:
    return results.tasks[task].metric if task in results.tasks else "acc1"


def _mean(models: list[list[Figure]]) -> list[Figure]:
    """The mean of each figure that all have."""
    values = [{(task, metric): value for task, metric, value in figures} for figures in models]
    shared = [key for key in values[0] if all(key in each for each in values)]
    return [(*key, fmean(each[key] for each in values)) for key in shared]


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
