"""The evaluation of a project's models on folders that are not its own: `mode evaluate --tasks` and `--suite`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from mode.clip.model import build_model, save_model
from mode.embedding.lsa import LsaEmbedder
from mode.ensemble.router import Router
from mode.params import ImageParams, ModelParams, RoutingParams
from mode.stages.evaluation import evaluate_folders, evaluate_suite
from tests.evaluation.conftest import CONFIG, WORDS, TaskFolders

COST = {"samples_seen": 64, "flops": 1e6, "seconds": 1.0}
PARAMS = Path("params.yaml")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskFolders:
    """A project with a seed and a router of one expert, which the seed stands in for, in the working directory."""
    monkeypatch.chdir(tmp_path)
    content = {
        "sources": {"base": {"shards": "glyphs"}},
        "experts": {"expert-0": {"cluster": 0}},
        "model": {"config": CONFIG, "tokenizer": "words"},
    }
    PARAMS.write_text(yaml.safe_dump(content))
    clip = build_model(ModelParams(config=CONFIG, tokenizer="words"), ImageParams(size=32), WORDS, 0)
    save_model(Path("models/seed"), clip, {"own": COST, "total": COST})
    embedder = LsaEmbedder.fit([*WORDS, "red spot", "blue square"] * 3, 3, 0)
    conditions: dict[str, np.ndarray] = {"expert-0": embedder.encode(["red"])}
    Router(conditions, embedder, RoutingParams(kind="published", retrieval="paper")).save(Path("models/ensemble"))
    return TaskFolders(tmp_path / "tasks")


def test_the_results_name_the_protocol_of_retrieval(here: TaskFolders) -> None:
    here.retrieval("wds_flickr30k", 4)
    found = evaluate_suite("retrieval", here.root, Path("models"), PARAMS, "cpu")
    assert found.provenance["retrieval_protocol"] == "paper"
    assert found.suite is not None
    assert found.suite.missing == ["mscoco_captions"]
    folder = here.classification("colours", [0, 1, 2])
    found = evaluate_folders([str(folder)], Path("models"), PARAMS, "cpu")
    assert "retrieval_protocol" not in found.provenance
