"""Nearest centre, exactly, with faiss: on the GPU when there is one."""

from __future__ import annotations

from functools import cache
from typing import Any

import faiss
import numpy as np


class NearestCentre:
    """The centres c with the smallest |x - c|^2 + price(c).

    A price is one more coordinate: with x' = (x, 0) and c' = (c, sqrt(price)) the sum is |x' - c'|^2, so faiss's exact
    L2 search does all the work. Only differences between prices matter, hence they are shifted to be at least 0.

    Args:
        centres: float32 [k, d].
        prices: [k], default all equal.
    """

    def __init__(self, centres: np.ndarray, prices: np.ndarray | None = None) -> None:
        extended = np.zeros((len(centres), centres.shape[1] + 1), dtype=np.float32)
        extended[:, :-1] = centres
        if prices is not None:
            extended[:, -1] = np.sqrt(prices - prices.min())
        index = faiss.IndexFlatL2(extended.shape[1])
        self._index = faiss.index_cpu_to_gpu(_gpu(), 0, index) if faiss.get_num_gpus() else index
        self._index.add(extended)

    def search(self, block: np.ndarray, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The `count` nearest centres of each row of a block (as `Rows` gives them), nearest first.

        Returns:
            priced squared distances, float32 [b, count], and numbers of centres, int64 [b, count].
        """
        distances, numbers = self._index.search(block, count)
        return np.maximum(distances, 0.0), numbers


@cache
def _gpu() -> Any:
    """Working memory of faiss on the GPU: taken once, as that takes a second."""
    return faiss.StandardGpuResources()
