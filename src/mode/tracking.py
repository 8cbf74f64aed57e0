"""MLflow: one run per model, the same metric names for every role, the ensemble as a registered model.

The only module that knows MLflow, and it imports it late, for that takes seconds. Everything lies in one folder::

    mlruns/mlflow.db     SQLite database (MLflow's plain file store is no longer maintained)
    mlruns/artifacts/    figures, reports, registered models
    mlruns/pending/      metrics that are not in the database yet: one journal per run in progress

A training must never fail or stall because of its bookkeeping. So `Run.log` only appends a line to the run's journal,
and a thread carries the journal into the database in batches. If the database is locked, the training goes on; what
is still in the journal when the process ends, killed or not, is sent the next time anyone opens the tracker.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import math
import os
import re
import sqlite3
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from filelock import FileLock, Timeout

from mode.data.files import sha256_of
from mode.errors import ModeError

Role = Literal["seed", "dense", "expert", "ensemble"]
Result = TypeVar("Result")

#: MLflow's limits for one `log_batch` call.
METRICS_PER_BATCH, ENTRIES_PER_BATCH = 1_000, 100
#: MLflow's limit for one parameter's value, in characters.
PARAM_LENGTH = 6_000
#: Seconds that the last flush of a cancelled run may take: a cancelled training has to be gone soon.
FAREWELL_SECONDS = 3.0
REGISTERED_MODEL, CHAMPION = "mode-ensemble", "champion"
#: What the registered model needs wherever it is served, at the versions of here.
SERVING = ("mlflow", "torch", "torchvision", "open_clip_torch", "transformers", "scikit-learn", "pydantic", "pandas")
#: A request that the registered model comes with: one pixel, in PNG.
EXAMPLE: dict[str, Any] = {
    "image": "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC",
    "classes": ["white", "black"],
    "templates": ["{c}"],
}

#: What a run's page says of its role.
ROLE_NOTES: dict[Role, str] = {
    "seed": "The dense model that every expert and every dense baseline continues from.",
    "dense": "A dense baseline: continues from the seed on all pairs. `dense-long` sees as many samples as seed and all"
    " experts together.",
    "expert": "A data expert: continues from the seed on one cluster of pairs, and a few from outside it.",
    "ensemble": "The experts together: `ensemble` weighs them per task by the words of its classes, `uniform` all"
    " alike, as a control.",
}
MODEL_NOTE = "A mixture of CLIP data experts as one zero-shot classifier; the classes' names weigh the experts."

log = logging.getLogger(__name__)

EXPERIMENT_NOTE = """\
One run per model. The tag **role** tells them apart: `seed`, `dense` (also `dense-long`), `expert` (which one: tag
**expert**; trained on which data: tag **source**) and `ensemble` (also `uniform`, the control for routing).
All have the same metric names, so one table compares them: sort by `zeroshot/mean`, group by `role`, and keep
`cost/flops` beside it. Filter example: `tags.role = 'expert'`.
"""


#: A saved view of the experiment's page: all models by accuracy, grouped by role, with what they cost beside it.
#: MLflow keeps such views as JSON in tags of the experiment; `viewStateShareKey` in an address opens one.
VIEW_KEY = "mode"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"
COMPARISON_VIEW: dict[str, Any] = {
    "orderByKey": "metrics.`zeroshot/mean`",
    "orderByAsc": False,
    "selectedColumns": [
        "metrics.`zeroshot/mean`",
        "metrics.`cost/samples_seen`",
        "metrics.`train/loss`",
    ],
    "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "role"}]},
}


def role_of(model: str) -> Role:
    """The role of a model by its name in `metrics.json`; any name that is not reserved is an expert's.

    >>> role_of("dense-long"), role_of("uniform"), role_of("expert-3")
    ('dense', 'ensemble', 'expert')
    """
    roles: dict[str, Role] = {
        "seed": "seed",
        "dense": "dense",
        "dense-long": "dense",
        "uniform": "ensemble",
        "ensemble": "ensemble",
    }
    return roles.get(model, "expert")


def metric_name(name: str) -> str:
    """`name` as MLflow allows it: letters, digits, `_ - . : /` and spaces.

    >>> metric_name("retrieval/flickr8k/image_recall@10")
    'retrieval/flickr8k/image_recall_at_10'
    """
    return re.sub(r"[^/\w.\- :]", "_", name.replace("@", "_at_")).strip("/") or "_"


def metrics_of(results: Mapping[str, Any], model: str) -> dict[str, float]:
    """One model's figures in `metrics.json`, flat, under the names that MLflow shows.

    Returns:
        `zeroshot/mean`, `zeroshot/<task>`, `retrieval/<task>/<metric>`, `cost/<kind>` and, for an expert,
        `routing/<task>` (the weight it got); those that the results have.
    """
    flat: dict[str, Any] = {}
    zeroshot = results.get("zeroshot", {})
    flat["zeroshot/mean"] = zeroshot.get("mean", {}).get(model)
    for task, accuracy in zeroshot.get("tasks", {}).items():
        flat[f"zeroshot/{task}"] = accuracy.get(model)
    for task, figures in results.get("retrieval", {}).get("tasks", {}).items():
        flat |= {f"retrieval/{task}/{name}": value for name, value in figures.get(model, {}).items()}
    for task, weights in results.get("routing", {}).items():
        flat[f"routing/{task}"] = weights.get(model)
    flat |= {f"cost/{kind}": value for kind, value in results.get("cost", {}).get(model, {}).items()}
    return {
        metric_name(name): float(value)
        for name, value in flat.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def models_in(results: Mapping[str, Any]) -> list[str]:
    """Every model that `metrics.json` has a figure for, in the order in which they first appear."""
    zeroshot, retrieval = results.get("zeroshot", {}), results.get("retrieval", {})
    tables = [
        zeroshot.get("mean", {}),
        *zeroshot.get("tasks", {}).values(),
        *retrieval.get("tasks", {}).values(),
        results.get("cost", {}),
    ]
    return list(dict.fromkeys(model for table in tables for model in table))


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        names: of the two runs.
        runs: their ids.
        params: parameters in which they differ; `None` where a run has no such parameter.
        metrics: latest value of every metric that either has; `None` where a run has none.
    """

    names: tuple[str, str]
    runs: tuple[str, str]
    params: dict[str, tuple[str | None, str | None]]
    metrics: dict[str, tuple[float | None, float | None]]


class Tracker:
    """The project's MLflow database and artifacts.

    Args:
        folder: where both lie; made if missing.
        experiment: MLflow experiment that holds the runs.
        flush_seconds: time between two batches of a run in progress.
        patience: seconds to wait for a locked database where waiting is all there is to do (at the end of a run).

    Example:
        >>> tracker = Tracker(Path("mlruns"))                                       # doctest: +SKIP
        >>> with tracker.run("expert-0", role="expert", expert="expert-0") as run:  # doctest: +SKIP
        ...     run.log(128, {"train/loss": 4.1})
    """

    def __init__(
        self, folder: Path, experiment: str = "mode", *, flush_seconds: float = 10.0, patience: float = 300.0
    ) -> None:
        self.folder = folder.absolute()
        self.experiment = experiment
        self.flush_seconds = flush_seconds
        self.patience = patience

    @property
    def uri(self) -> str:
        """MLflow's tracking (and registry) address of the database."""
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def pending(self) -> Path:
        """The folder of journals."""
        return self.folder / "pending"

    def prepare(self) -> None:
        """Create database and experiment, and send what earlier, killed runs have left behind.

        Call it once before models are trained side by side: processes that open a fresh database at once collide.

        Raises:
            ModeError: the database stayed locked for longer than `patience`, or the folder cannot be written.
        """
        self._patiently(lambda: self._store, "open the database")
        self.send_pending()

    def run(
        self,
        name: str,
        role: Role,
        *,
        expert: str | None = None,
        source: str | None = None,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
        description: str = "",
        run_id: str | None = None,
    ) -> Run:
        """A run, to be used as a context.

        Its status becomes FINISHED, FAILED (an exception) or KILLED (Ctrl-C, SIGTERM turned into `SystemExit`).

        Args:
            name: the model's, as in `metrics.json`.
            role: what it is to the method; a tag.
            expert, source: which expert, trained on which source; tags.
            params: nested dictionaries are flattened (`training.lr`).
            tags: more of them.
            description: Markdown for the run's page; default what its role means.
            run_id: continue this run: steps that it has already are dropped, and a parameter that differs from what
                it was is noted in a tag. A run that is no longer there is replaced by a new one.
        """
        own = {"role": role, "model": name, "expert": expert, "source": source, **(tags or {})}
        header = Header(
            name=name,
            tags={key: value for key, value in own.items() if value},
            params={key: str(value)[:PARAM_LENGTH] for key, value in flatten(params or {}).items()},
            description=description or ROLE_NOTES[role],
            run_id=run_id,
        )
        return Run(self, header)

    def log_results(
        self,
        results: Mapping[str, Any],
        runs: Mapping[str, str | None],
        *,
        params: Mapping[str, object] | None = None,
        descriptions: Mapping[str, str] | None = None,
        artifacts: Iterable[Path] = (),
    ) -> dict[str, str | None]:
        """Add evaluation and cost to every model's run.

        Ensembles are not trained, so they get a run here; the same evaluation of the same experts finds it again.
        A value that a run has already is not logged twice.

        Args:
            results: the content of `metrics.json`.
            runs: run id of each trained model (its `card.json` says); `None`: it gets a new run. A model that is not in
                here means its latest run.
            params: for the runs of ensembles.
            descriptions: Markdown per model.
            artifacts: files and folders for the run of `ensemble`: figures and the report.

        Returns:
            Run id of every model in `results`; `None` for one whose figures wait in a journal.
        """
        trained = {model: role_of(model) for model in models_in(results) if role_of(model) != "ensemble"}
        known = {model: runs[model] if model in runs else self._latest({"model": model}) for model in trained}
        experts = {model: known[model] for model, role in trained.items() if role == "expert"}
        identity = hashlib.sha256(json.dumps(experts, sort_keys=True).encode()).hexdigest()[:16]
        ids: dict[str, str | None] = {}
        for model in models_in(results):
            role = role_of(model)
            run_id = known[model] if model in known else self._latest({"model": model, "members": identity})
            run = self.run(
                model,
                role,
                expert=model if role == "expert" else None,
                params=params if role == "ensemble" else None,
                tags={"members": identity} if role == "ensemble" else None,
                description=(descriptions or {}).get(model, ""),
                run_id=run_id,
            )
            run.header.results = True
            with run:
                run.log(0, metrics_of(results, model))
            ids[model] = run.run_id
        if ids.get("ensemble"):
            self.log_artifacts(str(ids["ensemble"]), artifacts)
        return ids

    def log_artifacts(self, run_id: str, paths: Iterable[Path]) -> None:
        """Copy files and folders to a run. Raises `ModeError` as `prepare` does."""
        client = self._store.client
        for path in paths:
            if path.is_dir():
                action = partial(client.log_artifacts, run_id, str(path), artifact_path=path.name)
            else:
                action = partial(client.log_artifact, run_id, str(path))
            self._patiently(action, f"store {path.name}")

    def register_ensemble(
        self,
        mixture: Path,
        models: Mapping[str, Path],
        *,
        run_id: str | None = None,
        alias: str | None = CHAMPION,
    ) -> str:
        """Register the ensemble as a new version of the model `mode-ensemble`.

        It is logged with its own copy of all experts, so it can be served from elsewhere
        (`mlflow models serve -m models:/mode-ensemble@champion`); `mode.ensemble.pyfunc` documents the request. The
        same ensemble is not registered twice.

        Args:
            mixture: folder of the saved mixture.
            models: expert -> model folder; with `seed`, if an expert is not trained yet.
            run_id: the run it belongs to; default a new one, `ensemble`.
            alias: name that moves to this version; `None` for none.

        Returns:
            The version.

        Raises:
            ModeError: a folder is missing, or as `prepare`.
        """
        if missing := [str(folder) for folder in (mixture, *models.values()) if not folder.is_dir()]:
            raise ModeError(f"{', '.join(missing)}: no such folder", "train and evaluate first")
        content = fingerprint([mixture, *models.values()])
        store = self._patiently(lambda: self._store, "open the database")
        version = self._patiently(lambda: store.registered(content), "look for the registered model")
        if version is None:
            register = partial(store.register, mixture, dict(models), content, run_id)
            version = self._patiently(register, "register the ensemble")
        if alias:
            name = alias
            self._patiently(lambda: store.client.set_registered_model_alias(REGISTERED_MODEL, name, version), "set it")
        return version

    def compare(self, first: str, second: str) -> Comparison:
        """What differs between two runs, each given as an id, the beginning of one, or a run name (its latest run).

        Raises:
            ModeError: no run, or more than one, is called that.
        """
        runs = [self._store.find(reference) for reference in (first, second)]
        one, other = runs
        params = {
            key: (one.data.params.get(key), other.data.params.get(key))
            for key in sorted(one.data.params.keys() | other.data.params.keys())
        }
        metrics = {
            key: (one.data.metrics.get(key), other.data.metrics.get(key))
            for key in sorted(one.data.metrics.keys() | other.data.metrics.keys())
        }
        return Comparison(
            names=(one.info.run_name, other.info.run_name),
            runs=(one.info.run_id, other.info.run_id),
            params={key: pair for key, pair in params.items() if pair[0] != pair[1]},
            metrics=metrics,
        )

    def send_pending(self) -> int:
        """Send the journals of runs that are no longer in progress.

        A run whose journal does not say how it ended was killed, and is marked so.

        Returns:
            Journals sent; those that cannot be sent now stay.
        """
        sent = 0
        # One sender at a time, so that a run being resumed sees all that its predecessor has logged.
        with FileLock(self.folder / "pending.lock", timeout=min(self.patience, 30.0)):
            leftovers = [journal for path in self.pending.glob("*.jsonl") if (journal := Journal.adopt(path))]
            try:
                for journal in sorted(leftovers, key=lambda journal: journal.header.started):
                    try:
                        if not journal.over:
                            journal.end("KILLED")
                        journal.send(self._store)
                        journal.remove()
                        sent += 1
                    except Exception as error:
                        log.warning("MLflow: %s kept for later: %s", journal.path, one_line(error))
                        if is_temporary(error):
                            break
            finally:
                for journal in leftovers:
                    journal.lock.release()
        return sent

    @cached_property
    def _store(self) -> Store:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pending.mkdir(exist_ok=True)
        # A fresh database is created once: processes that open it at the same time would race.
        with FileLock(self.folder / "mlflow.lock", timeout=self.patience):
            return Store(self.uri, self.experiment, self.folder / "artifacts")

    def _latest(self, tags: Mapping[str, str]) -> str | None:
        """Id of the latest run with these tags; none if the database does not answer."""
        try:
            return self._store.latest(tags)
        except Exception as error:
            if not is_of_the_store(error):
                raise
            log.warning("MLflow: cannot look for the run of %s: %s", tags["model"], one_line(error))
            return None

    def _patiently(self, action: Callable[[], Result], what: str) -> Result:
        """Do `action`, again and again while the database is locked."""
        deadline = time.monotonic() + self.patience
        said = False
        while True:
            try:
                return action()
            except Exception as error:
                if not is_of_the_store(error):
                    raise
                if not is_temporary(error) or time.monotonic() >= deadline:
                    raise ModeError(
                        f"MLflow: cannot {what} in {self.folder}: {one_line(error)}",
                        "does another program hold mlflow.db?" if is_temporary(error) else "",
                    ) from error
                if not said:
                    log.warning("MLflow: %s: the database is locked, waiting up to %.0f s", what, self.patience)
                    said = True
            time.sleep(1.0)


class Run:
    """A run in progress; made by `Tracker.run`."""

    def __init__(self, tracker: Tracker, header: Header) -> None:
        self.tracker, self.header = tracker, header
        self._ending = threading.Event()
        self._settled = threading.Event()  # the id is known, or never will be
        self._thread = threading.Thread(target=self._send_until_ended, name=f"mlflow-{header.name}", daemon=True)

    def __enter__(self) -> Self:
        import_mlflow()  # here and not in the thread: imports of two threads at once can meet half-made modules
        try:
            self.tracker.pending.mkdir(parents=True, exist_ok=True)
            self._journal = Journal.create(self.tracker.pending, self.header)
        except OSError as error:
            raise ModeError(f"MLflow: cannot write in {self.tracker.folder}: {error.strerror}") from error
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = status_of(error)
        self._journal.end(status)
        self._ending.set()
        patience = FAREWELL_SECONDS if status == "KILLED" else self.tracker.patience
        self._thread.join(min(patience, 10.0))
        if self._thread.is_alive() and patience > 10.0:
            log.warning("MLflow: %s: waiting for the database, up to %.0f s", self.header.name, patience)
            self._thread.join(patience - 10.0)
        if not self._journal.sent:
            log.warning("MLflow: metrics of %s wait in %s and are sent later", self.header.name, self._journal.path)
        if not self._thread.is_alive():  # else it goes on while the process lives, and nobody else may send
            self._journal.lock.release()

    @property
    def run_id(self) -> str | None:
        """MLflow's id; waits for it, and is `None` if the database stays locked (the run appears there later)."""
        self._settled.wait(self.tracker.patience if self._thread.is_alive() else 0.0)
        return self.header.run_id if self.header.after is not None else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics at a step (samples seen). Costs one line in a file; the database gets it within seconds."""
        if metrics:
            self._journal.append(step, {metric_name(name): float(value) for name, value in metrics.items()})

    def _send_until_ended(self) -> None:
        complained = False
        self._try(self.tracker.send_pending)
        while not self._journal.sent:
            error = self._try(self._send)
            if error is not None and not is_temporary(error) and not isinstance(error, OSError):
                log.warning("MLflow: %s is not recorded any further: %s", self.header.name, one_line(error))
                self._settled.set()
                return
            if error is not None and not complained:
                log.warning("MLflow: %s goes on without the database for now: %s", self.header.name, one_line(error))
            complained = error is not None
            if not self._ending.wait(self.tracker.flush_seconds):
                continue
            if error is not None:
                time.sleep(0.5)

    def _send(self) -> None:
        self._journal.send(self.tracker._store)
        self._settled.set()
        if self._journal.sent:
            self._journal.remove()

    @staticmethod
    def _try(action: Callable[[], object]) -> BaseException | None:
        try:
            action()
        except Exception as error:
            return error
        return None


@dataclass
class Header:
    """First line of a journal: all that is needed to create or continue the run.

    Attributes:
        run_id: of the run, once it is known.
        after: steps up to this one were logged by the run that is continued; `None` until it was looked up.
        results: the metrics are results, which stand at one step: those that the run has already are dropped by value.
        keeps_status: results were added to a run that is over: how it ended is not theirs to say.
    """

    name: str
    tags: dict[str, str]
    params: dict[str, str]
    description: str = ""
    run_id: str | None = None
    after: int | None = None
    results: bool = False
    keeps_status: bool = False
    started: int = field(default_factory=lambda: now())


class Journal:
    """What a run has logged and the database does not have yet: a header and lines of JSON.

    The process that writes to it holds its lock, so a journal without a holder belongs to a run that is over.
    Sending is safe to repeat: each line carries the time of its logging, and MLflow stores no point of the same run,
    metric, step, time and value twice.
    """

    def __init__(self, path: Path, header: Header, lock: FileLock, lines: list[dict[str, Any]]) -> None:
        self.path, self.header, self.lock = path, header, lock
        self.sent = False
        self._lines = lines
        self._thread_lock = threading.Lock()

    @classmethod
    def create(cls, folder: Path, header: Header) -> Self:
        """A new journal, held by this process."""
        path = folder / f"{uuid.uuid4().hex}.jsonl"
        lock = cls._lock_of(path)
        lock.acquire()
        journal = cls(path, header, lock, [])
        journal._write()
        return journal

    @classmethod
    def adopt(cls, path: Path) -> Self | None:
        """The journal of a run that is over, held by this process from now on; `None` if its run is in progress."""
        lock = cls._lock_of(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        try:
            header, *lines = read_lines(path)
            return cls(path, Header(**header), lock, lines)
        except (OSError, ValueError, TypeError):  # removed by another process in the meantime, or not a journal
            lock.release()
            if not path.exists():
                path.with_suffix(".lock").unlink(missing_ok=True)
            return None

    @property
    def over(self) -> bool:
        """Whether the journal says how the run ended."""
        return any("status" in line for line in self._lines)

    def append(self, step: int, values: dict[str, float]) -> None:
        """Note metrics."""
        self._append({"step": step, "time": now(), "values": values})

    def end(self, status: str) -> None:
        """Note that the run is over."""
        self._append({"status": status, "time": now()})

    def send(self, store: Store) -> None:
        """Bring the database up to date; raises whatever MLflow raises, and keeps what was not sent."""
        with self._thread_lock:
            lines = list(self._lines)
        if self.header.after is None:
            store.open_run(self.header)
            self._drop(0)  # so that another process continues the same run
        run_id = str(self.header.run_id)
        store.log_metrics(run_id, list(self._points(lines, store)))
        for line in lines:
            if "status" in line and not self.header.keeps_status:
                store.end(run_id, line["status"], line["time"])
        if lines:
            self._drop(len(lines))
        self.sent = any("status" in line for line in lines)

    def remove(self) -> None:
        """The run is over and all is sent."""
        self.path.unlink(missing_ok=True)
        self.lock.release()
        self.path.with_suffix(".lock").unlink(missing_ok=True)

    def _points(self, lines: list[dict[str, Any]], store: Store) -> Iterator[tuple[str, float, int, int]]:
        """(metric, value, time, step) of what the run does not have yet."""
        known = store.latest_metrics(str(self.header.run_id)) if self.header.results and lines else {}
        for line in lines:
            for name, value in line.get("values", {}).items():
                seen = same(known.get(name), value) if self.header.results else line["step"] <= (self.header.after or 0)
                if not seen:
                    yield name, value, line["time"], line["step"]

    def _append(self, line: dict[str, Any]) -> None:
        with self._thread_lock:
            self._lines.append(line)
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:  # a full disk; the line is still in memory
                log.warning("MLflow: cannot write %s: %s", self.path, error.strerror)

    def _drop(self, count: int) -> None:
        """Forget the first `count` lines: they are in the database."""
        with self._thread_lock:
            del self._lines[:count]
            self._write()

    def _write(self) -> None:
        aside = self.path.with_suffix(".new")
        aside.write_text("".join(json.dumps(line) + "\n" for line in [vars(self.header), *self._lines]), "utf-8")
        aside.replace(self.path)

    @staticmethod
    def _lock_of(path: Path) -> FileLock:
        # Taken by one thread and released by another.
        return FileLock(path.with_suffix(".lock"), thread_local=False)


class Store:
    """The few things that are asked of MLflow, over its client."""

    def __init__(self, uri: str, experiment: str, artifacts: Path) -> None:
        mlflow = import_mlflow()
        self.uri = uri
        self.client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            self.experiment_id = self.client.create_experiment(experiment, artifact_location=artifacts.as_uri())
            # The page for trained models rather than that for language-model traces.
            self.client.set_experiment_tag(self.experiment_id, "mlflow.experimentKind", "custom_model_development")
            self.client.set_experiment_tag(self.experiment_id, "mlflow.note.content", EXPERIMENT_NOTE)
        else:
            self.experiment_id = found.experiment_id
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(self.experiment_id)
        view = json.dumps(COMPARISON_VIEW)
        if found is None or found.tags.get(VIEW_TAG) != view:
            self.client.set_experiment_tag(self.experiment_id, VIEW_TAG, view)

    def open_run(self, header: Header) -> None:
        """Create or continue the run of a header, and note its id and the last step it has in the header."""
        run = self._existing(header.run_id)
        header.keeps_status = header.results and run is not None
        if run is None:
            tags = {"mlflow.user": user(), "mlflow.source.name": "mode", "mlflow.source.type": "LOCAL"}
            run = self.client.create_run(
                self.experiment_id, start_time=header.started, tags=header.tags | tags, run_name=header.name
            )
        elif not header.results:
            self.client.update_run(run.info.run_id, status="RUNNING")
        run_id = str(run.info.run_id)
        note = {"mlflow.note.content": header.description} if header.description else {}
        self._tag(run_id, header.tags | note)
        self._log_params(run, header.params)
        steps = [
            point.step
            for key in run.data.metrics
            if key.startswith("train/")
            for point in self.client.get_metric_history(run_id, key)
        ]
        header.run_id, header.after = run_id, max(steps, default=-1)

    def log_metrics(self, run_id: str, points: list[tuple[str, float, int, int]]) -> None:
        """Store (metric, value, time in ms, step) points in as few calls as MLflow allows."""
        from mlflow.entities import Metric

        for start in range(0, len(points), METRICS_PER_BATCH):
            batch = [Metric(*point) for point in points[start : start + METRICS_PER_BATCH]]
            self.client.log_batch(run_id, metrics=batch)

    def latest_metrics(self, run_id: str) -> dict[str, float]:
        """Latest value of each of a run's metrics."""
        return dict(self.client.get_run(run_id).data.metrics)

    def end(self, run_id: str, status: str, at: int) -> None:
        """Set a run's final status; `at` in milliseconds."""
        self.client.set_terminated(run_id, status=status, end_time=at)

    def registered(self, content: str) -> str | None:
        """Version of the registered ensemble that has this content, if there is one."""
        versions = self.client.search_model_versions(f"name = '{REGISTERED_MODEL}'")
        return next((str(found.version) for found in versions if found.tags.get("content") == content), None)

    def register(self, mixture: Path, models: Mapping[str, Path], content: str, run_id: str | None) -> str:
        """Log the ensemble with all its folders, and make it a version of the registered model."""
        mlflow = import_mlflow()
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
        from mlflow.types.schema import Array

        texts = {"dtype": DataType.string, "shape": (-1,)}
        signature = ModelSignature(
            inputs=Schema([ColSpec(DataType.string, "image")]),
            outputs=Schema(
                [
                    ColSpec(DataType.string, "label"),
                    ColSpec(DataType.double, "probability"),
                    ColSpec(Array(DataType.double), "probabilities"),
                ]
            ),
            params=ParamSchema(
                [
                    # A request without classes must be refused, not answered with those of an example.
                    ParamSpec("classes", default=[], **texts),
                    ParamSpec("templates", default=[], **texts),
                ]
            ),
        )
        package = Path(__file__).parent
        with pointed_at(self.uri):
            with (
                warnings.catch_warnings(),
                mlflow.start_run(run_id, experiment_id=self.experiment_id, run_name=None if run_id else "ensemble"),
            ):
                warnings.simplefilter("ignore")  # it misses type hints, from which it would infer the signature
                info = mlflow.pyfunc.log_model(
                    name="ensemble",
                    python_model=str(package / "ensemble" / "pyfunc.py"),
                    artifacts={"mixture": str(mixture)} | {name: str(folder) for name, folder in models.items()},
                    code_paths=[str(package)],
                    signature=signature,
                    input_example=(
                        {"image": [EXAMPLE["image"]]},
                        {key: EXAMPLE[key] for key in ("classes", "templates")},
                    ),
                    pip_requirements=[f"{name}=={metadata.version(name)}" for name in SERVING],
                )
            if not self.client.search_registered_models(f"name = '{REGISTERED_MODEL}'"):
                self.client.create_registered_model(REGISTERED_MODEL, description=MODEL_NOTE)
            version = self.client.create_model_version(
                REGISTERED_MODEL, info.model_uri, run_id=info.run_id, model_id=info.model_id, tags={"content": content}
            )
        return str(version.version)

    def latest(self, tags: Mapping[str, str]) -> str | None:
        """Id of the latest run with all these tags."""
        condition = " and ".join(f"tags.`{key}` = '{quoted(value)}'" for key, value in tags.items())
        runs = self.client.search_runs([self.experiment_id], filter_string=condition, max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def find(self, reference: str) -> Any:
        """MLflow's run by id, beginning of an id (at least 4 characters), or name; of several with the name the latest.

        Raises:
            ModeError: there is none, or the beginning fits several.
        """
        runs = self.client.search_runs([self.experiment_id], max_results=10_000)  # latest first
        named = [run for run in runs if run.info.run_name == reference]
        begun = [run for run in runs if len(reference) >= 4 and run.info.run_id.startswith(reference)]
        if named or len(begun) == 1:
            return (named or begun)[0]
        if begun:
            raise ModeError(f"{reference}: the beginning of {len(begun)} runs' ids", "give more of it")
        known = ", ".join(dict.fromkeys(str(run.info.run_name) for run in runs[:50])) or "none yet"
        raise ModeError(f"{reference}: no such run", f"an id, or one of these names: {known}")

    def _existing(self, run_id: str | None) -> Any:
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if is_temporary(error):
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _log_params(self, run: Any, params: Mapping[str, str]) -> None:
        """Log parameters; one that is logged already cannot change, so its new value becomes a tag."""
        from mlflow.entities import Param

        known = run.data.params
        fresh = [Param(metric_name(key), value) for key, value in params.items() if metric_name(key) not in known]
        for start in range(0, len(fresh), ENTRIES_PER_BATCH):
            self.client.log_batch(run.info.run_id, params=fresh[start : start + ENTRIES_PER_BATCH])
        changed = {key: value for key, value in params.items() if known.get(metric_name(key), value) != value}
        self._tag(run.info.run_id, {f"changed.{metric_name(key)}": value for key, value in changed.items()})

    def _tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entries = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, len(entries), ENTRIES_PER_BATCH):
            self.client.log_batch(run_id, tags=entries[start : start + ENTRIES_PER_BATCH])


def page_addresses(folder: Path, address: str) -> dict[str, str]:
    """Where MLflow's page shows the comparison of all models, and each model's latest run.

    Args:
        folder: of the database.
        address: of MLflow's page.

    Returns:
        `comparison`, and every model by name -> address; empty without a database.
    """
    database = folder / "mlflow.db"
    if not database.is_file():
        return {}
    # Importing MLflow takes seconds; these tables have been the same for years.
    runs = "SELECT name, experiment_id, run_uuid FROM runs WHERE lifecycle_stage = 'active' ORDER BY start_time"
    view = "SELECT experiment_id FROM experiment_tags WHERE key = ? ORDER BY experiment_id"
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)) as connection:
            models = connection.execute(runs).fetchall()
            compared = connection.execute(view, (VIEW_TAG,)).fetchone()
    except sqlite3.Error:  # locked, or not filled yet
        return {}
    pages = {name: f"{address}/#/experiments/{experiment}/runs/{run}" for name, experiment, run in models}
    if compared:
        pages["comparison"] = f"{address}/#/experiments/{compared[0]}/runs?viewStateShareKey={VIEW_KEY}"
    return pages


def registered_folders(uri: str, runs: Path) -> tuple[Path, dict[str, Path]]:
    """The folders of an ensemble that `Tracker.register_ensemble` has registered.

    Args:
        uri: `models:/mode-ensemble@champion`, `models:/mode-ensemble/3` ...
        runs: the folder of MLflow's database; MLFLOW_REGISTRY_URI or MLFLOW_TRACKING_URI names another registry and is
            preferred.

    Returns:
        The mixture's folder, and model name -> model folder; from a registry elsewhere they are downloaded.

    Raises:
        ModeError: there is no such registry or model, or it is not an ensemble.
    """
    elsewhere = os.environ.get("MLFLOW_REGISTRY_URI") or os.environ.get("MLFLOW_TRACKING_URI")
    if not elsewhere and not (runs / "mlflow.db").is_file():
        raise ModeError(f"{uri}: {runs} holds no MLflow database", "run inside the project, or name the folder")
    mlflow = import_mlflow()
    from mlflow.exceptions import MlflowException

    try:
        with nullcontext() if elsewhere else pointed_at(Tracker(runs).uri):
            folder = Path(mlflow.artifacts.download_artifacts(uri))
            artifacts = mlflow.models.Model.load(folder).flavors["python_function"]["artifacts"]
    except MlflowException as error:
        raise ModeError(f"{uri}: {one_line(error)}") from None
    folders = {name: folder / artifact["path"] for name, artifact in artifacts.items()}
    if "mixture" not in folders:
        raise ModeError(f"{uri}: not an ensemble of this project")
    return folders.pop("mixture"), folders


@contextmanager
def pointed_at(uri: str) -> Iterator[None]:
    """MLflow's process-wide addresses set to `uri`, and put back.

    MLflow also notes them in environment variables, where they would outlive this and be taken for the user's own.
    """
    mlflow = import_mlflow()
    variables = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    tracking = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    registry = mlflow.get_registry_uri()
    if registry == mlflow.get_tracking_uri():  # nobody named one: it goes on following the other address
        registry = None
    try:
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        yield
    finally:
        mlflow.set_tracking_uri(tracking)
        mlflow.set_registry_uri(registry)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def import_mlflow() -> Any:
    """MLflow, quiet and without telemetry: its settings are read on import."""
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    for name in ("mlflow.store.db.utils", "alembic"):  # whole tracebacks of errors that are handled here
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return mlflow


def is_temporary(error: BaseException) -> bool:
    """Whether an error passes by itself: a locked database or lock file, as opposed to a wrong call."""
    if isinstance(error, Timeout):
        return True
    return getattr(error, "error_code", "") == "TEMPORARILY_UNAVAILABLE" or "database is locked" in str(error)


def is_of_the_store(error: BaseException) -> bool:
    """Whether an error comes from database, files or locks, which the user can mend, and not from this program."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("mlflow", "sqlalchemy")


def status_of(error: BaseException | None) -> str:
    """MLflow's name for how a run ended: exits by signal or Ctrl-C are KILLED, exceptions FAILED."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    stopped = isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code in (130, 143))
    return "KILLED" if stopped else "FAILED"


def flatten(nested: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested dictionaries as one, keys joined by dots.

    >>> flatten({"training": {"lr": 0.1}, "random_seed": 0})
    {'training.lr': 0.1, 'random_seed': 0}
    """
    flat: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A journal's lines; a last one that was cut off by a kill is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def same(known: float | None, value: float) -> bool:
    """Whether a stored value is this one; NaN is itself."""
    return known is not None and (known == value or (math.isnan(known) and math.isnan(value)))


def one_line(error: BaseException) -> str:
    """An exception's first line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def fingerprint(folders: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of all files in some folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{folder.name}/{path.relative_to(folder)}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def quoted(value: str) -> str:
    """A string inside MLflow's filter language."""
    return value.replace("'", "''")


def user() -> str:
    """Name of the account, for MLflow's page."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for the user
        return "unknown"


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
