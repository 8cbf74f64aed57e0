"""The figures of `metrics.json` under the names that MLflow shows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

Role = Literal["seed", "dense", "expert", "ensemble"]


def role_of(model: str) -> Role:
    """The role of a model by its name in `metrics.json`; any name that is not reserved is an expert's.

    >>> role_of("dense-long"), role_of("uniform"), role_of("expert-3")
    ('dense', 'ensemble', 'expert')
    """
    roles: dict[str, Role] = {
        "seed": "seed",
        "dense": "dense",
        "dense-long": "dense",
        "uniform": "ensemble",
        "ensemble": "ensemble",
    }
    return roles.get(model, "expert")


def metric_name(name: str) -> str:
    """`name` as MLflow allows it: letters, digits, `_ - . : /` and spaces.

    >>> metric_name("retrieval/flickr8k/image_recall@10")
    'retrieval/flickr8k/image_recall_at_10'
    """
    return re.sub(r"[^/\w.\- :]", "_", name.replace("@", "_at_")).strip("/") or "_"


def metrics_of(results: Mapping[str, Any], model: str) -> dict[str, float]:
    """One model's figures in `metrics.json`, flat, under the names that MLflow shows.

    Returns:
        `zeroshot/mean`, `zeroshot/<task>`, `retrieval/<task>/<metric>`, `cost/<kind>` and, for an expert,
        `routing/<task>` (the weight it got); those that the results have.
    """
    flat: dict[str, Any] = {}
    zeroshot = results.get("zeroshot", {})
    flat["zeroshot/mean"] = zeroshot.get("mean", {}).get(model)
    for task, accuracy in zeroshot.get("tasks", {}).items():
        flat[f"zeroshot/{task}"] = accuracy.get(model)
    for task, figures in results.get("retrieval", {}).get("tasks", {}).items():
        flat |= {f"retrieval/{task}/{name}": value for name, value in figures.get(model, {}).items()}
    for task, weights in results.get("routing", {}).items():
        flat[f"routing/{task}"] = weights.get(model)
    flat |= {f"cost/{kind}": value for kind, value in results.get("cost", {}).get(model, {}).items()}
    return {
        metric_name(name): float(value)
        for name, value in flat.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def models_in(results: Mapping[str, Any]) -> list[str]:
    """Every model that `metrics.json` has a figure for, in the order in which they first appear."""
    zeroshot, retrieval = results.get("zeroshot", {}), results.get("retrieval", {})
    tables = [
        zeroshot.get("mean", {}),
        *zeroshot.get("tasks", {}).values(),
        *retrieval.get("tasks", {}).values(),
        results.get("cost", {}),
    ]
    return list(dict.fromkeys(model for table in tables for model in table))
