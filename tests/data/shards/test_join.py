from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mode.checksums import check_manifest
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.join import join_indexes
from mode.data.shards.manifest import build_manifest
from mode.params import IndexParams, SourceParams
from tests.data.conftest import pair, tar_bytes, texts


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> tuple[PairIndex, PairIndex]:
    """Of two sources, one with a factor and with several captions of an image, the other with neither."""
    root = tmp_path_factory.mktemp("root")
    contents = {
        "a/0.tar": [*texts("x", ["one", "two", "three"]), *pair("y", 1)],
        "a/1.tar": [*texts("z", ["four", "fünf"], 2)],
        "b/0.tar": [*pair("x", 3, "other"), *pair("w", 4)],
    }
    for name, files in contents.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(tar_bytes(files))
    sources = {"a": SourceParams(shards={"a": 2.0}), "b": SourceParams(shards="b")}
    for name, source in sources.items():
        build_index(build_manifest(source, root), root, root / f"index-{name}", IndexParams(), workers=1)
    return PairIndex.load(root / "index-a"), PairIndex.load(root / "index-b")


def rows_of(index: PairIndex, rows: list[int]) -> list[tuple[object, ...]]:
    """All that a training asks of pairs, in Python's own numbers; of images, which pairs share one."""
    found = []
    for row in rows:
        file = int(index.file[row])
        factor = 1.0 if index.factor is None else float(index.factor[file])
        place = (index.path(file), int(index.offset[row]), int(index.length[row]), int(index.check[row]))
        found.append((index.caption(row), index.keys([row])[0], *place, *index.identity(file), factor))
    return found


chosen = st.sets(st.integers(0, 5), min_size=1).map(sorted)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(of_a=chosen, of_b=st.sets(st.integers(0, 1)).map(sorted), cut=st.integers(0, 6))
def test_pairs_are_those_of_their_sources(
    indexes: tuple[PairIndex, PairIndex],
    tmp_path_factory: pytest.TempPathFactory,
    of_a: list[int],
    of_b: list[int],
    cut: int,
) -> None:
    a, b = indexes
    out = tmp_path_factory.mktemp("joined") / "index"
    blocks = [np.array(part, np.int64) for part in (of_a[:cut], of_a[cut:])]  # an image may go from one to the next
    join_indexes(out, [(a, blocks), (b, [np.array(of_b, np.int64)])])
    joined = PairIndex.load(out)
    assert rows_of(joined, [*range(len(joined))]) == rows_of(a, of_a) + rows_of(b, of_b)
    images = [("a", int(a.image[row])) for row in of_a] + [("b", int(b.image[row])) for row in of_b]
    numbers = {image: number for number, image in enumerate(dict.fromkeys(images))}
    assert joined.image[:].tolist() == [numbers[image] for image in images]
    assert joined.first[:].tolist() == [images.index(image) for image in numbers] + [len(images)]
    assert check_manifest(out)
