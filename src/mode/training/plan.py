"""What a role trains on, from which step to which, and from whose weights: how seed, dense and experts relate.

Steps are optimiser steps counted from the beginning of the seed. With S = the seed's steps and D = the dense model's:

| role       | `wsd`                                   | `cosine`                                          |
|------------|-----------------------------------------|---------------------------------------------------|
| seed       | 0 to S, constant after the warm-up      | 0 to S of the dense model's cosine                |
| dense      | the seed from S to D, falling to 0      | the seed from S to D, the rest of the cosine      |
| dense-long | the seed from S on for as many steps as | from scratch for as many steps as seed and        |
|            | all experts together, falling to 0      | experts together: its cosine is another from 0 on |
| expert     | the seed from S on its own pairs, for   | the same, on the rest of the cosine               |
|            | its own steps, falling to 0             |                                                   |

Seed then dense is therefore the same as one uninterrupted dense training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mode.errors import ModeError
from mode.params import TrainingParams
from mode.training.schedule import Schedule

Role = Literal["seed", "dense", "dense-long", "expert"]


@dataclass(frozen=True)
class TrainPlan:
    """One training, completely.

    Attributes:
        role, name: such as `expert` and `expert-3`.
        source, cluster: whose pairs; `cluster` is None where it is all of them.
        rows: pairs, rows of the index, int64.
        first_step, last_step: half-open range of optimiser steps, counted from the beginning of the seed.
        batch_size: samples of a step.
        stream_start: position in the stream of samples at `first_step`.
        schedule: learning rate of a step.
        parent: the seed's folder, whose weights and optimiser state this training goes on from; None: from scratch.
    """

    role: Role
    name: str
    source: str
    cluster: int | None
    rows: NDArray[np.int64]
    first_step: int
    last_step: int
    batch_size: int
    stream_start: int
    schedule: Schedule
    parent: Path | None

    @property
    def steps(self) -> int:
        """Optimiser steps of this training itself."""
        return self.last_step - self.first_step

    @property
    def samples(self) -> int:
        """Samples of this training itself."""
        return self.steps * self.batch_size

    @property
    def stream_stop(self) -> int:
        """Position in the stream of samples at `last_step`."""
        return self.stream_start + self.samples

    def position(self, step: int) -> int:
        """Position in the stream of samples before `step`."""
        return self.stream_start + (step - self.first_step) * self.batch_size


def make_plan(
    role: Role,
    name: str,
    rows: NDArray[np.int64],
    training: TrainingParams,
    images: int,
    *,
    source: str,
    cluster: int | None = None,
    parent: Path | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    expert_epochs: Sequence[int | None] = (),
) -> TrainPlan:
    """Work out a role's steps and schedule.

    Args:
        role: see the table above.
        name: of the model.
        rows: the pairs it may see, rows of the index.
        training: the recipe.
        images: of the source that the seed is trained on: samples of an epoch if `training.epoch_samples` is null.
        source, cluster: noted on the card.
        parent: the seed's folder. Needed by an expert; `dense` and `dense-long` without it start from scratch, and
            `dense-long` with a cosine always does.
        epochs, lr: an expert's own, in place of those of `training`.
        expert_epochs: of `dense-long`: every expert's own epochs, None where it has none.

    Raises:
        ModeError: no pairs, fewer samples than one step, a warm-up longer than the seed, an expert without a seed, or
            a `dense-long` without experts.
    """
    if role not in get_args(Role):
        raise ModeError(f"no training role is called '{role}'", f"there are: {', '.join(get_args(Role))}")
    if not len(rows):
        raise ModeError(f"{name}: no pairs to train on")
    steps = _Steps(training, training.epoch_samples or images)
    seed, dense = steps.seed, steps.dense
    if training.warmup > seed:
        raise ModeError(
            f"training.warmup ({training.warmup} steps) exceeds the seed's {seed} steps", "set a shorter warm-up"
        )

    first, last, dense_end = (0 if parent is None else seed), dense, None
    if role == "seed":
        first, last, parent = 0, seed, None
    elif role == "expert":
        if parent is None:
            raise ModeError(f"{name}: an expert needs a seed to branch from")
        last, dense_end = seed + steps.of_expert(epochs), dense
    elif role == "dense-long":
        if not expert_epochs:
            raise ModeError(
                f"{name}: dense-long needs experts whose steps it can match", "set baselines.dense_long: false"
            )
        last = seed + sum(steps.of_expert(own) for own in expert_epochs)
        if training.schedule == "cosine":
            first, parent = 0, None
    end = dense if role == "seed" else last
    return TrainPlan(
        role=role,
        name=name,
        source=source,
        cluster=cluster,
        rows=rows,
        first_step=first,
        last_step=last,
        batch_size=training.batch_size,
        # An expert's pairs are a stream of their own; the others go on with the seed's.
        stream_start=0 if role == "expert" else first * training.batch_size,
        schedule=Schedule(
            training.schedule, lr or training.lr, training.warmup, branch=seed, end=end, dense_end=dense_end
        ),
        parent=parent,
    )


class _Steps:
    """Epochs to optimiser steps."""

    def __init__(self, training: TrainingParams, epoch_samples: int) -> None:
        self._epoch_samples, self._batch_size = epoch_samples, training.batch_size
        self.seed = self._of(training.seed_epochs)
        self.dense = self._of(training.epochs)
        if self.seed < 1 or self.dense <= self.seed:
            raise ModeError(
                f"training.epoch_samples: {epoch_samples} samples an epoch are too few for steps of"
                f" {training.batch_size}",
                "set training.epoch_samples or a smaller batch_size",
            )

    def of_expert(self, epochs: int | None) -> int:
        return self.dense - self.seed if epochs is None else max(1, self._of(epochs))

    def _of(self, epochs: int) -> int:
        return epochs * self._epoch_samples // self._batch_size
