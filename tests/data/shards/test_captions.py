"""`sources.NAME.captions`: captions from named keys of the json, and how probable each is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from mode.data.shards.account import IndexReport
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import Manifest, build_manifest
from mode.data.shards.scan import _captions_from, _probabilities, _Record
from mode.errors import ModeError
from mode.params import IndexParams, SourceParams

Build = Callable[..., IndexReport]
PLACES = {"caption": 0.5, "synthetic": 0.3, "txt": 0.2}


@pytest.fixture
def build(tmp_path: Path, tar_bytes: Callable[..., bytes], encode: Callable[..., bytes]) -> Build:
    def make(
        contents: dict[str, dict[str, object]],
        captions: dict[str, float] | None,
        unwanted: set[tuple[str, str]] = frozenset(),  # type: ignore[assignment]
        max_bad_share: float = 1.0,
    ) -> IndexReport:
        """Images with these jsons; the value of `.txt` is their txt."""
        members = []
        for number, (key, content) in enumerate(contents.items()):
            members.append((f"{key}.jpg", encode(number)))
            if ".txt" in content:
                members.append((f"{key}.txt", str(content.pop(".txt")).encode()))
            members.append((f"{key}.json", json.dumps(content).encode()))
        (tmp_path / "0.tar").write_bytes(tar_bytes(members))
        manifest = build_manifest(SourceParams(shards="0.tar", captions=captions), tmp_path)
        manifest.save(tmp_path / "manifest.json")
        assert Manifest.load(tmp_path / "manifest.json") == manifest
        params = IndexParams(max_bad_share=max_bad_share)
        return build_index(manifest, tmp_path, tmp_path / "index", params, workers=1, unwanted=unwanted)

    return make


def pairs(folder: Path) -> list[tuple[int, str, float]]:
    index = PairIndex.load(folder / "index")
    assert index.probability is not None
    shares = [round(float(each), 4) for each in index.probability]
    return list(zip(index.image[:].tolist(), index.captions(range(len(index))), shares, strict=True))


def test_worked_out_by_hand(build: Build, tmp_path: Path) -> None:
    contents: dict[str, dict[str, object]] = {
        "all": {"caption": " a  cat ", "synthetic": ["one", "two", "three"], ".txt": "txt", "texts": ["not asked for"]},
        "no-txt": {"caption": "a dog", "synthetic": ["one"]},
        "null": {"caption": None, "synthetic": [], ".txt": "only this"},
        "empty": {"caption": "", "synthetic": ["one", " ", "three", "x" * 100_001]},
        "nothing": {"texts": ["not asked for"]},
    }
    report = build(contents, PLACES)
    assert pairs(tmp_path) == [
        (0, "a cat", 0.5),
        (0, "one", 0.1),
        (0, "two", 0.1),
        (0, "three", 0.1),
        (0, "txt", 0.2),
        (1, "a dog", 0.5),
        (1, "one", 0.3),
        (2, "only this", 0.2),
        (3, "one", 0.15),
        (3, "three", 0.15),
    ]
    assert [(each.key, each.kind, each.detail) for each in report.problems] == [
        ("empty", "empty-caption", "number 0 of 5"),
        ("empty", "empty-caption", "number 2 of 5"),
        ("empty", "long-caption", "100,001 characters number 4 of 5"),
        ("nothing", "image-without-caption", "none in caption, synthetic, txt"),
    ]


def test_a_leaked_image_takes_its_probabilities_along(build: Build, tmp_path: Path) -> None:
    contents: dict[str, dict[str, object]] = {key: {"caption": key, "synthetic": [key * 2, key * 3]} for key in "abc"}
    build(contents, {"synthetic": 0.25, "caption": 0.75}, {("0.tar", "b")})
    assert [(caption, share) for _, caption, share in pairs(tmp_path)] == [
        ("aa", 0.125), ("aaa", 0.125), ("a", 0.75), ("cc", 0.125), ("ccc", 0.125), ("c", 0.75),
    ]  # fmt: skip


def test_without_captions_the_index_is_as_it_was(build: Build, tmp_path: Path) -> None:
    build({"a": {"caption": "words"}}, None)
    assert PairIndex.load(tmp_path / "index").probability is None
    assert not (tmp_path / "index/pairs/probability.npy").exists()
    assert "captions" not in json.loads((tmp_path / "manifest.json").read_text())


def test_faults_are_one_line_and_write_nothing(build: Build, tmp_path: Path) -> None:
    with pytest.raises(ModeError, match=r"not one good pair \(1 image-without-caption\)") as caught:
        build({"a": {"caption": "words"}}, {"captoin": 1.0})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "index").exists()
    (tmp_path / "pairs.parquet").write_bytes(b"")
    parquet.write_table(pa.table({"image": ["a.jpg"], "caption": ["words"]}), tmp_path / "pairs.parquet")
    with pytest.raises(ModeError, match="captions are for tars, this is a table"):
        build_manifest(SourceParams(shards="pairs.parquet", captions={"caption": 1.0}), tmp_path)


json_values: Any = st.none() | st.booleans() | st.floats() | st.sampled_from(["", " ", "a", "ab c"])
json_values |= st.lists(json_values, max_size=3)


@given(content=st.dictionaries(st.sampled_from([*PLACES, "other"]), json_values), txt=st.none() | st.binary(max_size=4))
def test_any_json_is_read_as_a_naive_reading_has_it(content: dict[str, Any], txt: bytes | None) -> None:
    record = _Record(json=json.dumps(content).encode(), txt=txt)
    found, fault = _captions_from(record, PLACES)
    for place in PLACES:
        stated = content.get(place) if place != "txt" else txt
        if stated is None or stated == []:
            assert place not in found
        else:
            assert len(found[place]) == (len(stated) if isinstance(stated, list) else 1)
    assert found or fault
    # Probabilities of an image are those of the places that have a caption to give.
    usable = [place for place, captions in found.items() if any(captions)]
    assert np.isclose(sum(_probabilities(found, PLACES)), sum(PLACES[place] for place in usable))
