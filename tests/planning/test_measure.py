"""Rates of this machine: what is measured, not how fast it is."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mode.data.glyphs.dataset import write_glyph_shards
from mode.data.shards.manifest import Manifest, build_manifest
from mode.errors import ModeError
from mode.params import ClusteringParams, GlyphParams, ImageParams, Params, SourceParams, parse_params
from mode.planning import measure as measuring
from mode.planning.measure import (
    MODELS,
    TABLES,
    WORDS,
    bytes_of,
    decode_rate,
    evaluation_rate,
    first_rows,
    fit_rate,
    index_rate,
    measure,
    own_encoder_rate,
    some_of,
    start_seconds,
)
from mode.planning.rates import Measured, Rates
from mode.planning.trial import clusters_at
from tests.small import VIT


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tars of 100 pairs each."""
    root = tmp_path_factory.mktemp("project")
    write_glyph_shards(GlyphParams(pairs=200, shard_pairs=100), root / "shards", random_seed=0, workers=1)
    return root


@pytest.fixture
def manifest(root: Path) -> Manifest:
    return build_manifest(SourceParams(shards="shards"), root)


@pytest.fixture
def params() -> Params:
    content = {
        "sources": {"base": {"shards": "shards"}},
        "experts": {"expert-0": {"cluster": 0}},
        "model": VIT.model_dump(),
        "image": {"size": 16},
        "clustering": {"fine": 4, "coarse": 1},
        "training": {"batch_size": 8},
        "machine": {"device": "cpu", "threads": 1},
    }
    return parse_params(content)


def of_a_model(flops_per_item: float) -> dict[str, Any]:
    """What `measure` is told of vectors and models."""
    flops = {"flops_per_pair": lambda words: 1e6 * words, "flops_per_item": flops_per_item, "flops_per_image": 1e6}
    return {"dimensions": 16, **flops}


def test_all_is_measured_and_nothing_is_left_behind(
    root: Path, manifest: Manifest, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "_WINDOWS", (2, 0.01))
    monkeypatch.setattr(measuring, "_VECTORS", 1_000)
    before = sorted(root.rglob("*"))
    found = measure(params, manifest, root, **of_a_model(flops_per_item=0.0))
    assert sorted(root.rglob("*")) == before
    of_others = {"training_share_of_peak", "inference_share_of_peak"}
    of_others |= {"read_bytes_per_second", "small_read_seconds", "gpu_context_bytes", "gpu_spare_share"}
    assert found.values.keys() == Rates.model_fields.keys() - of_others
    assert all(math.isfinite(value) and value > 0 for value in found.values.values())
    assert found.values["captions_per_image"] == 1.0
    assert found.values["image_bytes"] * 200 == bytes_of(root / "shards")
    assert found.device == "cpu"
    assert found.flops_per_pair == 1e6 * found.values["tokenizer_words"]
    per_core = found.values["training_samples_per_second"] * found.flops_per_pair
    assert found.values["training_flops_per_core_second"] == pytest.approx(per_core)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "12 of 12 rates" in printed.err
    assert "index" not in printed.err  # bars of what is called stay away


@pytest.mark.parametrize("view", ["text", "image", "both"])
def test_the_seeds_own_towers_are_measured_where_they_embed(params: Params, view: str) -> None:
    embedding = {"kind": "seed", "made_from": "models/seed", "view": view}
    own = parse_params({**params.model_dump(), "embedding": embedding})
    captions = ["a red king", "two of spades"] * 300
    rate = own_encoder_rate(own, captions, flops_per_item=1e6)
    assert 1e6 < rate < 1e12  # between one and a million pairs a second


def test_they_take_the_place_of_an_encoder_of_berts_shape(
    root: Path, manifest: Manifest, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_WINDOWS", (1, 0.01))
    monkeypatch.setattr(measuring, "_VECTORS", 1_000)
    monkeypatch.setattr(measuring, "start_seconds", lambda imports: float(len(imports)))
    monkeypatch.setattr(measuring, "own_encoder_rate", lambda *given: 2 * given[-1])
    own = parse_params({**params.model_dump(), "embedding": {"kind": "seed", "made_from": "models/seed"}})
    found = measure(own, manifest, root, **of_a_model(flops_per_item=3e6))
    assert found.values["encoder_flops_per_core_second"] == 6e6
    starts = {"start_seconds": TABLES, "words_start_seconds": WORDS, "model_start_seconds": MODELS}
    assert {rate: found.values[rate] for rate in starts} == {rate: len(imports) for rate, imports in starts.items()}


@pytest.mark.parametrize(
    ("imports", "libraries"),
    [(TABLES, set()), (WORDS, {"sklearn"}), (MODELS, {"torch", "open_clip", "mlflow"})],
    ids=["tables", "words", "models"],
)
def test_a_start_is_what_stages_import(imports: str, libraries: set[str]) -> None:
    code = f"{imports}\nimport sys; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"sklearn", "torch", "open_clip", "mlflow"} & set(told) == libraries
    assert start_seconds(imports) > 0


def test_a_fit_is_counted_as_a_plan_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 vectors of 8 dimensions, 4 centres: 5 passes, the last, and 2 over 32 a centre, or all that there are."""
    monkeypatch.setattr(measuring, "_clocked", lambda work: (2.0 / faiss.omp_get_max_threads(), work()))
    monkeypatch.setattr("mode.clustering.kmeans.TOLERANCE", -math.inf)  # no fit settles before its last pass
    vectors = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float16)
    clustering = ClusteringParams(iterations=5)
    assert fit_rate(vectors, clustering, fine=4) == 8 * 100 * 4 * 8 / 2
    assert fit_rate(vectors[:3], clustering, fine=4) == 8 * 3 * 3 * 8 / 2  # no more centres than vectors
    monkeypatch.setattr(measuring, "_FIT", 3 * 100 * 4 * 8)  # no time for more than three passes
    assert fit_rate(vectors, clustering, fine=4) == 5 * 100 * 4 * 8 / 2
    monkeypatch.setattr("mode.clustering.kmeans.TOLERANCE", math.inf)  # settles at once where no cluster may be full
    assert fit_rate(vectors, ClusteringParams(iterations=5, balance=4.0), fine=4) == 2 * 100 * 4 * 8 / 2


def test_the_evaluation_is_counted_for_each_thread(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 100 images of 2 MFLOP in half a second in every thread: 0.4 GFLOP/s each, however many there are."""
    encoded: list[int] = []
    monkeypatch.setattr(measuring, "_clocked", lambda work: (0.5, encoded.append(len(work()))))
    few = parse_params({**params.model_dump(), "machine": {"inference_batch": 100}})
    assert evaluation_rate(few, ["a red king"] * 10, flops_per_image=2e6) == 4e8
    assert encoded == [torch.get_num_threads()]


def test_what_was_measured_can_be_kept(root: Path, tmp_path: Path) -> None:
    measured = Measured("cpu", 1e6, {"image_bytes": 3.0})
    measured.save(tmp_path / "rates.json")
    assert [path.name for path in tmp_path.iterdir()] == ["rates.json"]


def test_an_interrupted_measurement_leaves_the_earlier_one(
    root: Path, manifest: Manifest, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "decode_rate", interrupted)
    before = sorted(root.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        measure(params, manifest, root, **of_a_model(flops_per_item=0.0))
    assert sorted(root.rglob("*")) == before


def test_the_first_shards_are_enough(manifest: Manifest) -> None:
    sizes = [shard.size for shard in manifest.shards]
    assert some_of(manifest, 1).shards == manifest.shards[:1]
    assert some_of(manifest, sizes[0] + 1).shards == manifest.shards
    assert some_of(manifest, sum(sizes) * 2).shards == manifest.shards


def test_images_that_cannot_be_decoded_give_no_rate() -> None:
    with pytest.raises(ModeError, match="none of 2 images can be decoded"):
        decode_rate([b"no image", b""], ImageParams(size=8))


def test_bytes_of_folders_are_those_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(bytes(5))
    (tmp_path / "a" / "b" / "two").write_bytes(bytes(7))
    assert (bytes_of(tmp_path), bytes_of(tmp_path / "a" / "one")) == (12, 5)


def test_clusters_of_made_up_centres_are_dealt_out_in_turn() -> None:
    assert clusters_at(np.ones((6, 4), np.float32), 2).coarse_of_fine.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_of_a_table_the_first_rows_are_taken(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "pictures").mkdir()
    rows = [(f"{number}.png", f"a picture, of {number}") for number in range(5)]
    for name, _ in rows:
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name)
    frame = pd.DataFrame(rows, columns=["image", "caption"])
    table = tmp_path / "pictures" / f"pairs.{suffix}"
    if suffix == "parquet":
        frame.to_parquet(table)
    else:
        frame.to_csv(table, index=False, sep="," if suffix == "csv" else "\t")
    manifest = build_manifest(SourceParams(shards=f"pictures/pairs.{suffix}"), tmp_path)
    few = first_rows(manifest, tmp_path, tmp_path / "few.parquet", rows=3)
    _, index = index_rate(few, tmp_path, tmp_path / "index", check_images=True)
    assert index.captions([0, 1, 2]) == [caption for _, caption in rows[:3]]
    assert len(index) == 3
    assert [Path(file).name for file in index.files] == ["0.png", "1.png", "2.png"]
