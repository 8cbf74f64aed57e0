"""Cheaper inference against the full ensemble, in accuracy and time, on finished projects. Nothing is trained.

    OMP_NUM_THREADS=1 python benchmarks/inference.py PROJECT... [--out reports/inference.json]

A project is a folder in which `dvc repro` has finished. Projects with the same tasks are seeds of one experiment: a row
is a mean ± standard deviation over them. `experts` is how many run per task, on average. Times are CPU time: `ms/image`
of the image encoders in batches of 64, on pixels that are decoded already; `ms/task` of `adapt`: routing, class names,
and the merge where there is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mode
from mode.clip.preprocess import Preprocess
from mode.ensemble.model import Ensemble
from mode.evaluation import metrics
from mode.evaluation.tasks import Task, open_tasks

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

Row = dict[str, float]


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("projects", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="keep all figures there, as JSON")
    arguments = parser.parse_args()
    experiments: dict[tuple[str, ...], list[dict[str, Row]]] = defaultdict(list)
    kept = {}
    for root in arguments.projects:
        print(root, file=sys.stderr)
        tasks = open_tasks([root / task for task in json.loads((root / "data/tasks/tasks.json").read_text())])
        kept[str(root)] = measure(root, tasks)
        experiments[tuple(sorted(task.name for task in tasks))].append(kept[str(root)])
    for runs in experiments.values():
        print(table(runs), end="\n\n")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def measure(root: Path, tasks: list[Task]) -> dict[str, Row]:
    """A row per variant; and the dense models' figures of the project's own evaluation."""
    ensemble = mode.load(root / "models", device="cpu")
    preprocess = Preprocess(next(iter(ensemble.clips.values())))
    inputs = {task.name: preprocess.normalise(pixels_of(task, ensemble)) for task in tasks}
    found = json.loads((root / "reports/metrics.json").read_text(encoding="utf-8"))
    rows = {name: known(found, name) for name in ("dense", "dense-long") if name in found["zeroshot"]["mean"]}
    for name, options in VARIANTS.items():
        rows[name] = of_variant(ensemble, tasks, inputs, options)
        print(f"  {name}", file=sys.stderr)
    return rows


def of_variant(ensemble: Ensemble, tasks: list[Task], inputs: dict[str, Tensor], options: dict[str, Any]) -> Row:
    """Figures and times over all tasks."""
    row: Row = {}
    accuracies, experts = {}, []
    adapting = encoding = 0.0
    for task in tasks:
        given = dict(options)
        if given.get("images") == "all":
            kept = [image for images in zip(*ensemble.router.images.values(), strict=False) for image in images][:512]
            given["images"] = [image.transpose(1, 2, 0) for image in kept]
        texts = list(task.texts if task.kind == "retrieval" else task.classes)
        start = time.process_time()
        adapted = ensemble.adapt(texts, list(task.templates) or None, **given)
        middle = time.process_time()
        scores = adapted.scores(inputs[task.name]).numpy()
        encoding += time.process_time() - middle
        adapting += middle - start
        experts.append(len(adapted.clips))
        if task.kind == "retrieval":
            image, text = metrics.ranks(scores.T, task.owners), metrics.best_ranks(scores, task.owners)
            row[f"{task.name} image recall@10"] = 100 * metrics.accuracy(image, 10)
            row[f"{task.name} text recall@10"] = 100 * metrics.accuracy(text, 10)
        else:
            accuracies[task.name] = 100 * metrics.accuracy(metrics.ranks(scores, task.labels))
    if len(accuracies) <= 6:
        row = accuracies | row
    return (
        {"zero-shot": statistics.fmean(accuracies.values())}
        | row
        | {
            "experts": statistics.fmean(experts),
            "ms/image": 1000 * encoding / sum(len(batch) for batch in inputs.values()),
            "ms/task": 1000 * adapting / len(tasks),
        }
    )


def pixels_of(task: Task, ensemble: Ensemble) -> Tensor:
    """All images of a task, decoded and cut to size: uint8 [n, 3, size, size]."""
    from mode.ensemble.images import rgb_batches

    preprocess = Preprocess(next(iter(ensemble.clips.values())))
    read = rgb_batches([image.read() for image in task.images], 256)
    return torch.stack([preprocess.pixels(image) for batch in read for image in batch])


def known(found: dict[str, Any], name: str) -> Row:
    """A model's row from reports/metrics.json; its times were not measured."""
    row = {"zero-shot": 100 * found["zeroshot"]["mean"][name]}
    if len(found["zeroshot"]["tasks"]) <= 6:
        row |= {task: 100 * figures[name] for task, figures in found["zeroshot"]["tasks"].items()}
    for task, figures in found["retrieval"]["tasks"].items():
        for kind in ("image", "text"):
            row[f"{task} {kind} recall@10"] = 100 * figures[name][f"{kind}_recall@10"]
    return row | {"experts": 1.0}


def table(runs: list[dict[str, Row]]) -> str:
    """Markdown: a row per variant, mean ± standard deviation over the runs."""
    columns = list(runs[0]["ensemble"])
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name in runs[0]:
        cells = []
        for column in columns:
            values = [run[name][column] for run in runs if column in run[name]]
            digits = 2 if column == "ms/image" else 1
            cell = f"{statistics.fmean(values):.{digits}f}" if values else "–"
            cells.append(cell + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
