"""Shards that come to a source: what is made of them is what would have been made of all at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import mode
from mode.clip.export import export_model
from mode.clip.lora import base_state
from mode.clip.model import load_model
from mode.clustering.assignment import Assignment
from mode.data.glyphs.dataset import write_glyph_shards
from mode.data.loading.selection import is_held_out
from mode.errors import ModeError
from mode.integrity import check_project
from mode.params import GlyphParams, ModelParams, load_params, parse_params
from mode.roles import EXPERT, SEED, UPDATE
from mode.stages import preparation, routing
from mode.stages.pairs import left_rows, rows_of_expert, seen_rows
from mode.stages.project import Project, trained_models
from mode.stages.reports import drifts
from mode.stages.shipping import export_shards
from mode.stages.sources import add_updates, check_names, find_arrival, keep_sources_watch
from mode.stages.training import train_role, training_of
from mode.tracking.store import database_uri, import_mlflow
from mode.vectors import load_vectors
from tests.killing import KILL, end_at

#: Names that sort between those that are there already.
FIRST, SECOND = ("00000.tar", "00002.tar"), ("00001.tar",)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all") / "tars"
    write_glyph_shards(GlyphParams(pairs=360, shard_pairs=120), folder, random_seed=0, workers=1)
    return folder


def content(vit: ModelParams) -> dict[str, Any]:
    training = {"epoch_samples": 64, "epochs": 4, "seed_epochs": 2, "batch_size": 8, "warmup": 2, "lr": 0.001}
    return {
        "sources": {"base": {"shards": "tars"}},
        "experts": {"expert-0": {"cluster": 0}, "expert-1": {"cluster": 1}},
        "updates": {},
        "embedding": {"dimensions": 8},
        "clustering": {"fine": 4, "coarse": 2},
        "model": vit.model_dump(),
        "image": {"size": 16},
        "training": {**training, "held_out": 9},
        "branch": {"outside_share": 0.1},
        "machine": {"device": "cpu", "threads": 1},
    }


def opened(root: Path) -> Project:
    return Project(root, load_params(root / "params.yaml"))


def prepare(project: Project, *sources: str) -> None:
    for source in sources:
        preparation.data(project, source)
        preparation.index(project, source)
        if source == "base":
            preparation.embedder(project)
        preparation.embed(project, source)
        if project.params.root_of(source) == source:
            preparation.cluster(project, source)
        preparation.assign(project, source)


def copy(tars: Path, root: Path, names: tuple[str, ...]) -> None:
    (root / "tars").mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy2(tars / name, root / "tars")


@pytest.fixture
def root(tmp_path: Path, tars: Path, vit: ModelParams) -> Path:
    """A project in which two shards were prepared, and a third has come."""
    root = tmp_path / "project"
    copy(tars, root, FIRST)
    (root / "params.yaml").write_text(yaml.safe_dump(content(vit), sort_keys=False))
    prepare(opened(root), "base")
    copy(tars, root, SECOND)
    return root


def arrive(root: Path) -> None:
    find_arrival(root, root / "params.yaml", "base")


def files_of(root: Path) -> dict[str, bytes]:
    paths = (path for path in sorted((root / "data").rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def test_what_arrives_touches_nothing_old_and_is_what_a_new_clone_makes(root: Path, tmp_path: Path, tars: Path) -> None:
    before = files_of(root)
    found = find_arrival(root, root / "params.yaml", "base", enter=False)
    assert (found.name, found.shards, found.bytes) == ("base-2", 1, (tars / SECOND[0]).stat().st_size)
    assert not (root / "arrivals.json").exists()
    arrive(root)
    with pytest.raises(ModeError, match="nothing has arrived: all 3 shards of 'base' are known"):
        arrive(root)
    project = opened(root)
    check_names(project)
    preparation.names(project)  # watch.yaml is in step
    watch = yaml.safe_load((root / "watch.yaml").read_text())
    assert (watch["clustered"], watch["assigned"]) == (["base"], {"base": "base", "base-2": "base"})
    prepare(project, "base-2")
    preparation.data(project, "base")  # which DVC always runs
    after = files_of(root)
    assert {name: after[name] for name in before} == before
    assert not project.clusters("base-2").exists()
    assert {finding.fault for finding in check_project(project, {"base-2": "base"})} == {None}
    assigned = Assignment.load(project.assignment("base-2"))
    Assignment(assigned.fine, 1 - assigned.coarse, assigned.distance).save(project.assignment("base-2"))
    [fault] = {finding.fault for finding in check_project(project, {"base-2": "base"})} - {None}
    assert fault is not None
    assert "names other clusters than data/clusters/base has" in fault
    preparation.assign(project, "base-2")
    with pytest.raises(ModeError, match="'base-2' continues 'base' and has no clusters of its own"):
        preparation.cluster(project, "base-2")

    clone = tmp_path / "clone"
    shutil.copytree(root, clone, ignore=shutil.ignore_patterns("data"))
    prepare(opened(clone), "base", "base-2")
    made = files_of(clone)
    assert {name: content for name, content in made.items() if name != "data/names.txt"} == {
        name: content for name, content in after.items() if name != "data/names.txt"
    }


def test_blocks_together_are_one_source_of_all_shards(root: Path, tmp_path: Path, vit: ModelParams) -> None:
    """With the same embedder and centres, row for row, in the order of the shards."""
    arrive(root)
    blocks = opened(root)
    prepare(blocks, "base-2")
    whole_root = tmp_path / "whole"
    shutil.copytree(root / "tars", whole_root / "tars")
    whole = Project(whole_root, parse_params(content(vit)))
    shutil.copytree(blocks.embedder, whole.embedder)
    shutil.copytree(blocks.clusters("base"), whole.clusters("base"))
    for stage in (preparation.data, preparation.index, preparation.embed, preparation.assign):
        stage(whole, "base")

    def rows(project: Project, *sources: str) -> Iterator[tuple[str, str, bytes, int, int, float]]:
        for source in sources:
            index, vectors = project.load_index(source), load_vectors(project.vectors(source))
            assigned = Assignment.load(project.assignment(source))
            for row in range(len(index)):
                place = (index.path(index.file[row]), index.keys([row])[0])
                found = (int(assigned.fine[row]), int(assigned.coarse[row]), float(assigned.distance[row]))
                yield (*place, np.asarray(vectors[row]).tobytes(), *found)

    assert sorted(rows(blocks, "base", "base-2")) == [*rows(whole, "base")]


def test_shards_that_nobody_has_entered_stop_dvc_before_it_removes_anything(
    root: Path, tars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = opened(root)
    keep_sources_watch(project)
    with pytest.raises(ModeError) as caught:
        preparation.names(project)
    assert str(caught.value) == (
        "source 'base' has 1 new shard, tars/00001.tar: all of it would be made anew (`mode arrivals base` has them"
        " embedded alone; to make all of it anew, `rm -r data/shards/base` first)"
    )
    find_arrival(root, root / "params.yaml", "base", enter=False)  # the list is still there, to compare with

    for missing in ("data/shards/base", "data/vectors/base.npy"):  # as advised; and where nothing was embedded yet
        (root / missing).rename(root / "aside")
        preparation.names(project)
        (root / "aside").rename(root / missing)
    (root / "tars/00000.tar").rename(root / "tars/00003.tar")  # then all of it is made anew anyway
    preparation.names(project)
    (root / "tars/00003.tar").rename(root / "tars/00000.tar")

    arrive(root)
    capsys.readouterr()
    preparation.names(opened(root))
    assert capsys.readouterr().out == ""
    shutil.copy2(tars / "00000.tar", root / "tars/more.tar")
    preparation.names(opened(root))
    assert capsys.readouterr().out == "base: 1 new shard waits for `mode arrivals base`\n"


def test_a_source_entered_by_hand_has_its_stages_the_next_time(root: Path) -> None:
    written = yaml.safe_load((root / "params.yaml").read_text())
    written["sources"] |= {"mine": {"shards": "tars", "coarse": 1}, "drawn": {"shards": "glyphs"}}
    (root / "params.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(ModeError, match="sources 'base', 'drawn', 'mine': stages of theirs were not"):
        preparation.names(opened(root))
    watch = yaml.safe_load((root / "watch.yaml").read_text())
    assert (watch["generated"], watch["watched"]) == (["drawn"], ["base", "mine"])
    assert watch["assigned"] == {"base": "base", "mine": "mine", "drawn": "drawn"}
    (root / "tars" / SECOND[0]).unlink()
    preparation.names(opened(root))


def test_bad_arrivals_are_one_line_and_change_no_file(root: Path) -> None:
    def refused(source: str, message: str) -> None:
        before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        with pytest.raises(ModeError) as caught:
            find_arrival(root, root / "params.yaml", source)
        assert message in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before

    refused("no", "no source is called 'no'")
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("shards: tars", "shards: glyphs"))
    refused("base", "source 'base' is built in: nothing arrives in it")
    (root / "params.yaml").write_text(text)
    (root / "arrivals.json").write_text("{")
    refused("base", "arrivals.json: damaged: not JSON")
    (root / "arrivals.json").unlink()
    arrive(root)
    refused("base-2", "source 'base-2' continues 'base' (`mode arrivals base`)")
    listed = json.loads((root / "arrivals.json").read_text())
    (root / "arrivals.json").write_text(json.dumps({**listed, "base-2": ["tars/00000.tar"]}))
    refused("base", "tars/00000.tar: twice, of base and of base-2")
    (root / "arrivals.json").write_text(json.dumps({"base": listed["base"]}))
    refused("base", "no shards of 'base-2', which looks where 'base' does")
    with pytest.raises(ModeError, match="no shards of 'base-2'"):
        preparation.data(opened(root), "base-2")
    (root / "arrivals.json").write_text(json.dumps(listed))
    (root / "tars/00002.tar").write_bytes(b"another")
    refused("base", "tars/00002.tar: has changed since 'base' was indexed")
    (root / "tars/00002.tar").unlink()
    refused("base", "tars/00002.tar: gone, but a shard of 'base'")
    shutil.rmtree(root / "data/shards")
    refused("base", "source 'base' has not been listed yet")


def test_killed_anywhere_and_given_again(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "data/vectors")  # not needed, and copied often
    wanted = tmp_path / "wanted"
    shutil.copytree(root, wanted)
    arrive(wanted)
    code, step = -1, -1
    while code:
        step += 3
        again = tmp_path / f"killed-{step}"
        shutil.copytree(root, again)
        code = end_at(step, "files", KILL, lambda again=again: arrive(again))  # type: ignore[misc]
        assert code in (0, -KILL)
        if (again / "params.yaml").read_text() == (root / "params.yaml").read_text():
            arrive(again)
        for name in ("params.yaml", "watch.yaml", "arrivals.json"):
            assert (again / name).read_text() == (wanted / name).read_text()
        shutil.rmtree(again)
    assert step > 9


def test_an_update_goes_on_from_its_expert_on_new_pairs_and_some_old_ones(root: Path, tmp_path: Path) -> None:
    project = opened(root)
    train_role(SEED, project)
    train_role(EXPERT, project, "expert-1")
    old = project.model("expert-1") / "open_clip_model.safetensors"
    weights = old.read_bytes()
    arrive(root)
    prepare(opened(root), "base-2")
    assert add_updates(root, root / "params.yaml", "expert-1") == ["expert-1-v2"]
    project = opened(root)
    training = training_of(project, UPDATE, "expert-1-v2")
    plan, index = training.plan, training.index

    # A naive oracle: the new pairs of the cluster, a tenth of the others of the new shard, and as many that the expert
    # was trained on; without those of held-out images.
    base, block = project.load_index("base"), project.load_index("base-2")
    assigned = Assignment.load(project.assignment("base-2")).coarse
    keys = index.keys(plan.pairs.rows[:])
    new = {key for key in keys if key in set(block.keys(range(len(block))))}
    own = {key for key, coarse in zip(block.keys(range(len(block))), assigned.tolist(), strict=True) if coarse == 1}
    trained = {base.keys([int(row)])[0] for rows in rows_of_expert(project, "expert-1", base) for row in rows}
    expert = training_of(project, EXPERT, "expert-1").plan
    assert len(own - new) <= 9
    assert len(new - own) <= round(0.1 * (len(block) - len(own)))
    assert {*keys} - new <= trained
    assert len(keys) == len({*keys}) == min(2 * len(new), len(new) + len(expert.pairs))
    assert (plan.first_step, plan.parent) == (expert.last_step, project.model("expert-1"))
    assert plan.steps == round(expert.steps * min(1, len(keys) / len(expert.pairs)))

    assert trained_models(project) == ["seed", "expert-1"]
    train_role(UPDATE, project, "expert-1-v2")
    assert old.read_bytes() == weights
    assert trained_models(project) == ["seed", "expert-1-v2"]
    made = load_model(project.model("expert-1-v2"))
    assert (made.card["role"], made.card["parent"], made.card["cluster"]) == ("update", "expert-1", 1)
    before = load_model(project.model("expert-1"))
    assert made.card["total"]["samples_seen"] == before.card["total"]["samples_seen"] + plan.samples
    changed = [not torch.equal(made.model.state_dict()[name], each) for name, each in before.model.state_dict().items()]
    assert any(changed)
    assert not (project.checkpoints / "expert-1-v2").exists()
    again = training_of(project, UPDATE, "expert-1-v2")
    assert again.fingerprint == training.fingerprint
    shutil.rmtree(project.checkpoints / "expert-1-v2")

    export_shards(root, root / "params.yaml", "expert-1-v2", tmp_path / "out", 10_000, force=False)
    record = json.loads((tmp_path / "out/export.json").read_text())
    assert (record["pairs"], record["continues"]) == (len(keys), "expert-1")
    assert not [*(project.checkpoints).glob("**/index*")]


def test_an_update_of_an_adapter_is_an_adapter_of_the_same_seed(root: Path) -> None:
    def write(**adapter: Any) -> Project:
        written = yaml.safe_load((root / "params.yaml").read_text())
        written["training"]["adapter"] = adapter
        (root / "params.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
        return opened(root)

    project = write(rank=4, lr=0.005)
    train_role(SEED, project)
    for expert in ("expert-0", "expert-1"):
        train_role(EXPERT, project, expert)
    before = {path: path.read_bytes() for path in project.models.rglob("*") if path.is_file()}
    arrive(root)
    prepare(opened(root), "base-2")
    add_updates(root, root / "params.yaml", "expert-1")
    project = opened(root)
    plan = training_of(project, UPDATE, "expert-1-v2").plan
    assert (plan.schedule.lr, plan.schedule.start) == (0.005, plan.first_step)
    with pytest.raises(ModeError, match=r"expert-1: an adapter of rank 4, but training\.adapter asks for 2"):
        train_role(UPDATE, write(rank=2, lr=0.005), "expert-1-v2")
    assert not project.model("expert-1-v2").exists()
    project = write(rank=4, lr=0.005)
    train_role(UPDATE, project, "expert-1-v2")

    assert {path: path.read_bytes() for path in before} == before
    old, new = load_model(project.model("expert-1")), load_model(project.model("expert-1-v2"))
    assert new.adapter == old.adapter
    seed, ours = load_model(project.model("seed")).model.state_dict(), base_state(new.model)
    assert [name for name in seed if not torch.equal(seed[name], ours[name])] == ["logit_scale"]
    fixed = {"role": "update", "parent": "expert-1", "source": "base-2", "cluster": 1, "pairs": len(plan.pairs)}
    assert {key: new.card[key] for key in fixed} == fixed
    assert new.card["adapter"] == old.card["adapter"]
    assert (new.card["adapter"]["base"], new.card["adapter"]["rank"]) == ("seed", 4)
    assert new.card["total"]["samples_seen"] == old.card["total"]["samples_seen"] + plan.samples
    assert {finding.fault for finding in check_project(project, {"base-2": "base"})} == {None}

    routing.ensemble(project)
    ensemble = mode.load(project.models, device="cpu")
    assert ensemble.experts == ("expert-0", "expert-1-v2")
    assert ensemble.adapt(["white chess king", "ace of hearts"], merge="ties").clips.keys() == {"merged"}
    export_model(project.models, "expert-1-v2", root / "whole")
    assert load_model(root / "whole").adapter is None


@pytest.mark.parametrize("replay_share", [0.0, 0.5])
def test_an_update_is_looked_at_on_held_out_pairs_old_and_new(root: Path, replay_share: float) -> None:
    arrive(root)
    prepare(opened(root), "base-2")
    add_updates(root, root / "params.yaml", "expert-1")
    written = yaml.safe_load((root / "params.yaml").read_text())
    written["training"] |= {"held_out": 40, "validate": {"every": 1, "held_out": 30}}
    written["updates"]["expert-1-v2"]["replay_share"] = replay_share
    (root / "params.yaml").write_text(yaml.safe_dump(written))
    project = opened(root)
    train_role(SEED, project)
    train_role(EXPERT, project, "expert-1")

    # A naive oracle: what the seed of the random numbers holds out of each source, of what the update would be shown.
    left: dict[str, set[str]] = {}
    for source in ("base", "base-2"):
        index = project.load_index(source)
        rows = np.concatenate([*left_rows(project, source, 1, 0.1)])
        assert is_held_out(index.image[rows], 40, index.images, 0).all()
        trained = {row for block in seen_rows(project, source, 1, 0.1) for row in block.tolist()}
        assigned = Assignment.load(project.assignment(source)).coarse
        assert {*np.flatnonzero(assigned == 1).tolist()} <= trained | {*rows.tolist()}
        assert not trained & {*rows.tolist()}
        left[source] = {*index.keys(rows)}
    training = training_of(project, UPDATE, "expert-1-v2")
    keys = training.index.keys(training.plan.pairs.held_out[:])
    old, new = ([key for key in keys if key in left[source]] for source in ("base", "base-2"))
    assert {*new} == left["base-2"]
    assert len(old) == (min(len(new), len(left["base"])) if replay_share else 0)
    assert len(keys) == len(old) + len(new)
    assert not {*keys} & {*training.index.keys(training.plan.pairs.rows[:])}
    assert new

    train_role(UPDATE, project, "expert-1-v2")
    heads, *looks = (project.model("expert-1-v2") / "validation.csv").read_text().splitlines()
    assert heads == "samples,loss"
    assert len(looks) == training.plan.steps + 1
    card = load_model(project.model("expert-1-v2")).card
    run = import_mlflow().MlflowClient(database_uri(project.runs)).get_run(card["mlflow_run"])
    assert run.data.metrics["validate/loss"] == pytest.approx(float(looks[-1].partition(",")[2]), abs=1e-6)


def test_an_update_without_a_new_pair_is_one_line(root: Path) -> None:
    arrive(root)
    project = opened(root)
    prepare(project, "base-2")
    add_updates(root, root / "params.yaml", "expert-1")
    path = project.assignment("base-2")
    assigned = Assignment.load(path)
    Assignment(assigned.fine, np.zeros_like(assigned.coarse), assigned.distance).save(path)
    (root / "models/expert-1").mkdir(parents=True)
    (root / "models/expert-1/card.json").write_text(json.dumps({"steps": [1, 2]}))
    with pytest.raises(ModeError, match="expert-1-v2: no pair of 'base-2' is in cluster 1") as caught:
        training_of(opened(root), UPDATE, "expert-1-v2")
    assert len(str(caught.value).splitlines()) == 1


def test_drift_is_of_what_is_assigned(root: Path) -> None:
    assert drifts(opened(root)) == []
    arrive(root)
    assert drifts(opened(root)) == []
    project = opened(root)
    prepare(project, "base-2")
    [found] = drifts(project)
    distances = [np.sort(Assignment.load(project.assignment(source)).distance) for source in ("base", "base-2")]
    near = distances[0][int(np.ceil(0.99 * len(distances[0]))) - 1]
    assert (found.source, found.continues, found.pairs) == ("base-2", "base", len(distances[1]))
    assert found.far == int((distances[1] > near + 2**-15).sum())
    assert sum(each.new_share for each in found.clusters) == pytest.approx(1)
