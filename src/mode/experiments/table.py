"""The figures of runs as one tidy table: a row for each run, arm, task and metric, with what the arm cost."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import fmean

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mode.errors import ModeError, in_one_line
from mode.files import write_aside
from mode.results import Cost, Results
from mode.roles import ENSEMBLE, EXPERT, FULL, UNIFORM_FULL, role_of

#: Columns and their types; `samples`, `flops` and `seconds` are those of training, from nothing; `models` the image
#: encoders that run per image; `device` what the run's models were trained on.
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
        ("flops", pa.float64()),
        ("seconds", pa.float64()),
        ("models", pa.float64()),
        ("commit", pa.string()),
        ("device", pa.string()),
    ]
)
_FIGURES = ("task", "metric", "value")
#: What an arm takes in training, from nothing, and then for an image; NaN where that is not known.
OF_TRAINING = ("samples", "flops", "seconds")
COSTS = (*OF_TRAINING, "models")
Figure = tuple[str, str, float]
#: Its name, figures, what its training cost, image encoders per image.
Arm = tuple[str, list[Figure], Cost, float]


def tidy(
    results: Results,
    variants: Results | None,
    *,
    experiment: str,
    run: str,
    random_seed: int,
    commit: str,
    device: str,
) -> pd.DataFrame:
    """The rows of one run.

    Args:
        results: of the evaluation.
        variants: of other ways to use the same models, whose names are arms as well.
        experiment, run, random_seed, commit, device: what they are of. (The results may be of an earlier commit: stages
            that are up to date are not made again.)
    """
    rows = [
        (arm, *figure, *map(_number, (cost.samples_seen, cost.flops, cost.seconds)), encoders)
        for arm, figures, cost, encoders in chain(_models(results), _variants(variants, results))
        for figure in figures
    ]
    table = pd.DataFrame(rows, columns=["arm", *_FIGURES, *COSTS])
    named = table.assign(experiment=experiment, run=run, random_seed=random_seed, commit=commit, device=device)
    return named.reindex(columns=SCHEMA.names)


def with_start(table: pd.DataFrame, start: pd.DataFrame, model: str) -> pd.DataFrame:
    """Add to what the arms of a run took in training what the model took that it started from.

    Args:
        table: of a run that had the model at no cost.
        start: of the run that made it.
        model: its arm there; one that is no arm was made from all experts, and took what the ensemble did.
    """
    made = start[start["arm"] == (model if model in set(start["arm"]) else ENSEMBLE.name)]
    spent = made[[*OF_TRAINING]].iloc[0] if len(made) else pd.Series(float("nan"), OF_TRAINING)
    return table.assign(**{cost: table[cost] + spent[cost] for cost in OF_TRAINING})


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
        raise ModeError(f"{path}: no table of results: {in_one_line(error)}") from None
    if table.schema.remove_metadata() != SCHEMA:
        found = ", ".join(table.schema.names)[:200]
        raise ModeError(f"{path}: not the columns of a table of results: {found}", "of another version? make it anew")
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _models(results: Results) -> Iterator[Arm]:
    """Every model and average, and the mean of the experts."""
    costs, experts = results.costs, [model for model in results.models if role_of(model) is EXPERT]
    together = {UNIFORM_FULL.name: sum(role_of(model) is FULL for model in results.models)}
    for model in results.models:
        encoders = together.get(model, len(results.experts)) if role_of(model).kind == "ensemble" else 1
        yield model, list(_figures(results, model)), costs.get(model, Cost()), float(encoders)
    if experts:
        mean = _mean([list(_figures(results, model)) for model in experts])
        yield EXPERT.mean, mean, costs.get(experts[0], Cost()), 1.0


def _variants(variants: Results | None, results: Results) -> Iterator[Arm]:
    """Other ways to use the same models; what the ensemble cost, where a variant does not say."""
    if variants is None:
        return
    costs, together = variants.costs, results.costs.get(ENSEMBLE.name, Cost())
    for name in variants.models:
        encoders = variants.encoders.get(name, float("nan"))
        yield name, list(_figures(variants, name)), costs.get(name) or together, encoders


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
