from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pandas as pd
import pytest

from mode.data.shards.manifest import Manifest, build_manifest
from mode.errors import ModeError
from mode.params import SourceParams


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for name in ("b.tar", "a.tar", "deep/er/c.tar", "notes.txt"):
        (tmp_path / "shards" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shards" / name).write_text(name)
    return tmp_path


def paths(manifest: Manifest) -> list[str]:
    return [shard.path for shard in manifest.shards]


def test_folder_glob_and_file_stay_relative_and_sorted(shards: Path) -> None:
    assert paths(build_manifest(SourceParams(shards="shards"), shards)) == [
        "shards/a.tar",
        "shards/b.tar",
        "shards/deep/er/c.tar",
    ]
    assert paths(build_manifest(SourceParams(shards="shards/*.tar"), shards)) == ["shards/a.tar", "shards/b.tar"]
    assert len(paths(build_manifest(SourceParams(shards="shards/**/*.tar"), shards))) == 3
    assert paths(build_manifest(SourceParams(shards="shards/b.tar"), shards)) == ["shards/b.tar"]
    project = shards / "project"
    project.mkdir()
    assert paths(build_manifest(SourceParams(shards="../shards/[ab].tar"), project)) == [
        "../shards/a.tar",
        "../shards/b.tar",
    ]
    absolute = str(shards / "shards")
    assert paths(build_manifest(SourceParams(shards=absolute), project))[0] == f"{absolute}/a.tar"


def test_size_time_and_checksum(shards: Path) -> None:
    shard = build_manifest(SourceParams(shards="shards/a.tar"), shards).shards[0]
    status = (shards / "shards" / "a.tar").stat()
    assert (shard.size, shard.mtime_ns, shard.checksum) == (5, status.st_mtime_ns, None)
    checked = build_manifest(SourceParams(shards="shards/a.tar", checksum=True), shards).shards[0]
    assert checked.checksum == hashlib.sha256(b"a.tar").hexdigest()


def test_with_checksums_a_copy_is_the_same_source(shards: Path) -> None:
    """And without them it is another one, as is an edit that leaves the size."""
    tar = shards / "shards/a.tar"
    sources = [SourceParams(shards="shards/a.tar", checksum=checksum) for checksum in (True, False)]
    before = [build_manifest(source, shards) for source in sources]
    os.utime(tar, ns=(1, 1))
    assert [build_manifest(source, shards) == old for source, old in zip(sources, before, strict=True)] == [True, False]
    tar.write_bytes(b"b.tar")
    os.utime(tar, ns=(1, 1))
    assert build_manifest(sources[0], shards) != before[0]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_tables(tmp_path: Path, suffix: str) -> None:
    frame = pd.DataFrame({"file": ["x.jpg"], "text": ["a cat"]})
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep={".csv": ",", ".tsv": "\t"}[suffix], index=False)
    source = SourceParams(shards=path.name, image_column="file", caption_column="text")
    manifest = build_manifest(source, tmp_path)
    assert (manifest.kind, paths(manifest)) == ("table", [path.name])
    with pytest.raises(ModeError, match=r"no column 'caption': it has 'file', 'text'"):
        build_manifest(SourceParams(shards=path.name, image_column="file"), tmp_path)


def test_save_and_load(shards: Path) -> None:
    manifest = build_manifest(SourceParams(shards="shards", checksum=True), shards)
    manifest.save(shards / "out" / "manifest.json")
    assert Manifest.load(shards / "out" / "manifest.json") == manifest


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shards": [{"path": "a"}]}', '{"shards": [], "sort": 1}'])
def test_not_a_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ModeError, match=r"manifest\.json: not a manifest"):
        Manifest.load(tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("shards_given", "message"),
    [
        ("empty", "empty: no .tar in this folder"),
        ("nowhere", "nowhere: no such file or folder"),
        ("shards/*.tgz", r"no file matches"),
        ("shards/{0..9}.tar", "no such file"),
        ("shards/notes.txt", "notes.txt is no .tar"),
        ("shards/*", r"neither a .tar nor a single table \(.*\) \(name tars, or one table\)"),
        ("bad.parquet", "not a parquet file"),
        ("empty.csv", "no column 'image': it has no columns"),
        ("latin.csv", "not UTF-8"),
    ],
)
def test_bad_sources(shards: Path, shards_given: str, message: str) -> None:
    (shards / "empty").mkdir()
    (shards / "bad.parquet").write_text("no")
    (shards / "empty.csv").write_text("")
    (shards / "latin.csv").write_bytes("image,caption,\xe9\n".encode("latin-1"))
    with pytest.raises(ModeError, match=message):
        build_manifest(SourceParams(shards=shards_given), shards)


def test_several_sets_each_with_its_factor(shards: Path) -> None:
    (shards / "own").mkdir()
    (shards / "own/z.tar").write_text("z")
    (shards / "list.txt").write_text("own/z.tar\n")
    sets = {"shards/deep": 0.5, "list.txt": 3.0, "shards/*.tar": 1.0}
    manifest = build_manifest(SourceParams(shards=sets), shards)
    factors = [(shard.path, shard.factor) for shard in manifest.shards]
    assert factors == [("shards/deep/er/c.tar", 0.5), ("own/z.tar", 3.0), ("shards/a.tar", 1.0), ("shards/b.tar", 1.0)]
    manifest.save(shards / "manifest.json")
    assert Manifest.load(shards / "manifest.json") == manifest
    build_manifest(SourceParams(shards="shards"), shards).save(shards / "manifest.json")
    assert "factor" not in (shards / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (
            {"shards": 1.0, "shards/b.tar": 2.0},
            "shards/b.tar: in two sets of one source: shards and shards/b.tar (leave it out of one)",
        ),
        ({"shards": 1.0, "pairs.csv": 2.0}, "pairs.csv: not a .tar, but one of several sets (a table is a source by"),
        ({"shards": 1.0, "none": 2.0}, "none: no such file or folder"),
        ({"shards/notes.txt": 1.0}, "shards/notes.txt: notes.txt is no .tar"),
    ],
)
def test_what_no_set_can_be(shards: Path, sets: dict[str, float], said: str) -> None:
    (shards / "pairs.csv").write_text("image,caption\n")
    with pytest.raises(ModeError) as caught:
        build_manifest(SourceParams(shards=sets), shards)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
