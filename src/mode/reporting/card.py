"""The model card: what the ensemble is made of, what it cost, what it can do and what not, from the run itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from mode.reporting.rendering import render
from mode.reporting.summary import Cluster, baselines, comparison, rows, task_figures, verdict, zeroshot_tasks
from mode.reporting.tables import markdown, routed
from mode.results import Results
from mode.roles import DENSE, ENSEMBLE

#: Tasks listed by name; with more there is the page.
TASKS = 30


def model_card(
    results: Results,
    clusters: Sequence[Cluster],
    sources: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, Any],
) -> str:
    """Markdown (`templates/card.md`), with the head that model hubs read.

    Args:
        results: of the evaluation.
        clusters: coarse clusters of all sources.
        sources: source -> `shards`, `images`, `pairs`, `bad` (left out, by kind or filter).
        parameters: what the models were made with: `model`, `training`, `embedding`, `clustering`, `routing`.
    """
    head = ModelCardData(
        library_name="open_clip", pipeline_tag="zero-shot-image-classification", tags=["clip", "mixture-of-experts"]
    )
    table, tasks = {row.model: row for row in rows(comparison(results))}, task_figures(results)
    models = [row.model for row in table.values() if row.role.kind in ("dense", "ensemble") and not row.role.many]
    best = table.get(ENSEMBLE.name)
    figures = zeroshot_tasks(results).reindex(columns=[ENSEMBLE.name, DENSE.name])
    listed = [
        (label, line.tolist(), routed(results.routing.get(task, {})))
        for (task, label), line in zip(tasks.index, tasks[models].to_numpy(), strict=True)
    ]
    text = render(
        "card.md",
        head=head.to_yaml(),
        verdict=verdict(results),
        sources=sources,
        clusters=clusters,
        parameters=parameters,
        comparison=markdown(results),
        models=models,
        listed=listed if len(listed) <= TASKS else [],
        counted=len(results.zeroshot.tasks) + len(results.retrieval.tasks),
        better=[
            role.name
            for role in reversed(baselines())
            if best and role.name in table and best.zeroshot < table[role.name].zeroshot
        ],
        lost=list(figures.index[figures[ENSEMBLE.name] < figures[DENSE.name]]),
        stand_ins=results.stand_ins,
        words=[cluster.words[0] for cluster in clusters if cluster.words][:2] or ["cat", "dog"],
        provenance=results.provenance,
        cost=results.cost.get(ENSEMBLE.name),
    )
    return str(ModelCard(text))  # which refuses a head that is none
