"""What a trial is timed by, and made-up centres to try. Imports little: benchmarks that measure memory use it, too."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from mode.clustering.hierarchy import Clusters

Result = TypeVar("Result")


def cpu_seconds(work: Callable[[], Result]) -> tuple[float, Result]:
    """CPU time that this process takes for it, and what comes out."""
    before = time.process_time()
    result = work()
    return time.process_time() - before, result


def clusters_at(centres: np.ndarray, coarse: int) -> Clusters:
    """Clusters with these fine centres, dealt out to the coarse ones in turn; their sizes mean nothing."""
    from mode.clustering.hierarchy import Clusters

    count = len(centres)
    return Clusters(
        fine_centres=centres,
        coarse_of_fine=(np.arange(count) % coarse).astype(np.int32),
        coarse_centres=centres[:coarse],
        fine_sizes=np.ones(count, np.int64),
        coarse_sizes=np.full(coarse, count // coarse),
        strategy="two-level",
        random_seed=0,
    )
