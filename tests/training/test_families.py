"""The model families of open_clip: each is trained two steps, saved, opened again, trained on from, and served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.loss import SigLipLoss
from PIL import Image
from torch.nn import functional as F

from mode.clip.model import build_model, load_model
from mode.data.loading.selection import Pairs
from mode.data.shards.index import PairIndex
from mode.embedding.base import build_embedder
from mode.ensemble.model import Ensemble
from mode.ensemble.router import Router
from mode.errors import ModeError
from mode.params import EmbeddingParams, ImageParams, MachineParams, ModelParams, RoutingParams, TrainingParams
from mode.roles import DENSE, SEED
from mode.training.learner import Towers, backward
from mode.training.loop import train
from mode.training.plan import Training, make_plan

TEXT: dict[str, Any] = {"context_length": 8, "width": 16, "heads": 2, "layers": 1}
TIMM: dict[str, Any] = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
FAMILIES: dict[str, dict[str, Any]] = {
    "CLIP, ViT": {"vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 16}, "text_cfg": TEXT},
    "CLIP, ResNet": {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32}, "text_cfg": TEXT},
    "CustomTextCLIP, timm": {"custom_text": True, "vision_cfg": TIMM, "text_cfg": TEXT},
    "CustomTextCLIP, transformers": {
        "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"hf_model_name": "roberta-base", "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"},
    },
    "SigLIP": {
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        "embed_dim": 64,
    },
}
RECIPE = TrainingParams(epoch_samples=12, epochs=4, seed_epochs=2, batch_size=12, warmup=0, lr=1e-3, accumulate=2)


def train_and_serve(family: str, project: Path, index_folder: Path, out: Path) -> None:
    """Two steps of a seed and two of a dense model, with gradient checkpointing; then the ensemble of the two."""
    index = PairIndex.load(index_folder)
    rows = np.arange(len(index), dtype=np.int64)
    model = ModelParams(config={"embed_dim": 16, **FAMILIES[family]}, tokenizer="words")
    image = ImageParams(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize_mode="squash")
    machine = MachineParams(device="cpu", grad_checkpointing=True)
    folders = {}
    for role in (SEED, DENSE):
        plan = make_plan(role, Pairs.of(rows, index.image), RECIPE, index.images, parent=folders.get("seed"))
        result = train(Training(plan, index, model, image, RECIPE, 3), project, machine, out / role.name)
        folders[role.name] = out / role.name / "model"
        result.save(folders[role.name])
        ours = result.clip.model.state_dict()
        again = load_model(folders[role.name])
        assert all(torch.equal(ours[name], tensor) for name, tensor in again.model.state_dict().items())
        assert (again.card["steps"], again.preprocess_cfg["resize_mode"]) == (
            [plan.first_step, plan.last_step],
            "squash",
        )

    captions = index.captions(rows[:20])
    embedder = build_embedder(EmbeddingParams(dimensions=4), captions, 0)
    vectors = embedder.encode(captions)
    router = Router.fit({"seed": vectors[:9], "dense": vectors[9:]}, embedder, RoutingParams(), captions, 0)
    router.save(out / "ensemble")
    ensemble = Ensemble.load(out / "ensemble", folders, "cpu")
    picture = Image.fromarray(np.full((40, 30, 3), (220, 30, 30), np.uint8))
    classes = ["red", "green", "blue"]
    scores = ensemble.adapt(classes).scores([picture])

    assert scores.shape == (1, 3)

    # The same by open_clip alone.
    weights = ensemble.router.weights([[name] for name in classes])
    expected = torch.zeros(1, 3)
    for name, folder in folders.items():
        network, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        with torch.no_grad():
            rows_of = F.normalize(network.eval().encode_image(transform(picture)[None]), dim=-1)
            expected += weights[name] * rows_of @ F.normalize(network.encode_text(tokenizer(classes)), dim=-1).T
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [name for name in FAMILIES if "transformers" not in name])
def test_a_family_is_trained_saved_opened_and_served(
    family: str, project: Path, index: PairIndex, tmp_path: Path
) -> None:
    train_and_serve(family, project, project / "index", tmp_path)


def test_a_text_tower_of_transformers(project: Path, index: PairIndex, tmp_path: Path) -> None:
    """Its configuration comes from the hub's cache: a tiny one here, in a process of its own that looks there."""
    kept = tmp_path / "home/hub/models--roberta-base"
    (kept / "snapshots/abc").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("abc")
    config = {"model_type": "roberta", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 100}
    (kept / "snapshots/abc/config.json").write_text(json.dumps(config))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, str(project), str(project / "index"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2_000:]


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"multimodal_cfg": {"width": 16}}, "CoCa"),
        ({"vision_cfg": {"timm_model_name": "naflexvit_base_patch16_map"}}, "NaFlex"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    part: dict[str, Any], name: str, project: Path, index: PairIndex, tmp_path: Path
) -> None:
    model = ModelParams(config={"embed_dim": 16, **FAMILIES["CLIP, ViT"], **part}, tokenizer="words")
    plan = make_plan(SEED, Pairs.of(np.arange(len(index)), index.image), RECIPE, index.images)
    training = Training(plan, index, model, ImageParams(size=32), RECIPE, 3)
    with pytest.raises(ModeError, match=f"a {name} model"):
        train(training, project, MachineParams(device="cpu"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_the_sigmoid_loss_is_that_of_the_paper(passes: int) -> None:
    """SigLIP (arXiv 2303.15343), algorithm 1: of every pair of the batch, is it one? In one pass and in several."""
    config = {"embed_dim": 64, **FAMILIES["SigLIP"]}
    clip = build_model(ModelParams(config=config, tokenizer="words"), ImageParams(size=32), ["a b c d"], 0)
    images, tokens = torch.rand(8, 3, 32, 32), clip.tokenizer(["a", "b", "c", "d", "a b", "c d", "b c", "d a"])
    loss = backward(Towers(clip.model), SigLipLoss(), images, tokens, passes)
    gradients = {name: each.grad.clone() for name, each in clip.model.named_parameters() if each.grad is not None}

    clip.model.zero_grad()
    rows = F.normalize(clip.model.encode_image(images), dim=-1)
    columns = F.normalize(clip.model.encode_text(tokens), dim=-1)
    logits = clip.model.logit_scale.exp() * rows @ columns.T + clip.model.logit_bias
    expected = sum(
        -F.logsigmoid((1 if row == column else -1) * logits[row, column]) for row in range(8) for column in range(8)
    )
    assert isinstance(expected, torch.Tensor)
    (expected / 8).backward()
    assert loss.item() == pytest.approx(expected.item() / 8, rel=1e-5)
    for name, each in clip.model.named_parameters():
        if each.grad is not None:
            torch.testing.assert_close(gradients[name], each.grad, rtol=1e-3, atol=1e-5)
    assert "logit_bias" in gradients


def test_gradients_that_are_computed_again_are_the_same(project: Path, index: PairIndex, tmp_path: Path) -> None:
    model = ModelParams(config={"embed_dim": 16, **FAMILIES["CLIP, ViT"]}, tokenizer="words")
    plan = make_plan(SEED, Pairs.of(np.arange(len(index)), index.image), RECIPE, index.images)
    training = Training(plan, index, model, ImageParams(size=32), RECIPE, 3)
    trained = [
        train(training, project, MachineParams(device="cpu", grad_checkpointing=again), tmp_path / str(again))
        for again in (False, True)
    ]
    ours, theirs = (result.clip.model.state_dict() for result in trained)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert trained[0].clip.card["own"]["flops"] == trained[1].clip.card["own"]["flops"]


if __name__ == "__main__":
    train_and_serve("CustomTextCLIP, transformers", *map(Path, sys.argv[1:]))
