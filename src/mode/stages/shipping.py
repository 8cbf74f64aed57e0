"""What a training uses, written for elsewhere: an expert's pairs as tars, a training's images as its pack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mode.errors import ModeError
from mode.params import load_params
from mode.roles import UPDATE, Role
from mode.stages.pairs import join_update, open_joined, pairs_of, rows_of_expert
from mode.stages.project import Project


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
        index, pairs = open_joined(project, key)
    else:
        index = project.load_index(project.expert(key).source if key else project.params.training.source)
        pairs = pairs_of(project, role, key, index)
    images, tars = write_pack(name, index, pairs, project.root, where, images_per_shard, force)
    print(f"{name}: {images:,} images in {tars:,} tars in {where}")
    print(f"`machine: {{packs: {{{name}: {where}}}}}` in params.yaml has its training read them")


def _role_called(project: Project, name: str) -> tuple[Role, str | None]:
    """Role and key of the training that makes the model of a name."""
    trainings = {role.model(key): (role, key) for role, key in project.params.trainings}
    if name not in trainings:
        raise ModeError(f"no training is called '{name}'", f"there are: {', '.join(trainings)}")
    return trainings[name]
