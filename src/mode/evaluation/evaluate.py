"""All models, their uniform average and their routed ensemble, on all tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from mode.clip.device import pick_device
from mode.clip.encode import encode_prompts
from mode.clip.model import Clip, load_model
from mode.ensemble.combine import by_model, query_weights
from mode.ensemble.router import STAND_IN, Router
from mode.ensemble.rules import uniform_weights
from mode.errors import ModeError
from mode.evaluation.features import encode_tasks, side_by_side
from mode.evaluation.growth import growth_of, mean_growth, partial_ensembles
from mode.evaluation.retrieval import retrieve
from mode.evaluation.tasks import Task, open_tasks
from mode.evaluation.zeroshot import classify, primary
from mode.params import MachineParams
from mode.results import Figures, Growth, GrowthCurve, Results, Retrieval, ZeroShot
from mode.roles import DERIVED, ENSEMBLE, UNIFORM


def evaluate_tasks(
    models: Mapping[str, Path | Clip],
    router: Router | None,
    tasks: Sequence[Path] | Sequence[Task],
    machine: MachineParams,
    metrics: Mapping[str, str] | None = None,
) -> Results:
    """Evaluate models and their ensembles on task folders.

    Every model is loaded once and encodes each text once; every image is decoded once. An expert of the router that is
    not among `models` is stood in for by `seed`, with the expert's weight.

    Args:
        models: name -> model folder, or a model that is loaded already (its mode and device stay as they were).
        router: weighs the experts for each task; `None` evaluates the models alone.
        tasks: folders in CLIP_benchmark's layout, or tasks of different names that are open already.
        machine: batch size, decoding threads, device.
        metrics: task name -> its metric, in place of what the folder says.

    Returns:
        All figures in 0..1; with a router also those of `uniform` and `ensemble`, and with a seed too the growth: of a
        retrieval task, that of the mean of image and text recall@10. Cost and provenance are the caller's to add.

    Raises:
        ModeError: no model or no task; a folder that cannot be read; a model with the name of an ensemble; an expert
            missing without a seed; an image that cannot be decoded; a model that gives NaN.
    """
    if not models:
        raise ModeError("there is no model to evaluate", "train one first")
    if taken := {role.name for role in DERIVED} & set(models):
        raise ModeError(f"a model is called '{taken.pop()}', which names an ensemble in the results")
    given = [task for task in tasks if isinstance(task, Task)]
    opened = given or open_tasks([task for task in tasks if isinstance(task, Path)], dict(metrics or {}))
    members = router.members(models) if router else {}
    routing = {task.name: router.weights(task.prompts) for task in opened} if router else {}

    zeroshot: dict[str, dict[str, float]] = {}
    retrieval: dict[str, Mapping[str, Figures]] = {}
    details: dict[str, Mapping[str, Figures]] = {}
    growth: dict[str, GrowthCurve] = {}
    device = str(pick_device(machine.device))
    with _ready(models, device) as clips:
        with side_by_side(clips, device) as run:
            columns = run(lambda name: _encode_metadata(name, clips[name], opened, machine, device))
        encoded = encode_tasks(
            opened, clips, batch_size=machine.inference_batch, workers=machine.decode_threads, device=device
        )
        for task, images in encoded:
            metadata = {name: by_task[task.name] for name, by_task in columns.items()}
            ensembles = _ensembles(members, routing[task.name]) if router else {}
            partial = partial_ensembles(members, routing[task.name]) if router and STAND_IN in clips else {}
            if task.kind == "retrieval":
                by_query = {}
                if router and router.routing.by_query:
                    routed = ensembles[ENSEMBLE.name]
                    by_query = {ENSEMBLE.name: query_weights(router, members, task.texts, routed, clips)}
                figures = retrieve(task, images, metadata, ensembles | partial, by_query=by_query)
            else:
                figures = classify(task, images, metadata, ensembles | partial)
            grown = {name: figures.pop(name) for name in partial}
            if task.kind == "retrieval":
                retrieval[task.name] = figures
                means = {name: (each["image_recall@10"] + each["text_recall@10"]) / 2 for name, each in grown.items()}
            else:
                zeroshot[task.name] = {name: primary(task, each) for name, each in figures.items()}
                details[task.name] = figures
                means = {name: primary(task, each) for name, each in grown.items()}
            if grown:
                growth[task.name] = growth_of(routing[task.name], means)
    results = Results(
        zeroshot=ZeroShot(mean=_means(zeroshot), tasks=zeroshot),
        retrieval=Retrieval(tasks=retrieval),
        routing=routing,
        details=details,
        tasks={task.name: task.summary() for task in opened},
        stand_ins={expert: model for expert, model in members.items() if expert != model},
    )
    if growth:
        results.growth = Growth(tasks=growth, mean=mean_growth([growth[name] for name in zeroshot]))
    return results


@contextmanager
def _ready(models: Mapping[str, Path | Clip], device: str) -> Iterator[dict[str, Clip]]:
    """All models on the device and in evaluation mode; those that were given loaded get their own state back."""
    clips: dict[str, Clip] = {}
    before: list[tuple[nn.Module, bool, torch.device]] = []
    try:
        for name, model in models.items():
            if isinstance(model, Clip):
                clips[name] = model
                before.append((model.model, model.model.training, next(model.model.parameters()).device))
                model.model.to(device)
            else:
                clips[name] = load_model(model, device)
                clips[name].model.to(memory_format=torch.channels_last)  # a fifth faster convolutions
            clips[name].model.eval()
        yield clips
    finally:
        for network, training, where in before:
            network.train(training).to(where)


def _encode_metadata(
    name: str, clip: Clip, tasks: Sequence[Task], machine: MachineParams, device: str
) -> dict[str, Tensor]:
    """Task -> unit vectors of its classes, or of its texts, all encoded in batches across the tasks."""
    prompts = list(chain.from_iterable(task.prompts for task in tasks))
    vectors = encode_prompts(clip, prompts, batch_size=machine.inference_batch, device=device, name=name)
    parts, start = {}, 0
    for task in tasks:
        parts[task.name] = vectors[start : start + len(task.prompts)]
        start += len(task.prompts)
    return parts


def _ensembles(members: Mapping[str, str], routed: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The weights of each model in the two ensembles."""
    return {UNIFORM.name: by_model(members, uniform_weights(tuple(members))), ENSEMBLE.name: by_model(members, routed)}


def _means(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Model -> its mean over the tasks."""
    names = next(iter(tasks.values()), {})
    return {name: math.fsum(figures[name] for figures in tasks.values()) / len(tasks) for name in names}
