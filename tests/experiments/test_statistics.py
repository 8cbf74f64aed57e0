"""Paired differences: by hand, against naive resampling, and what must hold of any figures."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mode.experiments.statistics import Difference, difference, summary


def table(*lines: list[float], tasks: str = "abcdefgh") -> pd.DataFrame:
    """Figures in percent: a line per random seed, tasks `a`, `b` ..."""
    return pd.DataFrame([*lines], columns=[*tasks[: len(lines[0])]], dtype=float) / 100


def gap_of(cells: list[list[float]]) -> Difference:
    """Of rows that differ by so many points."""
    above = table(*cells)
    return difference(above / 2 + 0.5, 0.5 - above / 2)


tables = st.integers(1, 4).flatmap(
    lambda tasks: st.lists(
        st.lists(st.floats(-50, 50, width=16), min_size=tasks, max_size=tasks), min_size=1, max_size=4
    )
)


def test_two_seeds_and_two_tasks_by_hand() -> None:
    """The seeds' means are 2 and 6, the tasks' 3 and 5.

    A draw's mean is 4, and -2, 0 or 2 by its seeds (a quarter, a half, a quarter) and -1, 0 or 1 by its tasks (the
    same): the lowest, 1, comes once in 16 draws, and so does the highest, 7.
    """
    found = gap_of([[1, 3], [5, 7]])
    assert (found.mean, found.sd) == pytest.approx((4, math.sqrt(8)))
    assert (found.low, found.high, found.word, found.over) == (1, 7, "better", "seeds and tasks")
    assert (found.seeds, found.tasks, found.pairs, found.dropped) == (2, 2, 4, 0)


@pytest.mark.parametrize(
    ("cells", "word"),
    [
        ([[1, 3], [5, 7]], "better"),
        ([[-1, -3], [-5, -7]], "worse"),
        ([[-1, 3], [-5, 7]], "undecided"),
        ([[0, 0], [0, 0]], "undecided"),
        ([[0, 1], [0, 1]], "undecided"),  # an interval that begins at 0 does not lie above it
    ],
)
def test_the_word_is_what_the_interval_says(cells: list[list[float]], word: str) -> None:
    assert gap_of(cells).word == word


def test_the_quantiles_are_those_of_all_resamples() -> None:
    """Three seeds and two tasks have 27 x 4 resamples, each as probable as any other."""
    cells = np.array([[1.0, 2.5], [-1.0, 4.0], [0.5, -3.0]])
    means = [
        cells[np.ix_(seeds, tasks)].mean()
        for seeds in itertools.product(range(3), repeat=3)
        for tasks in itertools.product(range(2), repeat=2)
    ]
    found = gap_of(cells.tolist())
    low, high = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    assert (found.low, found.high) == pytest.approx((low, high))


def test_many_cells_and_some_missing_against_naive_resampling() -> None:
    rng = np.random.default_rng(3)
    cells = 1.0 + rng.normal(0, 1, (3, 1)) + rng.normal(0, 2, (1, 12)) + rng.normal(0, 1, (3, 12))
    cells[0, 3] = cells[2, 7] = np.nan
    draw = random.Random(1)
    means = []
    for _ in range(4_000):
        seeds = [draw.randrange(3) for _ in range(3)]
        tasks = [draw.randrange(12) for _ in range(12)]
        means.append(np.nanmean([cells[seed, task] for seed in seeds for task in tasks]))
    found = difference(pd.DataFrame(cells) / 100, pd.DataFrame(np.zeros((3, 12))))
    low, high = np.quantile(means, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    assert found.mean == pytest.approx(np.nanmean(cells))
    assert (found.pairs, found.dropped) == (34, 2)


def test_one_seed_is_over_tasks_alone_and_flagged() -> None:
    found = gap_of([[1, 2, 3]])
    assert (found.word, found.one_seed, found.over) == ("better", True, "tasks")
    assert math.isnan(found.sd)
    assert (found.low, found.high) == (pytest.approx(1, abs=0.4), pytest.approx(3, abs=0.4))
    assert not gap_of([[1, 2], [1, 2]]).one_seed


def test_one_task_is_over_seeds_alone_by_students_t() -> None:
    """Three seeds that agree need not decide: 4.3027 is the 97.5% quantile with two degrees of freedom."""
    found = gap_of([[1], [2], [3]])
    assert (found.mean, found.sd, found.over, found.word) == (2, 1, "seeds", "undecided")
    half = 4.302653 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(2 - half, abs=1e-5), pytest.approx(2 + half, abs=1e-5))
    assert gap_of([[2.9], [3.0], [3.1]]).word == "better"
    assert (gap_of([[3], [3]]).low, gap_of([[3], [3]]).high) == (3, 3)


def test_one_seed_and_one_task_decide_nothing() -> None:
    found = gap_of([[5]])
    assert (found.mean, found.word, found.over) == (5, "undecided", "")
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_only_pairs_count_and_the_others_are_told() -> None:
    """Seeds 0 and 1 against 1 and 2, tasks a and b against b and c: seed 1 and task b is the one pair."""
    row = pd.DataFrame({"a": [0.1, 0.2], "b": [0.3, 0.45]}, [0, 1])
    than = pd.DataFrame({"b": [0.4, 0.5], "c": [0.6, 0.7]}, [1, 2])
    found = difference(row, than)
    assert (found.mean, found.pairs, found.dropped) == (pytest.approx(5), 1, 6)


def test_a_figure_that_is_nan_is_missing() -> None:
    row, than = table([1, math.nan], [3, 4]), table([0, 0], [0, math.nan])
    found = difference(row, than)
    assert (found.mean, found.pairs, found.dropped) == (2, 2, 2)
    assert (found.seeds, found.tasks) == (2, 1)


@pytest.mark.parametrize("than", [pd.DataFrame(), table([math.nan, math.nan]), table([1.0, 2.0]).set_index([[9]])])
def test_without_a_pair_nothing_is_said(than: pd.DataFrame) -> None:
    found = difference(table([1.0, 2.0]), than)
    assert (found.word, found.pairs, found.seeds, found.one_seed, found.over) == ("not measured", 0, 0, False, "")
    assert math.isnan(found.mean)


@given(tables)
@settings(max_examples=40)
def test_the_other_way_round_is_the_opposite(cells: list[list[float]]) -> None:
    row = table(*cells)
    one, other = difference(row, row * 0, draws=500), difference(row * 0, row, draws=500)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low), abs=1e-6, nan_ok=True)
    opposite = {"better": "worse", "worse": "better", "undecided": "undecided"}
    assert one.word == opposite[other.word]


@given(tables, st.floats(-0.5, 0.5))
@settings(max_examples=40)
def test_what_both_gain_does_not_matter_and_what_one_gains_moves_everything(
    cells: list[list[float]], gain: float
) -> None:
    row = table(*cells)
    plain = difference(row, row * 0, draws=500)
    both, alone = difference(row + gain, row * 0 + gain, draws=500), difference(row + gain, row * 0, draws=500)
    ends = (plain.mean, plain.low, plain.high)
    assert (both.mean, both.low, both.high) == pytest.approx(ends, abs=1e-6, nan_ok=True)
    moved = [end + 100 * gain for end in ends]
    assert (alone.mean, alone.low, alone.high) == pytest.approx(moved, abs=1e-6, nan_ok=True)
    assert alone.sd == pytest.approx(plain.sd, abs=1e-6, nan_ok=True)


@given(tables)
@settings(max_examples=40)
def test_an_interval_is_within_the_cells_and_the_mean_is_theirs(cells: list[list[float]]) -> None:
    found = difference(table(*cells), table(*cells) * 0, draws=500)
    assert found.mean == pytest.approx(np.mean(cells), abs=1e-6)
    if "tasks" in found.over:
        assert np.min(cells) - 1e-6 <= found.low <= found.high <= np.max(cells) + 1e-6


@given(tables, st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_the_order_of_seeds_and_tasks_does_not_matter(cells: list[list[float]], order: random.Random) -> None:
    row = table(*cells)
    shuffled = row.loc[order.sample([*row.index], len(row)), order.sample([*row.columns], row.shape[1])]
    assert difference(shuffled, row).mean == 0
    assert difference(row, shuffled).word == "undecided"
    assert summary(shuffled).mean == pytest.approx(summary(row).mean)


def test_the_same_figures_give_the_same_interval() -> None:
    assert gap_of([[1, -3, 2], [5, 7, 0]]) == gap_of([[1, -3, 2], [5, 7, 0]])


def test_a_row_by_itself() -> None:
    found = summary(table([10, 20], [20, 40]))
    assert (found.mean, found.sd) == (22.5, pytest.approx(math.sqrt(112.5)))
    assert (found.seeds, found.tasks, found.left_out) == (2, 2, 0)


def test_a_row_is_of_the_tasks_that_all_its_seeds_have() -> None:
    found = summary(table([10, 90], [20, math.nan]))
    assert (found.mean, found.seeds, found.tasks, found.left_out) == (15, 2, 1, 1)


def test_a_row_of_one_seed_has_no_spread_and_an_empty_one_no_mean() -> None:
    assert math.isnan(summary(table([10, 20])).sd)
    nothing = summary(pd.DataFrame())
    assert math.isnan(nothing.mean)
    assert (nothing.seeds, nothing.tasks) == (0, 0)
