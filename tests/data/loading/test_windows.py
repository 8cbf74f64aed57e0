from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode.data.loading.selection import Pairs
from mode.data.loading.stream import Chunk, PairStream
from mode.data.loading.windows import CHUNK, Windows

sizes = {
    "visits": st.integers(1, 280),
    "shuffle": st.integers(1, 400),
    "seed": st.integers(0, 2**32),
    "chunk": st.integers(1, 40),
    "number": st.integers(0, 4),
}


def chunks_of(windows: Windows, number: int, visits: int) -> list[tuple[int, int]]:
    """Of each slot of a pass the first visit of its chunk and the one behind its last, by what is found there."""
    slots, found = windows.found_at(number, np.arange(visits))
    held = [np.sort(found[slots == slot]) for slot in range(windows.slots)]
    assert all(np.array_equal(each, np.arange(each[0], each[-1] + 1)) for each in held), "neighbours, each once"
    return [(int(each[0]), int(each[-1]) + 1) for each in held]


def stream_of(images: int, shuffle: int, factors: np.ndarray | None = None, seed: int = 0) -> PairStream:
    rows = np.arange(images)
    return PairStream(Pairs.of(rows, rows, factors), rows, seed, shuffle_images=shuffle)


@given(**sizes)
def test_a_pass_visits_all_chunk_by_chunk(visits: int, shuffle: int, seed: int, chunk: int, number: int) -> None:
    windows = Windows(visits, shuffle, seed, chunk)
    positions = np.arange(visits)
    seen = windows.visits_at(number, positions)
    assert sorted(seen.tolist()) == positions.tolist()
    spans = [windows.span(number, window) for window in range(windows.per_pass)]
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == visits
    chunks = chunks_of(windows, number, visits)
    for window, (start, stop) in enumerate(spans):
        held = [range(*chunks[slot]) for slot in windows.slots_in(window)]
        assert sorted(seen[start:stop].tolist()) == sorted(visit for each in held for visit in each)
        assert all(each.start % min(chunk, shuffle) == 0 for each in held)
        assert all(len(each) == min(chunk, shuffle) or each.stop == visits for each in held)
    for position, slot in [*enumerate(windows.found_at(number, positions)[0].tolist())][:: max(1, visits // 20)]:
        assert slot in windows.slots_in(windows.window_of(number, position))


@given(**sizes, start=st.integers(0, 299), count=st.integers(0, 300))
def test_any_part_of_a_pass_is_the_same_by_itself(
    visits: int, shuffle: int, seed: int, chunk: int, number: int, start: int, count: int
) -> None:
    whole = Windows(visits, shuffle, seed, chunk).visits_at(number, np.arange(visits))
    some = np.arange(min(start, visits), min(start + count, visits))
    assert np.array_equal(Windows(visits, shuffle, seed, chunk).visits_at(number, some), whole[some])


def test_worked_out_by_hand() -> None:
    """Ten visits in chunks of three, one of which is short; two chunks a window."""
    windows = Windows(10, 7, 0, chunk=3)
    assert (windows.per_pass, windows.slots_per_window) == (2, 2)
    chunks = chunks_of(windows, 0, 10)
    assert sorted(chunks) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    short = chunks.index((9, 10))
    lengths = [1 if slot == short else 3 for slot in range(4)]
    assert [windows.span(0, 0), windows.span(0, 1)] == [(0, sum(lengths[:2])), (sum(lengths[:2]), 10)]


def test_chunks_come_in_another_order_in_each_pass_and_the_short_one_anywhere() -> None:
    windows = Windows(1_005, 100, 3, chunk=10)
    orders = [chunks_of(windows, number, 1_005) for number in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    assert len({order.index((1_000, 1_005)) for order in orders}) > 10
    middle = np.mean([order.index((500, 510)) for order in orders])
    assert 25 < middle < 75  # 50, with a standard deviation of 6.5


def test_a_sample_is_mixed_with_all_of_its_window() -> None:
    windows = Windows(10_000, 1_000, 1, chunk=100)
    seen = windows.visits_at(0, np.arange(1_000))
    assert len({visit // 100 for visit in seen[:50].tolist()}) == 10


@pytest.mark.parametrize("shuffle", [1, 5, 100, 10**6])
def test_a_stream_of_windows_shows_each_image_once_a_pass(shuffle: int) -> None:
    stream = stream_of(40, shuffle)
    for number in range(3):
        assert sorted(stream.rows_at(number * 40, 40).tolist()) == list(range(40))
    assert np.array_equal(stream.rows_at(35, 30), np.concatenate([stream.rows_at(35, 7), stream.rows_at(42, 23)]))
    assert not np.array_equal(stream.rows_at(0, 40), stream.rows_at(40, 40))


@given(
    factors=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0]), min_size=1, max_size=60),
    shuffle=st.integers(1, 90),
    start=st.integers(0, 200),
)
def test_a_chunk_holds_the_images_of_its_samples(factors: list[float], shuffle: int, start: int) -> None:
    stream = stream_of(len(factors), shuffle, np.array(factors))
    positions = np.arange(start, start + 50)
    numbers, images = stream.found_at(positions)
    assert stream.first_rows(images).tolist() == stream.rows_at(start, 50).tolist()
    for position, number, image in zip(positions.tolist(), numbers.tolist(), images.tolist(), strict=True):
        chunk = stream.chunk(number)
        first, last = stream.span(chunk.number, chunk.window)
        assert first <= position < last
        _, in_window = stream.found_at(np.arange(first, last)[stream.chunks_at(np.arange(first, last)) == number])
        assert image in in_window
        assert len(in_window) <= CHUNK


@given(factors=st.lists(st.sampled_from([0.5, 1.0, 2.0, 2.5]), min_size=1, max_size=60), seed=st.integers(0, 99))
def test_factors_mean_what_they_mean_without_windows(factors: list[float], seed: int) -> None:
    of_each = np.array(factors)
    stream = stream_of(len(factors), 8, of_each, seed)
    assert (
        stream.images_per_pass
        == PairStream(
            Pairs.of(np.arange(len(factors)), np.arange(len(factors)), of_each), np.arange(len(factors)), seed
        ).images_per_pass
    )
    for number in range(4):
        counts = np.bincount(
            stream.rows_at(number * stream.images_per_pass, stream.images_per_pass), minlength=len(factors)
        )
        assert (counts >= np.floor(of_each)).all()
        assert (counts <= np.ceil(of_each)).all()
    halves = np.flatnonzero(of_each == 0.5)
    if len(halves) % 2 == 0:  # then each has its turn in one of two passes
        counts = np.bincount(stream.rows_at(0, 2 * stream.images_per_pass), minlength=len(factors))
        assert (counts[halves] == 1).all()


def test_neighbours_have_their_turn_together() -> None:
    stream = stream_of(8 * CHUNK, 10_000, np.full(8 * CHUNK, 0.5))
    seen = np.unique(stream.rows_at(0, stream.images_per_pass) // CHUNK)
    assert len(seen) == 4


def test_windows_follow_one_another_through_the_passes() -> None:
    stream = stream_of(5, 2)
    found = list(stream.windows_from(3, 12))
    assert [window.begin for window in found] == sorted(window.begin for window in found)
    assert found[0].begin <= 3 < found[1].begin
    assert found[-1].begin < 12
    chunks = [chunk for window in found for chunk in window.chunks]
    assert chunks == sorted(chunks)
    assert {chunk.number for chunk in chunks} == {0, 1, 2}
    numbers = stream.chunks_at(np.arange(found[0].begin, 12))
    assert {stream.chunk(number) for number in numbers.tolist()} <= {*chunks}
    assert sorted(set(numbers.tolist()), key=stream.chunk) == sorted(set(numbers.tolist()))
    assert Chunk(1, 0, 0) in chunks
