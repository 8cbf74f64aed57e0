"""Where the files of a project lie: the only place that knows. Needs no parameters, and imports nothing heavy."""

from __future__ import annotations

import platform
from pathlib import Path

#: A training's checkpoint, in a folder of `checkpoints`.
CHECKPOINT = "checkpoint.safetensors"
#: In a model's folder, what its training has seen of it: losses, and what `training.validate` asks for.
CURVE, VALIDATION = "curve.csv", "validation.csv"


class RunPaths:
    """The names of all files of a run of an experiment, of which a project keeps a folder each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clone = folder / "project"
        self.commit = folder / "commit"
        self.lock = folder / "lock"
        self.log = folder / "log"
        # What stays of a run that is done.
        self.rows = folder / "rows.parquet"
        self.trainings = folder / "trainings.json"

    def kept(self, model: str) -> Path:
        """A model that another run starts from."""
        return self.folder / "kept" / model


class JobPaths:
    """The names of what a training's job of a scheduler and the process that waits for it keep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = folder / "lock"
        self.name = folder / "name"
        self.log = folder / "log"
        self.exit = folder / "exit"
        self.claim = folder / "claim"


class Paths:
    """The names of all files in a project's folder.

    Args:
        root: the folder; made absolute.
    """

    def __init__(self, root: Path) -> None:
        self.root = root = root.resolve()
        # What a person writes, and what DVC and MLflow keep beside it.
        self.params_file = root / "params.yaml"
        self.watch_file = root / "watch.yaml"
        self.version_file = root / "mode-version.yaml"
        self.leakage = root / "leakage.json"
        self.arrivals = root / "arrivals.json"
        self.dvc_file = root / "dvc.yaml"
        self.dvc_lock = root / "dvc.lock"
        self.deployments = root / "prefect.yaml"
        self.runs = root / "mlruns"
        # What stages make.
        self.data = root / "data"
        self.names = self.data / "names.txt"
        self.embedder = self.data / "embedder"
        self.tasks = self.data / "tasks"
        self.task_list = self.tasks / "tasks.json"
        self.tasks_manifest = self.data / "tasks-manifest.json"
        self.seed_manifest = self.data / "seed-manifest.json"
        self.models = root / "models"
        self.ensemble = self.models / "ensemble"
        self.checkpoints = root / "checkpoints"
        self.reports = root / "reports"
        self.metrics = self.reports / "metrics.json"
        self.page = self.reports / "index.html"
        self.model_card = self.reports / "model-card.md"
        self.figures = self.reports / "figures"
        self.plots = self.reports / "plots"
        self.experiments = root / "experiments"
        self.experiment_results = self.experiments / "results"
        self.book = root / "docs" / "paper.md"
        self.book_figures = root / "docs" / "figures" / "paper"
        self.book_page = self.reports / "paper.html"
        self.variants = self.reports / "variants.json"
        # What flows and `make ui` keep.
        self.state = root / ".mode"
        self.flow_lock = self.state / "flow.lock"
        self.page_lock = self.state / "ui.lock"
        self.cpu_locks = self.state / "locks"
        self.live_runs = self.state / "runs"
        self.order = self.state / "order.json"
        self.logs = self.state / "logs"
        self.prefect_home = self.state / "prefect"
        self.experiment_runs = self.state / "experiments"
        # What `mode plan --measure` found.
        self.rates = self.state / "rates.json"

    def shards(self, source: str) -> Path:
        return self.data / "shards" / source

    def manifest(self, source: str) -> Path:
        return self.shards(source) / "manifest.json"

    def index(self, source: str) -> Path:
        return self.data / "index" / source

    def vectors(self, source: str) -> Path:
        return self.data / "vectors" / f"{source}.npy"

    def clusters(self, source: str) -> Path:
        return self.data / "clusters" / source

    def assignment(self, source: str) -> Path:
        return self.data / "assignment" / f"{source}.parquet"

    def model(self, name: str) -> Path:
        return self.models / name

    def kept(self, name: str) -> Path:
        return self.checkpoints / name / "kept"

    def pairs(self, name: str, digest: str) -> Path:
        """The pairs of a training that is not finished, by a digest of what they were chosen from."""
        return self.checkpoints / name / f"pairs-{digest[:12]}"

    def joined_index(self, name: str, digest: str) -> Path:
        """The index of a training that is not finished and has pairs of several sources, by a digest of what it is."""
        return self.checkpoints / name / f"index-{digest[:12]}"

    def spool(self, name: str, digest: str) -> Path:
        """Images that a training under way has fetched to this machine, by a digest of the training."""
        return self.checkpoints / name / f"spool-{digest[:12]}" / platform.node()

    def pack(self, name: str, digest: str) -> Path:
        """Where the images of a training lie in its pack, by a digest of the pack."""
        return self.checkpoints / name / f"pack-{digest[:12]}"

    def training_lock(self, name: str) -> Path:
        return self.state / "trainings" / f"{name}.lock"

    def job(self, training: str) -> JobPaths:
        return JobPaths(self.state / "jobs" / training)

    def experiment(self, name: str) -> Path:
        return self.experiments / f"{name}.yaml"

    def experiment_table(self, name: str, quick: bool = False) -> Path:
        """What its runs found, with a record beside it; that of a quick try means nothing, and lies elsewhere."""
        return (self.experiment_runs / "quick" if quick else self.experiment_results) / f"{name}.parquet"

    def experiment_lock(self, name: str) -> Path:
        return self.experiment_runs / f"{name}.lock"

    def experiment_run(self, key: str) -> RunPaths:
        return RunPaths(self.experiment_runs / key)

    def kept_model(self, run: str, model: str) -> Path:
        """Where the run of this key leaves a model that another run starts from."""
        return self.experiment_run(run).kept(model)

    def all_runs(self) -> list[RunPaths]:
        """Runs of all experiments, done or not."""
        return [RunPaths(folder) for folder in sorted(self.experiment_runs.glob("*/"))]
