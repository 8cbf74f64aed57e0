from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mode.data.shards.arrivals import Arrivals, compare
from mode.data.shards.manifest import Manifest, Shard, build_manifest
from mode.errors import ModeError
from mode.params import SourceParams

SOURCES = {
    "base": SourceParams(shards="tars"),
    "base-2": SourceParams(shards="tars", continues="base"),
    "elsewhere": SourceParams(shards="more", continues="base"),
    "other": SourceParams(shards="tars"),
}


def manifest(*paths: str, size: int = 1) -> Manifest:
    return Manifest("tars", [Shard(path, size, 5, None) for path in paths])


def test_lists_survive_the_file(tmp_path: Path) -> None:
    arrivals = Arrivals({"base": ["tars/b.tar"], "base-2": ["tars/ä.tar", "s3://bucket/c.tar"]})
    arrivals.save(tmp_path / "arrivals.json")
    assert Arrivals.load(tmp_path / "arrivals.json") == arrivals
    assert arrivals.without(["base-2", "no"]) == Arrivals({"base": ["tars/b.tar"]})
    assert Arrivals.load(tmp_path / "none.json") == Arrivals({})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged: not JSON"),
        ("{", "damaged: not JSON"),
        ("[]", "damaged: lists of shards by source are wanted"),
        ('{"base": "a.tar"}', "damaged: lists of shards"),
        ('{"base": []}', "damaged: lists of shards"),
        ('{"base": [1]}', "damaged: lists of shards"),
        ('{"base": ["a.tar", "a.tar"]}', "a.tar: twice, of base and of base"),
        ('{"base": ["a.tar"], "base-2": ["b.tar", "a.tar"]}', "a.tar: twice, of base and of base-2"),
    ],
)
def test_a_damaged_list_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "arrivals.json").write_text(content)
    with pytest.raises(ModeError) as caught:
        Arrivals.load(tmp_path / "arrivals.json")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_two_sources_of_one_place_need_both_their_lists() -> None:
    arrivals = Arrivals({"base": ["tars/a.tar"], "base-2": ["tars/b.tar"]})
    assert arrivals.of("base", SOURCES) == ["tars/a.tar"]
    assert arrivals.of("elsewhere", SOURCES) is None
    assert arrivals.of("other", SOURCES) is None
    for source in ("base", "base-2"):
        with pytest.raises(ModeError, match=f"no shards of '{source}', which looks where"):
            arrivals.without([source]).of(source, SOURCES)


def test_what_has_come_is_what_no_manifest_lists() -> None:
    known = {"base": manifest("b", "d"), "base-2": manifest("c")}
    assert [shard.path for shard in compare(manifest("a", "b", "c", "d", "e"), known)] == ["a", "e"]
    assert compare(manifest("b", "c", "d"), known) == []


def test_an_old_shard_that_has_changed_or_gone_is_named() -> None:
    with pytest.raises(ModeError, match=r"^d: gone, but a shard of 'base'"):
        compare(manifest("a", "b"), {"base": manifest("b", "d")})
    with pytest.raises(ModeError, match=r"^b: has changed since 'base' was indexed"):
        compare(manifest("a", "b", size=2), {"base": manifest("b")})
    beside = Manifest("tars", manifest("b").shards, sidecars=[Shard("b.parquet", 1, 5, None)])
    rescored = Manifest("tars", manifest("b").shards, sidecars=[Shard("b.parquet", 1, 6, None)])
    with pytest.raises(ModeError, match=r"^b.parquet: has changed"):
        compare(rescored, {"base": beside})


names = st.text("abcxyz019-_", min_size=1, max_size=4)


@settings(max_examples=40)
@given(old=st.sets(names, min_size=1, max_size=5), new=st.sets(names, max_size=5))
def test_a_list_gives_the_same_manifest_wherever_new_names_sort(
    tmp_path_factory: pytest.TempPathFactory, old: set[str], new: set[str]
) -> None:
    root = tmp_path_factory.mktemp("root")
    (root / "tars").mkdir()
    source = SourceParams(shards="tars/*.tar")
    for name in old:
        (root / f"tars/{name}.tar").write_bytes(b"x")
        os.utime(root / f"tars/{name}.tar", ns=(7, 7))
    before = build_manifest(source, root)
    for name in new - old:
        (root / f"tars/{name}.tar").write_bytes(b"y")
    only = [shard.path for shard in before.shards]
    assert build_manifest(source, root, only) == before
    found = {shard.path for shard in compare(build_manifest(source, root), {"base": before})}
    assert found == {f"tars/{name}.tar" for name in new - old}


def test_a_shard_on_the_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/a.tar").write_bytes(b"x")
    for shards in ("tars", {"tars": 2.0}):
        with pytest.raises(ModeError, match=r"tars/b.tar: no such shard, but arrivals.json names it"):
            build_manifest(SourceParams(shards=shards), tmp_path, ["tars/a.tar", "tars/b.tar"])
