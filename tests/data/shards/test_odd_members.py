"""Members and tables that are made to break a reader: one line in the account each, never a traceback."""

from __future__ import annotations

import csv
import json
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from mode.columns import ColumnsWriter
from mode.data.shards import index as index_of
from mode.data.shards import manifest, scan
from mode.data.shards.account import IndexReport
from mode.data.shards.index import PairIndex, build_index, verify
from mode.data.shards.manifest import build_manifest
from mode.data.shards.places import listed_urls
from mode.errors import ModeError
from mode.params import IndexParams, SourceParams

Make = Callable[..., list[tuple[str, bytes]]]


def kinds(report: IndexReport) -> list[tuple[str, str]]:
    return [(problem.key, problem.kind) for problem in report.problems]


def index(root: Path, shards: str) -> tuple[IndexReport, PairIndex]:
    """Verified and indexed, which have to find the same."""
    report = build_index(
        build_manifest(SourceParams(shards=shards), root), root, root / "index", IndexParams(max_bad_share=1.0)
    )
    assert verify([shards], root).problems == report.problems
    return report, PairIndex.load(root / "index")


@pytest.fixture
def tar(tmp_path: Path, pair: Make, tar_bytes: Callable[..., bytes]) -> Callable[..., tuple[IndexReport, PairIndex]]:
    """Index a tar of one good pair and other files."""

    def make(files: list[tuple[str, bytes]]) -> tuple[IndexReport, PairIndex]:
        (tmp_path / "0.tar").write_bytes(tar_bytes([*pair("good"), *files]))
        return index(tmp_path, "0.tar")

    return make


def test_nested_json(tar: Callable[..., tuple[IndexReport, PairIndex]], encode: Callable[..., bytes]) -> None:
    report, pairs = tar([("a.jpg", encode()), ("a.json", b'{"caption":' + b"[" * 100_000)])
    assert kinds(report) == [("a", "image-without-caption")]
    assert len(pairs) == 1


def test_half_a_surrogate_pair(tar: Callable[..., tuple[IndexReport, PairIndex]], encode: Callable[..., bytes]) -> None:
    text = rb'{"texts": ["a \ud800 b", "\ud83d\ude00", "\udc80"]}'
    report, pairs = tar([("a.jpg", encode()), ("a.json", text)])
    assert report.bad == 0
    assert pairs.captions(range(1, 4)) == ["a \ufffd b", "\U0001f600", "\ufffd"]


def test_a_txt_in_utf_16(tar: Callable[..., tuple[IndexReport, PairIndex]], encode: Callable[..., bytes]) -> None:
    """As Windows writes it; without its mark nobody can know."""
    texts = {"a": "héllo".encode("utf-16"), "b": b"\xfe\xff" + "日本".encode("utf-16-be"), "c": b"\xff\xfea\0\x00\xd8"}
    report, pairs = tar(
        [member for key, text in texts.items() for member in ((f"{key}.jpg", encode()), (f"{key}.txt", text))]
    )
    assert report.bad == 0
    assert pairs.captions(range(1, 4)) == ["héllo", "日本", "a\ufffd"]


def test_captions_that_are_too_long_or_too_many(
    tar: Callable[..., tuple[IndexReport, PairIndex]], encode: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "MOST_CAPTIONS", 3)
    monkeypatch.setattr(scan, "_LARGEST_TEXT", 200_000)
    report, pairs = tar(
        [
            ("a.jpg", encode()), ("a.txt", b"x" * 100_001),
            ("b.jpg", encode()), ("b.json", json.dumps({"texts": ["y" * 100_001, *"12345"]}).encode()),
            ("c.jpg", encode()), ("c.txt", b"x" * 200_001),
            ("d.jpg", encode()), ("d.txt", b"z" * 100_000),
        ]
    )  # fmt: skip
    assert kinds(report) == [
        ("a", "long-caption"),
        ("b", "long-caption"),
        ("b", "too-many-captions"),
        ("c", "long-caption"),
    ]
    assert pairs.captions(range(1, 5)) == ["1", "2", "3", "z" * 100_000]


def test_very_many_captions_that_cannot_be_used(
    tar: Callable[..., tuple[IndexReport, PairIndex]], encode: Callable[..., bytes]
) -> None:
    """The account of a small json does not fill disk and memory."""
    captions = ["" if number % 2 else "x" * 100_001 for number in range(150)]
    report, pairs = tar([("a.jpg", encode()), ("a.json", json.dumps({"texts": [*captions, "last"]}).encode())])
    assert report.counts == {"long-caption": 50, "empty-caption": 51}
    assert report.problems[-1].detail == "50 more that are empty or too long"
    assert pairs.caption(1) == "last"


def test_names_that_are_too_long(tmp_path: Path, encode: Callable[..., bytes], tar_bytes: Callable[..., bytes]) -> None:
    """Each caption of an image has its key in the index: thirty thousand of them would make gigabytes of a long one."""
    long, most = "k" * 100_000, "m" * 1_000
    texts = json.dumps({"texts": ["a"] * 30_000}).encode()
    good, bad = [(f"{most}.jpg", encode()), (f"{most}.txt", b"b")], [(f"{long}.jpg", encode()), (f"{long}.json", texts)]
    (tmp_path / "0.tar").write_bytes(tar_bytes([*good, *bad], tarfile.PAX_FORMAT))
    report, pairs = index(tmp_path, "0.tar")
    assert [(key[:2], len(key), kind) for key, kind in kinds(report)] == [
        ("kk", 1_000, "image-without-caption"),
        ("kk", 1_000, "caption-without-image"),
    ]
    assert report.problems[0].detail == "a name of 100,004 characters"
    assert pairs.keys(range(len(pairs))) == [most]


def test_images_with_very_many_captions_are_written_in_parts(
    tar: Callable[..., tuple[IndexReport, PairIndex]], encode: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys of all pairs of a part are in memory together."""
    monkeypatch.setattr(index_of, "_BLOCK", 8)
    write, parts = ColumnsWriter.write, []

    def counted(self: ColumnsWriter, part: pa.Table) -> None:
        parts.append(len(part) if "key" in part.schema.names else 0)
        write(self, part)

    monkeypatch.setattr(ColumnsWriter, "write", counted)
    captions = [f"words {number}" for number in range(5)]
    files = [((f"{n}.jpg", encode(n)), (f"{n}.json", json.dumps({"texts": captions}).encode())) for n in range(6)]
    _, pairs = tar([*chain.from_iterable(files)])
    assert max(parts) == 11
    assert pairs.keys(range(len(pairs))) == ["good", *(key for key in "012345" for _ in captions)]
    assert pairs.captions(range(1, len(pairs))) == captions * 6
    assert pairs.image[:].tolist() == [0, *(image for image in range(1, 7) for _ in captions)]
    assert pairs.first[:].tolist() == [0, *range(1, 32, 5)]


def test_names_are_printed_safely(
    tar: Callable[..., tuple[IndexReport, PairIndex]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mode.reporting.tables import print_index_report

    report, _ = tar(
        [("\x1b]0;owned\x07\n[red]grün\udcff.txt", b"words"), ("b\x9b31m.jpg", b"no image"), ("b\x9b31m.txt", b"x")]
    )
    print_index_report(report)
    written = (tmp_path / "index" / "quarantine.csv").read_text()
    for text in (capsys.readouterr().out, written):
        assert not {character for character in text.replace("\n", "") if not character.isprintable()}
        assert r"\x1b]0;owned\x07\n[red]grün\udcff" in text
    assert len(written.splitlines()) == 3


def test_a_shard_whose_name_is_not_utf_8(tmp_path: Path, pair: Make, tar_bytes: Callable[..., bytes]) -> None:
    (tmp_path / "in").mkdir()
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff.tar")).write_bytes(tar_bytes(pair("a")))
    except OSError:
        pytest.skip("this file system has none")
    with pytest.raises(ModeError, match=r"\\udcff\.tar: the name is not UTF-8"):
        build_manifest(SourceParams(shards="in"), tmp_path)


@pytest.mark.parametrize("name", ["pipe.tar", "pipe.csv", "pipe.txt"])
def test_a_pipe_in_place_of_a_shard(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises((ModeError, OSError), match=r"no such file|not a file"):
        build_manifest(SourceParams(shards=name), tmp_path)


@pytest.mark.parametrize("listed", ["{0..99999999}", "{0..999}/{0..9999}", "{9..0}"])
def test_ranges_that_name_too_many_or_none(listed: str) -> None:
    with pytest.raises(ModeError, match=r"names [0-9,]+ objects \(a range may name 1 to 1,000,000\)"):
        listed_urls(f"https://host/{listed}.tar")


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        (b"0.tar\n" * 30, "180 bytes, a list may have 100 "),
        (b"# two\n" + b"x" * 21 + b".tar\n", "line 2 has 26 bytes, a name may have 20 "),
        (b"0.tar\n1.tar\n2.tar\n3.tar\n", "names more than 3 tars "),
        (b"file:///{0..3}.tar\n", "names more than 3 tars "),
        (b"\xff.tar\n", "not UTF-8 text "),
    ],
)
@pytest.mark.parametrize("where", ["", "file://"])
def test_a_list_without_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, refused: str, where: str
) -> None:
    for name, most in {"_LARGEST_LIST": 100, "_LONGEST_NAME": 20, "_MOST_LISTED": 3}.items():
        monkeypatch.setattr(manifest, name, most)
    (tmp_path / "list.txt").write_bytes(content)
    source = SourceParams(shards=f"{where}{tmp_path}/list.txt" if where else "list.txt")
    with pytest.raises(ModeError, match=rf"list\.txt: {refused}") as told:
        build_manifest(source, tmp_path)
    assert "\n" not in str(told.value)


def test_a_list_as_windows_writes_it(tmp_path: Path, pair: Make, tar_bytes: Callable[..., bytes]) -> None:
    for name in "01":
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(pair("a")))
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf0.tar\r\n1.tar\r\n")
    shards = build_manifest(SourceParams(shards="list.txt"), tmp_path).shards
    assert [shard.path for shard in shards] == ["0.tar", "1.tar"]


# Tables.


@pytest.fixture
def table(tmp_path: Path, encode: Callable[..., bytes]) -> Callable[..., tuple[IndexReport, dict[str, list[str]]]]:
    """Index a csv beside the images 0.jpg to 9.jpg: its report, and the captions of each image."""
    for number in range(10):
        (tmp_path / f"{number}.jpg").write_bytes(encode(number))

    def make(content: str | bytes) -> tuple[IndexReport, dict[str, list[str]]]:
        encoded = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "pairs.csv").write_bytes(b"image,caption\n" + encoded)
        report, pairs = index(tmp_path, "pairs.csv")
        found: dict[str, list[str]] = {}
        for row in range(len(pairs)):
            found.setdefault(pairs.path(pairs.file[row]), []).append(pairs.caption(row))
        return report, found

    return make


def test_paths_that_are_no_file(table: Callable[..., tuple[IndexReport, dict[str, list[str]]]], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("/dev/zero")
    names = ["pipe.jpg", "link.jpg", "/dev/zero", "/dev/stdin", ".", "a\0b.jpg", "x" * 5000]
    report, found = table("".join(f"{name},words\n" for name in [*names, "1.jpg"]))
    assert found == {"1.jpg": ["words"]}
    assert report.counts == {"caption-without-image": len(names)}


@pytest.mark.parametrize(
    "bad",
    [
        '2.jpg,"never closed',
        '"2.jpg,words',
        "2.jpg," + "x" * 140_000,
        '2.jpg,"' + "x" * 140_000,
        '2.jpg,"' + "x\n" * 150,
        "2.jpg,a,b",
        "2.jpg",
    ],
)
@pytest.mark.parametrize("after", ['4.jpg,"a, b"', '4.jpg,5" screen', "4.jpg,plain"])
def test_a_bad_row_costs_itself(
    table: Callable[..., tuple[IndexReport, dict[str, list[str]]]], bad: str, after: str
) -> None:
    report, found = table(f'1.jpg,"two\nlines, ""quoted"""\n{bad}\n3.jpg,three\n{after}\n5.jpg,five\n')
    assert found["1.jpg"] == ['two lines, "quoted"']
    assert {"3.jpg", "4.jpg", "5.jpg"} <= {*found}
    assert (found["3.jpg"], found["5.jpg"]) == (["three"], ["five"])
    assert "2.jpg" not in found
    assert report.counts["image-without-caption"] >= 1
    assert report.problems[0].key.strip('"').startswith("2.jpg")


def test_one_bad_byte_costs_its_letter_or_its_row(
    table: Callable[..., tuple[IndexReport, dict[str, list[str]]]],
) -> None:
    report, found = table(b"1.jpg,caf\xe9\n2\xff.jpg,two\n3.jpg,three\n")
    assert found == {"1.jpg": ["caf\ufffd"], "3.jpg": ["three"]}
    assert kinds(report) == [("2\\udcff.jpg", "caption-without-image")]


def test_a_field_over_csvs_limit_is_a_row_that_is_skipped(
    table: Callable[..., tuple[IndexReport, dict[str, list[str]]]],
) -> None:
    assert csv.field_size_limit() == 131_072
    report, found = table("1.jpg," + "x" * 131_073 + "\n2.jpg,two\n")
    assert found == {"2.jpg": ["two"]}
    assert kinds(report) == [("1.jpg", "image-without-caption")]


def test_a_header_over_csvs_limit(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("x" * 140_000 + "\n")
    with pytest.raises(ModeError, match="first line cannot be read: field larger"):
        build_manifest(SourceParams(shards="pairs.csv"), tmp_path)


@pytest.mark.parametrize("line", [bytes(1 << 20), b'"a\nb",' * (1 << 16)], ids=["no line", "marks"])
def test_a_header_as_long_as_the_file(tmp_path: Path, line: bytes) -> None:
    """Of a file of gigabytes no more than a part is in memory."""
    with (tmp_path / "pairs.csv").open("wb") as file:
        for _ in range(64):
            file.write(line)
    tracemalloc.start()
    try:
        with pytest.raises(ModeError, match=r"first line cannot be read: field larger|no column 'image'"):
            build_manifest(SourceParams(shards="pairs.csv"), tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


def test_parquet_columns_of_any_type(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    for number in range(4):
        (tmp_path / f"{number}").write_bytes(encode(number))
    captions = {
        "string": pa.array(["a", None, "b", "a"]),
        "large": pa.array(["a", None, "b", "a"], pa.large_string()),
        "dictionary": pa.array(["a", None, "b", "a"]).dictionary_encode(),
        "binary": pa.array([b"a", None, b"b\xff", b"a"]),
        "bad": pa.array([b"a", None, b"b\xff", b"a"]).view(pa.string()),
        "lists": pa.array([["a"], None, ["b"], ["a"]]),
        "numbers": pa.array([1.5, None, 2.5, 1.5]),
    }
    expected = {"binary": ["a", "b\ufffd", "a"], "bad": ["a", "b\ufffd", "a"], "lists": [], "numbers": []}
    for name, column in captions.items():
        images: pa.Array = pa.array(range(4)) if name == "large" else pa.array(map(str, range(4)))
        parquet.write_table(pa.table({"image": images, "caption": column}), tmp_path / "pairs.parquet")
        manifest = build_manifest(SourceParams(shards="pairs.parquet"), tmp_path)
        if expected.get(name) == []:
            with pytest.raises(ModeError, match="not one good pair"):
                build_index(manifest, tmp_path, tmp_path / "index", IndexParams(max_bad_share=1.0))
            continue
        build_index(manifest, tmp_path, tmp_path / "index", IndexParams(max_bad_share=1.0))
        assert PairIndex.load(tmp_path / "index").captions(range(3)) == expected.get(name, ["a", "b", "a"]), name


def test_a_parquet_table_that_unpacks_to_the_memory(tmp_path: Path) -> None:
    rows = np.zeros(100_000, np.int32)  # each the same long text
    same = {"image": ["1.jpg"], "caption": ["x" * 24_000]}
    table = pa.table({name: pa.DictionaryArray.from_arrays(rows, pa.array(text)) for name, text in same.items()})
    parquet.write_table(table, tmp_path / "rows.parquet", compression="zstd", store_schema=False)
    text = pa.table({"image": ["1.jpg"], "caption": ["x" * 200_000_000]})
    parquet.write_table(text, tmp_path / "text.parquet", compression="zstd")
    for name in ("rows", "text"):
        assert (tmp_path / f"{name}.parquet").stat().st_size < 100_000
        with pytest.raises(ModeError, match=f"{name}.parquet: unpacks to more than 200 times its size"):
            verify([f"{name}.parquet"], tmp_path)


def test_a_damaged_parquet_table(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    frame = pd.DataFrame({"image": [f"{n}.jpg" for n in range(1000)], "caption": [f"words {n}" for n in range(1000)]})
    frame.to_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(2000) + whole[2100:])
    with pytest.raises(ModeError, match=r"pairs\.parquet: (cannot be read|not a parquet file)"):
        verify(["pairs.parquet"], tmp_path)
