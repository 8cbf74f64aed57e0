"""How what arrives differs from what it continues: captions far from every centre, and clusters that fill up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mode.clustering.assignment import Assignment

#: Share of a source's own captions that are nearer to their centre than any that counts as far.
NEAR = 0.99
#: Distances of unit vectors and their means are 0 to 2; they are counted in so many steps.
_STEPS, _LARGEST = 1 << 16, 2.0
#: An expert of their own is advised from such a share of far captions on, which is no chance any more
#: (docs/performance.md), and such a number.
ADVISED_SHARE, ADVISED_PAIRS = 0.02, 100
#: A cluster fills up where its share of the new pairs is so many times its share of the old ones, and more by so much.
_FILLS_TIMES, _FILLS_BY = 1.5, 0.02


@dataclass(frozen=True)
class Counts:
    """An assignment, counted: all that drift is worked out from.

    Attributes:
        distances: int64 [steps], pairs by their distance from the nearest centre.
        coarse: int64 [coarse clusters], pairs of each.
    """

    distances: NDArray[np.int64]
    coarse: NDArray[np.int64]

    @classmethod
    def of(cls, blocks: Iterable[Assignment], coarse: int) -> Counts:
        """Count an assignment, block by block, of so many coarse clusters."""
        distances, sizes = np.zeros(_STEPS, np.int64), np.zeros(coarse, np.int64)
        for block in blocks:
            steps = np.clip(block.distance * (_STEPS / _LARGEST), 0, _STEPS - 1).astype(np.int64)
            distances += np.bincount(steps, minlength=_STEPS)
            sizes += np.bincount(block.coarse, minlength=coarse)
        return cls(distances, sizes)

    @property
    def pairs(self) -> int:
        """How many were counted."""
        return int(self.coarse.sum())


@dataclass(frozen=True)
class ClusterDrift:
    """A coarse cluster before and after.

    Attributes:
        number: of the cluster.
        share, new_share: of the source's own pairs, and of those that arrived.
    """

    number: int
    share: float
    new_share: float

    @property
    def fills_up(self) -> bool:
        """Whether clearly more of what arrives belongs to it than of what was there."""
        return self.new_share >= max(_FILLS_TIMES * self.share, self.share + _FILLS_BY)


@dataclass(frozen=True)
class Drift:
    """One arrival, beside the source that it continues.

    Attributes:
        source, continues: names of the two.
        pairs: that arrived.
        threshold: distance that `NEAR` of the captions of `continues` do not exceed, rounded up to a 32,768th.
        far: captions that arrived and are farther from every centre.
        clusters: all coarse clusters.
    """

    source: str
    continues: str
    pairs: int
    threshold: float
    far: int
    clusters: list[ClusterDrift]

    @property
    def far_share(self) -> float:
        """Of what arrived; without any drift it is at most 1 - `NEAR`."""
        return self.far / self.pairs

    @property
    def needs_expert(self) -> bool:
        """Whether the far captions are so many that an expert of their own is advised."""
        return self.far_share >= ADVISED_SHARE and self.far >= ADVISED_PAIRS

    def sentences(self) -> list[str]:
        """What there is to say, in words."""
        said = [
            f"{self.source}: {self.far_share:.1%} of {self.pairs:,} captions are farther from every centre than"
            f" {NEAR:.0%} of those of {self.continues} (without a change it would be {1 - NEAR:.0%})."
        ]
        said += [
            f"{self.source}: cluster {each.number} fills up: {each.new_share:.0%} of the new pairs are in it,"
            f" {each.share:.0%} of those of {self.continues}."
            for each in self.clusters
            if each.fills_up
        ]
        if self.needs_expert:
            said.append(
                f"{self.source}: {self.far:,} far captions may be worth an expert of their own:"
                " `mode add-source NAME SHARDS` adds their shards as a source with clusters of its own."
            )
        return said


def drift(source: str, new: Counts, continues: str, old: Counts) -> Drift:
    """Compare what arrived with what it continues; both have at least one pair.

    Example:
        >>> old, new = (Counts(np.bincount(steps, minlength=9), np.array([2, 2])) for steps in ([1] * 4, [1, 1, 1, 5]))
        >>> drift("base-2", new, "base", old).far
        1
    """
    last_near = int(np.searchsorted(np.cumsum(old.distances), NEAR * old.pairs))
    return Drift(
        source=source,
        continues=continues,
        pairs=new.pairs,
        threshold=(last_near + 1) * _LARGEST / len(old.distances),
        far=int(new.distances[last_near + 1 :].sum()),
        clusters=[
            ClusterDrift(number, float(before / old.pairs), float(after / new.pairs))
            for number, (before, after) in enumerate(zip(old.coarse, new.coarse, strict=True))
        ],
    )
