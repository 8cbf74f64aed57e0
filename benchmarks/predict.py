"""Prediction: images through four experts, against four forward passes in a row."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import Input, Race, Run, Side, Target, share_of_time
from benchmarks.pictures import captions, make_pictures

#: The model, and predictions in one timed run by batch size.
SIZES = {"quick": ("demo", {1: 2, 64: 1}), "full": ("ViT-S-32", {1: 20, 64: 1}), "large": ("ViT-B-32", {1: 20, 64: 1})}
EXPERTS = ("expert-0", "expert-1", "expert-2", "expert-3")
CLASSES = tuple(f"a thing of kind {number}" for number in range(10))


def _make(given: Input) -> None:
    import pickle

    import numpy as np

    from mode.clustering.hierarchy import fit_clusters
    from mode.embedding.base import build_embedder
    from mode.ensemble.router import Router
    from mode.params import ClusteringParams, EmbeddingParams, RoutingParams

    texts = [*captions(2_000), *CLASSES]
    embedder = build_embedder(EmbeddingParams(dimensions=32), texts, random_seed=0)
    clusters = fit_clusters(embedder.encode(texts), ClusteringParams(fine=16), 16, 4, random_seed=0)
    conditions = {name: clusters.condition(number) for number, name in enumerate(EXPERTS)}
    Router.fit(conditions, embedder, RoutingParams(), texts, 0).save(given.folder / "router")
    (given.folder / "images.pickle").write_bytes(pickle.dumps(make_pictures(64 if given.size != "quick" else 4)))
    np.save(given.folder / "classes.npy", np.arange(len(CLASSES)))


def _models(given: Input) -> dict[str, Any]:
    from mode.clip.model import build_model
    from mode.params import ImageParams, ModelParams, load_params

    name = SIZES[given.size][0]
    model, image = ModelParams(name=name), ImageParams(size=224)
    if name == "demo":
        demo = load_params(Path(__file__).parents[1] / "params.yaml")
        model, image = demo.model, demo.image
    return {expert: build_model(model, image, captions(500), seed) for seed, expert in enumerate(EXPERTS)}


def _images(given: Input, batch: int) -> list[bytes]:
    import pickle

    images: list[bytes] = pickle.loads((given.folder / "images.pickle").read_bytes())
    return (images * batch)[:batch]


def _ours(given: Input, batch: int, top: int | None) -> Run:
    from mode.processes import use_huge_pages

    use_huge_pages()  # as `mode.load` does
    import numpy as np

    from mode.ensemble.model import Ensemble
    from mode.ensemble.router import Router

    ensemble = Ensemble(Router.load(given.folder / "router"), _models(given), device="cpu")
    task = ensemble.adapt(CLASSES, top_k=top)
    images, times = _images(given, batch), SIZES[given.size][1][batch]

    def run() -> dict[str, Any]:
        for _ in range(times):
            probabilities = task(images)
        np.save(given.folder / f"mode-{batch}-{top}.npy", probabilities.numpy())
        return {"images": batch * times}

    return run


def _four_in_a_row(given: Input, batch: int) -> Run:
    """What one writes with plain open_clip: texts encoded once, images decoded once, four forward passes, a mean."""
    import io

    import numpy as np
    import torch
    import torch.nn.functional as F
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    from mode.ensemble.router import Router

    clips = _models(given)
    weights = Router.load(given.folder / "router").weights([[name] for name in CLASSES])
    clip = clips[EXPERTS[0]]
    preprocess = image_transform_v2(PreprocessCfg(size=clip.preprocess_cfg["size"]), is_train=False)
    images, times = _images(given, batch), SIZES[given.size][1][batch]
    texts = {}
    with torch.inference_mode():
        for name, clip in clips.items():
            clip.model.eval()
            texts[name] = F.normalize(clip.model.encode_text(clip.tokenizer(list(CLASSES))), dim=-1)

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            for _ in range(times):
                pixels = torch.stack([preprocess(Image.open(io.BytesIO(image))) for image in images])
                scores = torch.zeros(len(images), len(CLASSES))
                scale = 0.0
                for name, clip in clips.items():
                    scores += weights[name] * F.normalize(clip.model.encode_image(pixels), dim=-1) @ texts[name].T
                    scale += weights[name] * clip.model.logit_scale.exp().item()
                probabilities = (scale * scores).softmax(dim=1)
        np.save(given.folder / f"in-a-row-{batch}.npy", probabilities.numpy())
        return {"images": batch * times}

    return run


def _compare(folder: Path, batch: int) -> dict[str, float]:
    import numpy as np

    ours, theirs = np.load(folder / f"mode-{batch}-None.npy"), np.load(folder / f"in-a-row-{batch}.npy")
    return {"largest_difference": float(np.abs(ours - theirs).max())}


def _race(batch: int) -> Race:
    return Race(
        name=f"predict-{batch}",
        step=f"predict batches of {batch} with 4 experts of ViT-S/32, from JPEG bytes to probabilities of 10 classes",
        sides=(
            Side("mode", partial(_ours, batch=batch, top=None)),
            Side("mode, top-1", partial(_ours, batch=batch, top=1)),
            Side("four open_clip passes in a row", partial(_four_in_a_row, batch=batch)),
        ),
        targets=(
            Target("at most 1.05x their time", share_of_time("mode", "four open_clip passes in a row"), 1.05, True),
            Target(
                "top-1 at most 0.3x", share_of_time("mode, top-1", "four open_clip passes in a row"), 0.3, at_most=True
            ),
            Target(
                "the same probabilities within 1e-5",
                lambda sides: sides["mode"].figures["largest_difference"],
                1e-5,
                at_most=True,
            ),
        ),
        make=_make,
        compare=partial(_compare, batch=batch),
        notes="random weights; texts are encoded once on both sides",
    )


RACES = (_race(1), _race(64))
