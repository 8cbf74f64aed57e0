"""The results under the names that MLflow shows."""

from __future__ import annotations

import re

from mode.results import Cost, Figure, Results


def metric_name(name: str) -> str:
    """`name` as MLflow allows it: letters, digits, `_ - . : /` and spaces.

    >>> metric_name("retrieval/flickr8k/image_recall@10")
    'retrieval/flickr8k/image_recall_at_10'
    """
    return re.sub(r"[^/\w.\- :]", "_", name.replace("@", "_at_")).strip("/") or "_"


def metrics_of(results: Results, model: str) -> dict[str, float]:
    """One model's figures, flat, under the names that MLflow shows.

    Returns:
        `zeroshot/mean`, `zeroshot/<task>`, `retrieval/<task>/<metric>`, `cost/<kind>` and, for an expert,
        `routing/<task>` (the weight it got); those that the results have.
    """
    flat: dict[str, Figure] = {"zeroshot/mean": results.zeroshot.mean.get(model)}
    flat |= {f"zeroshot/{task}": figures.get(model) for task, figures in results.zeroshot.tasks.items()}
    for task, models in results.retrieval.tasks.items():
        flat |= {f"retrieval/{task}/{name}": value for name, value in models.get(model, {}).items()}
    flat |= {f"routing/{task}": weights.get(model) for task, weights in results.routing.items()}
    flat |= {f"cost/{kind}": value for kind, value in results.cost.get(model, Cost())}
    return {metric_name(name): float(value) for name, value in flat.items() if value is not None}
