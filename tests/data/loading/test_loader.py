from __future__ import annotations

import io
import struct
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from mode.data.images import decode, resize_and_crop
from mode.data.loading import store as store_module
from mode.data.loading.loader import Batch, ImageStore, PairStream, Shares, make_loader
from mode.data.loading.pixels import pixels_on_device
from mode.data.loading.selection import Pairs
from mode.data.loading.store import replacements
from mode.data.shards.index import PairIndex
from mode.errors import ModeError
from mode.params import ImageParams
from tests.waiting import wait_until

Make = Callable[..., list[tuple[str, bytes]]]
flat = chain.from_iterable
SIZE = 8
PLAIN = ImageParams(size=SIZE)
CROPPED = ImageParams(size=SIZE, crop_scale=0.3)


@pytest.fixture
def index(index_of: Callable[..., PairIndex], pair: Make, texts: Make) -> PairIndex:
    """Eleven images, sixteen pairs, in three tars."""
    return index_of(
        {
            "0.tar": [*flat(pair(f"a{n}", n) for n in range(5))],
            "1.tar": [*flat(texts(f"b{n}", ["x", "y"], n + 5) for n in range(5))],
            "2.tar": pair("c", 10),
        }
    )


def stream_of(index: PairIndex, seed: int = 0) -> PairStream:
    return PairStream(Pairs.of(np.arange(len(index)), index.image), index.image, seed)


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x.rows, y.rows)
        and torch.equal(x.images, y.images)
        and np.array_equal(x.positions, y.positions)
        and x.position == y.position
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("cache_mb", [0, 1])
def test_images_are_those_of_the_rows(index: PairIndex, tmp_path: Path, cache_mb: int) -> None:
    store = ImageStore(index, tmp_path, PLAIN, cache_mb)
    assert store.cached == bool(cache_mb)
    rows = np.array([15, 0, 6, 5, 0, 9])
    for _ in range(2):  # once decoded, once from memory
        images, good = store.load(rows)
        assert good.all()
        assert (images.dtype, images.shape) == (torch.uint8, (6, 3, SIZE, SIZE))
        for image, row in zip(images, rows, strict=True):
            shard = (tmp_path / index.path(index.file[row])).read_bytes()
            content = shard[index.offset[row] :][: index.length[row]]
            assert np.array_equal(image, resize_and_crop(decode(content), SIZE))
    assert store.load(rows[:0])[0].shape == (0, 3, SIZE, SIZE)


def test_memory_is_reckoned_for_the_rows_given(index_of: Callable[..., PairIndex], pair: Make, tmp_path: Path) -> None:
    index = index_of({"0.tar": [*flat(pair(f"{n}", n) for n in range(3))]})
    params = ImageParams(size=512)  # 0.75 MiB an image
    assert not ImageStore(index, tmp_path, params, 2).cached
    assert ImageStore(index, tmp_path, params, 3).cached
    store = ImageStore(index, tmp_path, params, 2, rows=np.array([0, 2]))
    assert store.cached
    assert store.load(np.array([2]))[1].all()
    with pytest.raises(IndexError):
        store.load(np.array([1]))


@pytest.mark.parametrize("image", [PLAIN, CROPPED])
def test_any_number_of_workers_gives_the_same_batches(index: PairIndex, tmp_path: Path, image: ImageParams) -> None:
    def batches(workers: int, cache_mb: int) -> list[Batch]:
        store = ImageStore(index, tmp_path, image, cache_mb)
        return list(make_loader(store, stream_of(index), Shares(5, 47, 4), workers=workers))

    expected = batches(0, 1)
    assert [len(batch.rows) for batch in expected] == [4] * 10 + [2]
    assert [batch.position for batch in expected] == [*range(9, 47, 4), 47]
    assert np.array_equal(np.concatenate([batch.rows for batch in expected]), stream_of(index).rows_at(5, 42))
    assert same(batches(0, 0), expected)
    assert same(batches(2, 1), expected)


@pytest.mark.parametrize("image", [PLAIN, CROPPED])
def test_resuming_gives_the_rest(index: PairIndex, tmp_path: Path, image: ImageParams) -> None:
    store = ImageStore(index, tmp_path, image, 1)
    whole = list(make_loader(store, stream_of(index), Shares(0, 40, 8), workers=0))
    for done in range(5):
        position = whole[done].position
        fresh = ImageStore(index, tmp_path, image, 1)
        rest = list(make_loader(fresh, stream_of(index), Shares(position, 40, 8), workers=0))
        assert same(rest, whole[done + 1 :])


@pytest.mark.parametrize("image", [PLAIN, CROPPED])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_each_batch(index: PairIndex, tmp_path: Path, image: ImageParams, world: int) -> None:
    def batches(rank: int, world: int) -> list[Batch]:
        store = ImageStore(index, tmp_path, image, 0)
        return list(make_loader(store, stream_of(index), Shares(3, 30, 12, rank, (0,) * world), workers=0))

    ranks = [batches(rank, world) for rank in range(world)]
    for whole, *parts in zip(batches(0, 1), *ranks, strict=True):
        assert np.array_equal(np.concatenate([part.rows for part in parts]), whole.rows)
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert {part.position for part in parts} == {whole.position}
        assert np.array_equal(np.concatenate([part.positions for part in parts]), whole.positions)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_mb", [0, 1])
def test_a_bad_image_is_replaced_with_its_pair_and_counted(
    index_of: Callable[..., PairIndex], pair: Make, tmp_path: Path, workers: int, cache_mb: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    files = [*flat(pair(f"{n}", n) for n in range(6))]
    index = index_of({"0.tar": [(name, b"bad" if name in ("1.jpg", "4.jpg") else data) for name, data in files]})
    store = ImageStore(index, tmp_path, PLAIN, cache_mb)
    stream = stream_of(index)
    batches = list(make_loader(store, stream, Shares(0, 18, 6), workers=workers))
    for batch in batches:
        asked = stream.rows_at_each(batch.positions)
        assert np.array_equal(batch.rows, asked[replacements(~np.isin(asked, [1, 4]))])
        assert torch.equal(batch.images, store.load(batch.rows)[0])
        assert sorted(batch.bad.tolist()) == [1, 4]
    assert store.bad == 6
    assert len(caplog.records) == 2, "each image is named once"
    assert f"shards/0.tar at byte {index.offset[1]}" in caplog.text


def test_nothing_but_bad_images(index_of: Callable[..., PairIndex], tmp_path: Path) -> None:
    index = index_of({"0.tar": [("a.jpg", b"bad"), ("a.txt", b"words")]})
    store = ImageStore(index, tmp_path, PLAIN, 1)
    with pytest.raises(ModeError, match=r"shards/0.tar at byte 512: cannot be read"):
        list(make_loader(store, stream_of(index), Shares(0, 4, 2), workers=0))


def test_a_missing_shard(index: PairIndex, tmp_path: Path) -> None:
    (tmp_path / "shards" / "1.tar").unlink()
    with pytest.raises(ModeError, match=r"1.tar: missing"):
        ImageStore(index, tmp_path, PLAIN, 0)
    ImageStore(index, tmp_path, PLAIN, 0, rows=np.array([0, 1]))  # of another shard


def test_leaving_early_leaves_nothing_running(index: PairIndex, tmp_path: Path) -> None:
    before = set(psutil.Process().children())

    def readers() -> set[psutil.Process]:
        return set(psutil.Process().children()) - before

    for workers in (0, 2):
        loader = make_loader(
            ImageStore(index, tmp_path, PLAIN, 0), stream_of(index), Shares(0, 10**9, 4), workers=workers
        )
        first = next(loader)
        assert first.position == 4
        assert bool(readers()) == bool(workers), "processes read, or one thread of this process"
        loader.close()  # type: ignore[attr-defined]
        wait_until(lambda: not readers(), readers)


def test_more_files_than_are_kept_open(index_of: Callable[..., PairIndex], pair: Make, tmp_path: Path) -> None:
    index = index_of({f"{n:03d}.tar": pair("a", n) for n in range(140)})
    store = ImageStore(index, tmp_path, PLAIN, 0)
    forth = store.load(np.arange(140))
    back = store.load(np.arange(140)[::-1].copy())
    assert forth[1].all()
    assert torch.equal(back[0], forth[0].flip(0))


def test_replacements_of_every_batch_of_five() -> None:
    for pattern in range(1, 32):
        good = np.array([bool(pattern >> place & 1) for place in range(5)])
        expected = [next(p % 5 for p in range(place, place + 5) if good[p % 5]) for place in range(5)]
        assert replacements(good).tolist() == expected
    assert replacements(np.zeros(3, bool)).tolist() == [0, 1, 2]
    assert replacements(np.zeros(0, bool)).tolist() == []


@pytest.mark.parametrize("bad", [False, True])
def test_batches_decoded_on_a_device_are_those_of_the_workers(
    index_of: Callable[..., PairIndex], pair: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: bool
) -> None:
    """The way that batches go with `decode: gpu`, with the CPU in the place of the GPU."""

    def on_cpu(contents: list[bytes], image: ImageParams, positions: np.ndarray, seed: int, _: torch.device) -> object:
        return pixels_on_device(contents, image, positions, seed, torch.device("cpu"))

    monkeypatch.setattr(store_module, "pixels_on_device", on_cpu)
    monkeypatch.setattr(store_module, "aside", lambda _: nullcontext(lambda pixels: pixels))
    last = [("last.jpg", b"bad"), ("last.txt", b"words")] if bad else pair("last", 9)
    index = index_of({"0.tar": [*flat(pair(f"{n}", n) for n in range(8))], "1.tar": last})
    image = CROPPED.model_copy(update={"decode": "gpu"})
    gpu = torch.device("cuda", 1)
    stores = [ImageStore(index, tmp_path, each, cache_mb=0, device=gpu) for each in (image, CROPPED)]
    assert [store.device for store in stores] == [gpu, torch.device("cpu")]
    assert ImageStore(index, tmp_path, image, cache_mb=0).device == torch.device("cpu")
    kept = PLAIN.model_copy(update={"decode": "gpu"})
    assert ImageStore(index, tmp_path, kept, cache_mb=1, device=gpu).device == torch.device("cpu")
    batches = [list(make_loader(store, stream_of(index), Shares(3, 25, 5), workers=2)) for store in stores]
    assert same(*batches)
    assert stores[0].bad == stores[1].bad
    assert (stores[0].bad > 0) == bad


@pytest.mark.parametrize("fault", [MemoryError("no room"), RuntimeError("can't allocate"), struct.error("short")])
@pytest.mark.parametrize("cache_mb", [0, 1])
def test_no_error_of_a_decoder_ends_a_training(
    index: PairIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, cache_mb: int
) -> None:
    whole = store_module.training_pixels

    def failing(content: bytes, *given: object) -> np.ndarray:
        if content == bad:
            raise fault
        return whole(content, *given)  # type: ignore[arg-type]

    store = ImageStore(index, tmp_path, PLAIN, cache_mb)
    bad = (tmp_path / index.path(0)).read_bytes()[index.offset[0] :][: index.length[0]]
    monkeypatch.setattr(store_module, "training_pixels", failing)
    batches = list(make_loader(store, stream_of(index), Shares(0, 22, 11), workers=0))
    assert [batch.bad.tolist() for batch in batches] == [[0], [0]]


def test_a_thin_image_is_replaced(index_of: Callable[..., PairIndex], pair: Make, tmp_path: Path) -> None:
    thin = io.BytesIO()
    Image.new("L", (1, 20_000)).save(thin, "PNG")
    index = index_of({"0.tar": [*pair("a"), ("b.png", thin.getvalue()), ("b.txt", b"thin"), *pair("c", 2)]})
    batches = make_loader(ImageStore(index, tmp_path, PLAIN, 0), stream_of(index), Shares(0, 3, 3), workers=0)
    assert [batch.bad.tolist() for batch in batches] == [[1]]
