"""The ensemble: the experts' conditions, their routing rule, and the training pairs that it is calibrated on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mode.errors import ModeError
from mode.roles import SEED
from mode.stages.pairs import seen_rows
from mode.stages.project import Project, sample_captions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mode.data.loading.store import ImageStore
    from mode.data.shards.index import PairIndex
    from mode.embedding.base import Embedder
    from mode.ensemble.evidence import Captions

#: Pairs that the weights of `merged-layers` are learned on: 64 steps of 128.
SOUP_PAIRS = 8_192


def ensemble(project: Project) -> None:
    """The experts' conditions and a routing rule that is calibrated on training captions."""
    from mode.checksums import content_of
    from mode.clustering.assignment import Assignment, same_embedder
    from mode.clustering.hierarchy import Clusters
    from mode.embedding.base import load_embedder
    from mode.ensemble.router import Router

    experts, versions = project.params.members, project.params.versions.values()
    sources = list(dict.fromkeys(params.source for params in experts.values()))
    clusters = {source: Clusters.load(project.clusters(source)) for source in sources}
    embedder = load_embedder(project.embedder)
    present = {"embedder": content_of(project.embedder)}
    for source in sources:
        assignment = project.assignment(source)
        same_embedder(project.clusters(source), clusters[source].origin, project.embedder, present)
        same_embedder(assignment, Assignment.origin(assignment), project.embedder, present)
    conditions = {name: clusters[params.source].condition(params.cluster) for name, params in experts.items()}
    routing, random_seed = project.params.routing, project.params.random_seed
    if embedder.view == "image":
        router = Router.fit_to_images(conditions, embedder, routing, *_image_views(project, sources, embedder))
    else:
        evidence = {name: evidence_of(project, name) for name in experts} if routing.kind == "evidence" else {}
        router = Router.fit(conditions, embedder, routing, calibration_captions(project), random_seed, evidence)
    images = {name: _kept_images(project, name) for name in experts}
    earlier = {names[-1]: names[-2::-1] for names in versions if len(names) > 1}
    replace(router, images=images, earlier=earlier).save(project.ensemble)
    temperature = f", temperature {router.temperature:.4g}" if router.temperature is not None else ""
    print(f"{len(experts)} experts, {routing.kind} routing{' by image' if router.by_image else ''}{temperature}")


def _image_views(
    project: Project, sources: Sequence[str], embedder: Embedder
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors of training images of all sources alike, as a whole and in part."""
    import numpy as np

    from mode.embedding.open_clip import OpenClipEmbedder
    from mode.ensemble.views import image_views

    assert isinstance(embedder, OpenClipEmbedder)  # no other has a view of images
    count = -(-project.params.routing.calibration_captions // len(sources))
    views = [
        image_views(embedder, project.load_index(source), project.root, count, project.params.random_seed)
        for source in sources
    ]
    whole, partial = (np.concatenate(each) for each in zip(*views, strict=True))
    return whole, partial


def calibration_captions(project: Project) -> list[str]:
    """Training captions of the experts' sources, that the routing is calibrated on."""
    sources = dict.fromkeys(params.source for params in project.params.experts.values())
    count, random_seed = project.params.routing.calibration_captions, project.params.random_seed
    return [
        caption for source in sources for caption in sample_captions(project.load_index(source), count, random_seed)
    ]


def evidence_of(project: Project, expert: str) -> Captions:
    """Some training captions of an expert's cluster with their vectors, those of held-out images left out.

    An expert that was trained on has those of all its sources, in proportion to their pairs.

    Raises:
        ModeError: the vectors are missing, damaged, or of another index or embedder than the assignment.
    """
    import numpy as np

    from mode.clustering.assignment import Assignment, same_embedder
    from mode.clustering.rows import Rows
    from mode.ensemble.evidence import Captions
    from mode.vectors import load_vectors, origin_of

    most = max(1, project.params.routing.evidence_captions // len(project.params.experts))
    texts, found = [], []
    for source, rows in _drawn_rows(project, expert, most):
        path, assignment = project.vectors(source), project.assignment(source)
        index, vectors = project.load_index(source), load_vectors(path)
        same_embedder(path, origin_of(path), assignment, Assignment.origin(assignment))
        if len(vectors) != len(index):
            raise ModeError(f"{path}: {len(vectors)} vectors, {len(index)} pairs in the index", "embed again")
        drawn = np.sort(rows)
        texts += index.captions(drawn)
        found.append(Rows(vectors, drawn).take(np.arange(len(drawn)))[:, :-1])
    return Captions(texts, np.concatenate(found))


def _drawn_rows(project: Project, expert: str, most: int) -> list[tuple[str, NDArray[np.int64]]]:
    """So many training pairs of an expert's cluster, or all if there are fewer: by source, in random order.

    Of several sources each has its share.
    """
    import numpy as np

    from mode.permutation import permuted

    params, random_seed = project.params.members[expert], project.params.random_seed
    sources = project.params.sources_of(expert)
    totals = [
        sum(len(rows) for rows in seen_rows(project, source, params.cluster, outside_share=0.0)) for source in sources
    ]
    wanted = min(sum(totals), most)
    # Whole numbers that add up to all of them.
    ends = np.round(np.cumsum(totals) * (wanted / max(1, sum(totals)))).astype(int)
    found = []
    for source, total, number in zip(sources, totals, np.diff(ends, prepend=0).tolist(), strict=True):
        # Which of them by number, in one pass over the assignment; and these, in another.
        numbers = permuted(np.arange(number), total, random_seed, params.cluster)
        drawn, first = np.empty(len(numbers), np.int64), 0
        for rows in seen_rows(project, source, params.cluster, outside_share=0.0):
            here = np.flatnonzero((first <= numbers) & (numbers < first + len(rows)))
            drawn[here] = rows[numbers[here] - first]
            first += len(rows)
        found.append((source, drawn))
    return found


def _kept_images(project: Project, expert: str) -> NDArray[np.uint8]:
    """Some training images of an expert's cluster, for the statistics of merged models."""
    import numpy as np

    from mode.clip.configuration import image_of_folder
    from mode.ensemble.router import images_to_keep

    random_seed = project.params.random_seed
    size = image_of_folder(project.model(SEED.name), project.params.image).size
    parts = []
    for source, drawn in _drawn_rows(project, expert, images_to_keep(len(project.params.experts), size)):
        pixels, good = _inference_images(project, project.load_index(source), drawn).load(drawn)
        parts.append(pixels.numpy()[good])
    kept: NDArray[np.uint8] = np.concatenate(parts)
    # Those of several sources are mixed: whoever takes some takes the first ones.
    return kept if len(parts) == 1 else kept[np.random.default_rng(random_seed).permutation(len(kept))]


def soup_pairs(project: Project) -> Iterator[tuple[Tensor, list[str]]]:
    """Training pairs of all experts alike, each once, mixed, in batches of a training's size; a bad image is left out.

    A batch is read when it is asked for, each of its sources by itself.
    """
    import numpy as np
    import torch

    members, size = project.params.members, project.params.training.batch_size
    parts = [part for name in members for part in _drawn_rows(project, name, SOUP_PAIRS // len(members))]
    sources = [*dict.fromkeys(source for source, _ in parts)]
    of = np.concatenate([np.full(len(rows), sources.index(source)) for source, rows in parts])
    drawn = np.concatenate([rows for _, rows in parts])
    indexes = [project.load_index(source) for source in sources]
    stores = [_inference_images(project, index, drawn[of == number]) for number, index in enumerate(indexes)]
    order = np.random.default_rng(project.params.random_seed).permutation(len(drawn))
    # The last batch may have fewer than another, and would count as much: it is left out, unless it is the only one.
    for first in range(0, max(1, len(order) - size + 1), size):
        images, captions = [], list[str]()
        for number, (store, index) in enumerate(zip(stores, indexes, strict=True)):
            batch = order[first : first + size]
            rows = drawn[batch[of[batch] == number]]
            pixels, good = store.load(rows)
            images.append(pixels[torch.from_numpy(good)])
            captions += index.captions(rows[good])
        yield torch.cat(images), captions


def _inference_images(project: Project, index: PairIndex, rows: NDArray[np.int64]) -> ImageStore:
    """Reads some pairs' images as the models take them at inference."""
    from mode.clip.configuration import image_of_folder
    from mode.data.loading.store import ImageStore

    image = image_of_folder(project.model(SEED.name), project.params.image.model_copy(update={"crop_scale": None}))
    return ImageStore(index, project.root, image, cache_mb=0, rows=rows)
