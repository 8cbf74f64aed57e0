"""The learning rate of every step, as a pure function: nothing to save, nothing to resume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then `wsd` or `cosine`, in optimiser steps since the seed began.

    Attributes:
        kind: `wsd` (warm-up, stable, decay: arXiv 2404.06395) is constant up to `branch` and falls linearly to 0 at
            `end`; `cosine` falls from the end of the warm-up to 0 at `end`.
        lr: the highest rate.
        warmup: steps of linear rise, the first at lr / warmup (as open_clip's).
        branch: the step at which experts leave the seed.
        end: the step at which the rate has reached 0.
        dense_end: where the dense model's schedule ends, if this one leaves it at `branch` for a shorter or longer way
            to `end`: its cosine is then stretched between the two; default `end`.

    Example:
        >>> wsd = Schedule("wsd", lr=1.0, warmup=2, branch=4, end=8)
        >>> [wsd.rate(step) for step in range(8)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    kind: Literal["wsd", "cosine"]
    lr: float
    warmup: int
    branch: int
    end: int
    dense_end: int | None = None

    def rate(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.kind == "wsd":
            left = (self.end - step) / max(1, self.end - self.branch)
            return self.lr * min(1.0, max(0.0, left))
        dense_end = self.end if self.dense_end is None else self.dense_end
        position = float(step)
        if step > self.branch:
            position = self.branch + (step - self.branch) * (dense_end - self.branch) / max(1, self.end - self.branch)
        progress = (position - self.warmup) / max(1, dense_end - self.warmup)
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
