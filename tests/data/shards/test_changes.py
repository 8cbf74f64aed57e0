"""A shard that changes while it is read: what was read is of one version, or ends in one line that names the shard.

The change is made at a chosen image, from within the reading, so that it always comes in the middle.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mode.data.loading.loader import ImageStore, PairStream, Shares, make_loader
from mode.data.loading.selection import Pairs
from mode.data.shards import filters, scan, tables
from mode.data.shards.export import Chosen, export_pairs
from mode.data.shards.index import PairIndex, build_index, verify
from mode.data.shards.manifest import build_manifest
from mode.data.shards.reading import ImageFiles
from mode.errors import ModeError
from mode.params import ImageParams, IndexParams, SourceParams
from tests.data.shards.test_places import Server

COUNT = 40
ALL = list(range(COUNT))


def members(order: list[int], shown: int = 0) -> list[tuple[str, bytes]]:
    """Pairs in this order; `shown` changes what their images show, and nothing else."""
    pictures = [b"\xff\xd8" + bytes([(number + shown) % 251]) * 900 for number in ALL]
    return [*chain.from_iterable([(f"{n:04d}.jpg", pictures[n]), (f"{n:04d}.txt", b"words")] for n in order)]


def by_rename(path: Path, content: bytes) -> None:
    (path.parent / "new").write_bytes(content)
    (path.parent / "new").replace(path)


def in_place(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


#: What may happen to a tar: how it is written, and what of.
CHANGES: dict[str, Callable[[Path, Callable[..., bytes]], None]] = {
    "replaced": lambda path, tar: by_rename(path, tar(members(ALL[::-1]))),
    "written over": lambda path, tar: in_place(path, tar(members(ALL[::-1]))),
    "truncated": lambda path, _: os.truncate(path, path.stat().st_size // 2),
    "appended to": lambda path, tar: in_place(path, tar(members([*ALL, *ALL[:3]]))),
    "removed": lambda path, _: path.unlink(),
}


class AtCall:
    """Calls a function as it is, but before its n-th call does something else."""

    def __init__(self, number: int, function: Callable[..., Any], do: Callable[[], object]) -> None:
        self.left, self._function, self._do = number, function, do

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            self._do()
        return self._function(*arguments, **named)


@pytest.fixture
def shards(tmp_path: Path, tar_bytes: Callable[..., bytes]) -> Path:
    """Two tars, of which the second is to change."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("0.tar", "1.tar"):
        (folder / name).write_bytes(tar_bytes(members(ALL)))
    return folder


def build(root: Path, shards: str = "shards") -> None:
    params = IndexParams(check_images=False, max_bad_share=1.0)
    build_index(build_manifest(SourceParams(shards=shards), root), root, root / "index", params, workers=1)


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_holds_no_rows_of_two_versions(
    shards: Path, tmp_path: Path, tar_bytes: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    build(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file()}
    at = AtCall(COUNT + 20, scan._account, lambda: CHANGES[change](shards / "1.tar", tar_bytes))
    monkeypatch.setattr(scan, "_account", at)
    with pytest.raises(ModeError, match=r"^shards/1\.tar: changed while it was read: .* \(run it again") as end:
        build(tmp_path)
    assert at.left < 0
    assert "\n" not in str(end.value)
    assert {path: path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file()} == before


def test_a_shard_that_changes_before_its_turn(
    shards: Path, tmp_path: Path, tar_bytes: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is whole, but not the one that was compared with the manifest."""
    replace = partial(by_rename, shards / "1.tar", tar_bytes(members(ALL[::-1])))
    monkeypatch.setattr(scan, "_account", AtCall(3, scan._account, replace))
    with pytest.raises(
        ModeError, match=r"^shards/1\.tar: changed while it was read: as long as it was, but written to"
    ):
        build(tmp_path)


def test_verifying_says_so_too(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_account", AtCall(60, scan._account, lambda: os.truncate(shards / "1.tar", 10_240)))
    with pytest.raises(ModeError, match=r"^shards/1\.tar: changed while it was read: 10,240 bytes"):
        verify(["shards"], tmp_path, check_images=False)


def test_an_object_that_changes_is_known_by_its_etag(
    shards: Path, tmp_path: Path, tar_bytes: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, other = Server(shards), tar_bytes(members(ALL[::-1]))
    try:
        monkeypatch.setattr(scan, "_account", AtCall(60, scan._account, partial(by_rename, shards / "1.tar", other)))
        with pytest.raises(ModeError, match=r"1\.tar: changed while it was read: its ETag is .*, it was "):
            build(tmp_path, server.url("{0..1}.tar"))
    finally:
        server.stop()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_and_an_image_of_it(
    tmp_path: Path, encode: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    import pandas as pd

    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(encode(number))
    table, rows = tmp_path / f"pairs.{suffix}", [(f"{number}.jpg", f"words {number}") for number in range(4)]
    frame = pd.DataFrame(rows, columns=["image", "caption"])
    frame.to_csv(table, index=False) if suffix == "csv" else frame.to_parquet(table)
    manifest = build_manifest(SourceParams(shards=table.name), tmp_path)
    index = partial(build_index, manifest, tmp_path, tmp_path / "index", IndexParams(max_bad_share=0.5), 1)

    decode = AtCall(3, tables.image_fault, lambda: in_place(tmp_path / "2.jpg", encode(9)))
    monkeypatch.setattr(tables, "image_fault", decode)
    index()  # the image had been read before
    check = AtCall(3, tables.check_of, lambda: in_place(tmp_path / "2.jpg", encode(2)))
    monkeypatch.setattr(tables, "check_of", check)
    report = index()
    assert [(each.key, each.kind, each.detail) for each in report.problems] == [
        ("2.jpg", "undecodable-image", "changed while it was read")
    ]
    assert PairIndex.load(tmp_path / "index").captions(range(3)) == ["words 0", "words 1", "words 3"]

    content = table.read_bytes()
    monkeypatch.setattr(tables, "_is_path", AtCall(2, tables._is_path, lambda: by_rename(table, content + b"\n")))
    with pytest.raises(ModeError, match=rf"^pairs\.{suffix}: changed while it was read: "):
        index()


def test_the_parquet_beside_a_tar(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    for name in ("0", "1"):
        frame = pd.DataFrame({"key": [f"{number:04d}" for number in ALL], "similarity": [0.5] * COUNT})
        frame.to_parquet(shards / f"{name}.parquet")
    source = SourceParams(shards="shards", filters=["similarity >= 0.3"])
    manifest = build_manifest(source, tmp_path)
    content = (shards / "1.parquet").read_bytes()
    change = AtCall(2, filters.open_bytes, lambda: by_rename(shards / "1.parquet", content + b"\0"))
    monkeypatch.setattr(filters, "open_bytes", change)
    with pytest.raises(ModeError, match=r"^shards/1\.parquet: changed while it was read: "):
        build_index(manifest, tmp_path, tmp_path / "index", IndexParams(check_images=False), workers=1)


# Reading images: of a training, of an embedding, for an export.


@pytest.mark.parametrize("change", CHANGES)
def test_images_are_those_that_were_indexed(
    shards: Path, tmp_path: Path, tar_bytes: Callable[..., bytes], change: str
) -> None:
    """A file that is replaced or removed stays what it was for whoever has it open, and is refused to others."""
    build(tmp_path)
    index, read = PairIndex.load(tmp_path / "index"), list[bytes]()

    def read_all(files: ImageFiles, change_at: int) -> None:
        for row in range(len(index)):
            if row == change_at:
                CHANGES[change](shards / "1.tar", tar_bytes)
            read.append(files.read(row))

    files, refused = ImageFiles(index, tmp_path), r"^shards/1\.tar: not the file that was indexed: [^\n]*$"
    if change in ("replaced", "removed"):
        read_all(files, COUNT + 20)
        assert len(read) == 2 * COUNT
        error, said = (ModeError, refused) if change == "replaced" else (FileNotFoundError, r"1\.tar")
        with pytest.raises(error, match=said):
            ImageFiles(index, tmp_path).read(COUNT)
    else:
        with pytest.raises(ModeError, match=refused):
            read_all(files, COUNT + 20)
    expected = [content for name, content in members(ALL) if name.endswith(".jpg")] * 2
    assert read == expected[: len(read)]


def test_other_images_under_the_same_names_in_an_open_file(
    shards: Path, tmp_path: Path, tar_bytes: Callable[..., bytes]
) -> None:
    build(tmp_path)
    index = PairIndex.load(tmp_path / "index")
    files = ImageFiles(index, tmp_path)
    files.read(COUNT)
    in_place(shards / "1.tar", tar_bytes(members(ALL, shown=1)))
    with pytest.raises(ModeError, match=r"1\.tar: not the file that was indexed: as long as it was, but other bytes"):
        files.read(COUNT)
    in_place(shards / "1.tar", tar_bytes(members(ALL)))
    assert files.read(COUNT + 1) == members(ALL)[2][1]


def test_a_file_of_the_same_time_and_size_in_the_place_of_another(
    shards: Path, tmp_path: Path, tar_bytes: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a copy that keeps times makes one; it is opened again, as where there are many."""
    monkeypatch.setattr("mode.data.shards.reading._OPEN_FILES", 1)
    build(tmp_path)
    index, time = PairIndex.load(tmp_path / "index"), (shards / "1.tar").stat().st_mtime_ns
    files = ImageFiles(index, tmp_path)
    files.read(COUNT)
    by_rename(shards / "1.tar", tar_bytes(members(ALL, shown=1)))
    os.utime(shards / "1.tar", ns=(time, time))
    files.read(0)
    with pytest.raises(ModeError, match=r"1\.tar: not the file that was indexed: as long as it was, but other bytes"):
        files.read(COUNT)


def test_a_training_from_a_server_ends_in_one_line(
    tmp_path: Path, encode: Callable[..., bytes], tar_bytes: Callable[..., bytes]
) -> None:
    def pairs(order: list[int]) -> bytes:
        return tar_bytes(
            [*chain.from_iterable([(f"{n:02d}.jpg", encode(n)), (f"{n:02d}.txt", b"words")] for n in order)]
        )

    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar").write_bytes(pairs(ALL))
    server = Server(tmp_path / "shards")
    try:
        build(tmp_path, server.url("0.tar"))
        index = PairIndex.load(tmp_path / "index")
        store = ImageStore(index, tmp_path, ImageParams(size=8), 0)
        stream = PairStream(Pairs.of(np.arange(len(index)), index.image), index.image, 0)
        batches = make_loader(store, stream, Shares(0, 4_000, 5), workers=2)
        next(batches)
        by_rename(tmp_path / "shards/0.tar", pairs(ALL[::-1]))
        with pytest.raises(ModeError, match=r"0\.tar: not the file that was indexed: [^\n]*$"):
            list(batches)
    finally:
        server.stop()


def test_an_export_leaves_no_tar_of_two_versions(
    shards: Path, tmp_path: Path, tar_bytes: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an object whose images have the same names and sizes, so that its ETag alone tells; then it is put back."""
    server, rows = Server(shards), np.arange(2 * COUNT)
    export = partial(export_pairs, about={}, pairs_per_shard=50)
    try:
        build(tmp_path, server.url("{0..1}.tar"))
        index = PairIndex.load(tmp_path / "index")
        content = (shards / "1.tar").read_bytes()
        first = AtCall(70, ImageFiles.read, partial(by_rename, shards / "1.tar", tar_bytes(members(ALL, shown=1))))
        monkeypatch.setattr(ImageFiles, "read", lambda *given: first(*given))
        with pytest.raises(ModeError, match=r"1\.tar: not the file that was indexed: its ETag is"):
            export(index, lambda: [Chosen(rows, {})], tmp_path, tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.tar", "export.json"]
        by_rename(shards / "1.tar", content)
        # A server makes the ETag of size and time.
        time = (shards / "0.tar").stat().st_mtime_ns
        for name in ("0.tar", "1.tar"):
            os.utime(shards / name, ns=(time, time))
        build(tmp_path, server.url("{0..1}.tar"))
        index = PairIndex.load(tmp_path / "index")
        export(index, lambda: [Chosen(rows, {})], tmp_path, tmp_path / "out")
        export(index, lambda: [Chosen(rows, {})], tmp_path, tmp_path / "whole")
    finally:
        server.stop()
    for name in ("00000.tar", "00001.tar"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
