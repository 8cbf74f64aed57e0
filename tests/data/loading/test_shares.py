"""Who takes which samples of a batch: all of them once, each machine those of its own chunks where it can."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode.data.loading.selection import Pairs
from mode.data.loading.shares import Shares
from mode.data.loading.stream import PairStream

#: Processes of each machine.
machines = st.lists(st.integers(1, 3), min_size=1, max_size=5)


def numbers_of(counts: list[int]) -> tuple[int, ...]:
    return tuple(np.repeat(np.arange(len(counts)), counts).tolist())


def stream_of(images: int, shuffle: int, seed: int = 0) -> PairStream:
    rows = np.arange(images)
    return PairStream(Pairs.of(rows, rows), rows, seed, shuffle_images=shuffle)


def in_windows(start: int, stop: int, batch: int, counts: list[int], stream: PairStream) -> list[Shares]:
    """Those of every process."""
    return [Shares(start, stop, batch, rank, numbers_of(counts), stream.chunks_at) for rank in range(sum(counts))]


@given(
    counts=machines,
    batch=st.integers(1, 90),
    start=st.integers(0, 60),
    length=st.integers(1, 300),
    images=st.integers(1, 200),
    shuffle=st.integers(1, 90),
)
def test_every_sample_is_taken_once_and_by_as_many_as_without_machines(
    counts: list[int], batch: int, start: int, length: int, images: int, shuffle: int
) -> None:
    stop, world = start + length, sum(counts)
    ours = in_windows(start, stop, batch, counts, stream_of(images, shuffle))
    slices = [Shares(start, stop, batch, rank, (0,) * world) for rank in range(world)]
    for number in range(len(ours[0])):
        taken = [each.of(number) for each in ours]
        assert sorted(np.concatenate(taken).tolist()) == [*range(*ours[0].span(number))]
        assert [len(each) for each in taken] == [len(each.of(number)) for each in slices]
        assert all((np.diff(each) > 0).all() for each in taken)
    for machine in range(len(counts)):
        some = [each for each in ours if each.machine == machine]
        of_processes = [sample for each in some for number in range(len(each)) for sample in each.of(number).tolist()]
        assert some[0].here(0, stop + 9).tolist() == sorted(of_processes)
        begin, end = start + length // 3, start + length // 2
        assert some[0].here(begin, end).tolist() == [each for each in sorted(of_processes) if begin <= each < end]


@given(world=st.integers(1, 7), batch=st.integers(1, 50), length=st.integers(1, 120))
def test_on_one_machine_a_process_takes_a_slice(world: int, batch: int, length: int) -> None:
    stream = stream_of(100, 40)
    for rank in range(world):
        shares = Shares(5, 5 + length, batch, rank, (0,) * world, stream.chunks_at)
        for number in range(len(shares)):
            begin, end = shares.span(number)
            size = end - begin
            expected = range(begin + size * rank // world, begin + size * (rank + 1) // world)
            assert shares.of(number).tolist() == [*expected]


def test_worked_out_by_hand() -> None:
    """Eight samples of chunks 0, 1 and 2 for two machines: the first has chunks 0 and 2, and too much of them."""
    chunks = np.array([0, 1, 2, 0, 2, 2, 1, 0])
    first, second = (Shares(0, 8, 8, rank, (0, 1), lambda positions: chunks[positions]) for rank in range(2))
    assert first.of(0).tolist() == [0, 2, 3, 7]
    assert second.of(0).tolist() == [1, 4, 5, 6]


@pytest.mark.parametrize(("counts", "most"), [([1, 1], 0.58), ([2, 2], 0.58), ([1, 1, 1, 1], 0.36), ([3, 1], 0.86)])
def test_a_machine_takes_from_few_chunks(counts: list[int], most: float) -> None:
    """Of 40 chunks that are mixed, the share that the first machine takes samples from, beyond three of each.

    Its own, half of them where it is one of two, and the last ones of another machine that had too many.
    """
    stream = stream_of(40 * 256, 40 * 256, seed=3)
    shares = in_windows(0, 40 * 256, 1_024, counts, stream)[0]
    taken = Counter(stream.chunks_at(shares.here(0, 40 * 256)).tolist())
    assert sum(count > 3 for count in taken.values()) / 40 <= most
    assert sum(taken.values()) == pytest.approx(40 * 256 * counts[0] / sum(counts))


@given(seed=st.integers(0, 2**32))
def test_what_a_machine_takes_is_as_mixed_as_the_batch(seed: int) -> None:
    """Of all images of two windows, each machine takes its half: uniform over them, whatever their place in a shard.

    With chunks of 256 and 20 of them a window, the mean place of a machine's images is off by less than six standard
    deviations of the mean of ten random chunks' places.
    """
    images = 20 * 256
    stream = stream_of(images, images, seed)
    for shares in in_windows(0, images, 512, [1, 1], stream):
        rows = stream.rows_at_each(shares.here(0, images))
        assert len(np.unique(rows)) == images // 2
        # Ten of twenty chunks without repetition: half of the variance of ten with it.
        deviation = 20 * 256 / np.sqrt(12) / np.sqrt(10) * np.sqrt(10 / 19)
        assert abs(rows.mean() - images / 2) < 6 * deviation
