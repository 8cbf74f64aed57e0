"""What tables, plots and page all show: the models in order, their means, and what they cost beside the dense one.

Everything here is a function of the content of `reports/metrics.json` (accuracies and recalls in 0..1). A part that is
missing there is missing in the result, never invented.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["seed", "dense", "other", "expert", "experts", "uniform", "ensemble"]

#: Order of the rows; `experts` is the mean of all experts.
KINDS: tuple[Kind, ...] = ("seed", "dense", "other", "experts", "expert", "uniform", "ensemble")
EXPERTS_MEAN = "experts, mean"


@dataclass(frozen=True)
class Cost:
    """What it took to have a model, starting from nothing: an expert's and a dense model's cost includes the seed's.

    Attributes:
        samples: image-caption pairs seen in training.
        flops: floating-point operations of the training.
        seconds: of training, summed over devices.
    """

    samples: float | None = None
    flops: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Row:
    """One model in the comparison.

    Attributes:
        model: its name; `EXPERTS_MEAN` for the mean of the experts' figures.
        kind: which part of the method it is.
        zeroshot: mean over the classification tasks, 0..1.
        recalls: mean over the retrieval tasks by metric, such as `image_recall@10`, 0..1.
        cost: of its training; of the mean of the experts, the mean.
        multiple: its FLOPs (samples where FLOPs are unknown) as a multiple of the dense model's.
    """

    model: str
    kind: Kind
    zeroshot: float | None
    recalls: dict[str, float]
    cost: Cost
    multiple: float | None


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


def number(value: object) -> float | None:
    """A finite number as a float; anything else is missing.

    >>> number(1), number(float("nan")), number(None)
    (1.0, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of those that are there; `None` of nothing."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sorting key that puts `expert-2` before `expert-10`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def zeroshot_tasks(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Accuracy by task and model."""
    return _numbers(metrics.get("zeroshot", {}).get("tasks", {}))


def retrieval_tasks(metrics: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Recalls by task, model and metric."""
    return {task: _numbers(models) for task, models in metrics.get("retrieval", {}).get("tasks", {}).items()}


def routing(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Weight by task and expert."""
    return _numbers(metrics.get("routing", {}))


def experts_of(metrics: Mapping[str, Any]) -> list[str]:
    """The experts: whatever is routed to, and models called `expert-...`, in natural order."""
    routed = {expert for weights in metrics.get("routing", {}).values() for expert in weights}
    named = {model for model in _models(metrics) if model.startswith("expert-")}
    return sorted(routed | named, key=natural)


def kind_of(model: str, experts: Iterable[str]) -> Kind:
    """The part of the method that a model is; `other` for what a run trains beside it."""
    reserved: dict[str, Kind] = {
        "seed": "seed",
        "dense": "dense",
        "dense-long": "dense",
        "uniform": "uniform",
        "ensemble": "ensemble",
        EXPERTS_MEAN: "experts",
    }
    return reserved.get(model) or ("expert" if model in set(experts) else "other")


def rows(metrics: Mapping[str, Any]) -> list[Row]:
    """All models in order: seed, dense, dense-long, others, the experts' mean, each expert, uniform, ensemble.

    The mean of the experts is there where there are two or more. `cost` of uniform and ensemble, where `metrics` does
    not give it, is that of the seed and of every expert's part after it.
    """
    experts = experts_of(metrics)
    costs = costs_of(metrics)
    dense = costs.get("dense", Cost())
    single = [
        Row(
            model=model,
            kind=kind_of(model, experts),
            zeroshot=_zeroshot_mean(metrics, model),
            recalls=_recall_means(metrics, model),
            cost=costs.get(model, Cost()),
            multiple=multiple_of(costs.get(model, Cost()), dense),
        )
        for model in _models(metrics)
    ]
    own = [row for row in single if row.kind == "expert"]
    if len(own) > 1:
        single.append(_mean_row(own))
    return sorted(single, key=lambda row: (KINDS.index(row.kind), natural(row.model)))


def costs_of(metrics: Mapping[str, Any]) -> dict[str, Cost]:
    """Cost of every model; see `rows` for the ensembles'."""
    costs = {
        model: Cost(number(given.get("samples_seen")), number(given.get("flops")), number(given.get("seconds")))
        for model, given in metrics.get("cost", {}).items()
    }
    seed = costs.get("seed", Cost())
    parts = [costs.get(expert, Cost()) for expert in experts_of(metrics)]

    def total(of_seed: float | None, of_experts: list[float | None]) -> float | None:
        if of_seed is None or not of_experts or any(part is None for part in of_experts):
            return None
        return of_seed + sum(part - of_seed for part in of_experts if part is not None)

    together = Cost(
        total(seed.samples, [part.samples for part in parts]),
        total(seed.flops, [part.flops for part in parts]),
        total(seed.seconds, [part.seconds for part in parts]),
    )
    return {"uniform": together, "ensemble": together, **costs}


def multiple_of(cost: Cost, dense: Cost) -> float | None:
    """Cost as a multiple of the dense model's: by FLOPs, else by samples (the same model sees them)."""
    for own, base in ((cost.flops, dense.flops), (cost.samples, dense.samples)):
        if own is not None and base:
            return own / base
    return None


def recall_names(metrics: Mapping[str, Any]) -> list[str]:
    """The two recalls that the comparison shows: images by text and texts by image, at 10 or else the largest k."""
    names = {name for models in retrieval_tasks(metrics).values() for given in models.values() for name in given}
    chosen = []
    for direction in ("image_recall", "text_recall"):
        cuts = sorted(int(name.rpartition("@")[2]) for name in names if re.fullmatch(rf"{direction}@\d+", name))
        if cuts:
            chosen.append(f"{direction}@{10 if 10 in cuts else cuts[-1]}")
    return chosen


def best(table: list[Row], value: dict[str, float | None]) -> set[str]:
    """Names of the models with the highest value, all of them if there is a tie; the experts' mean is no model."""
    there = {row.model: value[row.model] for row in table if row.kind != "experts" and value.get(row.model) is not None}
    highest = max((figure for figure in there.values() if figure is not None), default=None)
    return {model for model, figure in there.items() if figure == highest}


def headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The few numbers that `dvc metrics show` compares: means and cost multiples, by model."""
    table = rows(metrics)
    content: dict[str, Any] = {
        "zeroshot": {row.model: row.zeroshot for row in table if row.zeroshot is not None},
        "cost": {row.model: row.multiple for row in table if row.multiple is not None},
    }
    for name in recall_names(metrics):
        content[name] = {row.model: row.recalls[name] for row in table if name in row.recalls}
    return {key: {model: round(value, 6) for model, value in part.items()} for key, part in content.items() if part}


def verdict(metrics: Mapping[str, Any]) -> list[str]:
    """The result in sentences, losses as plainly as gains; nothing where there is no ensemble or no accuracy."""
    table = {row.model: row for row in rows(metrics)}
    ensemble = table.get("ensemble")
    if ensemble is None or ensemble.zeroshot is None:
        return []
    count = len(zeroshot_tasks(metrics))
    over = f" over {count} task{'s' if count != 1 else ''}" if count else ""
    sentences = [f"The routed ensemble reaches {percent(ensemble.zeroshot)} % zero-shot accuracy{over}."]
    others = {
        "dense": "the dense model",
        "dense-long": "the dense model of equal total cost",
        "uniform": "averaging the same experts uniformly",
        EXPERTS_MEAN: "an expert alone, on average",
    }
    points = {
        text: 100 * (ensemble.zeroshot - zeroshot)
        for model, text in others.items()
        if model in table and (zeroshot := table[model].zeroshot) is not None
    }
    above = [f"{gap:.1f} points over {text}" for text, gap in points.items() if gap >= 0.05]
    below = [f"{-gap:.1f} points to {text}" for text, gap in points.items() if gap <= -0.05]
    level = [text for text, gap in points.items() if abs(gap) < 0.05]
    if above:
        sentences.append(f"It gains {_listed(above)}.")
    if below:
        sentences.append(f"It loses {_listed(below)}.")
    if level:
        sentences.append(f"It is level with {_listed(level)}.")
    sentences += [
        f"{expert} is not trained yet: {model} answers for it."
        for expert, model in metrics.get("stand_ins", {}).items()
    ]
    if ensemble.multiple is not None:
        sentences.append(
            f"Its training cost {ensemble.multiple:.2f} times the dense model's; at prediction it runs"
            f" {len(experts_of(metrics))} image encoders instead of one."
        )
    return sentences


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal, a dash where it is missing.

    >>> percent(0.6049), percent(None)
    ('60.5', '–')
    """
    return "–" if value is None else f"{100 * value:.1f}"


def quantity(value: float | None) -> str:
    """A large number in short.

    >>> quantity(163_840), quantity(1.234e15), quantity(999)
    ('164 k', '1.23 P', '999')
    """
    if value is None:
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
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def times(multiple: float | None) -> str:
    """A multiple such as `1.47×`."""
    return "–" if multiple is None else f"{multiple:.2f}×"


def _models(metrics: Mapping[str, Any]) -> list[str]:
    zeroshot = metrics.get("zeroshot", {})
    tables = [
        zeroshot.get("mean", {}),
        *zeroshot.get("tasks", {}).values(),
        *metrics.get("retrieval", {}).get("tasks", {}).values(),
        metrics.get("cost", {}),
    ]
    return list(dict.fromkeys(model for table in tables for model in table))


def _zeroshot_mean(metrics: Mapping[str, Any], model: str) -> float | None:
    given = number(metrics.get("zeroshot", {}).get("mean", {}).get(model))
    return given if given is not None else mean(task.get(model) for task in zeroshot_tasks(metrics).values())


def _recall_means(metrics: Mapping[str, Any], model: str) -> dict[str, float]:
    given = [models[model] for models in retrieval_tasks(metrics).values() if model in models]
    names = dict.fromkeys(name for recalls in given for name in recalls)
    means = {name: mean(recalls.get(name) for recalls in given) for name in names}
    return {name: value for name, value in means.items() if value is not None}


def _mean_row(experts: list[Row]) -> Row:
    names = dict.fromkeys(name for row in experts for name in row.recalls)
    recalls = {name: mean(row.recalls.get(name) for row in experts) for name in names}
    return Row(
        model=EXPERTS_MEAN,
        kind="experts",
        zeroshot=mean(row.zeroshot for row in experts),
        recalls={name: value for name, value in recalls.items() if value is not None},
        cost=Cost(
            mean(row.cost.samples for row in experts),
            mean(row.cost.flops for row in experts),
            mean(row.cost.seconds for row in experts),
        ),
        multiple=mean(row.multiple for row in experts),
    )


def _numbers(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: value for key, given in entries.items() if (value := number(given)) is not None}
        for name, entries in table.items()
    }


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
