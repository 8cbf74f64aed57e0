"""Images read in long ranges: the same as one by one, each fetched once, whatever happens to the files beside."""

from __future__ import annotations

import contextlib
import fcntl
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mode.data.loading import windows as windows_module
from mode.data.loading.loader import Batch, ImageStore, PairStream, Shares, make_loader, samples_ahead
from mode.data.loading.ranges import Range, joined
from mode.data.loading.selection import Pairs
from mode.data.loading.spool import Spool, check_room, room_for
from mode.data.loading.windows import Windows
from mode.data.shards.index import PairIndex
from mode.data.shards.reading import ChangedShard, ImageFiles
from mode.errors import ModeError
from mode.params import ImageParams
from tests.waiting import wait_until

Make = Callable[..., list[tuple[str, bytes]]]
flat = chain.from_iterable
IMAGE = ImageParams(size=8)


class Counting(ImageFiles):
    """Image files that note which ranges were asked for, and which images by themselves."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.ranges: list[tuple[int, int, int]] = []
        self.singly: list[int] = []
        self._plain = ImageFiles(*given)

    def read_many(self, rows: Sequence[int], positions: Sequence[int] | None = None) -> Iterator[bytes | OSError]:  # noqa: ARG002
        self.singly += rows
        return self._plain.read_many(rows)

    def read_range(self, file: int, start: int, stop: int) -> bytes:
        self.ranges.append((file, start, stop))
        return super().read_range(file, start, stop)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three images a chunk, so that a few make many."""
    assert Windows.__init__.__defaults__ == (windows_module.CHUNK,)
    monkeypatch.setattr(Windows.__init__, "__defaults__", (3,))


@pytest.fixture
def index(index_of: Callable[..., PairIndex], pair: Make, texts: Make) -> PairIndex:
    """Forty images in three tars, some with two captions, one that cannot be decoded."""
    tars = {
        "0.tar": [*flat(pair(f"a{n:02}", n) for n in range(15))],
        "1.tar": [*flat(texts(f"b{n:02}", ["x", "y"], n + 15) for n in range(15))],
        "2.tar": [*flat(pair(f"c{n:02}", n + 30) for n in range(10))],
    }
    tars["0.tar"][6] = (tars["0.tar"][6][0], b"no image")
    return index_of(tars)


@pytest.fixture
def spools() -> Iterator[list[Spool]]:
    """Those of a test, whose threads end with it."""
    made: list[Spool] = []
    yield made
    for spool in made:
        spool.close()


@pytest.fixture
def make(index: PairIndex, tmp_path: Path, spools: list[Spool]) -> Callable[..., Any]:
    """A spool with its stream, and the files that it reads from."""

    def make(
        shuffle: int = 9, rows: np.ndarray | None = None, stop: int = 200, shares: Shares | None = None
    ) -> tuple[Spool, PairStream, Counting]:
        stream = stream_of(index, shuffle, rows)
        files = Counting(index, tmp_path)
        spools.append(Spool(tmp_path / "spool", files, stream, shares or Shares(0, stop, stop), requests=2))
        return spools[-1], stream, files

    return make


def stream_of(index: PairIndex, shuffle: int = 9, rows: np.ndarray | None = None) -> PairStream:
    rows = np.arange(len(index)) if rows is None else rows
    return PairStream(Pairs.of(rows, index.image), index.image, 4, shuffle_images=shuffle)


def named(*chunks: tuple[int, ...]) -> set[str]:
    """Names of the files of chunks, of machine 0."""
    return {"-".join(map(str, (*chunk, 0))) for chunk in chunks}


def read(spool: Spool, stream: PairStream, start: int, count: int) -> list[bytes | OSError]:
    rows = stream.rows_at(start, count).tolist()
    return list(spool.read_many(rows, range(start, start + count)))


@given(
    lengths=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 40)), min_size=1, max_size=30),
    gap=st.integers(0, 30),
    longest=st.integers(1, 120),
)
def test_ranges_hold_each_image_once(lengths: list[tuple[int, int, int]], gap: int, longest: int) -> None:
    """Every image of a walk through three files, with gaps between them."""
    images, place, file = [], 0, 0
    for number, before, length in sorted(lengths, key=lambda each: each[0]):
        place = place if number == file else 0
        file = number
        images.append((file, place + before, place + before + length))
        place += before + length
    columns = [np.array(column) for column in zip(*images, strict=True)]
    ranges = joined(*columns, gap, longest)
    assert [number for each in ranges for number in range(each.first, each.last)] == list(range(len(images)))
    for each in ranges:
        of = images[each.first : each.last]
        assert {file for file, _, _ in of} == {each.file}
        assert (each.start, each.stop) == (of[0][1], of[-1][2])
        assert each.stop - each.start <= longest or len(of) == 1
        assert all(after[1] - before[2] <= gap for before, after in pairwise(of))
    for one, other in pairwise(ranges):
        apart = one.file != other.file or other.start - one.stop > gap or other.stop - one.start > longest
        assert apart


def test_ranges_worked_out_by_hand() -> None:
    file, first, last = np.array([0, 0, 0, 1]), np.array([0, 15, 50, 0]), np.array([10, 25, 60, 10])
    assert joined(file, first, last, gap=4, longest=99) == [
        Range(0, 0, 10, 0, 1), Range(0, 15, 25, 1, 2), Range(0, 50, 60, 2, 3), Range(1, 0, 10, 3, 4)
    ]  # fmt: skip
    assert joined(file, first, last, gap=25, longest=99)[0] == Range(0, 0, 60, 0, 3)
    assert joined(file, first, last, gap=25, longest=59)[0] == Range(0, 0, 25, 0, 2)


@pytest.mark.parametrize("rows", [None, np.arange(0, 55, 4)])
def test_images_are_those_of_the_source_and_each_chunk_is_read_once(
    make: Callable[..., Any], index: PairIndex, tmp_path: Path, rows: np.ndarray | None
) -> None:
    spool, stream, files = make(rows=rows, stop=80)
    plain = ImageFiles(index, tmp_path)
    for start in range(0, 80, 8):
        expected = list(plain.read_many(stream.rows_at(start, 8).tolist()))
        assert read(spool, stream, start, 8) == expected
    wanted = {stream.chunk(number) for number in stream.chunks_at(np.arange(80)).tolist()}
    wait_until(lambda: {path.name for path in (tmp_path / "spool").glob("*")} == named(*wanted))
    # A chunk that reaches over the end of a shard takes two.
    assert len(wanted) <= len(files.ranges) <= 2 * len(wanted)
    assert max(Counter(files.ranges).values()) <= len({chunk.number for chunk in wanted})
    assert {*files.singly} <= {*stream.rows_at(*stream.span(0, 0)).tolist()}


def test_what_lies_far_from_the_next_is_not_read(
    make: Callable[..., Any], index: PairIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined, "__defaults__", (0, 2**23))
    spool, stream, files = make(rows=np.arange(0, 15, 2), stop=8)
    read(spool, stream, 0, 8)
    wanted = index.locate(np.arange(0, 15, 2))
    names = named(*(stream.chunk(number) for number in stream.chunks_at(np.arange(8)).tolist()))
    wait_until(lambda: {path.name for path in (tmp_path / "spool").glob("*")} == names)
    assert sum(stop - start for _, start, stop in files.ranges) == int((wanted.length + 512).sum())


def batches(
    index: PairIndex, root: Path, make: Callable[..., Any] | None, start: int = 0, workers: int = 0, cache_mb: int = 0
) -> list[Batch]:
    stream, reader, shares = stream_of(index), None, Shares(start, 90, 10)
    if make is not None:
        reader, stream, _ = make(shares=shares)
    store = ImageStore(index, root, IMAGE, cache_mb, reader=reader)
    return list(make_loader(store, stream, shares, workers=workers, spool=reader))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.rows, b.rows) and torch.equal(a.images, b.images) and np.array_equal(a.bad, b.bad)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("cache_mb", [0, 1])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 30, 50])
def test_batches_are_those_of_the_source_wherever_they_begin(
    make: Callable[..., Any], index: PairIndex, tmp_path: Path, workers: int, cache_mb: int, start: int
) -> None:
    expected = batches(index, tmp_path, None)[start // 10 :]
    assert any(len(batch.bad) for batch in expected)
    assert same(batches(index, tmp_path, make, start, workers, cache_mb=cache_mb), expected)


def test_processes_share_what_was_fetched(make: Callable[..., Any], index: PairIndex, tmp_path: Path) -> None:
    one, stream, files = make(stop=27)
    other, _, files_of_other = make(stop=27)
    for start in range(0, 27, 9):
        rows, positions = stream.rows_at(start, 9).tolist(), range(start, start + 9)
        with ThreadPoolExecutor(2) as threads:
            halves = [
                threads.submit(list, spool.read_many(rows[some], positions[some]))
                for spool, some in ((one, slice(5)), (other, slice(5, 9)))
            ]
        assert [len(half.result()) for half in halves] == [5, 4]
    assert max(Counter(files.ranges + files_of_other.ranges).values()) == 1


def test_the_first_samples_do_not_wait_for_their_window(make: Callable[..., Any], tmp_path: Path) -> None:
    """Its chunks are fetched by others, who never end: its images come one by one, and those behind it from chunks."""
    spool, stream, files = make(stop=18)
    (tmp_path / "spool").mkdir()
    parts = [(tmp_path / "spool" / f"0-0-{slot}-0.part").open("ab") for slot in range(3)]
    for part in parts:
        fcntl.flock(part, fcntl.LOCK_EX)
    rows = stream.rows_at(0, 9).tolist()
    assert read(spool, stream, 0, 9) == list(ImageFiles(spool.places, tmp_path).read_many(rows))
    assert files.singly == rows
    wait_until(lambda: all((tmp_path / "spool" / f"0-1-{slot}-0").exists() for slot in (3, 4, 5)))
    read(spool, stream, 9, 9)
    assert files.singly == rows, "what is there is not asked for"
    for part in parts:
        part.close()


@pytest.mark.parametrize("counts", [(1, 1), (2, 1), (1, 1, 1, 1)])
def test_a_machine_fetches_what_its_processes_take(
    make: Callable[..., Any],
    index: PairIndex,
    tmp_path: Path,
    counts: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each image of it, and of others no byte, where nothing is read over; batches are those of one machine."""
    monkeypatch.setattr(joined, "__defaults__", (0, 2**23))
    machines = tuple(np.repeat(np.arange(len(counts)), counts).tolist())
    taken: dict[int, list[int]] = {}
    for rank in range(len(machines)):
        shares = Shares(0, 80, 8, rank, machines, stream_of(index).chunks_at)
        spool, stream, files = make(shares=shares)
        for number in range(10):
            positions = shares.of(number)
            rows = stream.rows_at_each(positions).tolist()
            assert list(spool.read_many(rows, positions.tolist())) == list(ImageFiles(index, tmp_path).read_many(rows))
            taken.setdefault(number, []).extend(rows)
        wanted = index.locate(np.unique(stream.first_rows(stream.found_at(shares.here(0, 80))[1])))
        wanted_bytes = {
            (int(file), byte)
            for file, offset, length in zip(wanted.file, wanted.offset, wanted.length, strict=True)
            for byte in range(int(offset) - 512, int(offset + length))
        }
        assert {(file, byte) for file, start, stop in files.ranges for byte in range(start, stop)} <= wanted_bytes
    assert [sorted(taken[number]) for number in range(10)] == [
        sorted(stream_of(index).rows_at(8 * number, 8).tolist()) for number in range(10)
    ]


def test_what_is_passed_goes(make: Callable[..., Any], tmp_path: Path) -> None:
    spool, stream, _ = make(stop=40)
    read(spool, stream, 0, 40)
    windows = [*stream.windows_from(0, 40)]
    wanted = named(*(stream.chunk(number) for number in stream.chunks_at(np.arange(windows[2].begin, 40)).tolist()))

    def names() -> set[str]:
        return {path.name for path in (tmp_path / "spool").iterdir()}

    # What is asked for image by image at first is fetched as well, and may still be on its way.
    wait_until(lambda: wanted <= names() and not any(name.endswith(".part") for name in names()))
    spool.pass_by(windows[2].begin)
    assert names() == wanted
    assert read(spool, stream, 0, 9) == read(spool, stream, 0, 9), "and is fetched again if it has to be"


def test_one_who_died_while_fetching_is_followed_by_another(make: Callable[..., Any], tmp_path: Path) -> None:
    """Its lock ends with it; what it had written is written again. It is of the second window, which is waited for."""
    spool, stream, files = make(stop=18)
    (tmp_path / "spool").mkdir()
    aside = tmp_path / "spool" / "0-1-3-0.part"
    aside.write_bytes(b"half")
    with aside.open("ab") as dying:
        fcntl.flock(dying, fcntl.LOCK_EX)
        reading = threading.Thread(target=read, args=(spool, stream, 0, 18), daemon=True)
        reading.start()
        wait_until(lambda: (tmp_path / "spool" / "0-1-5-0").exists())
        assert not (tmp_path / "spool" / "0-1-3-0").exists()
    reading.join(30)
    assert not reading.is_alive()
    assert read(spool, stream, 0, 18) == list(files.read_many(stream.rows_at(0, 18).tolist()))
    wait_until(lambda: not list((tmp_path / "spool").glob("*.part")))


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_file_of_the_spool_changes_nothing(make: Callable[..., Any], tmp_path: Path, damage: str) -> None:
    spool, stream, _ = make(stop=40)
    expected = read(spool, stream, 0, 40)
    wait_until(lambda: not list((tmp_path / "spool").glob("*.part")))  # what is read ahead beside it
    for path in (tmp_path / "spool").glob("*[0-9]"):
        content = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(content[:-7] if damage == "cut" else bytes(byte ^ 255 for byte in content))
    fresh, _, _ = make(stop=40)
    assert read(fresh, stream, 0, 40) == expected


def test_a_folder_that_cannot_be_written_is_one_line(index: PairIndex, tmp_path: Path, spools: list[Spool]) -> None:
    (tmp_path / "occupied").write_text("a file")
    stream = stream_of(index)
    spools.append(Spool(tmp_path / "occupied", ImageFiles(index, tmp_path), stream, Shares(0, 18, 9), requests=2))
    assert len(read(spools[0], stream, 0, 9)) == 9, "the first window comes image by image"
    with pytest.raises(ModeError, match=r"occupied/\d+-\d+-\d+-0: cannot be written: File exists .*make room"):
        read(spools[0], stream, 9, 9)


def test_a_shard_that_changes_while_it_is_read_ends_it(
    make: Callable[..., Any], index: PairIndex, tmp_path: Path
) -> None:
    spool, stream, _ = make(stop=9)
    (tmp_path / index.path(1)).write_bytes(bytes((tmp_path / index.path(1)).stat().st_size))
    with pytest.raises(ChangedShard, match=r"1\.tar: not the file that was indexed"):
        read(spool, stream, 0, 40)


def test_a_shard_that_is_gone_costs_its_images(make: Callable[..., Any], index: PairIndex, tmp_path: Path) -> None:
    """As where images are read one by one."""
    spool, stream, _ = make(stop=40)
    (tmp_path / index.path(2)).unlink()
    rows = stream.rows_at(0, 40)
    is_lost = [isinstance(content, OSError) for content in read(spool, stream, 0, 40)]
    assert is_lost == (index.file[rows] == 2).tolist()


def test_room_is_that_of_the_largest_chunks(make: Callable[..., Any], index: PairIndex, tmp_path: Path) -> None:
    """Windows of three chunks of three; four samples ahead lie in two windows at most, with one behind them."""
    spool, stream, files = make()
    assert samples_ahead(4, 0) == 24
    need = room_for(Pairs.of(np.arange(len(index)), index.image), files, stream, 40)
    read(spool, stream, 0, 40)
    sizes: list[int] = []

    def all_were_there() -> bool:
        """Chunks that come meanwhile change their name when they are complete."""
        with contextlib.suppress(FileNotFoundError):
            sizes[:] = [path.stat().st_size for path in (tmp_path / "spool").iterdir()]
        return bool(sizes)

    wait_until(all_were_there)
    assert need >= sum(sizes)
    check_room(need, 100, tmp_path / "spool", 9)
    with pytest.raises(
        ModeError, match=r"sequential keeps up to 21 MiB of images in .*spool_mb is 20 .*shuffle_images"
    ):
        check_room(20 * 2**20 + 1, 20, tmp_path / "spool", 9)
    with pytest.raises(ModeError, match="MiB are free there"):
        check_room(2**60, 2**50, tmp_path / "spool", 9)
