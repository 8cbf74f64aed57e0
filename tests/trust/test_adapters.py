"""A project whose experts are adapters: every stage, and everything that is done with models afterwards."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import mode
from mode.clip.model import load_model
from mode.ensemble.model import Ensemble
from mode.errors import ModeError
from mode.integrity import check_project
from mode.paths import Paths
from mode.results import Results
from mode.tracking.registry import registered_folders
from tests.killing import served
from tests.once import made_once
from tests.trust import tiny

EXPERTS = ("expert-0", "expert-1")
CLASSES = ["white chess king", "ace of hearts", "black arrow"]


@pytest.fixture(scope="module")
def adapters(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny project with experts that are adapters."""
    return made_once(tmp_path_factory, "adapters", partial(with_adapters, finished))


def with_adapters(finished: Path, root: Path) -> None:
    """The finished project once more, with experts trained again as adapters, evaluated, and registered."""
    shutil.copytree(finished, root, symlinks=True)
    content = yaml.safe_load((root / "params.yaml").read_text())
    content["training"]["adapter"] = {"kind": "lora", "rank": 4}
    (root / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for name, key in [*[("expert", expert) for expert in EXPERTS], ("evaluate", None), ("report", None)]:
        assert served(partial(tiny.stage, root, name, key)) == 0, name


def test_experts_are_small_and_everything_is_evaluated(adapters: Path, finished: Path) -> None:
    def size(root: Path, name: str) -> int:
        return sum(path.stat().st_size for path in (root / "models" / name).iterdir())

    for expert in EXPERTS:
        assert not (adapters / "models" / expert / "open_clip_config.json").exists()
        assert size(adapters, expert) < size(finished, expert)
        assert (adapters / "models" / expert / "curve.csv").read_text().startswith("samples,loss")
    results, before = Results.load(adapters / "reports/metrics.json"), Results.load(finished / "reports/metrics.json")
    assert results.zeroshot.mean.keys() == before.zeroshot.mean.keys()
    assert results.zeroshot.mean["seed"] == before.zeroshot.mean["seed"]
    assert results.stand_ins == {}


def test_the_ensemble_is_opened_from_the_folder_and_from_the_registry(adapters: Path) -> None:
    images = list(np.random.default_rng(0).integers(0, 255, (3, 20, 20, 3), dtype=np.uint8))
    ensemble = mode.load(adapters / "models", device="cpu")
    expected = ensemble.adapt(CLASSES)(images)
    router, folders = registered_folders("models:/mode-ensemble@champion", adapters / "mlruns")
    assert set(folders) == {*EXPERTS, "seed"}  # the adapters' base goes with them
    registered = Ensemble.load(router, folders, "cpu")
    torch.testing.assert_close(registered.adapt(CLASSES)(images), expected)
    # One model alone is folded by its merge.
    best = ensemble.adapt(CLASSES, top_k=1)
    alone = ensemble.adapt(CLASSES, top_k=1, merge="weights")
    assert alone.clips["merged"].adapter is None
    torch.testing.assert_close(alone(images), best(images), rtol=1e-4, atol=1e-5)


def test_everything_is_sound_until_another_seed_is_put_there(adapters: Path, tmp_path: Path) -> None:
    assert [finding.fault for finding in check_project(Paths(adapters)) if finding.fault] == []
    shutil.copytree(adapters, tmp_path / "project", symlinks=True)
    models = tmp_path / "project/models"
    shutil.rmtree(models / "seed")
    shutil.copytree(models / "dense", models / "seed")
    faults = {str(each.path): each.fault for each in check_project(Paths(tmp_path / "project")) if each.fault}
    assert faults.keys() >= {f"models/{expert}" for expert in EXPERTS}
    assert "branched from another seed" in str(faults["models/expert-0"])
    for expert in EXPERTS:
        with pytest.raises(ModeError, match=f"{expert}: an adapter of another base than"):
            load_model(models / expert)
    with pytest.raises(ModeError, match="an adapter of another base than"):
        mode.load(models, device="cpu")


def test_the_card_names_the_base(adapters: Path) -> None:
    card = json.loads((adapters / "models/expert-0/card.json").read_text())
    clip = load_model(adapters / "models/expert-0")
    assert clip.adapter is not None
    assert (card["parent"], card["parent_weights"]) == (clip.adapter.base, clip.adapter.base_weights)
    assert card["adapter"]["rank"] == 4
