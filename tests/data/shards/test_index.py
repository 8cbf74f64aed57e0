from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from mode.checksums import check_manifest
from mode.data.shards.account import FileReport, IndexReport
from mode.data.shards.index import IndexWriter, PairIndex, build_index, verify
from mode.data.shards.manifest import build_manifest
from mode.data.shards.reading import ImageFiles
from mode.errors import ModeError
from mode.files import sha256_of_folder
from mode.params import IndexParams, SourceParams
from tests.bits import flipped

IndexOf = Callable[..., PairIndex]
Make = Callable[..., list[tuple[str, bytes]]]
flat = chain.from_iterable


def quarantine(tmp_path: Path) -> list[tuple[str, str, str]]:
    with (tmp_path / "index" / "quarantine.csv").open(newline="") as file:
        return [(Path(line["file"]).name, line["key"], line["kind"]) for line in csv.DictReader(file)]


def test_every_layout(index_of: IndexOf, encode: Callable[..., bytes], tmp_path: Path) -> None:
    contents = {
        "txt.jpg": encode(1),
        "json.jpeg": encode(2),
        "both.PNG": encode(3, kind="PNG"),
        "list.webp": encode(4, kind="WEBP"),
        "dir/with.dots.jpg": encode(5),
    }
    captions = {
        "txt.txt": b"\xef\xbb\xbf  one\n two ",
        "json.json": b'{"caption": "three", "other": 1}',
        "both.txt": b"the txt",
        "both.json": b'{"caption": "the json"}',
        "list.txt": b"the txt",
        "list.json": json.dumps({"texts": ["four", "five", "six"], "caption": "no"}).encode(),
        "dir/with.dots.txt": "sieben é".encode(),
    }
    files = [*contents.items(), *captions.items()]
    index = index_of({"a.tar": files[::-1], "b.tar": [("stats.json", b'{"count": 3}'), *files]})
    assert index.captions(range(len(index)))[7:] == ["one two", "three", "the txt", "four", "five", "six", "sieben é"]
    assert index.image[:].tolist() == [0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 9]
    assert (index.images, len(index)) == (10, 14)
    assert index.file[:].tolist() == [0] * 7 + [1] * 7
    assert [Path(path).name for path in index.files] == ["a.tar", "b.tar"]
    assert quarantine(tmp_path) == []
    for row, key in zip([7, 8, 9, 10, 13], contents, strict=True):
        shard = (tmp_path / index.path(index.file[row])).read_bytes()
        assert shard[index.offset[row] :][: index.length[row]] == contents[key]
    assert index.keys(range(7, 14)) == ["txt", "json", "both", "list", "list", "list", "dir/with.dots"]
    assert np.load(tmp_path / "index/pairs/caption_number.npy")[7:].tolist() == [0, 0, 0, 0, 1, 2, 0]
    assert index.first[:].tolist() == [0, 1, 4, 5, 6, 7, 8, 9, 10, 13, 14]


def test_rows_are_ordered_by_file_offset_and_caption(index_of: IndexOf, texts: Make) -> None:
    shards = {f"{n}.tar": [*flat(texts(f"{n}{m}", ["x", "y"]) for m in range(3))] for n in (2, 0, 1)}
    index = index_of(shards)
    order = np.lexsort((index.image, index.offset, index.file))
    assert order.tolist() == list(range(18))
    assert index.image[:].tolist() == np.repeat(np.arange(9), 2).tolist()


def test_each_kind_of_fault_is_named_and_skipped(
    index_of: IndexOf,
    pair: Make,
    texts: Make,
    encode: Callable[..., bytes],
    tar_bytes: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    whole = tar_bytes([*pair("good"), *pair("lost")])
    faults = {
        "damaged-tar": whole[: whole.index(b"lost.jpg") + 700],
        "image-without-caption": [*pair("good"), ("a.jpg", encode()), ("b.jpg", encode()), ("b.json", b"{bad")],
        "caption-without-image": [*pair("good"), ("a.txt", b"words"), ("b.json", b'{"caption": "words"}')],
        "duplicate-key": [*pair("good", 1), *pair("good", 2, "again"), ("good.png", encode(3, kind="PNG"))],
        "undecodable-image": [*pair("good"), ("a.jpg", b"no image"), ("a.txt", b"x"), ("b.jpg", b""), ("b.txt", b"x"),
                              ("c.jpg", encode()[:-300]), ("c.txt", b"x")],
        "empty-caption": [*pair("good"), ("a.jpg", encode()), ("a.txt", b" \n"), ("b.jpg", encode()),
                          ("b.json", b'{"caption": null}'), *texts("c", ["words", " ", "more"])],
    }  # fmt: skip
    index = index_of({f"{kind}.tar": content for kind, content in faults.items()}, check_images=True)
    found = quarantine(tmp_path)
    expected = {
        "damaged-tar": [""],
        "image-without-caption": ["a", "b"],
        "caption-without-image": ["a", "b"],
        "duplicate-key": ["good", "good"],
        "undecodable-image": ["a", "b", "c"],
        "empty-caption": ["a", "b", "c"],
    }
    assert found == sorted((f"{kind}.tar", key, kind) for kind, keys in expected.items() for key in keys)
    assert index.captions(range(len(index))) == ["caption of good"] * 4 + ["words", "more"] + ["caption of good"] * 2
    report = json.loads((tmp_path / "index" / "report.json").read_text())
    assert report["bad"] == {kind: len(keys) for kind, keys in expected.items()}
    assert (report["pairs"], report["images"]) == (8, 7)
    assert {Path(file["path"]).stem: file["bad"] for file in report["files"]} == {
        kind: {kind: len(keys)} for kind, keys in expected.items()
    }


def test_too_much_bad_stops_with_the_worst_shard_and_leaves_nothing(
    index_of: IndexOf, pair: Make, tmp_path: Path
) -> None:
    shards = {f"{n}.tar": [*flat(pair(f"{n}{m}") for m in range(9))] for n in range(2)}
    shards["1.tar"][-1:] = [("x.txt", b"words")]  # one image without caption, one caption without image
    with pytest.raises(
        ModeError, match=r"10\.5% of the pairs are bad, 10\.0% are allowed .*worst: shards/1.tar: 2 of 10"
    ):
        index_of(shards, max_bad_share=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
    assert len(index_of(shards, max_bad_share=0.11)) == 17


def test_a_damaged_tar_weighs_as_much_as_it_lost(
    index_of: IndexOf, pair: Make, tar_bytes: Callable[..., bytes]
) -> None:
    shards = {f"{n}.tar": tar_bytes([*flat(pair(f"{n}{m}") for m in range(10))]) for n in range(2)}
    shards["1.tar"] = b"\x01" * len(shards["0.tar"])
    with pytest.raises(ModeError, match=r"50\.0% of the pairs are bad.*shards/1.tar: 10 of 10"):
        index_of(shards, max_bad_share=0.3)


def test_no_pair_at_all(index_of: IndexOf, tar_bytes: Callable[..., bytes]) -> None:
    with pytest.raises(ModeError, match="not one good pair"):
        index_of({"a.tar": tar_bytes([])})


def test_shards_that_changed_since_the_manifest(pair: Make, tar_bytes: Callable[..., bytes], tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(tar_bytes(pair("x")))
    manifest = build_manifest(SourceParams(shards="*.tar"), tmp_path)
    (tmp_path / "b.tar").write_bytes(tar_bytes(pair("x") + pair("y"))[:-512])
    with pytest.raises(ModeError, match=r"b.tar: \d+ bytes, \d+ in the manifest"):
        build_index(manifest, tmp_path, tmp_path / "index", IndexParams())
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ModeError, match=r"a.tar: missing"):
        build_index(manifest, tmp_path, tmp_path / "index", IndexParams())
    assert not (tmp_path / "index").exists()


def test_processes_find_the_same(index_of: IndexOf, pair: Make, tmp_path: Path) -> None:
    index_of({f"{n}.tar": [*flat(pair(f"{n}{m}") for m in range(n))] for n in range(1, 6)})
    manifest = build_manifest(SourceParams(shards="shards"), tmp_path)
    build_index(manifest, tmp_path, tmp_path / "again", IndexParams(check_images=False), workers=2)
    files = [path.relative_to(tmp_path / "index") for path in (tmp_path / "index").rglob("*") if path.is_file()]
    assert len(files) > 15
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "index" / name).read_bytes()


def test_a_process_that_dies_over_a_shard_leaves_the_old_index(
    index_of: IndexOf, pair: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_of({f"{n:02d}.tar": [*flat(pair(f"{n}{m}") for m in range(9))] for n in range(30)})
    manifest, params = build_manifest(SourceParams(shards="shards"), tmp_path), IndexParams(check_images=False)
    before = sha256_of_folder(tmp_path / "index")
    add = IndexWriter.add

    def kill_another(self: IndexWriter, *given: Any) -> None:
        """When the first shard comes, some are still to be done."""
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):  # killed before, or ended
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
        add(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(IndexWriter, "add", kill_another)
        with pytest.raises(ModeError, match="processes that work side by side was killed"):
            build_index(manifest, tmp_path, tmp_path / "index", params, workers=2)
    assert sha256_of_folder(tmp_path / "index") == before
    build_index(manifest, tmp_path, tmp_path / "index", params, workers=2)
    assert sha256_of_folder(tmp_path / "index") == before
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_captions_by_row_and_in_blocks(index_of: IndexOf, texts: Make) -> None:
    index = index_of({f"{n}.tar": texts("k", [f"{n} {m}" for m in range(7)]) for n in range(3)})
    every = [f"{n} {m}" for n in range(3) for m in range(7)]
    assert [index.caption(row) for row in range(21)] == every
    assert index.captions(np.array([20, 0, 0, 7])) == ["2 6", "0 0", "0 0", "1 0"]
    assert index.captions([]) == []
    for batch in (1, 6, 7, 8, 100):
        blocks = list(index.iter_captions(batch))
        assert [*flat(blocks)] == every
        assert max(map(len, blocks)) <= batch


def test_not_an_index(tmp_path: Path) -> None:
    with pytest.raises(ModeError, match=r"not an index \(`dvc repro index`"):
        PairIndex.load(tmp_path / "nowhere")
    (tmp_path / "index.parquet").write_text("no")
    with pytest.raises(ModeError, match=r"one of an older version \(run its stage again"):
        PairIndex.load(tmp_path)


def test_any_flipped_bit_gives_wrong_values_or_one_line(index_of: IndexOf, texts: Make, tmp_path: Path) -> None:
    """Never another error, and never an end of the process; `mode check` names the file."""
    index_of({"0.tar": [*flat(texts(f"{n}", ["x", "y"]) for n in range(9))]})
    random = np.random.default_rng(0)
    columns = [path for path in (tmp_path / "index").glob("*/*") if path.stat().st_size]
    for file in sorted(columns):
        content = file.read_bytes()
        for bit in random.integers(0, 8 * len(content), 25).tolist():
            file.write_bytes(flipped(content, bit))
            try:
                index = PairIndex.load(tmp_path / "index")
                rows = np.arange(len(index))
                assert len(index.captions(rows)) == len(index.keys(rows)) == len(rows)
                [*ImageFiles(index, tmp_path).read_many(rows.tolist())]
            except ModeError as error:
                assert "\n" not in str(error)  # noqa: PT017
            with pytest.raises(ModeError, match=file.name):
                check_manifest(tmp_path / "index")
        file.write_bytes(content)
    assert check_manifest(tmp_path / "index")


def test_tables_that_do_not_belong_together(index_of: IndexOf, texts: Make, tmp_path: Path) -> None:
    index_of({"0.tar": texts("k", ["x", "y"])})
    np.save(tmp_path / "index/images/first.npy", np.array([0, 3]))
    with pytest.raises(ModeError, match="its images are not those of its pairs"):
        PairIndex.load(tmp_path / "index")


def test_a_manifest_of_checked_shards_is_still_only_compared_by_size(
    pair: Make, tar_bytes: Callable[..., bytes], tmp_path: Path
) -> None:
    """A checkout sets other times; the content is the same."""
    (tmp_path / "a.tar").write_bytes(tar_bytes(pair("x"), tarfile.GNU_FORMAT))
    manifest = build_manifest(SourceParams(shards="a.tar"), tmp_path)
    manifest = replace(manifest, shards=[replace(shard, mtime_ns=1) for shard in manifest.shards])
    assert build_index(manifest, tmp_path, tmp_path / "index", IndexParams()).pairs == 1


def test_good_shards_have_no_problems_and_bad_ones_are_listed(
    tmp_path: Path, pair: Make, tar_bytes: Callable[..., bytes]
) -> None:
    (tmp_path / "good.tar").write_bytes(tar_bytes(pair("a") + pair("b")))
    report = verify(["good.tar"], tmp_path)
    assert (report.bad, report.pairs, report.images, report.bad_share) == (0, 2, 2, 0.0)
    (tmp_path / "bad.tar").write_bytes(
        tar_bytes([*pair("a"), ("b.jpg", b"no image"), ("b.txt", b"x"), ("c.txt", b"x")])
    )
    report = verify(["*.tar"], tmp_path)
    assert report.counts == {"undecodable-image": 1, "caption-without-image": 1}
    assert (report.bad, report.pairs, report.bad_share) == (2, 3, 0.4)
    assert [(problem.file, problem.key) for problem in report.problems] == [("bad.tar", "b"), ("bad.tar", "c")]
    assert verify(["*.tar"], tmp_path, check_images=False).bad == 1


def test_nothing_good_is_reported_not_raised(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"\x01" * 2000)
    report = verify(["bad.tar"], tmp_path)
    assert (report.counts, report.pairs, report.bad_share) == ({"damaged-tar": 1}, 0, 1.0)
    with pytest.raises(ModeError, match=r"nowhere\.tar"):
        verify(["nowhere.tar"], tmp_path)


def test_factors_of_sets_are_those_of_their_images(tmp_path: Path, two_sets: PairIndex) -> None:
    index = two_sets
    assert index.files == ["web/0.tar", "own/0.tar", "own/1.tar"]
    assert index.factor is not None
    assert index.factor[:].tolist() == [1.0, 2.5, 2.5]
    plain = build_manifest(SourceParams(shards="web"), tmp_path)
    build_index(plain, tmp_path, tmp_path / "plain", IndexParams(), workers=1)
    assert PairIndex.load(tmp_path / "plain").factor is None


class Looks(list[FileReport]):
    """Counts how often it is gone through."""

    count = 0

    def __iter__(self) -> Iterator[FileReport]:
        self.count += 1
        return super().__iter__()


def test_the_account_of_many_bad_shards_is_not_reckoned_anew_for_each() -> None:
    """With two hundred thousand shards that took hours."""
    whole = FileReport("whole.tar", 100, 100, {}, 1_000)
    bad = [FileReport(f"{number}.tar", 9, 9, {"empty-caption": 1}, 90) for number in range(50)]
    damaged = FileReport("damaged.tar", 50, 50, {"damaged-tar": 2}, 500, lost_bytes=100)
    files = Looks([whole, *bad, damaged])
    report = IndexReport(files)
    # 600 pairs in 6,000 bytes: 100 lost ones are 10 pairs, of which the two damages count as two.
    assert report.bad_pairs(damaged) == 10
    assert report.bad_share == 60 / 660
    assert [file.path for file in report.worst()] == ["damaged.tar", "0.tar", "1.tar"]
    report.check(0.1)
    assert files.count < 20
