"""Cosine similarities of several models and of their ensembles, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mode.ensemble.combine import combine

#: How models become an ensemble: a weight per model, or a function of (first row, model -> similarities of the rows).
Mixing = Mapping[str, float] | Callable[[int, Mapping[str, NDArray[Any]]], NDArray[Any]]

#: Similarities of one model that are held at once (64 MB of float32).
BLOCK = 2**24


def similarity_blocks(
    rows: Mapping[str, Tensor],
    columns: Mapping[str, Tensor],
    ensembles: Mapping[str, Mixing],
    block: int = BLOCK,
) -> Iterator[tuple[int, str, NDArray[Any]]]:
    """Similarities of every row with every column, by each model and each ensemble.

    Args:
        rows: model -> unit vectors [r, d], d may differ by model.
        columns: model -> unit vectors [c, d].
        ensembles: name -> weight per model, the scores being weighted sums of the models' similarities; or a function
            that computes them.
        block: similarities of one model held at once; memory is that times the number of models and one.

    Yields:
        (number of the first row, name of the model or ensemble, float32 [rows of the block, c]); for each block of rows
        all models, then all ensembles.
    """
    first = next(iter(rows))
    step = max(1, block // max(1, len(columns[first])))
    for start in range(0, len(rows[first]), step):
        stop = start + step
        similarities = {name: (rows[name][start:stop] @ columns[name].T).cpu().numpy() for name in rows}
        for name, scores in similarities.items():
            yield start, name, scores
        for name, mixing in ensembles.items():
            scores = mixing(start, similarities) if callable(mixing) else combine(similarities, mixing)
            yield start, name, scores.astype(np.float32, copy=False)
