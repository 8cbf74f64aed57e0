from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode.permutation import hash_numbers, mix, permuted


def deviations(counts: np.ndarray, expected: float) -> float:
    """How many standard deviations chi-square lies above what chance gives."""
    chi_square, freedom = float(((counts - expected) ** 2 / expected).sum()), counts.size - 1
    return float((chi_square - freedom) / (2 * freedom) ** 0.5)


def test_hash_is_splitmix64() -> None:
    # The first outputs of the generator seeded with 0, as its author's C code prints them.
    assert hash_numbers(np.arange(3)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_hash_depends_on_every_key_and_looks_uniform() -> None:
    numbers = np.arange(20_000)
    a, b, c = hash_numbers(numbers, 1, 2), hash_numbers(numbers, 2, 1), hash_numbers(numbers, 1, 2**70 + 3)
    assert len({*a.tolist(), *b.tolist(), *c.tolist()}) == 60_000
    bits = np.unpackbits(a.view(np.uint8)).reshape(-1, 64).mean(0)
    assert np.abs(bits - 0.5).max() < 0.025  # seven standard deviations


@given(size=st.integers(1, 3_000), keys=st.lists(st.integers(0, 2**64), max_size=3))
def test_every_number_is_taken_to_a_place_of_its_own(size: int, keys: list[int]) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(size), size, *keys)), np.arange(size))


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1, 100_003])
def test_also_of_many(size: int) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(size), size, 5)), np.arange(size))


@given(size=st.integers(1, 2**62), numbers=st.lists(st.integers(0, 2**62), max_size=20), key=st.integers(0, 9))
def test_each_place_depends_on_its_number_alone(size: int, numbers: list[int], key: int) -> None:
    given_numbers = np.array([number % size for number in numbers], np.int64)
    together = permuted(given_numbers, size, key)
    assert ((together >= 0) & (together < size)).all()
    assert together.tolist() == [int(permuted(np.array([number]), size, key)[0]) for number in given_numbers]
    assert len({*together.tolist()}) == len({*given_numbers.tolist()})


def test_worked_out_with_whole_numbers_of_python() -> None:
    """A number at a time, from the definition: 1,000 numbers have 10 bits, halves of 5."""

    def walk(number: int, round_keys: list[int]) -> int:
        while True:
            left, right = divmod(number, 32)
            for key in round_keys:
                mixed = int(mix(np.array([(right + key) % 2**64], np.uint64))[0])
                left, right = right, left ^ mixed % 32
            number = 32 * left + right
            if number < 1_000:
                return number

    keys = [int(key) for key in hash_numbers(np.arange(8), 3, 4, 1_000_037)]
    assert permuted(np.arange(1_000), 1_000, 3, 4).tolist() == [walk(number, keys) for number in range(1_000)]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_few_numbers_come_in_all_orders_alike(size: int) -> None:
    trials = 4_000
    found = Counter(tuple(permuted(np.arange(size), size, 1, key).tolist()) for key in range(trials))
    counts = np.array([found[order] for order in permutations(range(size))])
    assert deviations(counts, trials / len(counts)) < 6


@pytest.mark.parametrize("size", [10, 64, 260])
def test_every_number_goes_to_every_place_alike(size: int) -> None:
    trials, counts = 5 * size, np.zeros((size, size))
    for key in range(trials):
        counts[np.arange(size), permuted(np.arange(size), size, key)] += 1
    assert abs(deviations(counts, trials / size)) < 6


@pytest.mark.parametrize("size", [1_000, 65_536, 100_000])
def test_as_random_as_a_shuffle(size: int) -> None:
    """Figures of which a shuffle's distribution is known; each within six of its standard deviations."""
    fixed = neighbours = rises = 0
    displacements = []
    passes = 40
    for number in range(passes):
        order = permuted(np.arange(size), size, 7, number)
        fixed += int((order == np.arange(size)).sum())
        steps = np.diff(order)
        neighbours += int((np.abs(steps) == 1).sum())
        rises += int((steps > 0).sum())
        displacements.append(float(np.abs(order - np.arange(size)).mean() / size))
        # Blocks of a sixteenth of the numbers go to all sixteenths of the places alike.
        blocks = np.zeros((16, 16))
        np.add.at(blocks, (np.arange(size) * 16 // size, order * 16 // size), 1)
        assert deviations(blocks, size / 256) < 6
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 6 / size**0.5
    # Fixed points: Poisson with mean 1 a pass. Neighbours that stay neighbours: Poisson with mean 2.
    assert abs(fixed - passes) < 6 * passes**0.5
    assert abs(neighbours - 2 * passes) < 6 * (2 * passes) ** 0.5
    # Rises: Eulerian, mean (n - 1) / 2, variance (n + 1) / 12.
    assert abs(rises - passes * (size - 1) / 2) < 6 * (passes * (size + 1) / 12) ** 0.5
    # Displacement: a third of n, with a variance of 2 n / 45 of the mean over n places.
    assert abs(np.mean(displacements) - 1 / 3) < 6 * (2 / (45 * size * passes)) ** 0.5 + 1 / size


def test_passes_have_nothing_to_do_with_each_other() -> None:
    """What two orders have in common is a fixed point of one against the other: one on average."""
    orders = [permuted(np.arange(4_096), 4_096, 1, number) for number in range(30)]
    alike = sum(int((one == other).sum()) for number, one in enumerate(orders) for other in orders[:number])
    assert abs(alike - 30 * 29 / 2) < 6 * (30 * 29 / 2) ** 0.5
