"""`training.compile`, with the compiler itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mode.data.glyphs.dataset import write_glyph_shards
from mode.data.loading.selection import Pairs
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import build_manifest
from mode.params import GlyphParams, ImageParams, IndexParams, MachineParams, ModelParams, SourceParams, TrainingParams
from mode.roles import SEED
from mode.training.loop import train
from mode.training.plan import Training, make_plan

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 1},
}


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_learns_the_same(tmp_path: Path) -> None:
    """Four steps, in which texts have different lengths."""
    write_glyph_shards(GlyphParams(pairs=64, shard_pairs=64), tmp_path / "shards", random_seed=0, workers=1)
    manifest = build_manifest(SourceParams(shards="shards"), tmp_path)
    build_index(manifest, tmp_path, tmp_path / "index", IndexParams(), workers=1)
    index = PairIndex.load(tmp_path / "index")
    losses = {}
    for compiled in (False, True):
        recipe = TrainingParams(
            epoch_samples=64, epochs=2, seed_epochs=1, batch_size=16, lr=1e-3, warmup=0, compile=compiled
        )
        plan = make_plan(SEED, Pairs.of(np.arange(len(index)), index.image), recipe, index.images)
        model = ModelParams(config=CONFIG, tokenizer="words")
        seen: list[float] = []
        result = train(
            Training(plan, index, model, ImageParams(size=32), recipe, random_seed=0),
            tmp_path,
            machine=MachineParams(device="cpu"),
            checkpoint_dir=tmp_path / f"checkpoints-{compiled}",
            on_metrics=lambda _, figures, seen=seen: seen.append(figures["train/loss"]),  # type: ignore[misc]
            log_every=1,
        )
        result.save(tmp_path / f"model-{compiled}")
        losses[compiled] = seen
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert len(set(losses[True])) == 4
