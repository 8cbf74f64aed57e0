"""Accuracy expert by expert: orders and ensembles worked out by hand, and the ends of the line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode.evaluation.growth import growth_of, mean_growth, partial_ensembles, steps
from mode.results import GrowthCurve

WEIGHTS = {"expert-0": 0.2, "expert-1": 0.5, "expert-2": 0.3}
OWN = {expert: expert for expert in WEIGHTS}


def test_every_number_of_few_experts_and_some_of_many() -> None:
    assert steps(0) == [0]
    assert steps(16) == list(range(17))
    assert steps(17) == [0, 1, 2, 4, 8, 16, 17]
    assert steps(32) == [0, 1, 2, 4, 8, 16, 32]


def test_the_seed_has_the_weights_of_experts_that_are_not_there_yet() -> None:
    ensembles = partial_ensembles(OWN, WEIGHTS)
    assert ensembles["by_task 0"] == {"seed": pytest.approx(1.0)}
    assert ensembles["by_task 1"] == {"seed": pytest.approx(0.5), "expert-1": 0.5}
    assert ensembles["by_task 2"] == {"seed": 0.2, "expert-1": 0.5, "expert-2": 0.3}
    assert ensembles["reversed 1"] == {"seed": pytest.approx(0.8), "expert-0": 0.2}
    assert ensembles["by_task 3"] == ensembles["reversed 3"] == {"seed": 0.0, **WEIGHTS}


def test_an_expert_that_was_never_trained_stays_the_seed() -> None:
    ensembles = partial_ensembles({**OWN, "expert-1": "seed"}, WEIGHTS)
    assert ensembles["by_task 1"] == {"seed": pytest.approx(1.0)}
    assert ensembles["by_task 3"] == {"seed": 0.5, "expert-0": 0.2, "expert-2": 0.3}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_weights_are_kept_whole(values: list[float]) -> None:
    weights = {f"expert-{number}": value for number, value in enumerate(values)}
    for router in partial_ensembles({expert: expert for expert in weights}, weights).values():
        assert sum(router.values()) == pytest.approx(sum(values))


def test_figures_and_their_mean() -> None:
    figures = {"by_task 0": 0.1, "by_task 1": 0.5, "by_task 2": 0.6, "reversed 0": 0.1, "reversed 1": 0.2}
    first = growth_of({"a": 0.3, "b": 0.7}, {**figures, "reversed 2": 0.6})
    assert first == GrowthCurve(order=["b", "a"], experts=[0, 1, 2], by_task=[0.1, 0.5, 0.6], reversed=[0.1, 0.2, 0.6])
    second = first.model_copy(update={"order": ["a", "b"], "by_task": [0.3, 0.5, None]})
    mean = mean_growth([first, second])
    assert mean.experts == [0, 1, 2]
    assert mean.by_task == [pytest.approx(0.2), 0.5, None]
    assert mean.reversed == pytest.approx([0.1, 0.2, 0.6])
    assert mean_growth([]) == GrowthCurve()
