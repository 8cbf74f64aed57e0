"""A map of the fine clusters: near each other where their captions are alike, coloured by the expert that has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from mode.reporting.rendering import render
from mode.reporting.summary import Cluster

#: Below so many centres their two main axes say all; beyond so many t-SNE takes minutes, and they have to do.
FEW, MANY = 8, 5_000
#: Up to so many, all distances are worked out sooner than those of trees: 64 take 0.3 processor seconds in place of 8.
EXACT = 512
#: As t-SNE's authors have it. scikit-learn's 12 throws single ones of few centres far out, and fits all of them worse.
EXAGGERATION = 4.0
#: Width and height of the drawing, its margin, and the radius of the largest cluster and of the smallest, in its own
#: units; so many clusters that all together they would cover more than a share of it are drawn smaller.
SIZE, MARGIN, LARGEST, SMALLEST, COVERED = (1000, 560), 26, 15.0, 2.5, 0.15
WORDS = 6


def places(centres: NDArray[np.floating], random_seed: int) -> NDArray[np.float64]:
    """Where to draw fine centres: t-SNE (van der Maaten and Hinton, 2008; scikit-learn's) from their main axes.

    Args:
        centres: float [m, d].
        random_seed: of t-SNE; the same gives the same map.

    Returns:
        float64 [m, 2] in 0..1. Distances on the map are ordinal at best: near is alike, far says little.

    Example:
        >>> places(np.array([[0.0, 0.0], [0.0, 4.0], [0.0, 1.0]]), random_seed=0)[:, 0].round(6).tolist()
        [0.0, 1.0, 0.25]
    """
    flat = np.asarray(centres, np.float64)
    flat = flat - flat.mean(axis=0)
    if FEW <= len(flat) <= MANY:
        from sklearn.manifold import TSNE

        method = "exact" if len(flat) <= EXACT else "barnes_hut"
        perplexity = min(30.0, (len(flat) - 1) / 3)
        tsne = TSNE(
            2,
            perplexity=perplexity,
            early_exaggeration=EXAGGERATION,
            init="pca",
            random_state=random_seed,
            method=method,
        )
        flat = tsne.fit_transform(flat).astype(np.float64)
    else:
        left, scale, _ = np.linalg.svd(flat, full_matrices=False)
        left = left * np.sign(left[np.abs(left).argmax(axis=0), range(left.shape[1])])  # the same on every machine
        flat = np.pad(left * scale, ((0, 0), (0, 2)))[:, :2]
    spread = np.ptp(flat, axis=0)
    # A direction without any spread is drawn in the middle.
    placed: NDArray[np.float64] = np.full_like(flat, 0.5)
    np.divide(flat - flat.min(axis=0), spread, out=placed, where=spread > 1e-9)
    return placed


def draw_map(clusters: Sequence[Cluster]) -> Markup:
    """The map as inline SVG, whose points tell their words when pointed at; empty without fine clusters.

    Args:
        clusters: with their `fine` clusters; the colours are those of their order.
    """
    sizes = [fine.size for cluster in clusters for fine in cluster.fine]
    largest = max(sizes, default=0)
    if not largest:
        return Markup()
    area = math.pi * LARGEST**2 * sum(sizes) / largest
    scale = min(1.0, (COVERED * SIZE[0] * SIZE[1] / area) ** 0.5)
    points = []
    for position, cluster in enumerate(clusters):
        for fine in cluster.fine:
            x, y = (MARGIN + place * (side - 2 * MARGIN) for place, side in zip((fine.x, fine.y), SIZE, strict=True))
            radius = scale * max(SMALLEST, LARGEST * (fine.size / largest) ** 0.5)  # area by size
            said = f"{cluster.name}: {', '.join(fine.words[:WORDS]) or '(no words)'} ({fine.size:,} captions)"
            points.append((x, y, radius, position, said))
    return Markup(render("map.svg", size=SIZE, points=points, coarse=len(clusters)))
