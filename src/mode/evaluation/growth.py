"""Accuracy after 0, 1, ... n experts: what training the experts in one order rather than another brings early.

The paper's training-priority experiment: the experts that a task's words weigh most are trained first, and the seed
stands in for the others. Since experts do not depend on each other, the finished experts give every step of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from mode.ensemble.combine import by_model
from mode.ensemble.router import STAND_IN
from mode.ensemble.rules import largest_first
from mode.results import GrowthCurve

#: Experts up to which every number of them is evaluated; beyond, the powers of two.
EVERY_STEP = 16
#: The order by the task's weights, and its reverse as a control.
ORDERS = ("by_task", "reversed")


def steps(experts: int) -> list[int]:
    """Numbers of experts to evaluate, from none to all.

    >>> steps(3), steps(40)
    ([0, 1, 2, 3], [0, 1, 2, 4, 8, 16, 32, 40])
    """
    if experts <= EVERY_STEP:
        return list(range(experts + 1))
    return [0, *(2**power for power in range(experts.bit_length()) if 2**power < experts), experts]


def partial_members(members: Mapping[str, str], weights: Mapping[str, float]) -> dict[str, dict[str, str]]:
    """The ensemble with only its first experts: `by_task 0`, `by_task 1`, ..., `reversed n` -> expert -> model.

    `members` is expert -> the model that answers for it, `weights` expert -> its weight for the task.
    """
    order = largest_first(weights)
    return {
        f"{kind} {count}": {expert: members[expert] if expert in ordered[:count] else STAND_IN for expert in order}
        for kind, ordered in zip(ORDERS, (order, order[::-1]), strict=True)
        for count in steps(len(order))
    }


def partial_ensembles(members: Mapping[str, str], weights: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """`partial_members` -> model -> weight."""
    partial = partial_members(members, weights)
    return {name: {STAND_IN: 0.0} | by_model(models, weights) for name, models in partial.items()}


def growth_of(weights: Mapping[str, float], figures: Mapping[str, float]) -> GrowthCurve:
    """One task's curves, from the figures of its partial ensembles."""
    counts = steps(len(weights))
    by_task, reverse = ([figures[f"{kind} {count}"] for count in counts] for kind in ORDERS)
    return GrowthCurve(order=largest_first(weights), experts=counts, by_task=by_task, reversed=reverse)


def mean_growth(tasks: Sequence[GrowthCurve]) -> GrowthCurve:
    """Mean over tasks of the same experts, undefined where one of them is; empty without a task."""
    if not tasks:
        return GrowthCurve()
    by_task, reverse = (
        [fmean(math.nan if value is None else value for value in step) for step in zip(*curves, strict=True)]
        for curves in ([task.by_task for task in tasks], [task.reversed for task in tasks])
    )
    return GrowthCurve(experts=tasks[0].experts, by_task=by_task, reversed=reverse)
