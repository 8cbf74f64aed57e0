from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode.training.schedule import Schedule


def test_wsd_by_hand() -> None:
    wsd = Schedule("wsd", lr=1.0, warmup=2, branch=4, end=8)
    assert [wsd.rate(step) for step in range(8)] == [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_by_hand() -> None:
    cosine = Schedule("cosine", lr=2.0, warmup=1, branch=4, end=5)
    expected = [2.0, 2.0, 1 + math.cos(math.pi / 4), 1.0, 1 + math.cos(3 * math.pi / 4)]
    assert [cosine.rate(step) for step in range(5)] == pytest.approx(expected)


def test_an_expert_of_equal_length_follows_the_dense_cosine() -> None:
    dense = Schedule("cosine", lr=1.0, warmup=3, branch=20, end=30)
    expert = Schedule("cosine", lr=1.0, warmup=3, branch=20, end=30, dense_end=30)
    assert [expert.rate(step) for step in range(20, 30)] == [dense.rate(step) for step in range(20, 30)]


def test_a_longer_expert_runs_the_rest_of_the_cosine_over_its_own_steps() -> None:
    dense = Schedule("cosine", lr=1.0, warmup=0, branch=20, end=30)
    expert = Schedule("cosine", lr=1.0, warmup=0, branch=20, end=40, dense_end=30)
    assert [expert.rate(20 + 2 * step) for step in range(10)] == pytest.approx(
        [dense.rate(20 + step) for step in range(10)]
    )


@given(
    kind=st.sampled_from(["wsd", "cosine"]),
    warmup=st.integers(0, 50),
    stable=st.integers(0, 50),
    decay=st.integers(1, 50),
)
def test_rate_rises_then_never_rises_again_and_ends_near_zero(kind: str, warmup: int, stable: int, decay: int) -> None:
    branch = warmup + stable
    schedule = Schedule(kind, lr=3.0, warmup=warmup, branch=branch, end=branch + decay)  # type: ignore[arg-type]
    rates = [schedule.rate(step) for step in range(branch + decay)]
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(0 < rate <= 3.0 for rate in rates)
    assert schedule.rate(branch + decay) == pytest.approx(0.0, abs=1e-12)
