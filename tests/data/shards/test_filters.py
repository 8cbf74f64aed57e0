"""Filters: what an image's row in the parquet beside its tar, or its json, decides about it."""

from __future__ import annotations

import json
import math
import operator
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from mode.data.shards.account import IndexReport
from mode.data.shards.filters import UNKNOWN, Filters
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import Manifest, build_manifest
from mode.errors import ModeError
from mode.params import IndexParams, SourceParams, parse_comparison

Build = Callable[..., IndexReport]

#: As img2dataset writes it: a row for each URL, also of those that were never fetched; text columns of few values.
ROWS = [
    {"key": "000", "status": "success", "similarity": 0.31, "original_width": 640, "NSFW": "UNLIKELY", "safe": True},
    {"key": "001", "status": "success", "similarity": 0.29, "original_width": 640, "NSFW": "UNLIKELY", "safe": True},
    {"key": "002", "status": "success", "similarity": 0.30, "original_width": 100, "NSFW": "NSFW", "safe": False},
    {"key": "003", "status": "failed_to_download", "similarity": 0.50, "original_width": None, "NSFW": "UNLIKELY"},
    {"key": "004", "status": "success", "similarity": None, "original_width": 640, "NSFW": "UNLIKELY", "safe": True},
    {"key": "005", "status": "success", "similarity": math.nan, "original_width": 640, "NSFW": None, "safe": False},
    {"key": "007", "status": "success", "similarity": 0.99, "original_width": 640, "NSFW": "UNSURE", "safe": None},
    {"key": "000", "status": "success", "similarity": 0.0, "original_width": 0, "NSFW": "again", "safe": False},
]
KEYS = ["000", "001", "002", "004", "005", "006", "007"]


@pytest.fixture
def build(tmp_path: Path, tar_bytes: Callable[..., bytes], pair: Any) -> Build:
    """Index `shards/0.tar`, with KEYS, under some filters; what stands beside it has been put there before."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar").write_bytes(tar_bytes([member for key in KEYS for member in pair(key)]))

    def make(*filters: str, shards: str = "shards", check_images: bool = False) -> IndexReport:
        manifest = build_manifest(SourceParams(shards=shards, filters=list(filters)), tmp_path)
        manifest.save(tmp_path / "manifest.json")
        assert Manifest.load(tmp_path / "manifest.json") == manifest
        params = IndexParams(check_images=check_images)
        return build_index(manifest, tmp_path, tmp_path / "index", params, workers=1)

    return make


@pytest.fixture
def beside(tmp_path: Path, build: Build) -> Path:
    """ROWS as the parquet beside the tar."""
    path = tmp_path / "shards/0.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def keys_in(folder: Path) -> list[str]:
    return PairIndex.load(folder / "index").keys(range(len(PairIndex.load(folder / "index"))))


@pytest.mark.parametrize(
    ("filters", "kept", "counted"),
    [
        (["similarity >= 0.3"], ["000", "002", "007"], {"similarity >= 0.3": 1, UNKNOWN: 3}),
        (["similarity>0.3", "original_width >=200"], ["000", "007"], {"similarity>0.3": 2, UNKNOWN: 3}),
        (["original_width >= 200", "similarity > 0.295"], ["000", "007"],
         {"original_width >= 200": 1, "similarity > 0.295": 1, UNKNOWN: 3}),
        (["NSFW == UNLIKELY"], ["000", "001", "004"], {"NSFW == UNLIKELY": 2, UNKNOWN: 2}),
        (["NSFW != UNLIKELY"], ["002", "007"], {"NSFW != UNLIKELY": 3, UNKNOWN: 2}),
        (["NSFW == 'UNSURE'"], ["007"], {"NSFW == 'UNSURE'": 4, UNKNOWN: 2}),
        (["safe == true"], ["000", "001", "004"], {"safe == true": 2, UNKNOWN: 2}),
        (["original_width < 1e3", "original_width<=640"], ["000", "001", "002", "004", "005", "007"], {UNKNOWN: 1}),
    ],
)  # fmt: skip
def test_worked_out_by_hand(
    build: Build, beside: Path, tmp_path: Path, filters: list[str], kept: list[str], counted: dict[str, int]
) -> None:
    report = build(*filters)
    assert keys_in(tmp_path) == kept
    assert report.filtered == counted
    assert (report.images, report.bad, report.dropped) == (len(kept), 0, 0)
    written = json.loads((tmp_path / "index/report.json").read_text())
    assert written["filtered"] == written["files"][0]["filtered"] == counted


def test_without_filters_nothing_says_that_there_could_be(build: Build, beside: Path, tmp_path: Path) -> None:
    report = build()
    assert report.images == len(KEYS)
    for text in ((tmp_path / "manifest.json").read_text(), (tmp_path / "index/report.json").read_text()):
        assert not {"filter", "sidecar"} & {*text.replace('"', " ").split()}
        assert "filter" not in text


@pytest.mark.parametrize("string", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("group", [1, 3, 100])
def test_any_form_of_the_file(build: Build, beside: Path, tmp_path: Path, string: pa.DataType, group: int) -> None:
    table = pa.Table.from_pylist(ROWS)
    for name in ("key", "NSFW"):
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(string))
    numbers = table["similarity"].cast(pa.float32())
    table = table.set_column(table.schema.get_field_index("similarity"), "similarity", numbers)
    parquet.write_table(table, beside, row_group_size=group, compression="zstd")
    build("similarity >= 0.295", "NSFW == UNLIKELY")
    assert keys_in(tmp_path) == ["000"]


def test_a_filtered_image_is_not_looked_into(build: Build, beside: Path, tmp_path: Path, tar_bytes: Any) -> None:
    """Neither decoded nor counted as bad: it is left out anyway."""
    members = [("000.jpg", b"no image"), ("000.txt", b"words"), ("001.jpg", b"no image either"), ("001.txt", b"words")]
    (tmp_path / "shards/0.tar").write_bytes(tar_bytes(members))
    with pytest.raises(ModeError, match=r"not one good pair \(1 undecodable-image, 1 similarity > 0.3\)"):
        build("similarity > 0.3", check_images=True)


def test_without_a_parquet_the_jsons_are_looked_at(build: Build, tmp_path: Path, tar_bytes: Any, pair: Any) -> None:
    members = [
        *(member for key in "abcdef" for member in pair(key)),
        ("a.json", b'{"similarity": 0.4, "NSFW": "UNLIKELY"}'),
        ("b.json", b'{"similarity": "0.4", "NSFW": "UNLIKELY"}'),
        ("c.json", b'{"similarity": 0.2, "NSFW": "UNLIKELY"}'),
        ("d.json", b'{"similarity": [0.4], "NSFW": "UNLIKELY"}'),
        ("e.json", b"{bad"),
    ]
    (tmp_path / "shards/0.tar").write_bytes(tar_bytes(members))
    report = build("similarity >= 0.3", "NSFW == UNLIKELY")
    assert keys_in(tmp_path) == ["a", "b"]
    assert report.filtered == {"similarity >= 0.3": 1, UNKNOWN: 3}


def test_tars_of_a_folder_called_dot(build: Build, beside: Path, tmp_path: Path, tar_bytes: Any, pair: Any) -> None:
    """`tar -cf 0.tar ./000.jpg` keeps `./` in the names."""
    (tmp_path / "shards/0.tar").write_bytes(tar_bytes([*pair("./000"), *pair("./001")]))
    build("similarity >= 0.3")
    assert keys_in(tmp_path) == ["./000"]


@pytest.fixture
def bucket() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/bucket", recursive=True)


def test_objects(build: Build, beside: Path, tmp_path: Path, bucket: Any) -> None:
    for name in ("0.tar", "0.parquet"):
        bucket.pipe_file(f"/bucket/{name}", (tmp_path / "shards" / name).read_bytes())
    bucket.pipe_file("/bucket/1.tar", (tmp_path / "shards/0.tar").read_bytes())
    build("similarity >= 0.3", shards="memory://bucket/0.tar")
    assert keys_in(tmp_path) == ["000", "002", "007"]
    with pytest.raises(ModeError, match=r"bucket/1.parquet: no such file, but 1 of 2 tars have their parquet"):
        build("similarity >= 0.3", shards="memory://bucket/")


def test_a_changed_parquet_is_noticed(build: Build, beside: Path, tmp_path: Path) -> None:
    source = SourceParams(shards="shards", filters=["similarity >= 0.3"])
    before = build_manifest(source, tmp_path)
    assert [each.path for each in before.sidecars] == ["shards/0.parquet"]
    parquet.write_table(pa.Table.from_pylist(ROWS[:5]), beside)
    assert build_manifest(source, tmp_path) != before
    with pytest.raises(ModeError, match=r"shards/0.parquet: \d+ bytes, \d+ in the manifest"):
        build_index(before, tmp_path, tmp_path / "index", IndexParams(), workers=1)
    checked = source.model_copy(update={"checksum": True})
    assert len(build_manifest(checked, tmp_path).sidecars[0].checksum or "") == 64


# Bad input: one line, and no index.


def refused(tmp_path: Path, build: Build, *filters: str, **given: Any) -> str:
    with pytest.raises(ModeError) as caught:
        build(*filters, **given)
    assert not list(tmp_path.glob("index*"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_column_that_is_not_there(build: Build, beside: Path, tmp_path: Path) -> None:
    assert "shards/0.parquet: no column 'clip' (it has key, status" in refused(tmp_path, build, "clip >= 0.3")
    parquet.write_table(pa.table({"similarity": [0.4]}), beside)
    assert "shards/0.parquet: no column 'key'" in refused(tmp_path, build, "similarity >= 0.3")


def test_a_field_that_no_json_has(build: Build, tmp_path: Path) -> None:
    said = refused(tmp_path, build, "similarity >= 0.3")
    assert said.startswith("filters: no json of these tars has 'similarity', and there is no parquet beside them")


def test_a_parquet_beside_some_tars_only(build: Build, beside: Path, tmp_path: Path) -> None:
    (tmp_path / "shards/1.tar").write_bytes((tmp_path / "shards/0.tar").read_bytes())
    said = refused(tmp_path, build, "similarity >= 0.3")
    assert "shards/1.parquet: no such file, but 1 of 2 tars have their parquet" in said
    (tmp_path / "shards/1.parquet").mkdir()
    assert "shards/1.parquet: no such file" in refused(tmp_path, build, "similarity >= 0.3")


def test_columns_of_something_else(build: Build, beside: Path, tmp_path: Path) -> None:
    nested = [{"key": "000", "similarity": [0.4], "pair": {"key": "001"}, "bytes": b"\xff"}]
    parquet.write_table(pa.Table.from_pylist(nested), beside)
    for filter_ in ("similarity >= 0.3", "pair == 001", "bytes == 1"):
        assert f"not one good pair (7 {UNKNOWN}" in refused(tmp_path, build, filter_).replace(f"1 {filter_}, 6", "7")


def test_tables_have_no_filters(build: Build, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("image,caption,similarity\n")
    assert "filters are for tars" in refused(tmp_path, build, "similarity >= 0.3", shards="pairs.csv")


def test_any_damage_is_one_line_or_an_account(build: Build, beside: Path, tmp_path: Path) -> None:
    whole = beside.read_bytes()
    for case in range(60):
        rng = random.Random(f"sidecar {case}")
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            begin = rng.randrange(len(content))
            content[begin : begin + rng.choice([0, 1, 9])] = rng.randbytes(rng.choice([1, 1, 9]))
        beside.write_bytes(content)
        with suppress(ModeError):
            build("similarity >= 0.3", "NSFW == UNLIKELY")


BOMB = """
import resource, sys
from pathlib import Path
from mode.data.shards.index import build_index
from mode.data.shards.manifest import build_manifest
from mode.errors import ModeError
from mode.params import IndexParams, SourceParams
root = Path(sys.argv[1])
manifest = build_manifest(SourceParams(shards="shards", filters=["NSFW == x"]), root)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    build_index(manifest, root, root / "index", IndexParams(), workers=1)
except ModeError as error:
    print(error, file=sys.stderr)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_small_file_of_gigabytes(build: Build, beside: Path, tmp_path: Path) -> None:
    rows = pa.array([0] * 100_000, pa.int32())
    columns = {name: pa.DictionaryArray.from_arrays(rows, pa.array(["x" * 24_000])) for name in ("key", "NSFW")}
    parquet.write_table(pa.table(columns), beside, compression="zstd", store_schema=False)
    assert beside.stat().st_size < 100_000
    done = subprocess.run([sys.executable, "-c", BOMB, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "unpacks to more than" in done.stderr
    assert int(done.stdout) < 512


# The comparisons themselves.


@pytest.mark.parametrize(
    ("text", "column", "sign", "value"),
    [
        ("similarity >= 0.3", "similarity", ">=", 0.3),
        (" clip score<1e-2 ", "clip score", "<", 0.01),
        ("original_width>200", "original_width", ">", 200.0),
        ("NSFW == UNLIKELY", "NSFW", "==", "UNLIKELY"),
        ("NSFW != 'a b'", "NSFW", "!=", "a b"),
        ('status == "1"', "status", "==", "1"),
        ("status == nan", "status", "==", "nan"),
    ],
)
def test_parsing(text: str, column: str, sign: str, value: float | str) -> None:
    assert parse_comparison(text) == (column, sign, value)


@pytest.mark.parametrize("text", ["", "similarity", "similarity > ", ">= 3", "a = 3", "a =< 3", "a >= b", "a >= nan",
                                  "a > inf", "a < 'x'", "a >== 3", "0.2 < similarity < 0.4"])  # fmt: skip
def test_what_is_no_filter_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="is no filter") as caught:
        parse_comparison(text)
    assert "\n" not in str(caught.value)


values = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.sampled_from(["1", "0.5", "x", ""]))
filters = st.tuples(
    st.sampled_from("ab"), st.sampled_from([">=", ">", "<=", "<", "==", "!="]), st.sampled_from([-1.0, 0.0, 0.5, 1.0])
)


@given(filters=st.lists(filters, max_size=4), row=st.dictionaries(st.sampled_from("ab"), values))
def test_fault_is_that_of_a_naive_reading(filters: Sequence[tuple[str, str, float]], row: dict[str, Any]) -> None:
    by_sign = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "==": operator.eq}
    expected = ""
    for column, sign, wanted in filters:
        try:
            found = float(row.get(column))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            found = math.nan
        if math.isnan(found):
            expected = UNKNOWN
            break
        meets = found != wanted if sign == "!=" else by_sign[sign](found, wanted)
        if not meets:
            expected = f"{column} {sign} {wanted}"
            break
    assert Filters([f"{column} {sign} {wanted}" for column, sign, wanted in filters]).fault(row) == expected
