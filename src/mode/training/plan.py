"""What a model is trained on, from which step to which, at which learning rates, and from whose weights.

Steps are optimiser steps counted from the beginning of the seed. With S = the seed's steps and D = the dense model's, a
role trains, by its `length` in `mode.roles`:

| length   | `wsd`                                    | `cosine`                                               |
|----------|------------------------------------------|--------------------------------------------------------|
| `seed`   | 0 to S, constant after the warm-up       | 0 to S of the dense model's cosine                     |
| `dense`  | from the seed at S to D, falling to 0    | from the seed at S to D, the rest of the cosine        |
| `total`  | from the seed at S, for as many steps as | from random weights, for as many steps as the seed and |
|          | all experts together, falling to 0       | all experts together, on a cosine of its own           |
| `expert` | from the seed at S, for D - S steps or   | the same, on the rest of the cosine, stretched to its  |
|          | its own number of epochs, falling to 0   | own length                                             |
| `update` | from a model at its last step, see below | the same                                               |

Training the seed and then the dense model is therefore the same as training the dense model in one go.

With a pretrained seed S is 0: it has taken no step here and left no optimiser state. Every other model then goes on
from its weights with a warm-up and a schedule of its own, wherever it ends: a fine-tuning. So does an expert that is an
adapter, whose parameters are new, from any seed.

An update goes on from an expert whose rate has fallen to 0, and which has left no optimiser state. Its rate warms up
and falls anew: with some old data shown again, that is as good as to train on everything anew (Ibrahim et al., arXiv
2403.08763). It has as many samples for each of its pairs as an expert has for each of its own in D - S steps, and D - S
steps at most. These may be few: a quarter of them at most is warm-up. All of this holds of an expert that is an adapter
as well, whose update trains the very same matrices on.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mode.clip.folder import weights_of
from mode.data.loading.selection import Pairs
from mode.data.shards.index import PairIndex
from mode.errors import ModeError
from mode.files import sha256_of
from mode.params import AdapterParams, ExpertParams, ImageParams, ModelParams, TrainingParams, UpdateParams
from mode.roles import Role


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then `wsd` or `cosine`, in optimiser steps since the seed began.

    Attributes:
        kind: `wsd` (warm-up, stable, decay: arXiv 2404.06395) is constant up to `branch`, or to the end of a warm-up
            that is later, and falls linearly to 0 at `end`; `cosine` falls from the end of the warm-up to 0 at `end`.
        lr: the highest rate.
        warmup: steps of linear rise from `start` on, the first at lr / warmup (as open_clip's).
        branch: the step at which experts leave the seed.
        end: the step at which the rate has reached 0.
        start: the step at which the optimiser begins with no moments.
        dense_end: where the dense model's schedule ends, if this one leaves it at `branch` for a shorter or longer way
            to `end`: its cosine is then stretched between the two; default `end`.
    """

    kind: Literal["wsd", "cosine"]
    lr: float
    warmup: int
    branch: int
    end: int
    dense_end: int | None = None
    start: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        warm = self.start + self.warmup
        if step < warm:
            return self.lr * (step + 1 - self.start) / self.warmup
        if self.kind == "wsd":
            return self.lr * min(1.0, max(0.0, (self.end - step) / max(1, self.end - max(self.branch, warm))))
        dense_end = self.end if self.dense_end is None else self.dense_end
        position = float(step)
        if step > self.branch:
            position = self.branch + (step - self.branch) * (dense_end - self.branch) / max(1, self.end - self.branch)
        progress = (position - warm) / max(1, dense_end - warm)
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True, eq=False)
class TrainPlan:
    """The pairs, steps and learning rates of one training; `steps` and `samples` are its own, not its parent's.

    Attributes:
        role, name: such as `EXPERT` and `expert-3`.
        source, cluster: whose pairs; `cluster` is None where it is all of them.
        pairs: of the index.
        first_step, last_step: half-open range of optimiser steps, counted from the beginning of the seed.
        batch_size: samples per step.
        stream_start: position in the stream of samples at `first_step`.
        schedule: learning rate of every step.
        parent: folder of the model whose weights and optimiser state this training starts from; None: from scratch.
    """

    role: Role
    name: str
    source: str
    cluster: int | None
    pairs: Pairs
    first_step: int
    last_step: int
    batch_size: int
    stream_start: int
    schedule: Schedule
    parent: Path | None

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step

    @property
    def samples(self) -> int:
        return self.steps * self.batch_size

    @property
    def stream_stop(self) -> int:
        """Position in the stream of samples at `last_step`."""
        return self.stream_start + self.samples

    def position(self, step: int) -> int:
        """Position in the stream of samples before `step`."""
        return self.stream_start + (step - self.first_step) * self.batch_size


@dataclass(frozen=True, eq=False)
class Training:
    """Everything that decides what a training computes. Where and how fast it runs is in `MachineParams`.

    Attributes:
        plan: which pairs, which steps, whose weights.
        index: of the source of the pairs.
        model: the architecture, where there is no parent to take it from.
        image: how images are prepared and augmented.
        recipe: batch size, optimiser, precision.
        random_seed: of weights, order of samples, augmentation and dropout.
    """

    plan: TrainPlan
    index: PairIndex
    model: ModelParams
    image: ImageParams
    recipe: TrainingParams
    random_seed: int

    @property
    def parameters(self) -> dict[str, Any]:
        """The sections of params.yaml that decide it, by their names there, without what is only done beside it."""
        return {
            "random_seed": self.random_seed,
            "model": self.model.model_dump(),
            "image": self.image.model_dump(),
            "training": self.recipe.model_dump(exclude=set(self.recipe.BESIDE)),
        }

    @property
    def adapter(self) -> AdapterParams | None:
        """As `adapter_of`."""
        return adapter_of(self.plan.role, self.recipe)

    @cached_property
    def parent_weights(self) -> str | None:
        """SHA-256 of the parent's own weights (`mode.clip.folder.weights_of`); None of a start from random ones."""
        return sha256_of(weights_of(self.plan.parent)) if self.plan.parent is not None else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all of it, with the contents of the index and the parent's weights, as 64 hexadecimal digits."""
        plan = self.plan
        content = {
            "role": plan.role.name,
            "steps": [plan.first_step, plan.last_step],
            "stream_start": plan.stream_start,
            "schedule": vars(plan.schedule),
            "parent": self.parent_weights,
            **self.parameters,
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
        index = self.index.digests("image.npy", "offset.npy", "length.npy", "probability.npy", "caption.utf8")
        for each in (plan.pairs.digest, *index):
            digest.update(each.encode())
        return digest.hexdigest()


def adapter_of(role: Role, recipe: TrainingParams) -> AdapterParams | None:
    """How a role's model is an adapter of the seed's, if it is: experts alone are, and what goes on from them."""
    return recipe.adapter if role.kind == "expert" else None


def make_plan(
    role: Role,
    pairs: Pairs,
    recipe: TrainingParams,
    images: int,
    *,
    key: str | None = None,
    expert: ExpertParams | UpdateParams | None = None,
    experts: int = 0,
    parent: Path | None = None,
    begins: int = 0,
    share: float = 1.0,
) -> TrainPlan:
    """Work out the steps and the schedule of one model.

    Args:
        role: see the table above.
        pairs: that it may see.
        recipe: of all roles.
        images: of the source that the seed is trained on: samples of an epoch if `training.epoch_samples` is null.
        key: which of the models of a role of which there are many.
        expert: what params.yaml says about that key; default: a whole length on the recipe's source and learning rate.
        experts: how many a `total` length counts, each of the common length.
        parent: the seed's folder, or that of the model that an update goes on from; None: from random weights, which an
            expert cannot start from. Ignored where the role starts from random weights anyway: the seed, and a `total`
            length on a cosine.
        begins: the last step of the model that an update goes on from.
        share: the pairs of an update, as a multiple of those that the expert was trained on.

    Raises:
        ModeError: no pairs, fewer samples than one step, a warm-up longer than the seed, an expert without a seed, or
            a `total` length without experts.
    """
    name, epoch = role.model(key), recipe.epoch_samples or images

    def steps_of(epochs: int) -> int:
        return epochs * epoch // recipe.batch_size

    seed, dense = steps_of(recipe.seed_epochs), steps_of(recipe.epochs)
    if role.length is None:
        raise ValueError(f"{role.name} is not trained")
    if not len(pairs):
        raise ModeError(
            f"{name}: no pairs to train on", "lower clustering.coarse or training.held_out, or give more pairs"
        )
    if dense <= seed or (recipe.seed_epochs and seed < 1):
        raise ModeError(
            f"training.epoch_samples: {epoch} samples an epoch are too few for steps of {recipe.batch_size}",
            "set training.epoch_samples or a smaller batch_size",
        )
    if recipe.seed_epochs and recipe.warmup > seed:
        raise ModeError(
            f"training.warmup ({recipe.warmup} steps) exceeds the seed's {seed} steps", "set a shorter warm-up"
        )
    if role.length == "total" and not experts:
        raise ModeError(f"{name}: needs experts whose steps it can match", "set baselines.dense_long: false")
    if role.length in ("expert", "update") and parent is None:
        raise ModeError(f"{name}: needs a seed to branch from", "train the seed first")
    if not recipe.seed_epochs and parent is None:
        raise ModeError(f"{name}: needs the pretrained seed", "`dvc repro seed` makes its folder")
    is_update = role.length == "update"
    from_scratch = role.length == "total" and recipe.schedule == "cosine" and recipe.seed_epochs
    if (role.parent is None and not is_update) or from_scratch:
        parent = None

    common = round((dense - seed) * min(1.0, share)) if is_update else dense - seed
    own = max(1, steps_of(expert.epochs) if expert and expert.epochs is not None else common)
    ends = {"seed": seed, "dense": dense, "total": seed + experts * (dense - seed), "expert": seed + own}
    ends["update"] = begins + own
    first, last = begins if is_update else 0 if parent is None else seed, ends[role.length]
    adapter = adapter_of(role, recipe)
    begins_anew = adapter is not None or is_update
    warmup = min(recipe.warmup, own // 4) if is_update else recipe.warmup
    if not is_update and (adapter or not recipe.seed_epochs) and recipe.warmup >= last - first:
        what = f"training.warmup ({recipe.warmup} steps) is not shorter than {name} ({last - first})"
        raise ModeError(what, "set a shorter warm-up")
    # The pairs of a cluster are a stream of their own. On all pairs, a model goes on where the seed stopped; of many
    # such models, each takes the next stretch of the stream, so that no two of them are the same.
    stream_start = 0 if role.pairs == "cluster" else first + (expert.cluster * (last - first) if expert else 0)
    return TrainPlan(
        role=role,
        name=name,
        source=expert.source if expert else recipe.source,
        cluster=expert.cluster if expert and role.pairs == "cluster" else None,
        pairs=pairs,
        first_step=first,
        last_step=last,
        batch_size=recipe.batch_size,
        stream_start=stream_start * recipe.batch_size,
        schedule=Schedule(
            recipe.schedule,
            (expert and expert.lr) or (adapter and adapter.lr) or recipe.lr,
            warmup,
            branch=seed,
            end=dense if role.length == "seed" else last,
            # Of a schedule that the seed began; from a pretrained one each model has its own, and so has an adapter.
            dense_end=dense if role.length == "expert" and recipe.seed_epochs and not adapter else None,
            start=first if begins_anew else 0,
        ),
        parent=parent,
    )
