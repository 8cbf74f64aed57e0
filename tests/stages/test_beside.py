"""What is noted of a model while it trains."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mode.clip.model import Clip, build_model, save_model
from mode.data.glyphs.dataset import write_glyph_shards, write_glyph_tasks
from mode.data.shards.index import build_index
from mode.data.shards.manifest import build_manifest
from mode.errors import ModeError
from mode.files import add_to_tar
from mode.params import GlyphParams, IndexParams, SourceParams, parse_params
from mode.roles import DENSE, SEED
from mode.stages.beside import Validation, beside_training
from mode.stages.project import Project
from mode.stages.training import _mix_with_seed, training_of
from mode.training.beside import KeptModels
from tests.stages.test_training import PARAMS
from tests.training.conftest import VIT

MODEL = {"config": VIT, "tokenizer": "words"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an index of 64 pairs, and the built-in tasks."""
    root = tmp_path_factory.mktemp("project")
    glyphs = GlyphParams(pairs=64, shard_pairs=64, test_images=1)
    write_glyph_shards(glyphs, root / "shards", random_seed=0, workers=1)
    write_glyph_tasks(glyphs, root / "data/tasks", random_seed=0, workers=1)
    build_index(build_manifest(SourceParams(shards="shards"), root), root, root / "data/index/base", IndexParams(), 1)
    return root


def project(root: Path, tasks: object = "glyphs", **training: object) -> Project:
    content = {**PARAMS, "model": MODEL, "image": {"size": 32}, "evaluation": {"tasks": tasks}}
    return Project(root, parse_params({**content, "training": {**PARAMS["training"], **training}}))  # type: ignore[dict-item]


def beside(of: Project, noted: Path, leads: bool = True) -> tuple[list[object], list[tuple[int, Mapping[str, float]]]]:
    logged: list[tuple[int, Mapping[str, float]]] = []
    training = training_of(of, SEED)

    def log(samples: int, figures: Mapping[str, float]) -> None:
        logged.append((samples, figures))

    return [*beside_training(of, training, noted, log, leads)], logged


def untrained(of: Project) -> Clip:
    clip = build_model(of.params.model, of.params.image, ["a letter"], random_seed=0)
    clip.model.train()
    return clip


def test_nothing_is_done_if_nothing_is_asked_for(root: Path, tmp_path: Path) -> None:
    assert beside(project(root), tmp_path / "noted") == ([], [])


def test_figures_are_noted_logged_shown_and_made_a_table(root: Path, tmp_path: Path) -> None:
    asked = {"every": 3, "tasks": ["chess", "data/tasks/dice"], "held_out": 20}
    of = project(root, held_out=24, validate=asked)
    [look], logged = beside(of, tmp_path / "noted")
    assert isinstance(look, Validation)
    assert [step for step in range(9) if look.due(step)] == [0, 3, 6, 8]  # the seed has eight steps
    clip = untrained(of)
    shown = look.do(3, clip)
    assert set(shown) == {"held-out loss", "chess", "dice"}
    scores = {f"validate/zeroshot/{task}": shown[task] for task in ("chess", "dice")}
    assert logged == [(24, {"validate/loss": shown["held-out loss"], **scores})]
    assert (look.done(3), look.done(6)) == (True, False)
    look.do(0, clip)
    heads, *lines = look.table().splitlines()
    assert heads == "samples,loss,zeroshot/chess,zeroshot/dice"
    assert [line.partition(",")[0] for line in lines] == ["0", "24"]
    figures = [f"{shown[name]:.6f}" for name in ("held-out loss", "chess", "dice")]
    assert lines[1].split(",")[1:] == figures == lines[0].split(",")[1:]  # the same model


def test_half_a_line_that_a_kill_left_is_made_again(root: Path, tmp_path: Path) -> None:
    of = project(root, validate={"every": 4, "tasks": ["chess"]})
    [look], _ = beside(of, tmp_path / "noted")
    assert isinstance(look, Validation)
    (tmp_path / "noted").write_text('{"samples": 0, "validate/zeroshot/chess": 0.5}\n{"samples": 32, "val')
    assert (look.done(0), look.done(4)) == (True, False)
    look.do(4, untrained(of))
    assert [line.partition(",")[0] for line in look.table().splitlines()] == ["samples", "0", "32"]


def test_many_tasks_are_one_figure_in_the_line(root: Path, tmp_path: Path) -> None:
    tasks = sorted(folder.name for folder in (root / "data/tasks").iterdir())[:4]
    of = project(root, validate={"every": 4, "tasks": tasks})
    [look], [*_] = beside(of, tmp_path / "noted")
    assert isinstance(look, Validation)
    assert list(look.do(4, untrained(of))) == ["zero-shot"]


def test_tasks_of_ones_own_are_found_by_name(root: Path, tmp_path: Path) -> None:
    of = project(root, tasks=["data/tasks/dice"], validate={"every": 4, "tasks": ["dice"]})
    assert len(beside(of, tmp_path / "noted")[0]) == 1


@pytest.mark.parametrize("given", ["glyphs", ["data/tasks/dice"]])
def test_a_task_that_is_not_there_is_one_line_before_the_training(root: Path, tmp_path: Path, given: object) -> None:
    of = project(root, tasks=given, validate={"every": 4, "tasks": ["chess", "unheard-of"]})
    with pytest.raises(ModeError, match=r"training\.validate\.tasks: no task is called '(unheard-of|chess)'") as error:
        beside(of, tmp_path / "noted")
    assert len(str(error.value).splitlines()) == 1


def test_processes_that_do_not_lead_know_only_when(root: Path, tmp_path: Path) -> None:
    of = project(root, validate={"every": 3, "tasks": ["unheard-of"]}, keep_checkpoints={"every": 4})
    [look, kept], _ = beside(of, tmp_path / "noted", leads=False)
    assert isinstance(look, Validation)
    assert isinstance(kept, KeptModels)
    assert [step for step in range(9) if look.due(step)] == [0, 3, 6, 8]
    assert [step for step in range(9) if kept.due(step)] == [4, 8]


def test_without_a_held_out_pair_there_is_no_loss(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of an expert none of whose pairs was drawn."""
    of = project(root, held_out=2, validate={"every": 4, "tasks": ["chess"], "held_out": 2})
    training = training_of(of, SEED)
    pairs = replace(training.plan.pairs, held_out=np.empty(0, np.int64))
    training = replace(training, plan=replace(training.plan, pairs=pairs))
    [look] = beside_training(of, training, tmp_path / "noted", lambda *_: None, True)
    assert list(look.do(4, untrained(of))) == ["chess"]
    assert "seed: no pair of it is held out, so" in capsys.readouterr().out


def test_held_out_images_that_cannot_be_decoded_give_no_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/0.tar", "w") as tar:
        for number in range(40):
            add_to_tar(tar, f"{number}.jpg", b"no picture")
            add_to_tar(tar, f"{number}.txt", b"a letter")
    manifest = build_manifest(SourceParams(shards="shards"), tmp_path)
    build_index(manifest, tmp_path, tmp_path / "data/index/base", IndexParams(check_images=False), 1)
    clip = untrained(project(tmp_path))
    asked = {"held_out": 20, "seed_share": "held-out", "validate": {"every": 4, "held_out": 20}}
    training = {**PARAMS["training"], "seed_epochs": 0, **asked}  # type: ignore[dict-item]
    seed = {"from": "pretrained", "name": "theirs"}
    of = Project(tmp_path, parse_params({**PARAMS, "seed": seed, "model": {}, "training": training}))
    save_model(of.model("seed"), clip, {})
    planned = training_of(of, DENSE)
    [look] = beside_training(of, planned, tmp_path / "noted", lambda *_: None, True)
    assert look.do(4, clip) == {}
    assert "dense: no image of its held-out pairs can be decoded, so" in capsys.readouterr().out
    with pytest.raises(ModeError, match="dense: no image of its held-out pairs can be decoded"):
        _mix_with_seed(of, planned, clip)


def test_what_is_done_beside_a_training_decides_nothing_in_it(root: Path) -> None:
    asked = {"validate": {"every": 3, "tasks": ["chess"]}, "keep_checkpoints": {"every": 1}}
    plain, watched = (training_of(project(root, **more), SEED) for more in ({}, asked))  # type: ignore[arg-type]
    assert watched.fingerprint == plain.fingerprint
    assert watched.parameters == plain.parameters
