"""Cheaper inference against the full ensemble, in accuracy and time, on finished projects. Nothing is trained.

    OMP_NUM_THREADS=1 python -m benchmarks.inference PROJECT... [--out reports/inference.json]

A project is a folder in which `dvc repro` has finished. Projects with the same tasks are seeds of one experiment: a row
is a mean ± standard deviation over them. `experts` is how many run per task, on average. Times are CPU time: `ms/image`
of the image encoders in batches of 64, on pixels that are decoded already; `ms/task` of `adapt`: routing, class names,
and the merge where there is one.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mode
from benchmarks.study import Row, Rows, compare_projects, figures, row_of
from mode.clip.preprocess import Preprocess
from mode.ensemble.images import rgb_batches
from mode.ensemble.model import Ensemble
from mode.evaluation import metrics
from mode.evaluation.tasks import Task
from mode.planning.trial import cpu_seconds
from mode.results import Results

#: Name of a row -> arguments of `Ensemble.adapt`.
VARIANTS: dict[str, dict[str, Any]] = {
    "ensemble": {},
    "the 2 experts of most weight": {"top_k": 2},
    "the expert of most weight": {"top_k": 1},
    "experts that make 0.9 of the weight": {"threshold": 0.9},
    "experts that make 0.75 of the weight": {"threshold": 0.75},
    "merged": {"merge": "weights"},
    "merged, statistics of all experts' images alike": {"merge": "weights", "images": "all"},
    "merged, the 2 experts of most weight": {"merge": "weights", "top_k": 2},
}


def measure(root: Path, tasks: list[Task]) -> Rows:
    """A row per variant; and the dense models' figures of the project's own evaluation, whose times are not known."""
    ensemble = mode.load(root / "models", device="cpu")
    preprocess = Preprocess(next(iter(ensemble.clips.values())))
    inputs = {task.name: preprocess.normalise(pixels_of(task, preprocess)) for task in tasks}
    known = figures(Results.load(root / "reports/metrics.json"))
    rows: Rows = {}
    for name in ("dense", "dense-long"):
        if name in known:
            shown = {head: 100 * value for head, value in known[name].items() if not head.endswith(("@1", "@5"))}
            rows[name] = shown | {"experts": 1.0}
    for name, options in VARIANTS.items():
        rows[name] = of_variant(ensemble, tasks, inputs, options)
        print(f"  {name}", file=sys.stderr)
    return rows


def of_variant(ensemble: Ensemble, tasks: list[Task], inputs: dict[str, Tensor], options: dict[str, Any]) -> Row:
    """Figures and times over all tasks."""
    accuracies, recalls, experts = {}, {}, []
    adapting = encoding = 0.0
    for task in tasks:
        given = dict(options)
        if given.get("images") == "all":
            kept = [image for images in zip(*ensemble.router.images.values(), strict=False) for image in images][:512]
            given["images"] = [image.transpose(1, 2, 0) for image in kept]
        texts = list(task.texts if task.kind == "retrieval" else task.classes)
        seconds, adapted = cpu_seconds(partial(ensemble.adapt, texts, list(task.templates) or None, **given))
        adapting += seconds
        seconds, found = cpu_seconds(partial(adapted.scores, inputs[task.name]))
        encoding, scores = encoding + seconds, found.numpy()
        experts.append(len(adapted.clips))
        if task.kind == "retrieval":
            image, text = metrics.ranks(scores.T, task.owners), metrics.best_ranks(scores, task.owners)
            recalls[f"{task.name} image recall@10"] = 100 * metrics.accuracy(image, 10)
            recalls[f"{task.name} text recall@10"] = 100 * metrics.accuracy(text, 10)
        else:
            accuracies[task.name] = 100 * metrics.accuracy(metrics.ranks(scores, task.labels))
    return row_of(accuracies, recalls) | {
        "experts": statistics.fmean(experts),
        "ms/image": 1000 * encoding / sum(len(batch) for batch in inputs.values()),
        "ms/task": 1000 * adapting / len(tasks),
    }


def pixels_of(task: Task, preprocess: Preprocess) -> Tensor:
    """All images of a task, decoded and cut to size: uint8 [n, 3, size, size]."""
    read = rgb_batches([image.read() for image in task.images], 256)
    return torch.stack([preprocess.pixels(image) for batch in read for image in batch])


if __name__ == "__main__":
    compare_projects(__doc__, measure, {"ms/image": 2}, percent=False)
