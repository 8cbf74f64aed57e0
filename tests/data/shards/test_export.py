"""Exported tars, read back by webdataset and by our own index."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from mode.data.shards import export as room
from mode.data.shards.export import Chosen, export_pairs
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import build_manifest
from mode.errors import ModeError
from mode.params import IndexParams, SourceParams

ROWS = np.array([0, 2, 3, 4, 6])


@pytest.fixture
def index(index_of: Any, pair: Any, texts: Any, encode: Any) -> PairIndex:
    """Seven pairs of five images: jpg, png and webp, one with three captions, in two tars."""
    first = [*pair("a", 1), *texts("b", ["one", "two", "grün"], 2), ("c.png", encode(3, kind="PNG")), ("c.txt", b"c")]
    second = [("d.WEBP", encode(4, kind="WEBP")), ("d.txt", b"d"), *pair("e", 5)]
    return index_of({"0.tar": first, "1.tar": second})


def export(index: PairIndex, root: Path, rows: np.ndarray = ROWS, size: int = 2, **options: Any) -> int:
    def chosen() -> Iterator[Chosen]:
        """In blocks, one of them empty."""
        for some in (rows[:3], rows[3:3], rows[3:]):
            yield Chosen(some, {"fine": (some * 10).astype(np.int32), "coarse": (some % 2).astype(np.int32)})

    pairs, tars = export_pairs(index, chosen, root, root / "out", {"expert": "expert-0"}, size, **options)
    assert pairs == len(rows)
    return tars


def original(index: PairIndex, root: Path, row: int) -> bytes:
    shard = (root / index.path(index.file[row])).read_bytes()
    return shard[index.offset[row] :][: index.length[row]]


def test_webdataset_reads_the_pairs_with_their_bytes(index: PairIndex, tmp_path: Path) -> None:
    assert export(index, tmp_path) == 3
    tars = [str(tmp_path / "out" / f"0000{number}.tar") for number in range(3)]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [int(sample["__key__"]) for sample in samples] == ROWS.tolist()
    suffixes = ["jpg", "jpg", "jpg", "png", "jpg"]
    for row, suffix, sample in zip(ROWS.tolist(), suffixes, samples, strict=True):
        assert sample[suffix] == original(index, tmp_path, row)
        assert sample["txt"].decode() == index.caption(row)
        assert json.loads(sample["json"]) == {
            "pair": row,
            "image": int(index.image[row]),
            "shard": index.path(index.file[row]),
            "fine": row * 10,
            "coarse": row % 2,
        }


@pytest.mark.parametrize("rows", [np.arange(7), ROWS, np.array([5]), np.empty(0, np.int64)])
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_our_own_index_finds_the_same_pairs(index: PairIndex, tmp_path: Path, rows: np.ndarray, size: int) -> None:
    assert export(index, tmp_path, rows, size) == -(-len(rows) // size)
    if not len(rows):
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["export.json"]
        return
    manifest = build_manifest(SourceParams(shards="out"), tmp_path)
    report = build_index(manifest, tmp_path, tmp_path / "again", IndexParams(max_bad_share=0), workers=1)
    assert (report.pairs, report.bad) == (len(rows), 0)
    again = PairIndex.load(tmp_path / "again")

    def pairs(of: PairIndex, chosen: list[int]) -> list[tuple[bytes, str]]:
        return [(original(of, tmp_path, row), of.caption(row)) for row in chosen]

    assert pairs(again, list(range(len(again)))) == pairs(index, rows.tolist())


class _Stop(Exception):
    pass


def test_interrupted_goes_on_and_ends_the_same(
    index: PairIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(index, tmp_path)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out").rename(tmp_path / "whole")

    read = room.ImageFiles.read
    rows_read: list[int] = []

    def stopping(self: room.ImageFiles, row: int) -> bytes:
        rows_read.append(row)
        if row == 4:
            raise _Stop
        return read(self, row)

    with monkeypatch.context() as patched:
        patched.setattr(room.ImageFiles, "read", stopping)
        with pytest.raises(_Stop):
            export(index, tmp_path)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.tar", "export.json"]
        patched.setattr(room.ImageFiles, "read", lambda self, row: rows_read.append(row) or read(self, row))
        rows_read.clear()
        export(index, tmp_path)
    assert rows_read == [3, 4, 6]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole


def test_other_files_and_other_exports_are_refused_without_force(index: PairIndex, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ModeError, match=r"not empty \(mine.txt, \.\.\.\) .*--force"):
        export(index, tmp_path)
    assert export(index, tmp_path, size=1, force=True) == 5
    with pytest.raises(ModeError, match="another export"):
        export(index, tmp_path, size=3)
    assert export(index, tmp_path, size=3, force=True) == 2
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00000.tar", "00001.tar", "export.json", "mine.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ModeError, match=r"not a folder \(name a new or empty one\)"):
        export_pairs(index, lambda: [Chosen(ROWS, {})], tmp_path, tmp_path / "file", {})


def test_a_shard_that_was_cut_is_an_error_and_leaves_no_tar(index: PairIndex, tmp_path: Path) -> None:
    shard = tmp_path / index.path(0)
    shard.write_bytes(shard.read_bytes()[: int(index.offset[2]) + 5])
    with pytest.raises(ModeError, match=r"0.tar: not the file that was indexed: [0-9,]+ bytes, it had 10,240"):
        export(index, tmp_path, np.array([2]))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["export.json"]


def test_keys_sort_as_rows(index: PairIndex, tmp_path: Path) -> None:
    export(index, tmp_path, np.arange(7), size=100)
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        names = tar.getnames()
    assert names == sorted(names, key=lambda name: name.split(".")[0])
    assert len(names) == 21
