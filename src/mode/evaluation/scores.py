"""Cosine similarities of several models and of their mixtures, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mode.ensemble.mixture import combine

#: Similarities of one model that are held at once (64 MB of float32).
BLOCK = 2**24


def similarity_blocks(
    rows: Mapping[str, Tensor],
    columns: Mapping[str, Tensor],
    mixtures: Mapping[str, Mapping[str, float]],
    block: int = BLOCK,
) -> Iterator[tuple[int, str, NDArray[Any]]]:
    """Similarities of every row with every column, by each model and each mixture of models.

    Args:
        rows: model -> unit vectors [r, d], d may differ by model.
        columns: model -> unit vectors [c, d].
        mixtures: name -> weight per model; their scores are the weighted sums of the models' similarities.
        block: similarities of one model held at once; memory is that times the number of models and one.

    Yields:
        (number of the first row, name of the model or mixture, float32 [rows of the block, c]); for each block of rows
        all models, then all mixtures.
    """
    first = next(iter(rows))
    step = max(1, block // max(1, len(columns[first])))
    for start in range(0, len(rows[first]), step):
        stop = start + step
        similarities = {name: (rows[name][start:stop] @ columns[name].T).cpu().numpy() for name in rows}
        for name, scores in similarities.items():
            yield start, name, scores
        for name, weights in mixtures.items():
            yield start, name, combine(similarities, weights).astype(np.float32, copy=False)
