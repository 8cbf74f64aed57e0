"""The trainings, and who sees which pairs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mode.errors import ModeError
from mode.files import told_of_no_room
from mode.params import load_params
from mode.processes import noting_signals
from mode.roles import DENSE_LONG, SEED, TRAINED, UPDATE, Role
from mode.stages.project import Project
from mode.stages.sources import keep_seed_watch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mode.clip.model import Clip
    from mode.data.loading.selection import Pairs
    from mode.data.shards.index import PairIndex
    from mode.params import ExpertParams, MachineParams, UpdateParams
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
        _pairs_of(project, role, key, index),
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
    index, pairs = _open_joined(project, key)
    before = sum(
        len(rows) for rows in seen_rows(project, update.replays, update.cluster, _outside_share(project, update))
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


def _open_joined(project: Project, key: str) -> tuple[PairIndex, Pairs]:
    """Index and pairs of an update, in files beside its checkpoint that the first process to come writes."""
    from mode.checksums import SEAL, content_of
    from mode.data.loading.selection import Pairs, every_row, write_pairs
    from mode.data.shards.index import PairIndex

    params, update = project.params, project.update(key)
    sources = (update.replays, update.source)
    made_from: dict[str, object] = {
        "held_out": params.training.held_out,
        "random_seed": params.random_seed,
        "cluster": update.cluster,
        "share": _outside_share(project, update),
        "replay_share": update.replay_share,
        "indexes": [content_of(project.index(source)) for source in sources],
        "assignments": [SEAL.digest_of(project.assignment(source)) for source in sources],
        "beside": "held-out pairs of both",
    }
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    joined, folder = project.joined_index(key, digest), project.pairs(key, digest)

    def make() -> None:
        trained = join_update(project, key, joined)
        index = PairIndex.load(joined)
        beside = (trained + block for block in every_row(len(index) - trained))
        # Which images are held out, only their own source says.
        write_pairs(folder, index, every_row(trained), held_out=0, random_seed=params.random_seed, beside=beside)

    _made_by_one(make, joined, folder)
    return PairIndex.load(joined), Pairs.open(folder)


#: Gives pairs of a source, a cluster and a share of the pairs outside it, in blocks: `seen_rows`, `left_rows`.
_RowsOf = Callable[["Project", str, int, float], "Iterator[NDArray[np.int64]]"]


def _of_update(project: Project, key: str, rows_of: _RowsOf) -> tuple[int, int]:
    """How many pairs of an update are old, as `replay_share` says if there are so many, and how many new."""
    update = project.update(key)
    share = _outside_share(project, update)
    old, new = (
        sum(len(rows) for rows in rows_of(project, source, update.cluster, share))
        for source in (update.replays, update.source)
    )
    return min(old, round(new * update.replay_share / (1 - update.replay_share))), new


def join_update(project: Project, key: str, out: Path) -> int:
    """Write an index of the pairs of an update: some that the expert was trained on, then those that are new.

    After them come, in the same proportion, the pairs of held-out images, which nothing is trained on.

    Returns:
        How many come before those of held-out images.

    Raises:
        ModeError: none is new, or as `rows_of_cluster`.
    """
    from mode.data.loading.selection import some_rows
    from mode.data.shards.join import join_indexes

    update = project.update(key)
    share = _outside_share(project, update)
    if not any((block == update.cluster).any() for block in _coarse_blocks(project, update.source)):
        advice = f"`mode remove-expert {key}` takes it out again"
        raise ModeError(f"{key}: no pair of '{update.source}' is in cluster {update.cluster}", advice)
    old_index, new_index = project.load_index(update.replays), project.load_index(update.source)
    parts, counts = [], []
    for rows_of in (seen_rows, left_rows):
        again, new = _of_update(project, key, rows_of)
        counts.append(again + new)
        if not new and rows_of is seen_rows:
            advice = "a smaller training.held_out"
            raise ModeError(f"{key}: all new pairs of cluster {update.cluster} are held out", advice)
        before = partial(rows_of, project, update.replays, update.cluster, share)
        parts += [
            (old_index, some_rows(before, again, project.params.random_seed)),
            (new_index, rows_of(project, update.source, update.cluster, share)),
        ]
    join_indexes(out, parts)
    return counts[0]


def seen_rows(project: Project, source: str, cluster: int, outside_share: float) -> Iterator[NDArray[np.int64]]:
    """The pairs of a source that an expert of a cluster is trained on, without those of held-out images, in blocks."""
    from mode.data.loading.selection import without_held_out

    params, index = project.params, project.load_index(source)
    rows = _rows_of_cluster(project, source, cluster, outside_share, index)
    return without_held_out(rows, index, params.training.held_out, params.random_seed)


def left_rows(project: Project, source: str, cluster: int, outside_share: float) -> Iterator[NDArray[np.int64]]:
    """Those of held-out images alone, which it would be trained on as well, were none held out."""
    from mode.data.loading.selection import only_held_out

    params, index = project.params, project.load_index(source)
    rows = _rows_of_cluster(project, source, cluster, outside_share, index)
    return only_held_out(rows, index, params.training.held_out, params.random_seed)


def _pairs_of(project: Project, role: Role, key: str | None, index: PairIndex) -> Pairs:
    """The pairs of a training, in files beside its checkpoint that the first process to come writes.

    Under torchrun that is the one that leads; the others wait for it.
    """
    from mode.checksums import SEAL, content_of
    from mode.data.loading.selection import Pairs, every_row, write_pairs

    params = project.params
    held_out, random_seed = params.training.held_out, params.random_seed
    made_from: dict[str, object] = {"held_out": held_out, "random_seed": random_seed, "index": content_of(index.folder)}
    if role.pairs == "cluster" and key is not None:
        rows = rows_of_expert(project, key, index)
        expert = project.expert(key)
        assignment = SEAL.digest_of(project.assignment(expert.source))
        made_from |= {"cluster": expert.cluster, "share": _outside_share(project, expert), "assignment": assignment}
    else:
        rows = every_row(len(index))
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    folder = project.pairs(role.model(key), digest)
    _made_by_one(lambda: write_pairs(folder, index, rows, held_out, random_seed), folder)
    return Pairs.open(folder)


def _made_by_one(make: Callable[[], None], *folders: Path) -> None:
    """See to it that folders are there: the process that leads makes them, the others wait."""
    from mode.files import is_there

    if _leads() and not all(map(is_there, folders)):
        make()
    while not all(folder.is_dir() for folder in folders):
        time.sleep(0.2)


def rows_of_expert(project: Project, name: str, index: PairIndex) -> Iterator[NDArray[np.int64]]:
    """The pairs that an expert sees, were none held out, in blocks.

    Raises:
        ModeError: the assignment is of another index, whose rows are other pairs; or, when blocks are asked for, the
            cluster is empty.
    """
    params = project.expert(name)
    return _rows_of_cluster(project, params.source, params.cluster, _outside_share(project, params), index)


def _rows_of_cluster(
    project: Project, source: str, cluster: int, outside_share: float, index: PairIndex
) -> Iterator[NDArray[np.int64]]:
    from mode.data.loading.selection import expert_rows

    _check_assignment(project, source, index)
    coarse = partial(_coarse_blocks, project, source)
    return expert_rows(coarse, cluster, outside_share, project.params.random_seed)


def _coarse_blocks(project: Project, source: str) -> Iterator[NDArray[np.int32]]:
    from mode.clustering.assignment import Assignment

    return Assignment.coarse_blocks(project.assignment(source))


def _check_assignment(project: Project, source: str, index: PairIndex) -> None:
    """Refuse an assignment of another index, whose rows are other pairs."""
    from mode.checksums import identity_of
    from mode.clustering.assignment import Assignment

    path = project.assignment(source)
    of, present = Assignment.origin(path).get("index"), identity_of(index.folder)
    if Assignment.pairs(path) != len(index) or (of and present and of != present):
        raise ModeError(f"{path}: of another index than {index.folder}", "embed and assign again")


def _outside_share(project: Project, trained: ExpertParams | UpdateParams) -> float:
    """Of the pairs outside its cluster, the share that an expert, or an update of one, sees."""
    own = trained.outside_share
    return project.params.branch.outside_share if own is None else own


def _leads() -> bool:
    """Whether this process reports and writes: under torchrun one of them does."""
    return os.environ.get("RANK", "0") == "0"


def export_shards(root: Path, params: Path, name: str, folder: Path, pairs_per_shard: int, force: bool) -> None:
    """The pairs that an expert, or an update of one, is trained on, as webdataset tars in `folder`.

    See `mode.data.shards.export`.

    Raises:
        ModeError: no such expert, its source is not assigned yet, or the folder holds something else.
    """
    from mode.clustering.assignment import Assignment
    from mode.data.shards.export import Chosen, export_pairs

    project = Project(root, load_params(params))
    if name in project.params.updates:
        _export_update(project, name, folder, pairs_per_shard, force)
        return
    expert = project.expert(name)
    index = project.load_index(expert.source)
    about: dict[str, object] = {"expert": name, "source": expert.source, "cluster": expert.cluster}

    def chosen() -> Iterator[Chosen]:
        first = 0
        assigned = Assignment.blocks(project.assignment(expert.source))
        for rows, part in zip(rows_of_expert(project, name, index), assigned, strict=True):
            yield Chosen(rows, {"fine": part.fine[rows - first], "coarse": part.coarse[rows - first]})
            first += len(part)

    pairs, shards = export_pairs(index, chosen, project.root, folder, about, pairs_per_shard, force)
    print(f"{name}: {pairs:,} pairs in {shards:,} tars in {folder}")


def _export_update(project: Project, name: str, folder: Path, pairs_per_shard: int, force: bool) -> None:
    """The same of an update: rows are those of the index of old and new pairs together."""
    from tempfile import TemporaryDirectory

    from mode.data.loading.selection import every_row
    from mode.data.shards.export import Chosen, export_pairs
    from mode.data.shards.index import PairIndex

    update = project.update(name)
    about: dict[str, object] = {"expert": name, **update.model_dump(include={"continues", "source", "cluster"})}
    project.checkpoints.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=project.checkpoints, prefix=f".{name}-") as aside:
        joined = Path(aside) / "index"
        trained = join_update(project, name, joined)
        index = PairIndex.load(joined)

        def chosen() -> Iterator[Chosen]:
            return (Chosen(rows, {}) for rows in every_row(trained))

        pairs, shards = export_pairs(index, chosen, project.root, folder, about, pairs_per_shard, force)
    print(f"{name}: {pairs:,} pairs in {shards:,} tars in {folder}")


def pack_images(root: Path, params: Path, name: str, where: str, images_per_shard: int, force: bool) -> None:
    """The images that a training uses, as tars of its own at a path or URL; see `mode.data.loading.pack`.

    Raises:
        ModeError: nothing that is trained is called so, earlier stages have not run, or something else is there.
    """
    from mode.data.loading.pack import write_pack

    project = Project(root, load_params(params))
    role, key = _role_called(project, name)
    if role is UPDATE and key is not None:
        index, pairs = _open_joined(project, key)
    else:
        index = project.load_index(project.expert(key).source if key else project.params.training.source)
        pairs = _pairs_of(project, role, key, index)
    images, tars = write_pack(name, index, pairs, project.root, where, images_per_shard, force)
    print(f"{name}: {images:,} images in {tars:,} tars in {where}")
    print(f"`machine: {{packs: {{{name}: {where}}}}}` in params.yaml has its training read them")


def _role_called(project: Project, name: str) -> tuple[Role, str | None]:
    """Role and key of the training that makes the model of a name."""
    params = project.params
    keys = {UPDATE: params.updates}
    trainings = {
        role.model(key): (role, key)
        for role in TRAINED
        for key in (keys.get(role, params.experts) if role.many else [None])
    }
    if name not in trainings:
        raise ModeError(f"no training is called '{name}'", f"there are: {', '.join(trainings)}")
    return trainings[name]


def _train(project: Project, training: Training) -> None:
    """Train one model and write its folder, with its run in MLflow and its curve of losses."""
    from mode.files import only_writer
    from mode.stages.beside import Validation, beside_training
    from mode.training.distribution import ending_together
    from mode.training.loop import Interrupted, train

    plan = training.plan
    # A checkpoint of another configuration stays beside until this training is done, in case one goes back to it.
    checkpoints = project.checkpoints / plan.name / training.fingerprint[:12]
    leads = _leads()
    copies = _copies(project.params.machine, training) if leads else None
    lock = only_writer(project.training_lock(plan.name), f"models/{plan.name}") if leads else nullcontext()
    with ExitStack() as until_it_ends, lock, ending_together():
        if leads:
            _find_checkpoint(plan.name, checkpoints, copies)
        checkpoints.mkdir(parents=True, exist_ok=True)
        record = _Record(project, training, checkpoints)
        looks = checkpoints / "validation.jsonl"
        beside = beside_training(project, training, looks, record.run.log, leads)
        with record.run if leads else nullcontext():
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
                )
            except Interrupted as interrupted:
                until_it_ends.enter_context(noting_signals())  # told once more, it goes on ending
                if leads:
                    print(interrupted, file=sys.stderr)
                sys.exit(interrupted.exit_code)
            if leads:
                _mix_with_seed(project, training, result.clip)
                result.clip.card["mlflow_run"] = record.run.run_id
                if doubt := result.clip.card["doubt"]:
                    print(f"warning: {doubt}", file=sys.stderr)
            tables = {"curve.csv": record.curve} if leads else {}
            for each in beside:
                if leads and isinstance(each, Validation):
                    tables["validation.csv"] = each.table()
            result.save(project.model(plan.name), tables)
        if leads:
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
    _made_by_one(lambda: fetch_table(where, project.root, index, pairs, record, folder), folder)
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
        raise ModeError(f"{training.plan.name}: none of its pairs is held out", "a larger training.held_out")
    held_out = HeldOut(training, pairs, project.root)
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
        self._losses, self._noted_run = checkpoints / "curve.csv", checkpoints / "mlflow_run"
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
