"""What tables, plots and page all show: the models in order, their means, and what they cost beside the dense one.

Everything here is a function of the results. A part that is missing there is missing here (NaN in a table), never
invented.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

from mode import roles
from mode.results import Cost, Results, natural
from mode.roles import DENSE, ENSEMBLE, Role, role_of


@dataclass(frozen=True)
class FineCluster:
    """A fine cluster on the map.

    Attributes:
        x, y: its place, 0..1.
        size: captions that it was fitted on.
        words: most telling first.
    """

    x: float
    y: float
    size: int
    words: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cluster:
    """A coarse cluster as the report shows it.

    Attributes:
        source: of the pairs.
        number: of the cluster within its source, from 0.
        size: pairs assigned to it.
        words: most telling first.
        expert: the model trained on it, if one is.
        fine: its fine clusters.
        images: some of its training images, encoded (PNG, JPEG).
    """

    source: str
    number: int
    size: int
    words: list[str] = field(default_factory=list)
    expert: str | None = None
    fine: list[FineCluster] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The expert's name, or source and number."""
        return self.expert or f"{self.source} {self.number}"


class Row(NamedTuple):
    """A row of `comparison`, for code that goes through it model by model; NaN where not known."""

    model: str
    role: Role
    mean: bool
    zeroshot: float
    multiple: float
    samples_seen: float

    @property
    def single(self) -> bool:
        """Whether it is one of several: what matters is their mean."""
        return self.role.many and not self.mean


def rows(table: pd.DataFrame) -> list[Row]:
    """The rows of `comparison`, or of a selection from it."""
    columns = table.reset_index(names="model")[[*Row._fields]]
    return [Row(*line) for line in columns.itertuples(index=False, name=None)]


def comparison(results: Results) -> pd.DataFrame:
    """One row per model in the order of the roles, with a mean before the models of a role that has several.

    Returns:
        Indexed by the model's name, or `Role.mean`. Columns, float64 and NaN where not known unless noted:

        - `role` (`Role`) and `mean` (bool): what it is, and whether it is the mean of several models;
        - `zeroshot`: mean over the classification tasks, 0..1;
        - `image_recall@10` ...: mean over the retrieval tasks, 0..1;
        - `samples_seen`, `flops`, `seconds`: of its training, from nothing or from a pretrained seed;
        - `multiple`: its FLOPs (samples where FLOPs are unknown) as a multiple of the dense model's.
    """
    models = pd.Index(results.models, dtype=object)
    means = pd.Series(results.zeroshot.mean, dtype=float).reindex(models)
    recalls = [_frame(figures) for figures in results.retrieval.tasks.values()]
    costs = _frame({model: cost.model_dump() for model, cost in results.costs.items()}, list(Cost.model_fields))
    table = pd.DataFrame({"zeroshot": means.fillna(zeroshot_tasks(results).mean().reindex(models))}, index=models)
    if recalls:
        table = table.join(pd.concat(recalls).groupby(level=0).mean())
    table = table.join(costs)
    table["multiple"] = multiples(costs).reindex(models)
    table.insert(0, "role", pd.Series([role_of(model) for model in models], index=models, dtype=object))
    table.insert(1, "mean", False)
    return _ordered(_with_means(table))


def zeroshot_tasks(results: Results) -> pd.DataFrame:
    """The figure of each classification task (row) and model (column), 0..1; NaN where there is none."""
    return _frame(results.zeroshot.tasks)


def recall_names(table: pd.DataFrame) -> list[str]:
    """The two recalls that the comparison shows: images by text and texts by image, at 10 or else the largest k."""
    chosen = []
    for direction in ("image_recall", "text_recall"):
        found = (re.fullmatch(rf"{direction}@(\d+)", name) for name in table.columns)
        cuts = [int(match[1]) for match in found if match]
        if cuts:
            chosen.append(f"{direction}@{10 if 10 in cuts else max(cuts)}")
    return chosen


def task_figures(results: Results) -> pd.DataFrame:
    """Figures of every task (row, by `task` and `label`) and model (column, in the comparison's order).

    Classification comes first; of retrieval there is a row per recall of the comparison, `TASK, image recall@10`.
    """
    table = comparison(results)
    lines = {(task, task): figures for task, figures in results.zeroshot.tasks.items()}
    for task, models in results.retrieval.tasks.items():
        for name in recall_names(table):
            figures = {model: recalls.get(name) for model, recalls in models.items()}
            lines[task, f"{task}, {name.replace('_', ' ')}"] = figures
    index = pd.MultiIndex.from_tuples(lines, names=["task", "label"]) if lines else None
    return pd.DataFrame([*lines.values()], index, columns=[*table.index[~table["mean"]]], dtype=float)


def best(values: pd.Series[float], table: pd.DataFrame) -> pd.Series[bool]:
    """Which models have the highest value, all of them if there is a tie; a mean of several is no model."""
    return (values == values[~table["mean"]].max()) & ~table["mean"]


def headline(results: Results) -> dict[str, dict[str, float]]:
    """The few numbers that `dvc metrics show` compares: means and cost multiples, by model."""
    table = comparison(results)
    columns = {"zeroshot": "zeroshot", "cost": "multiple"} | {name: name for name in recall_names(table)}
    content = {key: table[column].dropna().round(6) for key, column in columns.items()}
    return {key: {str(model): value for model, value in part.items()} for key, part in content.items() if len(part)}


def baselines() -> list[Role]:
    """What the ensemble is held against task by task: the dense models."""
    return [role for role in roles.ROLES if role.kind == "dense" and not role.many]


def verdict(results: Results) -> list[str]:
    """The result in sentences, losses as plainly as gains; nothing where there is no ensemble or no accuracy."""
    table = {row.model: row for row in rows(comparison(results).dropna(subset="zeroshot"))}
    ensemble = table.get(ENSEMBLE.name)
    if ensemble is None:
        return []
    count = len(results.zeroshot.tasks)
    over = f" over {count} task{'s' if count != 1 else ''}" if count else ""
    sentences = [f"The routed ensemble reaches {percent(ensemble.zeroshot)} % zero-shot accuracy{over}."]
    points = _points(table)
    for verb, chosen in (
        ("gains", [f"{gap:.1f} points over {label}" for label, gap in points.items() if gap >= 0.05]),
        ("loses", [f"{-gap:.1f} points to {label}" for label, gap in points.items() if gap <= -0.05]),
        ("is level with", [label for label, gap in points.items() if abs(gap) < 0.05]),
    ):
        if chosen:
            sentences.append(f"It {verb} {_listed(chosen)}.")
    sentences += [f"{name} is not trained yet: {model} answers for it." for name, model in results.stand_ins.items()]
    if pd.notna(ensemble.multiple):
        sentences.append(
            f"Its training cost {ensemble.multiple:.2f} times the dense model's; at prediction it runs"
            f" {len(results.experts)} image encoders instead of one."
        )
    return sentences


def doubts(cards: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the models' cards say may have gone wrong without an error; one sentence where several say the same.

    >>> doubts({"seed": {"doubt": None}, "dense": {"doubt": "dense has learnt next to nothing."}})
    ['dense has learnt next to nothing.']
    """
    found = {name: card["doubt"] for name, card in cards.items() if card.get("doubt")}
    if len(found) < 2:
        return list(found.values())
    cause = "too short a training, or captions that do not belong to their images"
    return [f"{_listed(list(found))} have learnt next to nothing, their loss is that of chance: {cause}."]


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal, a dash where it is missing.

    >>> percent(0.6049), percent(None), percent(float("nan"))
    ('60.5', '–', '–')
    """
    return "–" if pd.isna(value) else f"{100 * value:.1f}"


def quantity(value: float | None) -> str:
    """A large number in short.

    >>> quantity(163_840), quantity(1.234e15), quantity(999)
    ('164 k', '1.23 P', '999')
    """
    if pd.isna(value):
        return "–"
    value = float(f"{value:.3g}")  # before the prefix is chosen: 999.9 is 1 k
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds as people say them.

    >>> duration(42.4), duration(300), duration(7_260)
    ('42 s', '5 min 0 s', '2 h 1 min')
    """
    if pd.isna(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def times(multiple: float | None) -> str:
    """A multiple such as `1.47×`."""
    return "–" if pd.isna(multiple) else f"{multiple:.2f}×"


def _frame(rows: Mapping[str, Mapping[str, float | None]], columns: list[str] | None = None) -> pd.DataFrame:
    """Rows of figures; what is `None`, or not in a row, is NaN."""
    return pd.DataFrame([*rows.values()], [*rows], columns, dtype=float)


def multiples(costs: pd.DataFrame) -> pd.Series[float]:
    """Costs as multiples of the dense model's: by FLOPs, else by samples (the same model sees them)."""
    if DENSE.name not in costs.index:
        return pd.Series(index=costs.index, dtype=float)
    multiples = costs / costs.loc[DENSE.name].replace(0, float("nan"))
    return multiples["flops"].fillna(multiples["samples_seen"])


def _with_means(table: pd.DataFrame) -> pd.DataFrame:
    """With a row for the mean of each role that has two or more models."""
    figures = table.columns[2:]
    for role in dict.fromkeys(table["role"]):
        own = table.loc[[each == role for each in table["role"]], figures]
        if role.many and len(own) > 1:
            table.loc[role.mean] = [role, True, *own.mean()]
    return table


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    """In the order of the roles, a mean first, then by name."""
    keys = zip(map(roles.ROLES.index, table["role"]), ~table["mean"], map(natural, table.index), strict=True)
    place = dict(zip(table.index, keys, strict=True))
    return table.loc[sorted(table.index, key=place.__getitem__)]


def _points(table: Mapping[str, Row]) -> dict[str, float]:
    """Percentage points that the ensemble is better by, by what it is held against; single models come before means."""
    points = {}
    for role in sorted(roles.ROLES, key=lambda role: role.many):
        other = table.get(role.mean if role.many else role.name)
        if other and role.kind != "seed" and role != ENSEMBLE:
            label = f"{role.label}, on average" if role.many else role.label
            points[label] = 100 * (table[ENSEMBLE.name].zeroshot - other.zeroshot)
    return points


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
