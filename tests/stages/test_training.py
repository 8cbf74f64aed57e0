"""What a training stage makes of params.yaml and of the table of roles."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml

from mode.clip.model import build_model, load_model, save_model
from mode.data.glyphs.dataset import write_glyph_shards
from mode.data.shards.index import build_index
from mode.data.shards.manifest import build_manifest
from mode.errors import ModeError
from mode.integrity import check_parents, check_project
from mode.params import GlyphParams, ImageParams, IndexParams, ModelParams, SourceParams, parse_params
from mode.roles import DENSE, DENSE_LONG, SEED, Role
from mode.stages.project import Project
from mode.stages.shipping import pack_images
from mode.stages.training import train_role, training_of
from mode.training.mixing import mix
from tests.small import VIT

TRAINING = {"epoch_samples": 32, "epochs": 4, "seed_epochs": 2, "batch_size": 8, "warmup": 0, "lr": 0.5}
PARAMS = {
    "random_seed": 5,
    "sources": {"base": {"shards": "glyphs"}},
    "experts": {"expert-0": {"cluster": 0}, "expert-1": {"cluster": 1, "epochs": 3, "lr": 0.25}},
    "model": {"name": "ViT-B-32"},
    "clustering": {"coarse": 3},
    "training": TRAINING,
}
#: An arm that no table has.
FULL = Role("full", "dense", "a full model", "", parent="seed", pairs="all", length="expert", many=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an index of 64 pairs, and the configuration of a seed."""
    root = tmp_path_factory.mktemp("project")
    write_glyph_shards(GlyphParams(pairs=64, shard_pairs=64), root / "shards", random_seed=0, workers=1)
    build_index(build_manifest(SourceParams(shards="shards"), root), root, root / "data/index/base", IndexParams(), 1)
    write_seed(root)
    return root


def write_seed(root: Path, **preprocess: object) -> None:
    """A configuration is all that a plan needs of the seed."""
    folder = root / "models/seed"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))


def test_another_arm_needs_no_more_than_its_row(root: Path) -> None:
    """One for each expert, with that expert's epochs and learning rate, on all pairs."""
    project = Project(root, parse_params(PARAMS))
    parent = project.model("seed")
    (parent / "open_clip_model.safetensors").write_bytes(b"weights")
    trainings = [training_of(project, FULL, key) for key in project.params.experts]
    assert [each.plan.name for each in trainings] == ["full-expert-0", "full-expert-1"]
    assert [each.plan.steps for each in trainings] == [8, 12]
    assert [each.plan.schedule.lr for each in trainings] == [0.5, 0.25]
    for each in trainings:
        np.testing.assert_array_equal(each.plan.pairs.rows[:], np.arange(64))
        assert (each.plan.parent, each.random_seed) == (parent, 5)
    assert len({each.fingerprint for each in trainings}) == 2


def test_dense_long_is_as_long_as_the_seed_and_one_expert_per_cluster(root: Path) -> None:
    """Whatever experts there are: one that comes, goes or has epochs of its own does not make it out of date."""
    plan = training_of(Project(root, parse_params(PARAMS)), DENSE_LONG).plan
    assert (plan.first_step, plan.steps) == (8, 3 * 8)
    fewer = parse_params({**PARAMS, "sources": {"base": {"shards": "glyphs", "coarse": 2}}})
    assert training_of(Project(root, fewer), DENSE_LONG).plan.steps == 2 * 8


def test_dense_long_that_is_not_wanted_is_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = Project(tmp_path, parse_params({**PARAMS, "baselines": {"dense_long": False}}))
    train_role(DENSE_LONG, project)
    assert list(project.model("dense-long").iterdir()) == []
    assert capsys.readouterr().out == "dense-long: not trained, baselines.dense_long is false\n"


def test_all_that_decides_a_training_is_in_its_fingerprint(root: Path) -> None:
    first = training_of(Project(root, parse_params(PARAMS)), SEED).fingerprint
    for other in (
        {"random_seed": 6},
        {"model": {"name": "ViT-B-16"}},
        {"image": {"shift": 1}},
        {"training": {**PARAMS["training"], "eps": 1e-8}},  # type: ignore[dict-item]
    ):
        assert training_of(Project(root, parse_params({**PARAMS, **other})), SEED).fingerprint != first
    elsewhere = parse_params({**PARAMS, "machine": {"threads": 1, "cache_mb": 0}, "clustering": {"coarse": 4}})
    assert training_of(Project(root, elsewhere), SEED).fingerprint == first


def test_an_expert_that_no_one_named_is_refused(root: Path) -> None:
    with pytest.raises(ModeError, match="no expert is called 'expert-7'"):
        training_of(Project(root, parse_params(PARAMS)), FULL, "expert-7")


def test_a_pretrained_seed_is_a_seed_like_any_other(root: Path, tmp_path: Path, vit: ModelParams) -> None:
    """Its card says where it came from; a dense model goes on from it, and costs what it took alone."""
    image = ImageParams(size=32, mean=(0.5, 0.5, 0.5), resize_mode="squash")
    theirs = build_model(vit, image, ["a white chess king"], random_seed=3)
    save_model(tmp_path / "theirs", theirs, {})
    shutil.copytree(root / "data", tmp_path / "data")
    (tmp_path / "shards").symlink_to(root / "shards")
    training = {**PARAMS["training"], "seed_epochs": 0, "epochs": 2, "warmup": 2, "lr": 1e-3}  # type: ignore[dict-item]
    seed = {"from": "pretrained", "name": "local-dir:theirs"}
    params = parse_params({**PARAMS, "seed": seed, "model": {}, "training": training, "image": {"shift": 1}})
    project = Project(tmp_path, params)

    train_role(SEED, project)
    made = load_model(project.model("seed"))
    assert all(torch.equal(theirs.model.state_dict()[name], each) for name, each in made.model.state_dict().items())
    assert made.card["origin"]["name"] == "local-dir:theirs"
    assert made.card["total"] == {"samples_seen": 0, "flops": 0, "seconds": 0.0}
    assert made.card["mlflow_run"]
    assert [finding.fault for finding in check_project(project) if "models" in str(finding.path)] == [None]

    planned = training_of(project, DENSE)
    assert (planned.plan.first_step, planned.plan.last_step) == (0, 8)
    assert (planned.image.size, planned.image.resize_mode, planned.image.shift) == (32, "squash", 1)
    train_role(DENSE, project)
    dense = load_model(project.model("dense"))
    assert dense.card["parent_weights"] == made.card["origin"]["sha256"]
    assert dense.card["total"] == dense.card["own"]
    assert dense.preprocess_cfg["resize_mode"] == "squash"
    check_parents(project.models, ["seed", "dense"])


def test_params_that_contradict_a_pretrained_seed_write_nothing(root: Path, tmp_path: Path, vit: ModelParams) -> None:
    save_model(tmp_path / "theirs", build_model(vit, ImageParams(size=32), ["a dog"], 0), {})
    seed = {"from": "pretrained", "name": "theirs"}
    training = {**PARAMS["training"], "seed_epochs": 0}  # type: ignore[dict-item]
    params = parse_params({**PARAMS, "seed": seed, "model": {}, "training": training, "image": {"size": 224}})
    with pytest.raises(ModeError, match=r"image\.size is 224, but the seed theirs was made for 32"):
        train_role(SEED, Project(tmp_path, params))
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("share", [0.5, "held-out"])
def test_a_fine_tuned_model_is_mixed_with_its_seed(root: Path, tmp_path: Path, vit: ModelParams, share: object) -> None:
    save_model(tmp_path / "theirs", build_model(vit, ImageParams(size=32), ["a white chess king"], 3), {})
    shutil.copytree(root / "data", tmp_path / "data")
    (tmp_path / "shards").symlink_to(root / "shards")
    training = {**PARAMS["training"], "seed_epochs": 0, "epochs": 2, "lr": 1e-3, "held_out": 20}  # type: ignore[dict-item]
    trained = {}
    for each in (0.0, share):
        changes = {"seed": {"from": "pretrained", "name": "theirs"}, "model": {}}
        params = parse_params({**PARAMS, **changes, "training": {**training, "seed_share": each}})
        project = Project(tmp_path, params)
        train_role(SEED, project)
        train_role(DENSE, project)
        trained[each] = load_model(project.model("dense"))
    seed, own = load_model(tmp_path / "models/seed").model.state_dict(), trained[0.0].model.state_dict()
    card = trained[share].card  # type: ignore[index]
    expected = mix(own, seed, card["seed_share"])
    for name, tensor in trained[share].model.state_dict().items():  # type: ignore[index]
        torch.testing.assert_close(tensor, expected[name])
    assert "seed_share" not in trained[0.0].card
    if share == "held-out":
        losses = card["held_out_losses"]
        assert len(losses) == 11
        assert losses[f"{card['seed_share']:g}"] == min(losses.values())


def test_a_machine_that_vanishes_leaves_a_copy_to_go_on_from(root: Path, tmp_path: Path) -> None:
    """Killed for good as soon as a copy is there; the next machine has the project and no checkpoint."""
    params: dict[str, Any] = {**PARAMS, "model": VIT.model_dump(exclude_none=True), "image": {"size": 16}}
    params["training"] = {**TRAINING, "seed_epochs": 3, "epochs": 4, "lr": 0.01}
    params["machine"] = {"device": "cpu", "threads": 1, "checkpoint_minutes": 1e-9}
    whole = Project(copied(root, tmp_path / "whole"), parse_params(params))
    train_role(SEED, whole)
    copies = {"checkpoint_url": f"file://{tmp_path}/store", "checkpoint_url_minutes": 1e-9}
    params["machine"] |= copies
    params_file = copied(root, tmp_path / "first") / "params.yaml"
    params_file.write_text(yaml.safe_dump(params))
    # It is slow enough to be killed on the way: a copy is made after each step, and waited for.
    script = (
        "import sys, mode.training.remote as remote\n"
        "offer = remote.RemoteCheckpoints.offer\n"
        "def slowly(self, folder, step):\n"
        "    offer(self, folder, step); self._wait(); print(step, flush=True)\n"
        "    step < 5 or sys.stdin.read()\n"
        "remote.RemoteCheckpoints.offer = slowly\n"
        "from mode.cli import main\n"
        "sys.argv = ['mode', 'stage', 'seed']\n"
        "main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=params_file.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "5\n" in iter(process.stdout.readline, "")
        process.kill()
    second = Project(copied(root, tmp_path / "second"), parse_params(params))
    train_role(SEED, second)
    weights = "models/seed/open_clip_model.safetensors"
    assert (second.root / weights).read_bytes() == (whole.root / weights).read_bytes()
    curves = [(each.root / "models/seed/curve.csv").read_text() for each in (second, whole)]
    assert curves[0] == curves[1]
    assert not list((tmp_path / "store" / "seed").iterdir())


@pytest.mark.parametrize("read", ["random", "sequential"])
def test_a_training_from_its_pack_is_the_same_bit_by_bit(
    root: Path, tmp_path: Path, read: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where the shards are gone; a pack of other pairs ends it in one line."""
    params: dict[str, Any] = {**PARAMS, "model": VIT.model_dump(exclude_none=True), "image": {"size": 16}}
    params["training"] = {**TRAINING, "lr": 0.01, "read": read, "shuffle_images": 20}
    params["machine"] = {"device": "cpu", "threads": 1, "cache_mb": 0}
    weights = {}
    for name in ("shards", "pack"):
        project = Project(copied(root, tmp_path / name), parse_params(params))
        if name == "pack":
            file = project.params_file
            file.write_text(yaml.safe_dump(params))
            pack_images(project.root, file, "seed", f"file://{tmp_path}/packed", 10, force=False)
            assert "seed: 64 images in 7 tars in file://" in capsys.readouterr().out
            shutil.rmtree(project.root / "shards")
            params["machine"]["packs"] = {"seed": f"file://{tmp_path}/packed"}
            project = Project(project.root, parse_params(params))
        train_role(SEED, project)
        weights[name] = (project.model("seed") / "open_clip_model.safetensors").read_bytes()
        assert not (project.checkpoints / "seed").exists()
    assert weights["pack"] == weights["shards"]
    params["training"]["held_out"] = 5
    with pytest.raises(ModeError, match="a pack of other pairs than the training's"):
        train_role(SEED, Project(tmp_path / "pack", parse_params(params)))


def test_only_what_is_trained_is_packed(root: Path, tmp_path: Path) -> None:
    file = copied(root, tmp_path / "project") / "params.yaml"
    file.write_text(yaml.safe_dump({**PARAMS, "full": ["expert-0"]}))
    there = r"seed, dense, dense-long, full-expert-0, expert-0, expert-1\)"
    with pytest.raises(ModeError, match=rf"no training is called 'ensemble' .*{there}"):
        pack_images(file.parent, file, "ensemble", "packed", 10, force=False)


def copied(root: Path, to: Path) -> Path:
    """The project on another machine: shards and index, no model."""
    for name in ("shards", "data"):
        shutil.copytree(root / name, to / name)
    return to
