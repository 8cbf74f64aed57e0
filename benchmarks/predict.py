"""Prediction: images through four experts, against four forward passes in a row."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness import Input, Race, Run, Target, figure, share_of_time
from benchmarks.inputs import EXPERTS, captions, make_pictures, random_experts, save_router

if TYPE_CHECKING:
    from mode.clip.model import Clip
    from mode.ensemble.router import Router

#: The model, and predictions in one timed run by batch size.
SIZES = {"quick": ("demo", {1: 2, 64: 1}), "full": ("ViT-S-32", {1: 20, 64: 1}), "large": ("ViT-B-32", {1: 20, 64: 1})}
CLASSES = tuple(f"a thing of kind {number}" for number in range(10))


def _make(given: Input) -> None:
    save_router(given.folder, [*captions(2_000), *CLASSES])


def _prepared(given: Input, batch: int) -> tuple[Router, dict[str, Clip], list[bytes], int]:
    """The router, the experts, the images of a batch, and how often it is predicted."""
    from mode.ensemble.router import Router

    model, times = SIZES[given.size]
    images = make_pictures(min(batch, 4 if given.size == "quick" else 64)) * batch
    return Router.load(given.folder / "router"), random_experts(model, captions(500)), images[:batch], times[batch]


def _ours(given: Input, batch: int, top: int | None) -> Run:
    from mode.ensemble.model import Ensemble
    from mode.processes import use_huge_pages

    use_huge_pages()  # as `mode.load` does
    router, clips, images, times = _prepared(given, batch)
    task = Ensemble(router, clips, device="cpu").adapt(CLASSES, top_k=top)

    def run() -> dict[str, Any]:
        for _ in range(times):
            probabilities = task(images)
        np.save(given.folder / f"mode-{batch}-{top}.npy", probabilities.numpy())
        return {"images": batch * times}

    return run


def _four_in_a_row(given: Input, batch: int) -> Run:
    """What one writes with plain open_clip: texts encoded once, images decoded once, four forward passes, a mean."""
    import torch
    import torch.nn.functional as F
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    router, clips, images, times = _prepared(given, batch)
    weights = router.weights([[name] for name in CLASSES])
    size = clips[EXPERTS[0]].preprocess_cfg["size"]
    preprocess = image_transform_v2(PreprocessCfg(size=size), is_train=False)
    texts = {}
    with torch.inference_mode():
        for name, clip in clips.items():
            clip.model.eval()
            texts[name] = F.normalize(clip.model.encode_text(clip.tokenizer(list(CLASSES))), dim=-1)

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            for _ in range(times):
                pixels = torch.stack([preprocess(Image.open(io.BytesIO(image))) for image in images])
                scores, scale = torch.zeros(len(images), len(CLASSES)), 0.0
                for name, clip in clips.items():
                    scores += weights[name] * F.normalize(clip.model.encode_image(pixels), dim=-1) @ texts[name].T
                    scale += weights[name] * clip.model.logit_scale.exp().item()
                probabilities = (scale * scores).softmax(dim=1)
        np.save(given.folder / f"in-a-row-{batch}.npy", probabilities.numpy())
        return {"images": batch * times}

    return run


def _compare(folder: Path, batch: int) -> dict[str, float]:
    ours, theirs = np.load(folder / f"mode-{batch}-None.npy"), np.load(folder / f"in-a-row-{batch}.npy")
    return {"largest_difference": float(np.abs(ours - theirs).max())}


PEER = "four open_clip passes in a row"


def _race(batch: int) -> Race:
    return Race(
        name=f"predict-{batch}",
        step=f"predict batches of {batch} with 4 experts of ViT-S/32, from JPEG bytes to probabilities of 10 classes",
        sides={
            "mode": partial(_ours, batch=batch, top=None),
            "mode, top-1": partial(_ours, batch=batch, top=1),
            PEER: partial(_four_in_a_row, batch=batch),
        },
        targets=(
            Target("at most 1.05x their time", share_of_time("mode", PEER), 1.05, at_most=True),
            Target("top-1 at most 0.3x", share_of_time("mode, top-1", PEER), 0.3, at_most=True),
            Target("the same probabilities within 1e-5", figure("mode", "largest_difference"), 1e-5, at_most=True),
        ),
        make=_make,
        compare=partial(_compare, batch=batch),
        notes="random weights; texts are encoded once on both sides",
    )


RACES = (_race(1), _race(64))
