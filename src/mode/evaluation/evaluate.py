"""All models, their uniform average and their routed ensemble, on all tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from mode.clip.device import pick_device
from mode.clip.model import Clip, load_models
from mode.ensemble.combine import ImageWeights, by_model, logit_scales
from mode.ensemble.router import STAND_IN, Router
from mode.ensemble.rules import uniform_weights
from mode.errors import ModeError
from mode.evaluation.features import encode_metadata, encode_tasks
from mode.evaluation.growth import growth_of, mean_growth, partial_ensembles, partial_members
from mode.evaluation.mixtures import Mixture, Routed, figures_of_all
from mode.evaluation.scores import Collected, primary
from mode.evaluation.tasks import Task, open_tasks
from mode.params import MachineParams
from mode.results import Growth, GrowthCurve, Results
from mode.roles import DERIVED, ENSEMBLE, FULL, UNIFORM, UNIFORM_FULL, role_of

if TYPE_CHECKING:
    from mode.embedding.open_clip import OpenClipEmbedder

#: Coordinates of unit vectors that differ by less are the same but for rounding.
SAME = 1e-6
#: The model whose image vectors a router of images compares; no model folder has such a name.
ROUTER = "the router"


def evaluate_tasks(
    models: Mapping[str, Path | Clip],
    router: Router | None,
    tasks: Sequence[Path] | Sequence[Task],
    machine: MachineParams,
    metrics: Mapping[str, str] | None = None,
) -> Results:
    """Evaluate models and their ensembles on task folders.

    Every model is loaded once and encodes each text once; every image is decoded once for all models that fit into
    `machine.models_mb` together. An expert of the router that is not among `models` is stood in for by `seed`, with the
    expert's weight.

    Args:
        models: name -> model folder, or a model that is loaded already (its mode and device stay as they were).
        router: weighs the experts for each task, or for each image of it; `None` evaluates the models alone.
        tasks: folders in CLIP_benchmark's layout, or tasks of different names that are open already.
        machine: batch size, decoding threads, device.
        metrics: task name -> its metric, in place of what the folder says.

    Returns:
        All figures in 0..1; with copies of experts on all pairs also those of `uniform-full`, with a router those of
        `uniform` and `ensemble`, and with a seed too the growth: of a retrieval task, that of the mean of image and
        text recall@10. Where images are routed by themselves, the routing of a task is the mean over its images. Cost
        and provenance are the caller's to add.

    Raises:
        ModeError: no model or no task; a folder that cannot be read; a model with the name of an ensemble; an expert
            missing without a seed; an image that cannot be decoded; a model that gives NaN, or the same vector to all
            images or to all texts.
    """
    if not models:
        raise ModeError("there is no model to evaluate", "train one first")
    if taken := {role.name for role in DERIVED} & set(models):
        raise ModeError(f"a model is called '{taken.pop()}', which names an ensemble in the results", "rename it")
    opened = [task for task in tasks if isinstance(task, Task)]
    opened = opened or open_tasks([task for task in tasks if isinstance(task, Path)], metrics)
    members = router.members(models) if router else {}
    full = [name for name in models if role_of(name) is FULL]
    routed = {task.name: Routed.by(router, task) for task in opened} if router and not router.by_image else {}

    found, growth = Collected(), dict[str, GrowthCurve]()
    device = str(pick_device(machine.device))
    with encoded({**models, **looking(router)}, opened, machine, device) as vectors:
        columns = {name: vectors.texts[name] for name in models}
        _refuse_dead(columns, "text")
        seen: dict[str, list[Tensor]] = {name: [] for name in models}
        for number, (task, images) in enumerate(vectors.images):
            if router and router.by_image:
                routed[task.name] = Routed.by(router, task, images.pop(ROUTER).cpu().numpy())
            for name, rows in images.items():
                seen[name].append(_ends(rows))
            mixtures = {UNIFORM_FULL.name: Mixture(uniform_weights(full))} if full else {}
            partial: dict[str, Mixture] = {}
            if here := routed.get(task.name):
                mixtures[UNIFORM.name] = Mixture(by_model(members, uniform_weights([*members])))
                mixtures[ENSEMBLE.name] = here.mixture(members, vectors.scales)
                partial = _partial_mixtures(members, here) if STAND_IN in models else {}
            metadata = {name: parts[number] for name, parts in columns.items()}
            figures = figures_of_all(task, images, metadata, mixtures | partial)
            if here and partial:
                grown = {name: primary(task, figures.pop(name)) for name in partial}
                growth[task.name] = growth_of(here.weights, grown)
            found.add(task, figures)
        _refuse_dead(seen, "image")
    results = found.results(opened)
    results.routing = {task: each.weights for task, each in routed.items()}
    results.stand_ins = {expert: model for expert, model in members.items() if expert != model}
    if growth:
        results.growth = Growth(tasks=growth, mean=mean_growth([growth[name] for name in found.zeroshot]))
    return results


def _partial_mixtures(members: Mapping[str, str], routed: Routed) -> dict[str, Mixture]:
    """The ensemble with only its first experts (`mode.evaluation.growth`), routed as a whole or image by image."""
    weights, images = partial_ensembles(members, routed.weights), routed.images
    if images is None:
        return {name: Mixture(each) for name, each in weights.items()}
    answering = partial_members(members, routed.weights)
    return {name: Mixture(each, ImageWeights(by_model(answering[name], images))) for name, each in weights.items()}


@dataclass(frozen=True)
class Encoded:
    """What models make of tasks.

    Attributes:
        scales: model -> the factor from its cosines to its logits.
        texts: model -> for each task the vectors of its classes or texts, as of `encode_metadata`.
        images: each task with the vectors of its images, model -> [images, d], as of `encode_tasks`; once.
    """

    scales: Mapping[str, float]
    texts: Mapping[str, tuple[Tensor, ...]]
    images: Iterator[tuple[Task, dict[str, Tensor]]]


@contextmanager
def encoded(
    models: Mapping[str, Path | Clip], tasks: Sequence[Task], machine: MachineParams, device: str
) -> Iterator[Encoded]:
    """Encode texts and images of tasks with models, of which only so many are open at once as `machine` says.

    If all fit into `machine.models_mb`, one pass over the images is made, as they are asked for. Otherwise there is one
    pass for each group that fits, or for a model that does not fit alone, and the vectors wait on the disk until all
    are there. They are the same either way.
    """
    batch, workers = machine.inference_batch, machine.decode_threads
    groups = _groups(models, machine.models_mb * 2**20)
    if len(groups) == 1:
        with ready_models(models, device) as ready:
            texts = encode_metadata(tasks, ready, batch_size=batch, device=device)
            images = encode_tasks(tasks, ready, batch_size=batch, workers=workers, device=device)
            yield Encoded(logit_scales(ready), texts, images)
        return
    scales: dict[str, float] = {}
    texts = {}
    with TemporaryDirectory(prefix="mode-vectors-", ignore_cleanup_errors=True) as folder:
        place = {name: Path(folder) / str(number) for number, name in enumerate(models)}
        for path in place.values():
            path.mkdir()
        for number, group in enumerate(groups, start=1):
            with ready_models({name: models[name] for name in group}, device) as ready:
                scales |= logit_scales(ready)
                texts |= encode_metadata(tasks, ready, batch_size=batch, device=device)
                title = f"evaluate, models {number} of {len(groups)}"
                images = encode_tasks(tasks, ready, batch_size=batch, workers=workers, device=device, title=title)
                for task_number, (_, rows_of) in enumerate(images):
                    for name, rows in rows_of.items():
                        np.save(place[name] / f"{task_number}.npy", rows.cpu().numpy())

        def kept(number: int) -> dict[str, Tensor]:
            loaded = {name: np.load(path / f"{number}.npy", allow_pickle=False) for name, path in place.items()}
            return {name: torch.from_numpy(rows).to(device) for name, rows in loaded.items()}

        in_order = {name: texts[name] for name in models}
        yield Encoded(scales, in_order, ((task, kept(number)) for number, task in enumerate(tasks)))


def _groups(models: Mapping[str, Path | Clip], most: int) -> list[list[str]]:
    """Names of models, in order, in groups whose weights together have at most so many bytes, or of one model.

    Those that are loaded already take no more.
    """
    groups: list[list[str]] = [[]]
    held = 0
    for name, model in models.items():
        size = 0 if isinstance(model, Clip) else sum(path.stat().st_size for path in model.glob("*.safetensors"))
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def looking(router: Router | None) -> dict[str, Clip]:
    """The model that looks at every image for a router of images, called `ROUTER`; none for a router of words."""
    if router is None or not router.by_image:
        return {}
    return {ROUTER: cast("OpenClipEmbedder", router.embedder).clip}


def _ends(vectors: Tensor) -> Tensor:
    """The least and the greatest of each coordinate, [2, d]; one vector alone stays one, [1, d]."""
    return torch.stack([vectors.amin(dim=0), vectors.amax(dim=0)]) if len(vectors) > 1 else vectors


def _refuse_dead(vectors: Mapping[str, Sequence[Tensor]], what: str) -> None:
    """A model that gives every image, or every text, the same vector has learnt nothing, and its figures are chance.

    Args:
        vectors: model -> some of its vectors, or their `_ends`.
        what: they are of: `image` or `text`.

    Raises:
        ModeError: names such a model, where there is more than one vector.
    """
    for name, parts in vectors.items():
        ends = _ends(torch.cat([*parts]))
        if len(ends) > 1 and float((ends[1] - ends[0]).max()) < SAME:
            raise ModeError(f"model '{name}' gives every {what} the same vector", "its training failed: train it again")


@contextmanager
def ready_models(models: Mapping[str, Path | Clip], device: str) -> Iterator[dict[str, Clip]]:
    """All models on the device and in evaluation mode; those that were given loaded get their own state back."""
    clips: dict[str, Clip] = {}
    before: list[tuple[nn.Module, bool, torch.device]] = []
    try:
        opened = load_models({name: model for name, model in models.items() if isinstance(model, Path)}, device)
        for name, model in models.items():
            if isinstance(model, Clip):
                clips[name] = model
                before.append((model.model, model.model.training, next(model.model.parameters()).device))
                model.model.to(device)
            else:
                clips[name] = opened[name]
                clips[name].model.to(memory_format=torch.channels_last)  # a fifth faster convolutions
            clips[name].model.eval()
        yield clips
    finally:
        for network, training, where in before:
            network.train(training).to(where)
