"""The model card: what the ensemble is made of, what it cost, what it can do and what not, from the run itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mode.reporting.summary import (
    Cluster,
    duration,
    number,
    quantity,
    retrieval_tasks,
    routing,
    rows,
    verdict,
    zeroshot_tasks,
)
from mode.reporting.tables import markdown, routed, task_lines

#: Tasks listed by name; with more there is the page.
TASKS = 30


def model_card(
    metrics: Mapping[str, Any],
    clusters: Sequence[Cluster],
    sources: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, Any],
) -> str:
    """Markdown, with the head that model hubs read.

    Args:
        metrics: content of `metrics.json`.
        clusters: coarse clusters of all sources.
        sources: source -> `shards`, `images`, `pairs`, `bad` (left out, by kind).
        parameters: what the models were made with: `model`, `training`, `embedding`, `clustering`, `routing`.
    """
    parts = [
        _head(),
        "# Mixture of CLIP data experts\n\n" + " ".join(verdict(metrics)),
        _data(sources, clusters),
        _made(parameters),
        "## Results\n\n" + _results(metrics),
        _limits(metrics, clusters),
        _use(clusters),
        _provenance(metrics),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head() -> str:
    lines = [
        "library_name: open_clip",
        "pipeline_tag: zero-shot-image-classification",
        "tags: [clip, mixture-of-experts]",
    ]
    return "\n".join(["---", *lines, "---"])


def _data(sources: Mapping[str, Mapping[str, Any]], clusters: Sequence[Cluster]) -> str:
    lines = ["## Data", "", "| source | shards | images | pairs | left out |", "|---|---|---:|---:|---|"]
    for name, facts in sources.items():
        bad = ", ".join(f"{count:,} {kind}" for kind, count in sorted(facts["bad"].items())) or "nothing"
        lines.append(f"| {name} | `{facts['shards']}` | {facts['images']:,} | {facts['pairs']:,} | {bad} |")
    lines += [
        "",
        "An expert was trained on the pairs of one coarse cluster, and a few from outside it:",
        "",
    ]
    lines += ["| expert | source | pairs | words that tell it from the others |", "|---|---|---:|---|"]
    for cluster in clusters:
        words = ", ".join(cluster.words) or "–"
        lines.append(f"| {cluster.name} | {cluster.source} | {cluster.size:,} | {words} |")
    return "\n".join(lines)


def _made(parameters: Mapping[str, Any]) -> str:
    training = parameters["training"]
    model = parameters["model"].get("name") or "a configuration of its own (`open_clip_config.json`)"
    epoch = training["epoch_samples"]
    return "\n".join(
        [
            "## How it was made",
            "",
            f"- Architecture: {model}.",
            f"- Seed: {training['seed_epochs']} epochs of {quantity(epoch) if epoch else 'all'} samples on source"
            f" `{training['source']}`; every expert goes on from it to epoch {training['epochs']}.",
            f"- Batch {training['batch_size']:,}, AdamW, learning rate {training['lr']:g}, schedule"
            f" {training['schedule']}, {training['precision']}.",
            f"- Captions: embedded with {parameters['embedding']['kind']}; {parameters['clustering']['fine']} fine"
            f" clusters in {parameters['clustering']['coarse']} coarse ones, unless a source says otherwise.",
            f"- Routing: {parameters['routing']['kind']}, from the words of a task's classes alone.",
        ]
    )


def _results(metrics: Mapping[str, Any]) -> str:
    lines = [markdown(metrics)]
    tasks = task_lines(metrics)
    if 0 < len(tasks) <= TASKS:
        models = [row.model for row in rows(metrics) if row.kind in ("dense", "uniform", "ensemble")]
        weights = routing(metrics)
        lines += [f"| task, % | {' | '.join(models)} | routed to |", "|---|" + "---:|" * len(models) + "---|"]
        for name, figures in tasks:
            cells = [f"{100 * figures[model]:.1f}" if model in figures else "–" for model in models]
            lines.append(f"| {name} | {' | '.join(cells)} | {routed(weights.get(name.partition(',')[0], {}))} |")
    counted = len(zeroshot_tasks(metrics)) + len(retrieval_tasks(metrics))
    lines += ["", f"{counted} tasks, none of whose labels was used to choose anything."]
    return "\n".join(lines)


def _limits(metrics: Mapping[str, Any], clusters: Sequence[Cluster]) -> str:
    lines = ["## Limits", ""]
    table = {row.model: row for row in rows(metrics)}
    best = table.get("ensemble")
    for model in ("dense-long", "dense"):
        other = table.get(model)
        if best and other and (best.zeroshot or 0.0) < (other.zeroshot or 0.0):
            lines.append(f"- `{model}` is better in the mean over the tasks.")
    lost = [
        task
        for task, figures in zeroshot_tasks(metrics).items()
        if figures.get("ensemble", 0.0) < figures.get("dense", 0.0)
    ]
    if lost:
        named = ", ".join(lost[:12]) + (" ..." if len(lost) > 12 else "")
        lines.append(f"- Worse than the dense model on {len(lost)} tasks: {named}.")
    for expert, model in metrics.get("stand_ins", {}).items():
        lines.append(f"- {expert} is not trained: {model} answers for it.")
    encoders = len({cluster.expert for cluster in clusters} - {None})
    lines += [
        f"- At prediction it runs up to {encoders} image encoders; `top_k`, `threshold` and `merge` of `adapt` make it"
        " cheaper.",
        "- Routing knows a task by its words: names that the captions never used say nothing, and the weights are then"
        " even.",
        "- It repeats what its captions say, mistakes and prejudice included. It was not examined for either; nothing"
        " here supports a use that decides over people.",
    ]
    return "\n".join(lines)


def _use(clusters: Sequence[Cluster]) -> str:
    words = [cluster.words[0] for cluster in clusters if cluster.words][:2] or ["cat", "dog"]
    listed = ", ".join(f'"a {word}"' for word in words)
    return (
        "## Use\n\n```python\nimport mode\n\n"
        f'task = mode.load("models").adapt([{listed}])\nprint(task.weights, task("image.jpg"))\n```'
    )


def _provenance(metrics: Mapping[str, Any]) -> str:
    given = metrics.get("provenance") or {}
    cost = metrics.get("cost", {}).get("ensemble") or {}
    lines = [f"- {key}: {value}" for key, value in given.items() if not isinstance(value, Mapping)]
    if cost:
        lines.append(
            f"- training: {quantity(number(cost.get('samples_seen')))} samples,"
            f" {quantity(number(cost.get('flops')))} FLOPs,"
            f" {duration(number(cost.get('seconds')))} summed over devices"
        )
    return "## Provenance\n\n" + "\n".join(lines) if lines else ""
