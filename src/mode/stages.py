"""One function per stage of dvc.yaml: reads parameters and inputs, calls the library, writes outputs.

The only place that knows where the files of a project lie. Libraries are imported inside the functions, since a stage
needs one room and the others cost seconds to import.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mode.errors import ModeError
from mode.params import ExpertParams, Params, SourceParams, TrainingParams, load_params

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mode.clustering.assignment import Assignment
    from mode.data.index import PairIndex
    from mode.engine import Engine
    from mode.evaluation.tasks import Task
    from mode.reporting.summary import Cluster
    from mode.training.plan import Role

#: The data set that needs no file of one's own.
BUILT_IN = "glyphs"
#: Groups of sources in watch.yaml.
WATCH_GROUPS = ("generated", "watched")
#: Stages that several processes can do together.
TRAININGS = ("seed", "dense", "dense-long", "expert")
#: Training images of each cluster on the page.
SAMPLE_IMAGES = 12
#: What a model card says of cost.
COST = ("samples_seen", "flops", "seconds")


@dataclass(frozen=True)
class Project:
    """A project folder, its parameters, and the names of all files in it."""

    root: Path
    params: Params

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.root.resolve())

    @property
    def embedder(self) -> Path:
        return self.root / "data" / "embedder"

    @property
    def tasks(self) -> Path:
        return self.root / "data" / "tasks"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def ensemble(self) -> Path:
        return self.models / "ensemble"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def runs(self) -> Path:
        return self.root / "mlruns"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    def shards(self, source: str) -> Path:
        return self.root / "data" / "shards" / source

    def manifest(self, source: str) -> Path:
        return self.shards(source) / "manifest.json"

    def index(self, source: str) -> Path:
        return self.root / "data" / "index" / source

    def vectors(self, source: str) -> Path:
        return self.root / "data" / "vectors" / f"{source}.npy"

    def clusters(self, source: str) -> Path:
        return self.root / "data" / "clusters" / source

    def assignment(self, source: str) -> Path:
        return self.root / "data" / "assignment" / f"{source}.parquet"

    def model(self, name: str) -> Path:
        return self.models / name

    def source(self, name: str) -> SourceParams:
        """Parameters of a source; `ModeError` names those there are."""
        if name not in self.params.sources:
            raise ModeError(f"no source is called '{name}'", f"params.yaml has: {', '.join(self.params.sources)}")
        return self.params.sources[name]

    def expert(self, name: str) -> ExpertParams:
        """Parameters of an expert; `ModeError` names those there are."""
        if name not in self.params.experts:
            raise ModeError(f"no expert is called '{name}'", f"params.yaml has: {', '.join(self.params.experts)}")
        return self.params.experts[name]

    def load_index(self, source: str) -> PairIndex:
        from mode.data.index import PairIndex

        return PairIndex.load(self.index(source))


def run_stage(name: str, key: str | None, root: Path, params: Path) -> None:
    """Run one stage of dvc.yaml.

    Raises:
        ModeError: no such stage, a key too many or too few, or anything in the stage's input that the user can mend.
    """
    if name in KEYED_STAGES:
        if key is None:
            raise ModeError(f"stage {name} needs a key", f"mode stage {name} KEY, such as `base` or `expert-0`")
    elif name not in STAGES:
        raise ModeError(f"no stage is called '{name}'", f"there are: {', '.join([*KEYED_STAGES, *STAGES])}")
    elif key is not None:
        raise ModeError(f"stage {name} takes no key, but got '{key}'")
    project = Project(root, load_params(params))
    if _in_several_processes(project, name, [name, *([key] if key else []), "--params", str(params)]):
        return
    if key is not None:
        KEYED_STAGES[name](project, key)
    else:
        STAGES[name](project)


def _in_several_processes(project: Project, name: str, arguments: list[str]) -> bool:
    """Run a training as the environment's MODE_PROCESSES says; False where this process is to do it itself.

    Raises:
        ModeError: `torchrun` started a stage that is no training: each process would do all of it.
    """
    processes = _number_from("MODE_PROCESSES") or 1
    started = "WORLD_SIZE" in os.environ  # by torchrun, or by this very function
    if started and name not in TRAININGS and os.environ["WORLD_SIZE"] != "1":
        raise ModeError(f"stage {name} is no training", f"torchrun is for {', '.join(TRAININGS)}")
    if started or processes == 1 or name not in TRAININGS:
        return False
    device = os.environ.get("MODE_DEVICE") or project.params.training.device
    if device.startswith("cuda:"):
        raise ModeError(
            f"MODE_PROCESSES: {processes} processes, but one device, {device}", "training.device: auto gives each a GPU"
        )
    from mode.data.parallel import cores
    from mode.training.launch import launch, share_threads

    share_threads(processes, _number_from("MODE_THREADS") or project.params.training.threads or cores())
    launch(processes, "mode.cli", ["stage", *arguments])
    return True


def data(project: Project, source: str) -> None:
    """Shards of a built-in source, and the manifest of any source; keeps watch.yaml in step with params.yaml."""
    from mode.data.manifest import build_manifest

    params = project.source(source)
    folder = project.shards(source)
    if params.shards == BUILT_IN:
        from mode.data.glyphs import write_glyph_shards

        write_glyph_shards(project.params.glyphs, folder, project.params.random_seed)
        where = str(folder.relative_to(project.root))
        manifest = build_manifest(SourceParams(shards=where, checksum=True), project.root)
        # DVC knows these files by their content; the time at which they were made must not make them look changed.
        manifest = replace(manifest, shards=[replace(shard, mtime_ns=0) for shard in manifest.shards])
    else:
        manifest = build_manifest(params, project.root)
    folder.mkdir(parents=True, exist_ok=True)
    manifest.save(project.manifest(source))
    _keep_watch(project, source, generated=params.shards == BUILT_IN)
    print(f"{source}: {len(manifest.shards):,} shards, {sum(shard.size for shard in manifest.shards) / 1e6:,.1f} MB")


def tasks(project: Project) -> None:
    """The built-in evaluation tasks, or a list of the given folders."""
    from mode.data.files import write_aside

    with write_aside(project.tasks) as folder:
        folder.mkdir(parents=True)
        if project.params.evaluation.tasks == BUILT_IN:
            from mode.data.glyphs import write_glyph_tasks

            write_glyph_tasks(project.params.glyphs, folder, project.params.random_seed)
            listed = sorted(child.name for child in folder.iterdir())
            where = [str((project.tasks / name).relative_to(project.root)) for name in listed]
        else:
            from mode.evaluation.tasks import open_task

            where = list(project.params.evaluation.tasks)
            for task in where:
                open_task(project.root / task)  # an unusable folder must not be noticed after the training
        write_json(folder / "tasks.json", where)
    print(f"{len(where)} tasks")


def index(project: Project, source: str) -> None:
    """One pass over the shards of a source."""
    from mode.data.index import build_index
    from mode.data.manifest import Manifest

    report = build_index(
        Manifest.load(project.manifest(source)), project.root, project.index(source), project.params.index
    )
    bad = ", ".join(f"{count} {kind}" for kind, count in sorted(report.counts.items())) or "nothing bad"
    print(f"{source}: {report.pairs:,} pairs of {report.images:,} images; {bad}")


def embedder(project: Project) -> None:
    """Fit the caption embedder, or fetch it, and keep it with the data."""
    from mode.embedding.base import build_embedder

    params = project.params.embedding
    captions = _sample_captions(project.load_index(params.fit_on), params.sample, project.params.random_seed)
    build_embedder(params, captions, project.params.random_seed).save(project.embedder)


def embed(project: Project, source: str) -> None:
    """Captions of a source to unit vectors, float16, in the index's row order."""
    from mode.embedding.base import StoredEmbedder, embed_index

    params = project.params.embedding
    here = os.environ.get("MODE_DEVICE") or params.device
    # What a scheduler of this machine gave this process says nothing about the devices of another machine's workers.
    device = params.device if "://" in _engine_setting() else here
    stored = StoredEmbedder.at(project.embedder, device, params.batch_size)
    with _engine(_gpus_for(here) if params.kind != "lsa" else 0, alone=here.startswith("cuda:")) as engine:
        embed_index(stored.open(), project.load_index(source), project.vectors(source), engine=engine, encode=stored)


def cluster(project: Project, source: str) -> None:
    """Fine and coarse clusters of a source, with the words that name them."""
    import numpy as np

    from mode.clustering.assignment import assign
    from mode.clustering.hierarchy import fit_clusters
    from mode.clustering.words import name_clusters

    vectors = np.load(project.vectors(source), mmap_mode="r")
    fine, coarse = project.params.clusters_of(source)
    clusters = fit_clusters(vectors, project.params.clustering, fine, coarse, project.params.random_seed)
    clusters = name_clusters(clusters, project.load_index(source), assign(vectors, clusters))
    clusters.save(project.clusters(source))
    for number, (size, words) in enumerate(zip(clusters.coarse_sizes, clusters.coarse_words, strict=True)):
        print(f"{source} cluster {number}: {size:,} pairs: {', '.join(words)}")


def assign(project: Project, source: str) -> None:
    """Every pair of a source to its nearest fine centre, hence to one coarse cluster."""
    import faiss

    from mode.clustering.assignment import assign_file

    with _engine(faiss.get_num_gpus()) as engine:
        assign_file(project.vectors(source), project.clusters(source), project.assignment(source), engine)


def seed(project: Project) -> None:
    """The shared, partly trained beginning of every model."""
    params = project.params.training
    _train(project, "seed", "seed", params.source, _all_rows)


def dense(project: Project) -> None:
    """The dense baseline: the seed trained on, on everything, to the last epoch."""
    _train(project, "dense", "dense", project.params.training.source, _all_rows)


def dense_long(project: Project) -> None:
    """A dense model of as many samples as seed and experts together, if `training.dense_long` asks for it."""
    params = project.params
    if not params.training.dense_long:
        project.model("dense-long").mkdir(parents=True, exist_ok=True)
        print("dense-long: not trained, training.dense_long is false")
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
    rows, _ = _rows_of_expert(project, name)
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


def _rows_of_expert(project: Project, name: str) -> tuple[NDArray[np.int64], Assignment]:
    """The pairs that an expert sees, and what they were chosen from."""
    from mode.clustering.assignment import Assignment
    from mode.training.selection import expert_rows

    params = project.expert(name)
    share = project.params.training.outside_share if params.outside_share is None else params.outside_share
    assignment = Assignment.load(project.assignment(params.source))
    return expert_rows(assignment.coarse, params.cluster, share, project.params.random_seed), assignment


def ensemble(project: Project) -> None:
    """The experts' conditions and a routing rule that is calibrated on training captions."""
    from mode.clustering.hierarchy import Clusters
    from mode.embedding.base import load_embedder
    from mode.ensemble.mixture import Mixture

    experts = project.params.experts
    sources = list(dict.fromkeys(params.source for params in experts.values()))
    clusters = {source: Clusters.load(project.clusters(source)) for source in sources}
    conditions = {name: clusters[params.source].condition(params.cluster) for name, params in experts.items()}
    routing, random_seed = project.params.routing, project.params.random_seed
    captions = [
        caption
        for source in sources
        for caption in _sample_captions(project.load_index(source), routing.calibration_captions, random_seed)
    ]
    mixture = Mixture.fit(conditions, load_embedder(project.embedder), routing, captions, random_seed)
    images = {name: _kept_images(project, name) for name in experts}
    replace(mixture, images=images).save(project.ensemble)
    temperature = f", temperature {mixture.temperature:.4g}" if mixture.temperature is not None else ""
    print(f"{len(experts)} experts, {routing.kind} routing{temperature}")


def _kept_images(project: Project, expert: str) -> NDArray[np.uint8]:
    """Some training images of an expert's cluster, for the statistics of merged models."""
    import numpy as np

    from mode.clustering.assignment import Assignment
    from mode.data.store import ImageStore
    from mode.ensemble.merge import images_to_keep

    params, index = project.expert(expert), project.load_index(project.expert(expert).source)
    image = project.params.image.model_copy(update={"crop_scale": None})
    rows = np.flatnonzero(Assignment.load(project.assignment(params.source)).coarse == params.cluster)
    rows = _without_held_out(rows, index, project.params.training.held_out, project.params.random_seed)
    count = min(len(rows), images_to_keep(len(project.params.experts), image.size))
    drawn = np.random.default_rng([project.params.random_seed, params.cluster]).choice(rows, size=count, replace=False)
    pixels, good = ImageStore(index, project.root, image, cache_mb=0, rows=drawn).load(drawn)
    kept: NDArray[np.uint8] = pixels.numpy()[good]
    return kept


def evaluate(project: Project) -> None:
    """Every model, the uniform average and the ensemble on every task."""
    from mode.reporting.summary import headline

    where = json.loads((project.tasks / "tasks.json").read_text(encoding="utf-8"))
    metrics = _evaluate(project, project.models, [project.root / task for task in where])
    write_json(project.reports / "metrics.json", metrics)
    write_json(project.reports / "summary.json", headline(metrics))


def report(project: Project) -> None:
    """Plots and the page; in MLflow each model's figures, the plots as artifacts, and the ensemble as a model."""
    from mode.data.files import write_aside
    from mode.reporting.card import model_card
    from mode.reporting.files import write_plot_data
    from mode.reporting.page import render_page
    from mode.reporting.plots import save_plots

    metrics = json.loads((project.reports / "metrics.json").read_text(encoding="utf-8"))
    metrics["provenance"] |= _lock_hash(project)
    clusters, curves = _reported_clusters(project), _curves(project)
    figures = project.reports / "figures"
    save_plots(figures, metrics, clusters, curves)
    write_plot_data(project.reports / "plots", metrics, curves)
    page = project.reports / "index.html"
    with write_aside(page) as temporary:
        temporary.write_text(render_page(metrics, clusters, curves), encoding="utf-8")
    card = project.reports / "model-card.md"
    parameters = project.params.model_dump(include={"model", "training", "embedding", "clustering", "routing"})
    with write_aside(card) as temporary:
        facts = {source: _facts(project, source) for source in dict.fromkeys(cluster.source for cluster in clusters)}
        temporary.write_text(model_card(metrics, clusters, facts, parameters), encoding="utf-8")
    _record(project, metrics, [figures, page, card])
    print(f"wrote {page.relative_to(project.root)}")


def _facts(project: Project, source: str) -> dict[str, Any]:
    """What the model card says of a source."""
    report = json.loads((project.index(source) / "report.json").read_text(encoding="utf-8"))
    return {"shards": project.source(source).shards, **{key: report[key] for key in ("images", "pairs", "bad")}}


def _lock_hash(project: Project) -> dict[str, str]:
    """What DVC recorded of everything up to the ensemble, as one hash: equal hashes are equal inputs and results."""
    import hashlib

    import yaml

    path = project.root / "dvc.lock"
    stages = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("stages", {}) if path.is_file() else {}
    upstream = {name: stage for name, stage in stages.items() if name not in ("evaluate", "report")}
    if not upstream:
        return {}
    return {"dvc_lock_sha256": hashlib.sha256(json.dumps(upstream, sort_keys=True).encode()).hexdigest()}


def _record(project: Project, metrics: dict[str, Any], artifacts: list[Path]) -> None:
    """Tell MLflow how good every model is, and register the ensemble."""
    from mode.ensemble.mixture import Mixture
    from mode.tracking import Tracker

    tracker = Tracker(project.runs)
    trained = _trained(project)
    runs = tracker.log_results(
        metrics,
        {name: card.get("mlflow_run") for name, card in _cards(project.models, trained).items()},
        params=project.params.model_dump(include={"routing", "clustering", "embedding", "random_seed"}),
        artifacts=artifacts,
    )
    needed = set(Mixture.load(project.ensemble).members(trained).values())
    folders = {name: project.model(name) for name in sorted(needed)}
    tracker.register_ensemble(project.ensemble, folders, run_id=runs.get("ensemble"))


def evaluate_folders(tasks: list[str], models: Path, params: Path, device: str) -> dict[str, Any]:
    """Figures of all models in `models` on any task folders; the schema is that of `reports/metrics.json`."""
    return _evaluate(_on_device(params, device), models, [Path(task) for task in tasks])


def evaluate_suite(suite: str, root: Path, models: Path, params: Path, device: str) -> dict[str, Any]:
    """The same on those tasks of a standard suite that lie under `root`; `suite` in the result says which are missing.

    Raises:
        ModeError: no such suite, none of its tasks is there, or one of them is damaged.
    """
    from mode.evaluation.suites import open_suite

    found = open_suite(suite, root)
    metrics = _evaluate(_on_device(params, device), models, found.tasks)
    metrics["suite"] = {"name": suite, "missing": list(found.missing)}
    return metrics


def _on_device(params: Path, device: str) -> Project:
    """The project, to be evaluated on `device`."""
    project = Project(Path.cwd(), load_params(params))
    chosen = project.params.evaluation.model_copy(update={"device": device})
    return Project(project.root, project.params.model_copy(update={"evaluation": chosen}))


def order_experts(root: Path, params: Path, task: str) -> dict[str, float]:
    """Experts by their routing weight for a task, largest first; needs the ensemble stage, and no trained expert.

    Args:
        root: of the project.
        params: its parameter file.
        task: name of one of the project's tasks, or a task folder.

    Raises:
        ModeError: no such task, or the ensemble's conditions are not there yet.
    """
    from mode.ensemble.mixture import Mixture
    from mode.evaluation.growth import training_order
    from mode.evaluation.tasks import open_task

    project = Project(root, load_params(params))
    listing = project.tasks / "tasks.json"
    listed = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else []
    folders = {Path(where).name: project.root / where for where in listed}
    folder = folders.get(task, project.root / task)
    if not folder.is_dir():
        some = ", ".join([*folders][:8]) + (", ..." if len(folders) > 8 else "")
        raise ModeError(f"no task is called '{task}'", f"a task folder, or one of: {some}" if some else "a task folder")
    weights = Mixture.load(project.ensemble).weights(open_task(folder).prompts)
    return {expert: weights[expert] for expert in training_order(weights)}


def export_shards(root: Path, params: Path, name: str, folder: Path, pairs_per_shard: int, force: bool) -> None:
    """The pairs that an expert is trained on, as webdataset tars in `folder`; see `mode.data.export`.

    Raises:
        ModeError: no such expert, its source is not assigned yet, or the folder holds something else.
    """
    from mode.data.export import export_pairs

    project = Project(root, load_params(params))
    expert = project.expert(name)
    rows, assignment = _rows_of_expert(project, name)
    about: dict[str, object] = {"expert": name, "source": expert.source, "cluster": expert.cluster}
    columns = {"fine": assignment.fine, "coarse": assignment.coarse}
    index = project.load_index(expert.source)
    shards = export_pairs(index, rows, project.root, folder, columns, about, pairs_per_shard, force)
    print(f"{name}: {len(rows):,} pairs in {shards:,} tars in {folder}")


def add_source(root: Path, params: Path, name: str, shards: str, experts: int, fine: int | None) -> list[str]:
    """Enter a source and its experts in params.yaml and watch.yaml; returns the experts' names.

    Raises:
        ModeError: the name is taken, or there are no shards; then no file is changed.
    """
    from mode import edit
    from mode.data.manifest import build_manifest

    project = Project(root, load_params(params))
    if shards != BUILT_IN:
        build_manifest(SourceParams(shards=shards), project.root)
    text, added = edit.add_source(params.read_text(encoding="utf-8"), name, shards, experts, fine)
    _replace_text(params, text)
    _keep_watch(project, name, generated=shards == BUILT_IN)
    return added


def remove_expert(root: Path, params: Path, name: str) -> None:
    """Take an expert out of params.yaml, and its model out of `models/`.

    Raises:
        ModeError: there is no such expert.
    """
    from mode import edit

    project = Project(root, load_params(params))
    text = edit.remove_expert(params.read_text(encoding="utf-8"), name)
    _replace_text(params, text)
    left = set(load_params(params).sources)
    for source in set(project.params.sources) - left:
        _keep_watch(project, source, generated=None)
    for folder in (project.model(name), project.checkpoints / name):
        shutil.rmtree(folder, ignore_errors=True)


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
    from mode.tracking import Tracker, role_of
    from mode.training.distribution import ending_together
    from mode.training.interruption import Interrupted
    from mode.training.loop import configuration_hash, train
    from mode.training.plan import make_plan

    params = project.params
    training = _on_this_machine(params.training)
    index = project.load_index(source)
    epoch_images = project.load_index(training.source).images if source != training.source else index.images
    plan = make_plan(
        role,
        name,
        _without_held_out(rows_of(index), index, training.held_out, params.random_seed),
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
        "pairs": len(plan.rows),
        "steps": plan.steps,
        "cluster": cluster,
    }
    run = Tracker(project.runs).run(
        name,
        role_of(name),
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


def _on_this_machine(training: TrainingParams) -> TrainingParams:
    """`training` with the device, and where it names none the threads, that a scheduler gave this process."""
    threads = _number_from("MODE_THREADS")
    given = {"device": os.environ.get("MODE_DEVICE"), "threads": threads if training.threads is None else None}
    return training.model_copy(update={key: value for key, value in given.items() if value})


def _number_from(variable: str) -> int | None:
    """A positive whole number from the environment; None if the variable is not set."""
    text = os.environ.get(variable)
    if text is not None and not (text.isdecimal() and int(text) > 0):
        raise ModeError(f"{variable}: '{text}' is not a whole number above 0")
    return int(text) if text else None


def _engine_setting() -> str:
    """Where blocks of very many pairs are computed. It changes no result, hence is no parameter."""
    return os.environ.get("MODE_ENGINE") or "local"


def _engine(gpus: int, alone: bool = False) -> AbstractContextManager[Engine]:
    """The engine that the environment asks for: a process per GPU, or per thread; or one (`alone`)."""
    from mode.data.parallel import cores
    from mode.engine import open_engine

    processes = 1 if alone else _number_from("MODE_THREADS") or cores()
    return open_engine(_engine_setting(), processes, gpus)


def _gpus_for(device: str) -> int:
    """GPUs to spread a neural encoder over; 0 for the CPU, or if one GPU is named."""
    import torch

    return torch.cuda.device_count() if device in ("auto", "cuda") else 0


def _all_rows(index: PairIndex) -> NDArray[np.int64]:
    import numpy as np

    return np.arange(len(index), dtype=np.int64)


def _without_held_out(rows: NDArray[np.int64], index: PairIndex, held_out: int, random_seed: int) -> NDArray[np.int64]:
    from mode.training.selection import held_out_images

    if not held_out:
        return rows
    left: NDArray[np.int64] = rows[~held_out_images(index.images, held_out, random_seed)[index.image[rows]]]
    return left


def _sample_captions(index: PairIndex, count: int, random_seed: int) -> list[str]:
    """At most `count` captions, each once, in index order."""
    import numpy as np

    if len(index) <= count:
        return [caption for block in index.iter_captions() for caption in block]
    rows = np.random.default_rng(random_seed).choice(len(index), size=count, replace=False)
    return index.captions(np.sort(rows))


def _trained(project: Project) -> list[str]:
    """Names of the models that are there, in the order of the tables."""
    names = ["seed", "dense", "dense-long", *project.params.experts]
    return [name for name in names if (project.model(name) / "card.json").is_file()]


def _cards(models: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {name: json.loads((models / name / "card.json").read_text(encoding="utf-8")) for name in names}


def _evaluate(project: Project, models: Path, tasks: Sequence[Path] | Sequence[Task]) -> dict[str, Any]:
    """Figures of all models, with what each cost and what they were made from."""
    from mode.ensemble.mixture import Mixture
    from mode.evaluation.evaluate import evaluate_tasks

    trained = [name for name in _trained(project) if (models / name).is_dir()]
    mixture = Mixture.load(models / "ensemble") if (models / "ensemble").is_dir() else None
    metrics = evaluate_tasks({name: models / name for name in trained}, mixture, tasks, project.params.evaluation)
    cards = _cards(models, trained)
    metrics["cost"] = {name: card["total"] for name, card in cards.items()}
    if mixture is not None and "seed" in cards:
        members = [cards[name]["own"] for name in mixture.experts if name in cards]
        together = {kind: cards["seed"]["total"][kind] + sum(own[kind] for own in members) for kind in COST}
        metrics["cost"] |= {"uniform": together, "ensemble": together}
    metrics["provenance"] = _provenance(project)
    return metrics


def _provenance(project: Project) -> dict[str, Any]:
    """What made the figures: commit, parameters, versions, machine."""
    import hashlib
    import platform
    import subprocess
    from importlib.metadata import version

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(project.root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    parameters = json.dumps(project.params.model_dump(mode="json"), sort_keys=True)
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no", "src", "flows")),
        "params_sha256": hashlib.sha256(parameters.encode()).hexdigest(),
        "random_seed": project.params.random_seed,
        "versions": {name: version(name) for name in ("mode-clip", "torch", "open_clip_torch")},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _reported_clusters(project: Project) -> list[Cluster]:
    """The coarse clusters of all sources that have an expert, with the map of their fine ones and sample images."""
    import numpy as np

    from mode.clustering.assignment import Assignment
    from mode.clustering.hierarchy import Clusters
    from mode.data.images import to_png
    from mode.ensemble.mixture import Mixture
    from mode.reporting.cluster_map import places
    from mode.reporting.summary import Cluster, FineCluster

    kept = Mixture.load(project.ensemble).images
    experts = {(params.source, params.cluster): name for name, params in project.params.experts.items()}
    sources = dict.fromkeys(source for source, _ in experts)
    loaded = {source: Clusters.load(project.clusters(source)) for source in sources}
    # One map for all sources: they are embedded alike.
    centres = np.concatenate([clusters.fine_centres for clusters in loaded.values()])
    where = iter(places(centres, project.params.random_seed))
    reported = []
    for source, clusters in loaded.items():
        sizes = np.bincount(Assignment.load(project.assignment(source)).coarse, minlength=len(clusters.coarse_words))
        fine: list[list[FineCluster]] = [[] for _ in clusters.coarse_words]
        for owner, size, words in zip(clusters.coarse_of_fine, clusters.fine_sizes, clusters.fine_words, strict=True):
            x, y = next(where)
            fine[owner].append(FineCluster(float(x), float(y), int(size), list(words)))
        for number, words in enumerate(clusters.coarse_words):
            expert = experts.get((source, number))
            images = [to_png(pixels) for pixels in kept.get(expert or "", [])[:SAMPLE_IMAGES]]
            reported.append(Cluster(source, number, int(sizes[number]), list(words), expert, fine[number], images))
    return reported


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


def _curves(project: Project) -> dict[str, list[tuple[float, float]]]:
    """Training loss of every model that is there: name -> (samples, loss)."""
    curves = {}
    for name in _trained(project):
        path = project.model(name) / "curve.csv"
        lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []
        curves[name] = [(float(samples), float(loss)) for samples, _, loss in (line.partition(",") for line in lines)]
    return curves


def write_json(path: Path, content: object) -> None:
    """Write JSON aside and move it into place."""
    from mode.data.files import write_aside

    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _replace_text(path: Path, text: str) -> None:
    from mode.data.files import write_aside

    with write_aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _keep_watch(project: Project, source: str, generated: bool | None) -> None:
    """Note in watch.yaml whether DVC makes this source's shards, or looks at them on every run, or (None) neither."""
    import yaml

    path = project.root / "watch.yaml"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    comment = "".join(line for line in lines if line.startswith("#"))
    content = yaml.safe_load("".join(lines)) or {}
    groups = {name: [other for other in content.get(name) or [] if other != source] for name in WATCH_GROUPS}
    if generated is not None:
        groups[WATCH_GROUPS[0 if generated else 1]].append(source)
    groups = {name: sorted(group) for name, group in groups.items()}
    if groups != content:
        _replace_text(path, comment + yaml.safe_dump(groups, sort_keys=False, default_flow_style=None))


KEYED_STAGES: dict[str, Callable[[Project, str], None]] = {
    "data": data,
    "index": index,
    "embed": embed,
    "cluster": cluster,
    "assign": assign,
    "expert": expert,
}
STAGES: dict[str, Callable[[Project], None]] = {
    "tasks": tasks,
    "embedder": embedder,
    "seed": seed,
    "dense": dense,
    "dense-long": dense_long,
    "ensemble": ensemble,
    "evaluate": evaluate,
    "report": report,
}
