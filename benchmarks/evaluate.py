"""Evaluation of four experts, their uniform average and the routed ensemble."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.harness import Input, Race, Run, Target, faster, figure
from benchmarks.inputs import EXPERTS, captions, random_experts, save_router

#: Images per class, and tasks.
SIZES = {"quick": (2, 2), "full": (16, 12), "large": (32, 52)}
BATCH = 256
#: Decoding threads of ours, worker processes of theirs.
WORKERS = 2


def _make(given: Input) -> None:
    from mode.clip.model import save_model
    from mode.data.glyphs.dataset import write_glyph_tasks
    from mode.params import GlyphParams

    images, tasks = SIZES[given.size]
    write_glyph_tasks(GlyphParams(test_images=images), given.folder / "tasks", random_seed=0, workers=1)
    for folder in sorted((given.folder / "tasks").iterdir())[tasks:]:
        shutil.rmtree(folder)
    texts = captions(2_000)
    for name, clip in random_experts("demo", texts).items():
        save_model(given.folder / "models" / name, clip, {})
    save_router(given.folder, texts)


def _ours(given: Input) -> Run:
    from mode.ensemble.router import Router
    from mode.evaluation.evaluate import evaluate_tasks
    from mode.params import MachineParams
    from mode.processes import use_huge_pages

    use_huge_pages()  # as `mode evaluate` does
    params = MachineParams(inference_batch=BATCH, decode_threads=WORKERS, device="cpu")
    models, tasks = {name: given.folder / "models" / name for name in EXPERTS}, given.folder / "tasks"

    def run() -> dict[str, Any]:
        found = evaluate_tasks(models, Router.load(given.folder / "router"), sorted(tasks.iterdir()), params)
        accuracies = {
            (task, name): found.details[task][name]["acc1"] or 0.0 for task in found.details for name in EXPERTS
        }
        mean = _keep(accuracies, given, "mode")
        images = sum(task.images for task in found.tasks.values())
        return {"images": images, **mean, "routed_acc1": found.zeroshot.mean["ensemble"]}

    return run


def _keep(accuracies: dict[tuple[str, str], float], given: Input, side: str) -> dict[str, float]:
    """Keep those of each task and model for `_compare`; returns their mean."""
    by_name = {f"{task}/{name}": accuracy for (task, name), accuracy in accuracies.items()}
    (given.folder / f"{side}.json").write_text(json.dumps(by_name), encoding="utf-8")
    return {"mean_acc1": sum(by_name.values()) / len(by_name)}


def _clip_benchmark(given: Input) -> Run:
    """The package's reader and metrics, once per model; in one process, so that its imports count only once."""
    import numpy as np
    import open_clip
    import torch
    from clip_benchmark.datasets.builder import build_wds_dataset
    from clip_benchmark.metrics import zeroshot_classification

    # clip_benchmark 1.6 calls float() on an array of one element, which NumPy refuses since 2.4.
    zeroshot_classification.float = lambda value: value.item() if isinstance(value, np.ndarray) else float(value)

    def run() -> dict[str, Any]:
        accuracies = {}
        for name in EXPERTS:
            folder = f"local-dir:{given.folder / 'models' / name}"
            model, _, transform = open_clip.create_model_and_transforms(folder)
            tokenizer = open_clip.get_tokenizer(folder)
            model.eval()
            for task in sorted((given.folder / "tasks").iterdir()):
                dataset = build_wds_dataset(task.name, transform, data_dir=str(task))
                # One tar a task: it can feed one worker; a worker process would cost more than it decodes.
                loader = torch.utils.data.DataLoader(dataset.batched(BATCH), batch_size=None)
                found = zeroshot_classification.evaluate(
                    model, loader, tokenizer, dataset.classes, dataset.templates, "cpu", amp=False
                )
                accuracies[task.name, name] = found["acc1"]
        return _keep(accuracies, given, "clip_benchmark")

    return run


def _compare(folder: Path) -> dict[str, float]:
    ours, theirs = (json.loads((folder / f"{name}.json").read_text()) for name in ("mode", "clip_benchmark"))
    assert set(ours) == set(theirs)
    return {"largest_difference": max(abs(ours[key] - theirs[key]) for key in ours)}


PEER = "clip_benchmark, once per model"
IDENTICAL = "identical figures: largest difference at most 1e-7"
RACES = (
    Race(
        name="evaluate",
        step="evaluate 4 experts on 12 tasks (ours: uniform and routed as well)",
        sides={"mode": _ours, PEER: _clip_benchmark},
        targets=(
            Target("at least 3x", faster("mode", PEER), 3.0),
            Target(IDENTICAL, figure("mode", "largest_difference"), 1e-7, at_most=True),
        ),
        make=_make,
        compare=_compare,
        notes="the demo's model with random weights; loading the models is part of the time of both",
    ),
)
