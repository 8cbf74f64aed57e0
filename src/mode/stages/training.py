"""The trainings."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mode.errors import ModeError
from mode.files import told_of_no_room
from mode.paths import CURVE, VALIDATION
from mode.processes import before_ending, leads, noting_signals
from mode.roles import DENSE_LONG, SEED, UPDATE, Role
from mode.stages.machine import made_by_one
from mode.stages.pairs import open_joined, outside_share, pairs_of, seen_rows
from mode.stages.project import Project
from mode.stages.sources import keep_seed_watch

if TYPE_CHECKING:
    from mode.clip.model import Clip
    from mode.params import MachineParams
    from mode.training.batches import Images
    from mode.training.plan import Training
    from mode.training.remote import RemoteCheckpoints


def train_role(role: Role, project: Project, key: str | None = None) -> None:
    """Train the model of a role (where there are many, the one of this key), from its checkpoint if there is one."""
    if role is DENSE_LONG and not project.params.baselines.dense_long:
        project.model(role.name).mkdir(parents=True, exist_ok=True)
        print(f"{role.name}: not trained, baselines.dense_long is false")
        return
    if role is SEED:
        keep_seed_watch(project)
    if role is SEED and project.params.seed.pretrained:
        _take_seed(project)
        return
    _train(project, training_of(project, role, key))


def _take_seed(project: Project) -> None:
    """Make a pretrained model the seed: its folder is like that of one that was trained here, at no cost here."""
    from mode.clip.model import save_sealed
    from mode.clip.pretrained import given_card, open_seed
    from mode.files import only_writer
    from mode.tracking.runs import Tracker

    params = project.params
    with only_writer(project.training_lock(SEED.name), f"models/{SEED.name}"):
        clip, origin = open_seed(params.seed, project.root, params.image)
        card = given_card(clip, origin)
        with Tracker(project.runs).run(SEED.name, SEED.kind, params={"seed": card["origin"]}) as run:
            card["mlflow_run"] = run.run_id
        save_sealed(project.model(SEED.name), clip, card)
    licence = f", licence {origin.licence}" if origin.licence else ""
    print(f"seed: {origin.name}, {card['parameters']:,} parameters of {origin.weights}{licence}")


def training_of(project: Project, role: Role, key: str | None = None) -> Training:
    """What params.yaml and the files of earlier stages make of a role; where there are many, of the expert `key`.

    Only the sections of params.yaml that dvc.yaml gives a training are read here. The files of its pairs are written,
    unless they are there.
    """
    from mode.clip.configuration import image_of_folder
    from mode.training.plan import Training, make_plan

    if role is UPDATE and key is not None:
        return _update_of(project, key)
    params, recipe = project.params, project.params.training
    expert = project.expert(key) if key is not None else None
    parent = project.model(role.parent) if role.parent else None
    source = expert.source if expert else recipe.source
    index = project.load_index(source)
    images = index.images if source == recipe.source else project.load_index(recipe.source).images
    plan = make_plan(
        role,
        pairs_of(project, role, key, index),
        recipe,
        images,
        key=key,
        expert=expert,
        # As many as the first source has clusters: an expert that is added, removed or given epochs of its own later
        # must not make this model out of date.
        experts=params.coarse_of(source) if role.length == "total" else 0,
        parent=parent,
    )
    image = params.image if parent is None else image_of_folder(parent, params.image)
    return Training(plan, index, params.model, image, recipe, params.random_seed)


def _update_of(project: Project, key: str) -> Training:
    """`training_of` an update: on an index of its own, which has pairs of two sources."""
    from mode.clip.configuration import image_of_folder
    from mode.clip.folder import base_of
    from mode.stages.project import cards_of
    from mode.training.plan import Training, make_plan

    params, update = project.params, project.update(key)
    parent = project.model(update.continues)
    card = cards_of(project.models, [update.continues])[update.continues]
    index, pairs = open_joined(project, key)
    before = sum(
        len(rows) for rows in seen_rows(project, update.replays, update.cluster, outside_share(project, update))
    )
    images = project.load_index(params.training.source).images
    plan = make_plan(
        UPDATE,
        pairs,
        params.training,
        images,
        key=key,
        expert=update,
        parent=parent,
        begins=int(card["steps"][1]),
        share=len(pairs) / before,
    )
    image = image_of_folder(base_of(parent) or parent, params.image)  # an adapter's is its base's
    return Training(plan, index, params.model, image, params.training, params.random_seed)


def _train(project: Project, training: Training) -> None:
    """Train one model and write its folder, with its run in MLflow and its curve of losses."""
    from mode.files import only_writer
    from mode.stages.beside import Validation, beside_training
    from mode.tracking.runs import FAREWELL_SECONDS
    from mode.training.distribution import ending_together
    from mode.training.loop import Interrupted, train

    plan = training.plan
    # A checkpoint of another configuration stays beside until this training is done, in case one goes back to it.
    checkpoints = project.checkpoints / plan.name / training.fingerprint[:12]
    leading = leads()
    copies = _copies(project.params.machine, training) if leading else None
    lock = only_writer(project.training_lock(plan.name), f"models/{plan.name}") if leading else nullcontext()
    with ExitStack() as until_it_ends, lock, ending_together():
        if leading:
            _find_checkpoint(plan.name, checkpoints, copies)
        checkpoints.mkdir(parents=True, exist_ok=True)
        record = _Record(project, training, checkpoints)
        looks = checkpoints / "validation.jsonl"
        beside = beside_training(project, training, looks, record.run.log, leading)
        with before_ending(record.run.settle, FAREWELL_SECONDS), record.run if leading else nullcontext():
            try:
                machine = project.params.machine
                result = train(
                    training,
                    project.root,
                    machine,
                    checkpoints,
                    record.add,
                    beside=beside,
                    copies=copies,
                    images=_images(project, training),
                    keep_last=True,
                )
            except Interrupted as interrupted:
                until_it_ends.enter_context(noting_signals())  # told once more, it goes on ending
                if leading:
                    print(interrupted, file=sys.stderr)
                sys.exit(interrupted.exit_code)
            if leading:
                _mix_with_seed(project, training, result.clip)
                result.clip.card["mlflow_run"] = record.run.run_id
                if doubt := result.clip.card["doubt"]:
                    print(f"warning: {doubt}", file=sys.stderr)
            tables = {CURVE: record.curve} if leading else {}
            for each in beside:
                if leading and isinstance(each, Validation):
                    tables[VALIDATION] = each.table()
            result.save(project.model(plan.name), tables)
        if leading:
            _remove_checkpoints(project, plan.name)
        if copies is not None:
            copies.clear()


def _images(project: Project, training: Training) -> Images:
    """Where a training on this machine has its images from."""
    from mode.data.loading.pack import Pack, fetch_table, read_record
    from mode.training.batches import Images

    name, index, pairs = training.plan.name, training.index, training.plan.pairs
    spool = project.spool(name, training.fingerprint)
    where = project.params.machine.packs.get(name)
    if where is None:
        return Images(spool=spool)
    record = read_record(where, project.root, index, pairs)
    digest = hashlib.sha256(json.dumps([where, record], sort_keys=True).encode()).hexdigest()
    folder = project.pack(name, digest)
    made_by_one(lambda: fetch_table(where, project.root, index, pairs, record, folder), folder)
    return Images(Pack(folder, index), spool)


def _copies(machine: MachineParams, training: Training) -> RemoteCheckpoints | None:
    """The copies of a training's checkpoints that outlive this machine, if they are asked for."""
    from mode.training.remote import RemoteCheckpoints

    if machine.checkpoint_url is None:
        return None
    minutes, keep = machine.checkpoint_url_minutes, machine.checkpoint_url_keep
    return RemoteCheckpoints(machine.checkpoint_url, training.plan.name, training.fingerprint, minutes, keep)


def _find_checkpoint(name: str, checkpoints: Path, copies: RemoteCheckpoints | None) -> None:
    """Say that a training has a checkpoint; where it has none here, bring the newest copy.

    Other processes of the training look for a checkpoint when this one has joined them, and find it then.
    """
    if any(checkpoints.glob("*.safetensors")):
        print(f"{name} goes on from its checkpoint", flush=True)
        if copies is not None:
            copies.catch_up()
    elif copies is not None and (step := copies.fetch(checkpoints)) is not None:
        print(f"{name} goes on from the copy of its checkpoint at step {step:,} in {copies.url}", flush=True)


def _mix_with_seed(project: Project, training: Training, clip: Clip) -> None:
    """Mix a trained model with its seed, as `training.seed_share` says; its card tells by how much, and why."""
    from mode.clip.model import load_model
    from mode.data.loading.selection import held_out_pairs
    from mode.training.beside import HeldOut
    from mode.training.mixing import best_share, mix

    recipe, parent = training.recipe, training.plan.parent
    if not recipe.seed_share or parent is None or training.plan.role is UPDATE:  # which goes on from a mixed one
        return
    seed = load_model(parent).model.state_dict()
    if recipe.seed_share != "held-out":
        clip.model.load_state_dict(mix(clip.model.state_dict(), seed, recipe.seed_share))
        clip.card["seed_share"] = recipe.seed_share
        return
    pairs = held_out_pairs(training.plan.pairs, training.index.image, recipe.held_out, training.random_seed)
    if not len(pairs):
        raise ModeError(f"{training.plan.name}: none of its pairs is held out", "raise training.held_out")
    held_out = HeldOut(training, pairs, project.root)
    if not held_out:
        raise ModeError(
            f"{training.plan.name}: no image of its held-out pairs can be decoded", "raise training.held_out"
        )
    share, losses = best_share(clip.model, seed, lambda: held_out.loss(clip, project.params.machine.inference_batch))
    clip.card |= {"seed_share": share, "held_out_losses": {f"{share:g}": loss for share, loss in losses.items()}}
    print(f"{training.plan.name}: {share:.0%} of the seed in it, by the loss on {len(held_out):,} held-out pairs")


def _remove_checkpoints(project: Project, name: str) -> None:
    """Remove what a finished training leaves, but for the models that it was asked to keep."""
    folder = project.checkpoints / name
    if not project.kept(name).is_dir():
        shutil.rmtree(folder)
        return
    for child in folder.iterdir():
        if child != project.kept(name):
            shutil.rmtree(child)


class _Record:
    """A training's figures, in MLflow and in a file; what it needs to go on with both lies beside the checkpoint.

    Attributes:
        run: in MLflow; the one of the interrupted training where there was one.
    """

    def __init__(self, project: Project, training: Training, checkpoints: Path) -> None:
        from mode.tracking.runs import Tracker

        plan = training.plan
        self._batch_size = plan.batch_size
        self._losses, self._noted_run = checkpoints / CURVE, checkpoints / "mlflow_run"
        own = {"pairs": len(plan.pairs), "steps": plan.steps, "cluster": plan.cluster}
        self.run = Tracker(project.runs).run(
            plan.name,
            plan.role.kind,
            expert=plan.name if plan.role.kind == "expert" else None,
            source=plan.source,
            params={**training.parameters, "machine": project.params.machine.model_dump(), **own},
            run_id=self._noted_run.read_text(encoding="utf-8") if self._noted_run.is_file() else None,
        )

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Figures of the last steps up to `step`."""
        samples = step * self._batch_size
        with told_of_no_room(self._losses), self._losses.open("a", encoding="utf-8") as file:
            file.write(f"{samples},{figures['train/loss']:.6f}\n")
        self.run.log(samples, figures)
        if self.run.header.run_id and not self._noted_run.is_file():
            self._noted_run.write_text(self.run.header.run_id, encoding="utf-8")

    @property
    def curve(self) -> str:
        """Loss over samples as csv; of a part that was trained twice after a crash the last one counts."""
        lines = self._losses.read_text(encoding="utf-8").splitlines() if self._losses.is_file() else []
        points = {int(samples): loss for samples, _, loss in (line.partition(",") for line in lines)}
        return "\n".join(["samples,loss", *(f"{samples},{loss}" for samples, loss in sorted(points.items()))]) + "\n"
