"""A training's images in shards of its own."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import tarfile
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import fsspec
import numpy as np
import pytest

from mode.data.loading import pack as pack_module
from mode.data.loading.pack import Pack, Store, fetch_table, read_record, write_pack
from mode.data.loading.selection import Pairs
from mode.data.shards.identity import sample_of
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import build_manifest
from mode.data.shards.places import LocalFile
from mode.data.shards.reading import ChangedShard, ImageFiles, check_files
from mode.errors import ModeError
from mode.params import IndexParams, SourceParams
from tests.data.shards.test_places import Server

Make = Callable[..., list[tuple[str, bytes]]]
flat = chain.from_iterable
#: Nine images: one of the first tar is left out, of the second only some captions are wanted.
ROWS = np.array([0, 1, 3, 4, 5, 6, 8, 10, 12, 14])


@pytest.fixture
def index(index_of: Callable[..., PairIndex], pair: Make, texts: Make) -> PairIndex:
    """Five images with a caption each, five with two."""
    first = [*flat(pair(f"a{n}", n) for n in range(5))]
    return index_of({"0.tar": first, "1.tar": [*flat(texts(f"b{n}", ["x", "y"], n + 5) for n in range(5))]})


@pytest.fixture
def pairs(index: PairIndex) -> Pairs:
    return Pairs.of(ROWS, index.image)


@pytest.fixture(params=["folder", "url"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "packed" if request.param == "folder" else f"file://{tmp_path}/packed"


def opened(where: str, root: Path, index: PairIndex, pairs: Pairs, to: str = "table") -> Pack:
    fetch_table(where, root, index, pairs, read_record(where, root, index, pairs), root / to)
    return Pack(root / to, index)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_pack_gives_the_bytes_of_the_source(
    index: PairIndex, pairs: Pairs, tmp_path: Path, where: str, size: int
) -> None:
    assert write_pack("expert-0", index, pairs, tmp_path, where, size) == (9, -(-9 // size))
    pack = opened(where, tmp_path, index, pairs)
    assert (pack.file_count, pack.has_urls) == (-(-9 // size), where != "packed")
    mixed = np.array([14, 0, 5, 6, 12, 12, 3])
    packed = list(ImageFiles(pack, tmp_path).read_many(mixed.tolist()))
    assert packed == list(ImageFiles(index, tmp_path).read_many(mixed.tolist()))
    check_files(pack, tmp_path, range(pack.file_count))
    located = pack.locate(ROWS)
    order = list(zip(located.file.tolist(), located.offset.tolist(), strict=True))
    assert order == sorted(order), "in the order of the index"
    with pytest.raises(ModeError, match="an image of the training is not in it"):
        pack.locate(np.array([2]))


def test_images_are_found_between_marks(
    index: PairIndex, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "_STRIDE", 2)
    write_pack("expert-0", index, pairs, tmp_path, "packed", 4)
    pack = opened("packed", tmp_path, index, pairs)
    assert np.array_equal(pack.locate(ROWS[::-1]).length, index.locate(ROWS[::-1]).length)


def test_other_trainers_find_each_image_once_with_its_captions(
    index: PairIndex, pairs: Pairs, tmp_path: Path, where: str
) -> None:
    write_pack("expert-0", index, pairs, tmp_path, where, 4)
    found = {}
    for path in sorted((tmp_path / "packed").glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                member = tar.extractfile(name)
                assert member is not None
                found[name] = member.read()
    assert len(found) == 9 * 3
    about = json.loads(found["0000000005.json"])
    assert about == {"image": 5, "pairs": [5, 6], "texts": index.captions([5, 6]), "shard": "shards/1.tar"}
    assert found["0000000005.txt"].decode() == index.caption(5)
    [suffix] = {name.partition(".")[2] for name in found} - {"txt", "json"}
    assert found[f"0000000000.{suffix}"] == ImageFiles(index, tmp_path).read(0)
    manifest = build_manifest(SourceParams(shards="packed"), tmp_path)
    report = build_index(manifest, tmp_path, tmp_path / "again", IndexParams(max_bad_share=0), workers=1)
    assert (report.pairs, report.bad) == (len(ROWS), 0)


def test_tars_are_checksummed(index: PairIndex, pairs: Pairs, tmp_path: Path, where: str) -> None:
    write_pack("expert-0", index, pairs, tmp_path, where, 5)
    note = json.loads((tmp_path / "packed/00001.json").read_text())
    tar, places = (tmp_path / f"packed/00001.{suffix}" for suffix in ("tar", "npy"))
    assert note == {
        "images": 4,
        "bytes": tar.stat().st_size,
        "sha256": hashlib.sha256(tar.read_bytes()).hexdigest(),
        "sample": sample_of(LocalFile(tar)),
        "etag": None,  # no file of this machine has one
        "places": hashlib.sha256(places.read_bytes()).hexdigest(),
    }


def test_interrupted_it_goes_on_and_ends_the_same(
    index: PairIndex, pairs: Pairs, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pack("expert-0", index, pairs, tmp_path, where, 3)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()}
    (tmp_path / "packed").rename(tmp_path / "whole")
    write = pack_module.Store.write

    def stopping(self: pack_module.Store, name: str, content: bytes | Path) -> None:
        if name == "00001.npy":
            raise KeyboardInterrupt
        write(self, name, content)

    with monkeypatch.context() as patched:
        patched.setattr(pack_module.Store, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            write_pack("expert-0", index, pairs, tmp_path, where, 3)
    with pytest.raises(ModeError, match=r"packed: not complete: 00001\.json is missing .*mode pack"):
        opened(where, tmp_path, index, pairs)
    (tmp_path / "packed/00000.tar").touch()
    time = (tmp_path / "packed/00000.tar").stat().st_mtime_ns
    write_pack("expert-0", index, pairs, tmp_path, where, 3)
    assert (tmp_path / "packed/00000.tar").stat().st_mtime_ns == time, "what is whole is left alone"
    assert {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()} == whole


def test_what_is_of_something_else_is_refused(
    index: PairIndex, pairs: Pairs, index_of: Callable[..., PairIndex], pair: Make, tmp_path: Path, where: str
) -> None:
    with pytest.raises(ModeError, match="no pack"):
        read_record(where, tmp_path, index, pairs)
    write_pack("expert-0", index, pairs, tmp_path, where, 4)
    with pytest.raises(ModeError, match="a pack of other pairs than the training's"):
        read_record(where, tmp_path, index, Pairs.of(ROWS[:5], index.image))
    with pytest.raises(ModeError, match=r"another pack .*--force"):
        write_pack("expert-0", index, Pairs.of(ROWS[:5], index.image), tmp_path, where, 4)
    assert write_pack("expert-0", index, Pairs.of(ROWS[:5], index.image), tmp_path, where, 4, force=True) == (5, 2)
    assert not (tmp_path / "packed/00002.tar").exists()
    other = index_of({"other.tar": [*flat(pair(f"a{n}", n + 50) for n in range(15))]})
    with pytest.raises(ModeError, match="a pack of another index than the training's"):
        read_record(where, tmp_path, other, pairs)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/text.txt").write_text("mine")
    with pytest.raises(ModeError, match=r"mine: not empty \(text\.txt, \.\.\.\)"):
        write_pack("expert-0", index, pairs, tmp_path, "mine", 4)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("00001.npy", None),
        ("00001.npy", b"\x93NUMPY\x01\x00v\x00{" + b"(" * 117 + b"\n"),
        ("00001.npy", b"much" * 9_000),
        ("00001.json", b"{}"),
        ("00001.json", b'{"bytes": true, "sample": 1, "etag": null, "places": ""}'),
        ("00001.json", b'{"bytes": 10240, "sample": 4294967296, "etag": null, "places": ""}'),
        ("00001.json", b"[" * 9_000),
        ("pack.json", b"null"),
    ],
)
def test_damage_is_one_line(index: PairIndex, pairs: Pairs, tmp_path: Path, name: str, content: bytes | None) -> None:
    write_pack("expert-0", index, pairs, tmp_path, "packed", 4)
    file = tmp_path / "packed" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if content is None else content)
    with pytest.raises(ModeError, match="packed") as refused:
        opened("packed", tmp_path, index, pairs)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "table").exists()


def test_a_table_that_lies_is_found_out(index: PairIndex, pairs: Pairs, tmp_path: Path) -> None:
    """Somebody has written another table with its own checksum."""
    write_pack("expert-0", index, pairs, tmp_path, "packed", 100)
    file, note = tmp_path / "packed/00000.npy", tmp_path / "packed/00000.json"
    for column, value in (("offset", -5), ("offset", 2**40), ("length", 3), ("image", 7)):
        places = np.load(file)
        kept = file.read_bytes()
        places[column][2] = value
        content = io.BytesIO()
        np.save(content, places)
        file.write_bytes(content.getvalue())
        told = json.loads(note.read_text())
        note.write_text(json.dumps({**told, "places": hashlib.sha256(content.getvalue()).hexdigest()}))
        with pytest.raises(ModeError, match=r"00000\.npy: damaged"):
            opened("packed", tmp_path, index, pairs)
        file.write_bytes(kept)


@pytest.mark.parametrize("change", ["other bytes", "longer", "gone"])
def test_another_tar_in_the_place_of_one_is_noticed_when_the_pack_is_opened(
    index: PairIndex, pairs: Pairs, tmp_path: Path, where: str, change: str
) -> None:
    write_pack("expert-0", index, pairs, tmp_path, where, 100)
    tar = tmp_path / "packed/00000.tar"
    changed(tar, change)
    refused = "missing, but it was packed" if change == "gone" else "damaged, or of another pack"
    if where == "packed" and change == "other bytes":  # a file is compared when it is opened
        pack, refused = opened(where, tmp_path, index, pairs), "not the file that was packed: as long as it was"
        with pytest.raises(ChangedShard, match=rf"00000\.tar: {refused}, but other bytes .*pack NAME DIR --force"):
            ImageFiles(pack, tmp_path).read(4)
        return
    with pytest.raises(ModeError, match=rf"packed/00000\.tar: {refused} .`mode pack NAME DIR --force` packs anew"):
        opened(where, tmp_path, index, pairs)


@pytest.mark.parametrize("change", ["other bytes", "longer"])
def test_a_tar_that_is_written_to_while_it_is_read_is_noticed(
    index: PairIndex, pairs: Pairs, tmp_path: Path, change: str
) -> None:
    write_pack("expert-0", index, pairs, tmp_path, "packed", 100)
    files = ImageFiles(opened("packed", tmp_path, index, pairs), tmp_path)
    assert files.read(4)
    changed(tmp_path / "packed/00000.tar", change)
    with pytest.raises(ChangedShard, match=r"^packed/00000\.tar: not the file that was packed: [^\n]*table\)$"):
        files.read(4)


def changed(tar: Path, change: str) -> None:
    """Change a byte of it in the middle of an image, which nothing that is known of that image covers; or more."""
    content = bytearray(tar.read_bytes())
    if change == "gone":
        tar.unlink()
        return
    with tarfile.open(tar) as members:
        member = next(each for each in members if each.name.endswith(".jpg"))
    content[member.offset_data + 4] ^= 255
    assert member.size > 512 + 5, "the last bytes of an image are compared"
    tar.write_bytes(content + bytes(10_240 if change == "longer" else 0))


def test_force_packs_anew_what_is_damaged(index: PairIndex, pairs: Pairs, tmp_path: Path, where: str) -> None:
    write_pack("expert-0", index, pairs, tmp_path, where, 4)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()}
    changed(tmp_path / "packed/00001.tar", "longer")
    write_pack("expert-0", index, pairs, tmp_path, where, 4)
    with pytest.raises(ModeError, match=r"00001\.tar: damaged"):
        opened(where, tmp_path, index, pairs)
    write_pack("expert-0", index, pairs, tmp_path, where, 4, force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()} == whole
    opened(where, tmp_path, index, pairs)


def test_a_shard_that_has_changed_is_not_packed(index: PairIndex, pairs: Pairs, tmp_path: Path) -> None:
    shard = tmp_path / index.path(1)
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ChangedShard, match=r"1\.tar: not the file that was indexed"):
        write_pack("expert-0", index, pairs, tmp_path, "packed", 100)
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["pack.json"]


def test_a_store_without_folders(index: PairIndex, pairs: Pairs, tmp_path: Path) -> None:
    where = "memory://bucket/packed"
    try:
        write_pack("expert-0", index, pairs, tmp_path, where, 4)
        pack = opened(where, tmp_path, index, pairs)
        rows = ROWS.tolist()
        packed = list(ImageFiles(pack, tmp_path).read_many(rows))
        assert packed == list(ImageFiles(index, tmp_path).read_many(rows))
    finally:
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_no_more_of_a_note_is_read_than_a_note_has(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_bytes(b"")
    (tmp_path / "long.json").write_bytes(bytes(101))
    (tmp_path / "right.json").write_bytes(b"{}")
    (tmp_path / "endless.json").write_bytes(b"{}")
    server = Server(tmp_path)
    server.faults["endless.json"] = ["long"]
    try:
        store = Store(server.url(""), tmp_path)
        assert (store.read("empty.json", 100), store.read("right.json", 100)) == (b"", b"{}")
        assert store.read("missing.json", 100) is None
        for name in ("long", "endless"):
            with pytest.raises(ModeError, match=f"{name}\\.json: more than 100 bytes"):
                store.read(f"{name}.json", 100)
        assert server.taken == 0
    finally:
        server.stop()


def test_a_full_disk_under_the_temporary_tar_is_one_line(
    index: PairIndex, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, hard))
    try:
        with pytest.raises(ModeError, match=rf"^{tmp_path}/temporary/.*/00000\.tar: cannot be written: File too large"):
            write_pack("expert-0", index, pairs, tmp_path, "packed", 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [*(tmp_path / "temporary").iterdir()]
    assert write_pack("expert-0", index, pairs, tmp_path, "packed", 100) == (9, 1)
