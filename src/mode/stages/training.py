"""The trainings, and who sees which pairs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mode.params import load_params
from mode.stages.project import Project

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mode.clustering.assignment import Assignment
    from mode.data.shards.index import PairIndex
    from mode.training.plan import Role


def seed(project: Project) -> None:
    """The shared, partly trained beginning of every model."""
    params = project.params.training
    _train(project, "seed", "seed", params.source, _all_rows)


def dense(project: Project) -> None:
    """The dense baseline: the seed trained on, on everything, to the last epoch."""
    _train(project, "dense", "dense", project.params.training.source, _all_rows)


def dense_long(project: Project) -> None:
    """A dense model of as many samples as seed and experts together, if `baselines.dense_long` asks for it."""
    params = project.params
    if not params.baselines.dense_long:
        project.model("dense-long").mkdir(parents=True, exist_ok=True)
        print("dense-long: not trained, baselines.dense_long is false")
        return
    _train(
        project,
        "dense-long",
        "dense-long",
        params.training.source,
        _all_rows,
        # One expert per cluster of the first source, each of the common length: an expert that is added, removed or
        # given epochs of its own later must not make this model out of date.
        expert_epochs=[None] * params.clusters_of(params.training.source)[1],
    )


def expert(project: Project, name: str) -> None:
    """One data expert: from the seed, on its cluster."""
    params = project.expert(name)
    rows, _ = rows_of_expert(project, name)
    _train(
        project,
        "expert",
        name,
        params.source,
        lambda _index: rows,
        cluster=params.cluster,
        epochs=params.epochs,
        lr=params.lr,
    )


def rows_of_expert(project: Project, name: str) -> tuple[NDArray[np.int64], Assignment]:
    """The pairs that an expert sees, and what they were chosen from."""
    from mode.clustering.assignment import Assignment
    from mode.data.loading.selection import expert_rows

    params = project.expert(name)
    share = project.params.branch.outside_share if params.outside_share is None else params.outside_share
    assignment = Assignment.load(project.assignment(params.source))
    return expert_rows(assignment.coarse, params.cluster, share, project.params.random_seed), assignment


def export_shards(root: Path, params: Path, name: str, folder: Path, pairs_per_shard: int, force: bool) -> None:
    """The pairs that an expert is trained on, as webdataset tars in `folder`; see `mode.data.shards.export`.

    Raises:
        ModeError: no such expert, its source is not assigned yet, or the folder holds something else.
    """
    from mode.data.shards.export import export_pairs

    project = Project(root, load_params(params))
    expert = project.expert(name)
    rows, assignment = rows_of_expert(project, name)
    about: dict[str, object] = {"expert": name, "source": expert.source, "cluster": expert.cluster}
    columns = {"fine": assignment.fine, "coarse": assignment.coarse}
    index = project.load_index(expert.source)
    shards = export_pairs(index, rows, project.root, folder, columns, about, pairs_per_shard, force)
    print(f"{name}: {len(rows):,} pairs in {shards:,} tars in {folder}")


def _train(
    project: Project,
    role: Role,
    name: str,
    source: str,
    rows_of: Callable[[PairIndex], NDArray[np.int64]],
    *,
    cluster: int | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    expert_epochs: Sequence[int | None] = (),
) -> None:
    """Train one model, from its last checkpoint if there is one, with its run in MLflow."""
    from mode.data.loading.selection import without_held_out
    from mode.roles import role_of
    from mode.tracking.runs import Tracker
    from mode.training.distribution import ending_together
    from mode.training.interruption import Interrupted
    from mode.training.loop import configuration_hash, train
    from mode.training.plan import make_plan

    params = project.params
    training = params.training
    index = project.load_index(source)
    epoch_images = project.load_index(training.source).images if source != training.source else index.images
    plan = make_plan(
        role,
        name,
        without_held_out(rows_of(index), index.image, training.held_out, params.random_seed),
        training,
        epoch_images,
        source=source,
        cluster=cluster,
        parent=None if role == "seed" else project.model("seed"),
        epochs=epochs,
        lr=lr,
        expert_epochs=expert_epochs,
    )
    # A checkpoint of another configuration stays beside until this training is done, in case one goes back to it.
    configuration = configuration_hash(plan, index, params.model, params.image, training, params.random_seed)
    checkpoints = project.checkpoints / name / configuration[:12]
    curve = _Curve(checkpoints / "curve.csv")
    noted_run = checkpoints / "mlflow_run"
    leads = os.environ.get("RANK", "0") == "0"  # under torchrun, the process that reports and writes
    if leads and any(checkpoints.glob("*.safetensors")):
        print(f"{name} goes on from its checkpoint", flush=True)
    checkpoints.mkdir(parents=True, exist_ok=True)
    tracked: dict[str, object] = {
        **params.model_dump(include={"random_seed", "image", "model"}),
        "training": training.model_dump(),
        "machine": params.machine.model_dump(),
        "pairs": len(plan.rows),
        "steps": plan.steps,
        "cluster": cluster,
    }
    run = Tracker(project.runs).run(
        name,
        role_of(name).kind,
        expert=name if role == "expert" else None,
        source=source,
        params=tracked,
        run_id=noted_run.read_text(encoding="utf-8") if noted_run.is_file() else None,
    )

    def on_metrics(step: int, figures: dict[str, float]) -> None:
        curve.add(step * plan.batch_size, figures["train/loss"])
        run.log(step * plan.batch_size, figures)
        if run.header.run_id and not noted_run.is_file():
            noted_run.write_text(run.header.run_id, encoding="utf-8")

    with ending_together():
        with run if leads else nullcontext():
            try:
                result = train(
                    plan,
                    index,
                    project.root,
                    model=params.model,
                    image=params.image,
                    training=training,
                    machine=params.machine,
                    random_seed=params.random_seed,
                    checkpoint_dir=checkpoints,
                    on_metrics=on_metrics,
                )
            except Interrupted as interrupted:
                if leads:
                    print(interrupted, file=sys.stderr)
                sys.exit(interrupted.exit_code)
            if leads:
                result.clip.card["mlflow_run"] = run.run_id
            result.save(project.model(name))
        if leads:
            curve.move_to(project.model(name) / "curve.csv")
            shutil.rmtree(project.checkpoints / name)


def _all_rows(index: PairIndex) -> NDArray[np.int64]:
    import numpy as np

    return np.arange(len(index), dtype=np.int64)


class _Curve:
    """Training loss over samples, kept beside the checkpoint so that it survives an interruption."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, samples: int, loss: float) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{samples},{loss:.6f}\n")

    def move_to(self, path: Path) -> None:
        """Write the curve with a header; of a part that was trained twice after a crash the last one counts."""
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        points = {int(samples): loss for samples, _, loss in (line.partition(",") for line in lines)}
        rows = [f"{samples},{loss}" for samples, loss in sorted(points.items())]
        path.write_text("\n".join(["samples,loss", *rows]) + "\n", encoding="utf-8")
