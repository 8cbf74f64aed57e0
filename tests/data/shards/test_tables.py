from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mode.data.loading.store import ImageStore
from mode.data.shards.account import LISTED
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import build_manifest
from mode.errors import ModeError
from mode.params import ImageParams, IndexParams, SourceParams


@pytest.fixture
def folder(tmp_path: Path, encode: Callable[..., bytes]) -> Path:
    for number in range(3):
        (tmp_path / "photos" / "in").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "in" / f"{number}.jpg").write_bytes(encode(number))
    (tmp_path / "photos" / "in" / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "photos" / "in" / "empty.jpg").write_bytes(b"")
    return tmp_path


ROWS = [
    ("in/1.jpg", "a cat, sitting"),
    ("in/0.jpg", 'a "dog"\nrunning'),
    ("in/1.jpg", "NA"),
    ("in/1.jpg", "NA"),  # the same pair again
    ("in/2.jpg", " "),  # an image whose only caption is empty
    ("in/none.jpg", "lost"),
    ("in/bad.jpg", "bad"),
    ("in/empty.jpg", "bad"),
    ("", "no image"),
]


@pytest.mark.parametrize(("suffix", "workers"), [(".csv", 1), (".tsv", 2), (".parquet", 1)])
def test_table(folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, workers: int) -> None:
    monkeypatch.setattr("mode.data.shards.tables.BLOCK", 2)  # several blocks of few images
    frame = pd.DataFrame(ROWS, columns=["image", "caption"])
    path = folder / "photos" / f"pairs{suffix}"
    if suffix == ".parquet":
        frame.loc[4, "caption"] = None
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep={".csv": ",", ".tsv": "\t"}[suffix], index=False)
    manifest = build_manifest(SourceParams(shards=f"photos/pairs{suffix}"), folder)
    params = IndexParams(max_bad_share=1.0)
    report = build_index(manifest, folder, folder / "index", params, workers=workers)
    index = PairIndex.load(folder / "index")
    assert index.captions(range(3)) == ["a cat, sitting", "NA", 'a "dog" running']
    assert index.files == ["photos/in/1.jpg", "photos/in/0.jpg"]
    assert (index.file[:].tolist(), index.image[:].tolist(), index.offset[:].tolist()) == (
        [0, 0, 1],
        [0, 0, 1],
        [0, 0, 0],
    )
    assert index.length[:].tolist() == [(folder / index.path(file)).stat().st_size for file in index.file]
    assert report.counts == {
        "duplicate-key": 1,
        "empty-caption": 1,
        "caption-without-image": 2,
        "undecodable-image": 2,
    }
    with (folder / "index" / "quarantine.csv").open(newline="") as file:
        assert {line["file"] for line in csv.DictReader(file)} == {f"photos/pairs{suffix}"}
    images, good = ImageStore(index, folder, ImageParams(size=8), cache_mb=1).load(np.arange(3))
    assert good.all()
    assert images[0].equal(images[1])
    assert not images[0].equal(images[2])


def test_rows_with_a_field_too_many_or_too_few(folder: Path) -> None:
    (folder / "photos" / "pairs.csv").write_text("image,caption\nin/0.jpg,a cat, sitting\n\nin/1.jpg\nin/2.jpg,dog\n")
    manifest = build_manifest(SourceParams(shards="photos/pairs.csv"), folder)
    report = build_index(manifest, folder, folder / "index", IndexParams(max_bad_share=1.0))
    assert [(problem.kind, problem.detail) for problem in report.problems] == [
        ("image-without-caption", "line 2: 3 fields, the header has 2"),
        ("image-without-caption", "line 4: 1 fields, the header has 2"),
    ]
    assert PairIndex.load(folder / "index").captions([0]) == ["dog"]


def test_absolute_image_paths(folder: Path) -> None:
    image = folder / "photos" / "in" / "0.jpg"
    (folder / "pairs.csv").write_text(f"image,caption\n{image},words\n")
    build_index(build_manifest(SourceParams(shards="pairs.csv"), folder), folder, folder / "index", IndexParams())
    assert PairIndex.load(folder / "index").files == [str(image)]


def test_images_are_decoded_only_if_asked_for(folder: Path) -> None:
    (folder / "photos" / "pairs.csv").write_text("image,caption\nin/bad.jpg,words\n")
    manifest = build_manifest(SourceParams(shards="photos/pairs.csv"), folder)
    report = build_index(manifest, folder, folder / "index", IndexParams(check_images=False))
    assert (report.pairs, report.bad) == (1, 0)


IMAGES = st.sampled_from(["in/0.jpg", "in/1.jpg", "in/2.jpg", "no", ""])


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.sampled_from(["in/0.jpg", "in/1.jpg", "in/2.jpg", "no", ""]), st.sampled_from("abc ")))
)
def test_any_order_of_rows_is_grouped_as_a_naive_reading_has_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rows: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr("mode.data.shards.tables.BLOCK", 2)
    pd.DataFrame([*rows, ("in/0.jpg", "z")], columns=["image", "caption"]).to_csv(folder / "pairs.csv", index=False)
    grouped: dict[str, list[str]] = {}
    bad = {"caption-without-image": 0, "empty-caption": 0, "duplicate-key": 0}
    for image, caption in [*rows, ("in/0.jpg", "z")]:
        known = grouped.setdefault(image, []) if image else []
        kind = "empty-caption" if caption == " " else "duplicate-key" if caption in known else ""
        kind = kind if image else "caption-without-image"
        if kind:
            bad[kind] += 1
        else:
            known.append(caption)
    bad["caption-without-image"] += "no" in grouped
    expected = {image: captions for image, captions in grouped.items() if captions and image != "no"}

    if not (folder / "in").exists():
        (folder / "in").symlink_to(folder / "photos" / "in")
    manifest = build_manifest(SourceParams(shards="pairs.csv"), folder)
    report = build_index(manifest, folder, folder / "index", IndexParams(max_bad_share=1.0), workers=1)
    index = PairIndex.load(folder / "index")
    assert index.captions(range(len(index))) == [caption for captions in expected.values() for caption in captions]
    assert index.keys(index.first[:-1]) == list(expected)
    assert report.counts == {kind: count for kind, count in bad.items() if count}
    assert report.bad == len((folder / "index/quarantine.csv").read_text().splitlines()) - 1
    assert len(report.files) == 1


def test_everything_that_is_skipped_is_listed_once(folder: Path) -> None:
    """More of it than is kept in memory, and than one part of a table has."""
    rows = [(f"lost/{number}.jpg", "words") if number % 2 else ("in/0.jpg", " ") for number in range(3_000)]
    rows += [("in/0.jpg", "again")] * 1_500
    pd.DataFrame(rows, columns=["image", "caption"]).to_csv(folder / "photos" / "pairs.csv", index=False)
    manifest = build_manifest(SourceParams(shards="photos/pairs.csv"), folder)
    report = build_index(manifest, folder, folder / "index", IndexParams(max_bad_share=1.0), workers=1)
    assert report.counts == {"empty-caption": 1_500, "duplicate-key": 1_499, "caption-without-image": 1_500}
    with (folder / "index" / "quarantine.csv").open(newline="") as file:
        listed = [(line["key"], line["kind"]) for line in csv.DictReader(file)]
    assert listed == [
        *[("in/0.jpg", "empty-caption")] * 1_500,
        *[("in/0.jpg", "duplicate-key")] * 1_499,
        *((f"lost/{number}.jpg", "caption-without-image") for number in range(1, 3_000, 2)),
    ]
    assert [(each.key, each.kind) for each in report.problems] == listed[:LISTED]


def test_no_room_to_sort_in_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite is told that its file may not grow, which it says as it does of a full disk."""
    from mode.data.shards import tables

    init = tables._Database.__init__

    def small(self: tables._Database, table: str) -> None:
        init(self, table)
        self._connection.execute("PRAGMA max_page_count = 3")

    monkeypatch.setattr(tables._Database, "__init__", small)
    pd.DataFrame([("in/0.jpg", "x" * 90)] * 500, columns=["image", "caption"]).to_csv(folder / "pairs.csv", index=False)
    with pytest.raises(ModeError, match=r"^pairs.csv: its rows cannot be sorted in /[^:]+: .*full: [\d,]+ bytes are"):
        build_index(
            build_manifest(SourceParams(shards="pairs.csv"), folder), folder, folder / "index", IndexParams(), workers=1
        )
    assert not (folder / "index").exists()
