"""The fine clusters nearest to words or phrases: one expert is trained on them for a purpose (paper, Tables 8, 17)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mode.clustering.hierarchy import nearest_centres
from mode.embedding.base import Embedder, text_part
from mode.errors import ModeError


def near_phrases(embedder: Embedder, phrases: Sequence[str], nearest: int) -> Callable[[np.ndarray], np.ndarray]:
    """What `fit_clusters` takes as `near_targets`; phrases of which the embedder knows no word are named and left out.

    Args:
        embedder: of the clustered vectors; of view `both`, phrases are compared with the texts' halves of the centres.
        phrases: words or phrases, at least one.
        nearest: fine clusters of each.

    Raises:
        ModeError: the embedder knows no word of any.
    """
    points = embedder.encode(phrases)
    known = np.asarray(points.any(axis=1))
    if not known.any():
        raise ModeError(
            f"clustering.targets: embedder '{embedder.name}' knows no word of {', '.join(phrases[:5])}",
            "words that the captions have, or another embedder",
        )
    if unknown := [phrase for phrase, is_known in zip(phrases, known, strict=True) if not is_known]:
        print(f"{len(unknown)} of {len(phrases)} targets have no known word: {', '.join(unknown[:10])}")
    return lambda centres: nearest_centres(points[known], text_part(centres, embedder.view), nearest)
