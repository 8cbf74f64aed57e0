"""What may be said of figures that were measured several times: means, and differences paired by random seed and task.

Figures come as one table per row of an experiment: indexed by random seed, a column per task, values 0..1, NaN where
there is none. Everything that comes out is in percent or percentage points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

#: Resamples of an interval.
DRAWS = 10_000
#: Ends of the 95% interval.
ENDS = (0.025, 0.975)
#: Decimals of a percentage point that are kept, so that the noise of floating point decides no word and no digit.
DECIMALS = 9

Word = Literal["better", "worse", "undecided", "not measured"]


@dataclass(frozen=True)
class Summary:
    """A row by itself.

    Attributes:
        mean: over random seeds and tasks, in percent; NaN without a figure.
        sd: standard deviation over random seeds of the mean over tasks, in points; NaN with one seed.
        seeds, tasks: how many it is of.
        left_out: tasks that not every random seed has; they count in none, so that all means are of the same tasks.
    """

    mean: float
    sd: float
    seeds: int
    tasks: int
    left_out: int


@dataclass(frozen=True)
class Difference:
    """One row minus another, in percentage points.

    Attributes:
        mean: over all pairs; NaN without one.
        sd: standard deviation over random seeds of the mean over tasks; NaN with one seed.
        low, high: the 95% interval, see `difference`; NaN with one seed and one task, which have no spread.
        seeds, tasks, pairs: how many it is of; a pair is a random seed and a task that both rows have.
        dropped: random seeds and tasks that only one of the rows has.
    """

    mean: float
    sd: float
    low: float
    high: float
    seeds: int
    tasks: int
    pairs: int
    dropped: int

    @property
    def word(self) -> Word:
        """`better`: the interval lies above 0; `worse`: below it; else `undecided`; without a pair `not measured`."""
        if not self.pairs:
            return "not measured"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "undecided"

    @property
    def one_seed(self) -> bool:
        """Whether nothing is known of what another random seed would give, whatever the word."""
        return self.seeds == 1

    @property
    def over(self) -> str:
        """What the interval is over; empty: there is none."""
        return " and ".join(name for name, count in (("seeds", self.seeds), ("tasks", self.tasks)) if count > 1)


def summary(figures: pd.DataFrame) -> Summary:
    """Mean and spread of a row's own figures.

    Args:
        figures: [random seeds, tasks], 0..1.
    """
    known = figures.dropna(how="all", axis=0).dropna(how="all", axis=1)
    whole = known.dropna(how="any", axis=1)
    means = 100 * whole.mean(axis=1)
    return Summary(
        _rounded(means.mean()), _rounded(means.std(ddof=1)), *whole.shape, left_out=known.shape[1] - whole.shape[1]
    )


def difference(row: pd.DataFrame, than: pd.DataFrame, draws: int = DRAWS) -> Difference:
    """How much better one row is than another, on the random seeds and tasks that both have.

    The interval is of a two-way bootstrap (the pigeonhole bootstrap: Owen, Annals of Applied Statistics 1 (2007)): both
    random seeds and tasks are drawn anew with replacement, independently of each other, and the mean is taken over the
    crossed cells, each as often as its seed and its task were drawn; the ends are the 2.5% and 97.5% quantiles. So it
    answers for other random seeds *and* for other tasks of the same kind. The numbers drawn are always the same. With
    one seed it is over tasks alone (`Difference.over`). With one task there is little to draw from, and it is
    Student's interval of the seeds' differences: all of three draws are of one sign once in four times by chance.

    What few seeds or tasks mean: no end can lie beyond the most extreme of those that there are, so that hardly
    anything is known of what others would give. With three seeds and 52 tasks the interval of made-up differences
    holds the true one in 92% of cases where the seeds matter as much as the tasks, in 97% where they matter less, and
    in 86% where they matter twice as much. With two or three tasks it is rather about these than about tasks like them.
    Images are never drawn anew: where all seeds have the same ones, as in a folder, it says nothing of others.

    Args:
        row, than: [random seeds, tasks], 0..1.
        draws: resamples.

    Example:
        >>> tables = [pd.DataFrame({"a": [0.5, 0.6], "b": [0.3, 0.4]}, [0, 1]) + better for better in (0.02, 0.0)]
        >>> found = difference(*tables)
        >>> found.mean, found.low, found.high, found.word
        (2.0, 2.0, 2.0, 'better')
    """
    row, than = row.align(than)
    gaps = 100 * (row - than)
    pairs = int(gaps.notna().to_numpy().sum())
    dropped = int((row.notna() | than.notna()).to_numpy().sum()) - pairs
    gaps = gaps.dropna(how="all", axis=0).dropna(how="all", axis=1)
    if not pairs:
        return Difference(math.nan, math.nan, math.nan, math.nan, 0, 0, 0, dropped)
    cells = gaps.to_numpy(dtype=float)
    low, high = _interval(cells, draws)
    spread = gaps.mean(axis=1).std(ddof=1)
    return Difference(
        _rounded(np.nanmean(cells)), _rounded(spread), _rounded(low), _rounded(high), *cells.shape, pairs, dropped
    )


def _interval(cells: NDArray[np.float64], draws: int) -> tuple[float, float]:
    """Ends of the interval of the mean of [seeds, tasks]; cells that are NaN are never drawn."""
    if cells.size == 1:
        return math.nan, math.nan
    if cells.shape[1] == 1:
        return _students_interval(cells[:, 0])
    rng = np.random.default_rng(0)
    # How often each seed and each task is drawn: all that a mean over crossed cells needs to know.
    seeds, tasks = (rng.multinomial(size, np.full(size, 1 / size), size=draws) for size in cells.shape)
    there = ~np.isnan(cells)
    sums = ((seeds @ np.where(there, cells, 0.0)) * tasks).sum(axis=1)
    counts = ((seeds @ there) * tasks).sum(axis=1)
    low, high = np.quantile(sums[counts > 0] / counts[counts > 0], ENDS)
    return float(low), float(high)


def _students_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Ends of Student's interval of the mean of two or more values."""
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(len(values))
    low, high = mean + error * stats.t.ppf(ENDS, len(values) - 1)
    return float(low), float(high)


def _rounded(value: float) -> float:
    return round(float(value), DECIMALS) + 0.0  # no minus zero
