"""A shard that is another one than was indexed ends whatever reads it; a copy with another time does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from mode.data.loading.loader import ImageStore, PairStream, Shares, make_loader
from mode.data.loading.selection import Pairs
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import build_manifest
from mode.data.shards.reading import ImageFiles
from mode.errors import ModeError
from mode.params import ImageParams, IndexParams, SourceParams

Make = Callable[..., list[tuple[str, bytes]]]
COUNT = 200  # pairs: more than the samples of a shard cover


def picture(number: int) -> bytes:
    """Bytes of one length, as of encoded images; what is compared does not depend on what they show."""
    return b"\xff\xd8" + number.to_bytes(4, "big") * 250


def files(order: list[int], pictures: list[int] | None = None) -> list[tuple[str, bytes]]:
    shown = order if pictures is None else pictures
    pairs = zip(order, shown, strict=True)
    return [*chain.from_iterable([(f"{k:04d}.jpg", picture(p)), (f"{k:04d}.txt", b"words")] for k, p in pairs)]


def replace(path: Path, content: bytes, keep_time: bool) -> None:
    time = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(time, time) if keep_time else (time + 10**9, time + 10**9))


ALL = list(range(COUNT))


@pytest.mark.parametrize("keep_time", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("order", "pictures"),
    [
        (ALL[::-1], None),  # other places for the same keys
        (ALL, ALL[::-1]),  # the same keys and sizes, other images
        (ALL[:-1], None),  # shorter
        ([*ALL, *range(COUNT, COUNT + 20)], None),  # longer
    ],
)
def test_training_ends_with_one_line_that_names_the_shard(
    index_of: Callable[..., PairIndex], tar_bytes: Callable[..., bytes], tmp_path: Path, keep_time: bool, workers: int,
    order: list[int], pictures: list[int] | None,
) -> None:  # fmt: skip
    index = index_of({"0.tar": files(ALL)})
    replace(tmp_path / "shards" / "0.tar", tar_bytes(files(order, pictures)), keep_time)

    def train() -> None:
        store = ImageStore(index, tmp_path, ImageParams(size=8), 0)
        stream = PairStream(Pairs.of(np.arange(len(index)), index.image), index.image, 0)
        list(make_loader(store, stream, Shares(0, 20, 5), workers=workers))

    with pytest.raises(ModeError, match=r"^shards/0\.tar: not the file that was indexed: .*index the source") as end:
        train()
    assert "\n" not in str(end.value)


def test_two_swapped_images_are_noticed_when_they_are_read(
    index_of: Callable[..., PairIndex], tar_bytes: Callable[..., bytes], tmp_path: Path
) -> None:
    """By the names in their headers, while the samples of the shard are the same."""
    wrong = []
    for first in range(2, COUNT - 1, 7):
        swapped = [*ALL[:first], first + 1, first, *ALL[first + 2 :]]
        index = index_of({"0.tar": files(ALL)})
        (tmp_path / "shards" / "0.tar").write_bytes(tar_bytes(files(swapped)))
        read = ImageFiles(index, tmp_path)
        try:
            assert read.read(0) == picture(0)
        except ModeError:
            continue  # a sample lies on it
        with pytest.raises(ModeError, match="another image is at byte"):
            read.read(first)
        wrong.append(first)
    assert wrong, "or nothing was tested"


@pytest.mark.parametrize("check_images", [False, True])
def test_a_copy_with_another_time_is_the_same_shard(
    index_of: Callable[..., PairIndex], pair: Make, tmp_path: Path, check_images: bool
) -> None:
    index = index_of({"0.tar": [*chain.from_iterable(pair(f"{n}", n) for n in range(9))]}, check_images=check_images)
    images = list(ImageFiles(index, tmp_path).read_many(range(9)))
    os.utime(tmp_path / "shards" / "0.tar", (1, 1))
    assert list(ImageFiles(index, tmp_path).read_many(range(9))) == images
    ImageStore(index, tmp_path, ImageParams(size=8), 0)


@pytest.mark.parametrize("check_images", [False, True])
def test_an_image_of_a_table_that_is_another_one(
    encode: Callable[..., bytes], tmp_path: Path, check_images: bool
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(encode(number, kind="PNG"))
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(f"{n}.jpg,words {n}\n" for n in range(3)))
    manifest = build_manifest(SourceParams(shards="pairs.csv"), tmp_path)
    build_index(manifest, tmp_path, tmp_path / "index", IndexParams(check_images=check_images))
    index = PairIndex.load(tmp_path / "index")
    content = (tmp_path / "1.jpg").read_bytes()
    os.utime(tmp_path / "1.jpg", (1, 1))
    assert ImageFiles(index, tmp_path).read(1) == content
    (tmp_path / "1.jpg").write_bytes(content[:-100] + bytes(100))
    with pytest.raises(ModeError, match=r"1\.jpg: not the file that was indexed: another image"):
        ImageFiles(index, tmp_path).read(1)
    (tmp_path / "1.jpg").write_bytes(content + b"\0")
    with pytest.raises(ModeError, match=r"1\.jpg: not the file that was indexed: [0-9,]+ bytes"):
        ImageStore(index, tmp_path, ImageParams(size=8), 0)
