from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode.data.loading.selection import Pairs
from mode.data.loading.stream import _PASS as PASS
from mode.data.loading.stream import PairStream
from mode.errors import ModeError
from mode.permutation import hash_numbers, permuted

# Numbers of captions per image; images are numbered with gaps, as in a cluster of a larger source.
captions_per_image = st.lists(st.integers(1, 4), min_size=1, max_size=12)


def stream(
    rows: np.ndarray,
    images: np.ndarray,
    random_seed: int,
    probabilities: np.ndarray | None = None,
    factors: np.ndarray | None = None,
) -> PairStream:
    """Of an index in which these rows have these images (and probabilities), and the rows between the one before."""
    before = np.searchsorted(rows, np.arange(rows.max() + 1), side="right") - 1
    of_index = np.where(before < 0, 0, images[before])
    probable = None if probabilities is None else probabilities[before]
    return PairStream(Pairs.of(rows, of_index, factors), of_index, random_seed, probable)


def stream_of(counts: list[int], seed: int = 0) -> tuple[PairStream, np.ndarray, np.ndarray]:
    images = np.repeat(np.arange(len(counts)) * 3 + 5, counts)
    rows = np.arange(len(images)) * 2 + 100
    return stream(rows, images, seed), rows, images


@given(counts=captions_per_image, seed=st.integers(0, 2**32), number=st.integers(0, 5))
def test_each_pass_has_every_image_exactly_once(counts: list[int], seed: int, number: int) -> None:
    stream, rows, images = stream_of(counts, seed)
    assert stream.images_per_pass == len(counts)
    seen = stream.rows_at(number * len(counts), len(counts))
    image_of = dict(zip(rows.tolist(), images.tolist(), strict=True))
    assert sorted(image_of[row] for row in seen.tolist()) == sorted(set(images.tolist()))


@given(counts=captions_per_image, start=st.integers(0, 60), count=st.integers(0, 60), split=st.integers(0, 60))
def test_any_part_of_the_stream_is_the_same_however_it_is_read(
    counts: list[int], start: int, count: int, split: int
) -> None:
    whole = stream_of(counts)[0].rows_at(0, 120)
    stream = stream_of(counts)[0]
    assert np.array_equal(stream.rows_at(start, count), whole[start : start + count])
    split = min(split, count)
    parts = [stream.rows_at(start, split), stream.rows_at(start + split, count - split)]
    assert np.array_equal(np.concatenate(parts), whole[start : start + count])


def test_order_of_rows_given_does_not_matter() -> None:
    images = np.array([2, 4, 4, 9, 9, 9])
    mixed = np.array([5, 0, 3, 1, 4, 2])
    expected = PairStream(Pairs.of(np.arange(6), images), images, 1).rows_at(0, 30)
    assert np.array_equal(PairStream(Pairs.of(mixed, images), images, 1).rows_at(0, 30), expected)


def test_passes_seeds_and_captions_vary() -> None:
    stream, _, _ = stream_of([1] * 50)
    assert not np.array_equal(stream.rows_at(0, 50), stream.rows_at(50, 50))
    assert not np.array_equal(stream.rows_at(0, 50), stream_of([1] * 50, seed=1)[0].rows_at(0, 50))
    rows = stream_of([4])[0].rows_at(0, 4000)
    shares = np.bincount((rows - 100) // 2, minlength=4) / 4000
    assert np.abs(shares - 0.25).max() < 0.04  # six standard deviations


def test_nothing_to_draw_from() -> None:
    with pytest.raises(ModeError, match="no pairs"):
        PairStream(Pairs.of(np.empty(0, np.int64), np.arange(1)), np.arange(1), 0)


@pytest.mark.parametrize(
    ("rows", "first"),
    [
        ([0, 1, 9], [0, 2, 3]),
        ([0, -1, 2], [0, 2, 3]),
        ([0, 1, 2], [0, 0, 3]),
        ([0, 1, 2], [0, 7, 3]),
        ([0, 1, 2], [-1, 2, 3]),
    ],
)
def test_damaged_pairs_are_an_error_in_one_line(rows: list[int], first: list[int]) -> None:
    pairs = Pairs(np.array(rows), np.array(first), np.empty(0, np.int64), [(2, 1.0)], "")
    with pytest.raises(ModeError, match="damaged"):
        PairStream(pairs, np.zeros(3, np.int64), 0).rows_at(0, 40)


def test_worked_out_by_a_walk_through_the_images() -> None:
    """Each position by itself, from the definitions: the place in the pass, then the caption."""
    images = np.array([5, 5, 5, 8, 11, 11, 14, 17, 17, 17, 17, 20])
    seen = stream(np.arange(12) * 2 + 100, images, 7).rows_at(3, 15).tolist()
    numbers = sorted({*images.tolist()})
    for position, row in enumerate(seen, start=3):
        number, within = divmod(position, len(numbers))
        image = numbers[permuted(np.array([within]), len(numbers), 7, number, PASS)[0]]
        captions = np.flatnonzero(images == image)
        drawn = int(hash_numbers(np.array([image]), 7, number)[0]) % len(captions)
        assert row == captions[drawn] * 2 + 100


@given(
    counts=captions_per_image,
    seed=st.integers(0, 2**32),
    start=st.integers(0, 30),
    weights=st.lists(st.floats(0.01, 1.0), min_size=48, max_size=48),
)
def test_captions_come_as_their_probabilities_have_it(
    counts: list[int], seed: int, start: int, weights: list[float]
) -> None:
    """Against a walk through the captions of each image; the order of images is that of alike captions."""
    _, rows, images = stream_of(counts, seed)
    probabilities = np.array(weights[: len(rows)], np.float32)
    seen = stream(rows, images, seed, probabilities).rows_at(start, 20)
    alike = stream(rows, images, seed).rows_at(start, 20)
    of = dict(zip(rows.tolist(), images.tolist(), strict=True))
    for position, row in enumerate(seen.tolist(), start):
        image = of[row]
        assert image == of[alike[position - start]]
        own = np.flatnonzero(images == image)
        drawn = int(hash_numbers(np.array([image]), seed, position // len(counts))[0]) / 2**64
        left = drawn * sum(float(probabilities[each]) for each in own)
        for each in own:
            left -= float(probabilities[each])
            if left < 1e-9:
                break
        assert row == rows[each] or abs(left) < 1e-6


def test_shares_of_captions_over_many_passes() -> None:
    images = np.array([0, 0, 0, 1, 1, 2])
    probabilities = np.array([0.5, 0.25, 0.25, 0.3, 0.1, 0.2])
    seen = stream(np.arange(6), images, 3, probabilities).rows_at(0, 3 * 4_000)
    shares = np.bincount(seen, minlength=6) / 4_000
    assert np.abs(shares - [0.5, 0.25, 0.25, 0.75, 0.25, 1.0]).max() < 0.03  # four standard deviations


factors_of_sets = st.lists(st.sampled_from([0.25, 0.3, 0.5, 1.0, 1.5, 2.0, 2.75, 3.0]), min_size=1, max_size=3)


@st.composite
def sets(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, the number of the image of each, and its factor: images of several sets, in the order of an index."""
    counts, factors = draw(captions_per_image), draw(factors_of_sets)
    images = np.repeat(np.arange(len(counts)) * 3 + 5, counts)
    owner = np.sort(draw(st.lists(st.integers(0, len(factors) - 1), min_size=len(counts), max_size=len(counts))))
    return np.arange(len(images)) * 2 + 100, images, np.repeat(np.array(factors)[owner], counts)


@given(given_sets=sets(), seed=st.integers(0, 2**32), passes=st.integers(1, 9))
def test_images_are_visited_as_often_as_their_factor_says(
    given_sets: tuple[np.ndarray, np.ndarray, np.ndarray], seed: int, passes: int
) -> None:
    """After any number of passes, and nobody has had a turn more than anybody else of the same factor."""
    rows, images, factors = given_sets
    made = stream(rows, images, seed, factors=factors)
    numbers = np.unique(images)
    factor_of = dict(zip(images.tolist(), factors.tolist(), strict=True))
    image_of = dict(zip(rows.tolist(), images.tolist(), strict=True))
    seen = Counter(image_of[row] for row in made.rows_at(0, passes * made.images_per_pass).tolist())
    for factor in set(factor_of.values()):
        alike = [number for number in numbers.tolist() if factor_of[number] == factor]
        turns = math.ceil(round((factor % 1) * len(alike), 9))  # in each pass
        each, more = divmod(passes * turns, len(alike))
        visits = Counter(seen[number] - passes * int(factor) for number in alike)
        assert visits == Counter({each: len(alike) - more, each + 1: more})


@given(given_sets=sets(), start=st.integers(0, 60), count=st.integers(0, 60), split=st.integers(0, 60))
def test_with_factors_any_part_is_the_same_however_it_is_read(
    given_sets: tuple[np.ndarray, np.ndarray, np.ndarray], start: int, count: int, split: int
) -> None:
    rows, images, factors = given_sets
    whole = stream(rows, images, 3, factors=factors).rows_at(0, 120)
    made, split = stream(rows, images, 3, factors=factors), min(split, count)
    assert np.array_equal(made.rows_at(start, count), whole[start : start + count])
    parts = [made.rows_at(start, split), made.rows_at(start + split, count - split)]
    assert np.array_equal(np.concatenate(parts), whole[start : start + count])


@given(counts=captions_per_image, seed=st.integers(0, 2**32), start=st.integers(0, 40))
def test_a_factor_of_one_is_no_factor(counts: list[int], seed: int, start: int) -> None:
    plain, rows, images = stream_of(counts, seed)
    same = stream(rows, images, seed, factors=np.ones(len(rows)))
    assert np.array_equal(same.rows_at(start, 40), plain.rows_at(start, 40))


def test_worked_out_by_hand() -> None:
    """Images 0 to 3 twice a pass, 4 to 7 every second pass: passes of ten, and never the same half twice."""
    images, factors = np.arange(8), np.repeat([2.0, 0.5], 4)
    made = stream(np.arange(8), images, 0, factors=factors)
    assert made.images_per_pass == 10
    passes = [made.rows_at(10 * number, 10).tolist() for number in range(4)]
    assert [sorted(each)[:8] for each in passes] == [[0, 0, 1, 1, 2, 2, 3, 3]] * 4
    halves = [{row for row in each if row > 3} for each in passes]
    assert halves[0] | halves[1] == {4, 5, 6, 7} == halves[2] | halves[3]
    assert halves[0] == halves[2]
    assert len({tuple(each) for each in passes}) == 4, "each pass in an order of its own"


def test_the_second_visit_draws_a_caption_of_its_own() -> None:
    images, factors = np.repeat(np.arange(500), 2), np.full(1_000, 2.0)
    seen = stream(np.arange(1_000), images, 0, factors=factors).rows_at(0, 1_000)
    visits = np.sort(seen).reshape(500, 2)
    both = int((visits[:, 0] != visits[:, 1]).sum())
    assert 180 < both < 320, "of 500 images half show both of their captions"
