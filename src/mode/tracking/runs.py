"""Runs: `Tracker` makes them, finds them again and compares them; a `Run` logs into its journal."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self, TypeVar

from filelock import FileLock

from mode.errors import ModeError, first_line
from mode.results import Cost, Figure, Results
from mode.roles import ENSEMBLE, Kind, role_of
from mode.tracking.journal import Header, Journal
from mode.tracking.registry import CHAMPION, REGISTERED_MODEL, fingerprint, register, registered
from mode.tracking.store import (
    Store,
    database_uri,
    import_mlflow,
    is_of_the_store,
    is_temporary,
    make_database,
    metric_name,
)

Result = TypeVar("Result")
#: MLflow's limit for one parameter's value, in characters.
PARAM_LENGTH = 6_000
#: Seconds that the last flush of a run may take that was cancelled or has failed: it has to be gone soon.
FAREWELL_SECONDS = 3.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        names, runs: of the two runs; `runs` are their ids.
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

    Example (not run by the tests: making a database takes seconds):
        >>> tracker = Tracker(Path("mlruns"))                                       # doctest: +SKIP
        >>> with tracker.run("expert-0", role="expert", expert="expert-0") as run:  # doctest: +SKIP
        ...     run.log(128, {"train/loss": 4.1})
    """

    def __init__(
        self, folder: Path, experiment: str = "mode", *, flush_seconds: float = 10.0, patience: float = 300.0
    ) -> None:
        self.folder = folder.absolute()
        self.experiment, self.flush_seconds, self.patience = experiment, flush_seconds, patience
        #: MLflow's tracking (and registry) address of the database, and the folder of journals.
        self.uri, self.pending = database_uri(self.folder), self.folder / "pending"

    @cached_property
    def store(self) -> Store:
        """The database, made if missing; raises whatever MLflow raises."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pending.mkdir(exist_ok=True)
        # A fresh database is created once: processes that open it at the same time would race.
        with FileLock(self.folder / "mlflow.lock", timeout=self.patience):
            make_database(self.folder)
            return Store(self.uri, self.experiment, self.folder / "artifacts")

    def prepare(self) -> None:
        """Create database and experiment, and send what earlier, killed runs have left behind.

        Call it once before models are trained side by side: processes that open a fresh database at once collide.

        Raises:
            ModeError: the database stayed locked, or another process was sending, for longer than `patience`; or the
                folder cannot be written.
        """
        self._patiently("open the database", lambda: self.store)
        self._patiently("send what is pending", self.send_pending)

    def run(
        self,
        name: str,
        role: Kind,
        *,
        expert: str | None = None,
        source: str | None = None,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
        run_id: str | None = None,
        description: str | None = None,
    ) -> Run:
        """A run, to be used as a context.

        Its status becomes FINISHED, FAILED (an exception) or KILLED (Ctrl-C, SIGTERM turned into `SystemExit`).

        Args:
            name: the model's, as in `metrics.json`.
            role: what it is to the method; a tag.
            expert, source: which expert, trained on which source; tags.
            params: nested dictionaries are flattened (`training.lr`).
            tags: more of them.
            run_id: continue this run: steps that it has already are dropped, and a parameter that differs from what
                it was is noted in a tag. A run that is no longer there is replaced by a new one.
            description: Markdown for its page; default: what a model of that name is to the method.
        """
        own = {"role": role, "model": name, "expert": expert, "source": source, **(tags or {})}
        header = Header(
            name=name,
            tags={key: value for key, value in own.items() if value},
            params={key: str(value)[:PARAM_LENGTH] for key, value in flatten(params or {}).items()},
            description=role_of(name).note if description is None else description,
            run_id=run_id,
        )
        return Run(self, header)

    def log_results(
        self,
        results: Results,
        runs: Mapping[str, str | None],
        *,
        params: Mapping[str, object] | None = None,
        artifacts: Iterable[Path] = (),
        more: Mapping[str, float] | None = None,
    ) -> dict[str, str | None]:
        """Add evaluation and cost to every model's run.

        Ensembles are not trained, so they get a run here; the same evaluation of the same experts finds it again.
        A value that a run has already is not logged twice.

        Args:
            results: of the evaluation.
            runs: run id of each trained model (its `card.json` says); `None`: it gets a new run. A model that is not in
                here means its latest run.
            params: for the runs of ensembles.
            artifacts: files and folders for the run of `ensemble`: figures and the report.
            more: figures for the run of `ensemble` that are no part of its results.

        Returns:
            Run id of every model in `results`; `None` for one whose figures wait in a journal.
        """
        trained = {model: role_of(model).kind for model in results.models if role_of(model).trained}
        known = {model: runs[model] if model in runs else self._latest({"model": model}) for model in trained}
        experts = {model: known[model] for model, role in trained.items() if role == "expert"}
        identity = hashlib.sha256(json.dumps(experts, sort_keys=True).encode()).hexdigest()[:16]
        ids: dict[str, str | None] = {}
        for model in results.models:
            role = role_of(model).kind
            run_id = known[model] if model in known else self._latest({"model": model, "members": identity})
            run = self.run(
                model,
                role,
                expert=model if role == "expert" else None,
                params=params if role == ENSEMBLE.kind else None,
                tags={"members": identity} if role == ENSEMBLE.kind else None,
                run_id=run_id,
            )
            run.header.results = True
            with run:
                run.log(0, metrics_of(results, model) | ({**(more or {})} if model == ENSEMBLE.name else {}))
            ids[model] = run.run_id
        if run_of_ensemble := ids.get(ENSEMBLE.name):
            self.log_artifacts(run_of_ensemble, artifacts)
        return ids

    def log_arms(
        self, name: str, found: Iterable[Results], *, params: Mapping[str, object], tags: Mapping[str, str]
    ) -> None:
        """A run for all models of an evaluation together: `ARM/zeroshot/mean`, `ARM/retrieval/...`, `ARM/cost/...`.

        Args:
            name: of the run.
            found: results of its evaluations, of models of different names.
            params, tags: what made them what they are.
        """
        note = f"All arms of a run of the experiment {tags['experiment']}, see docs/paper.md."
        with self.run(name, ENSEMBLE.kind, params=params, tags=tags, description=note) as run:
            for results in found:
                for arm in results.models:
                    figures = metrics_of(results, arm).items()
                    run.log(0, {f"{arm}/{kind}": value for kind, value in figures if _is_of_all_tasks(kind)})

    def log_artifacts(self, run_id: str, paths: Iterable[Path]) -> None:
        """Copy files and folders to a run. Raises `ModeError` as `prepare` does."""
        client = self.store.client
        for path in paths:
            copy, place = (client.log_artifacts, path.name) if path.is_dir() else (client.log_artifact, None)
            self._patiently(f"store {path.name}", copy, run_id, str(path), place)

    def register_ensemble(
        self, router: Path, models: Mapping[str, Path], *, run_id: str | None = None, alias: str | None = CHAMPION
    ) -> str:
        """Register the ensemble as a new version of the model `mode-ensemble`, and return that version.

        It is logged with its own copy of all experts, so it can be served from elsewhere
        (`mlflow models serve -m models:/mode-ensemble@champion`); `mode.tracking.pyfunc` documents the request. The
        same ensemble is not registered twice.

        Args:
            router: folder of the saved router.
            models: expert -> model folder; with `seed`, if an expert is not trained yet.
            run_id: the run it belongs to; default a new one, `ensemble`.
            alias: name that moves to this version; `None` for none.

        Raises:
            ModeError: a folder is missing, or as `prepare`.
        """
        if missing := [str(folder) for folder in (router, *models.values()) if not folder.is_dir()]:
            raise ModeError(f"{', '.join(missing)}: no such folder", "train and evaluate first")
        content = fingerprint([router, *models.values()])
        store = self._patiently("open the database", lambda: self.store)
        version = self._patiently("look for the registered model", registered, store, content)
        if version is None:
            version = self._patiently("register the ensemble", register, store, router, models, content, run_id)
        if alias:
            self._patiently("set it", store.client.set_registered_model_alias, REGISTERED_MODEL, alias, version)
        return version

    def compare(self, first: str, second: str) -> Comparison:
        """What differs between two runs, each given as `Store.find` takes it; raises as that and `prepare` do."""
        store = self._patiently("open the database", lambda: self.store)
        one, other = store.find(first), store.find(second)
        params, metrics = (
            {key: (left.get(key), right.get(key)) for key in sorted(left.keys() | right.keys())}
            for left, right in ((one.data.params, other.data.params), (one.data.metrics, other.data.metrics))
        )
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
                        journal.send(self.store)
                        journal.remove()
                        sent += 1
                    except Exception as error:
                        log.warning("MLflow: %s kept for later: %s", journal.path, first_line(error))
                        if is_temporary(error):
                            break
            finally:
                for journal in leftovers:
                    journal.lock.release()
        return sent

    def _latest(self, tags: Mapping[str, str]) -> str | None:
        """Id of the latest run with these tags; none if the database does not answer."""
        try:
            return self.store.latest(tags)
        except Exception as error:
            if not is_of_the_store(error):
                raise
            log.warning("MLflow: cannot look for the run of %s: %s", tags["model"], first_line(error))
            return None

    def _patiently(self, what: str, action: Callable[..., Result], *arguments: object) -> Result:
        """Do `action`, again and again while the database is locked."""
        deadline = time.monotonic() + self.patience
        said = False
        while True:
            try:
                return action(*arguments)
            except Exception as error:
                if not is_of_the_store(error):
                    raise
                if not is_temporary(error) or time.monotonic() >= deadline:
                    raise ModeError(
                        f"MLflow: cannot {what} in {self.folder}: {first_line(error)}",
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

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        status = status_of(error)
        self._journal.end(status)
        self._ending.set()
        # What did not go well tells so at once, on a full disk above all; its journal is sent later.
        patience = self.tracker.patience if status == "FINISHED" else FAREWELL_SECONDS
        self._thread.join(min(patience, 10.0))
        if self._thread.is_alive() and patience > 10.0:
            log.warning("MLflow: %s: waiting for the database, up to %.0f s", self.header.name, patience)
            self._thread.join(patience - 10.0)
        if not self._journal.sent:
            log.warning("MLflow: metrics of %s wait in %s and are sent later", self.header.name, self._journal.path)
        if not self._thread.is_alive():  # else it goes on while the process lives, and nobody else may send
            self._journal.lock.release()

    def settle(self) -> None:
        """Have it over as KILLED, unless it is over already: the process is about to end, without a way out of `with`.

        Returns when MLflow has it; waits as long as that takes.
        """
        if self._thread.is_alive():
            if not self._journal.over:
                self._journal.end("KILLED")
            self._ending.set()
            self._thread.join()

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
        with suppress(Exception):
            self.tracker.send_pending()
        while not self._journal.sent:
            error = self._send()
            if error is not None and not is_temporary(error) and not isinstance(error, OSError):
                log.warning("MLflow: %s is not recorded any further: %s", self.header.name, first_line(error))
                self._settled.set()
                return
            if error is not None and not complained:
                log.warning("MLflow: %s goes on without the database for now: %s", self.header.name, first_line(error))
            complained = error is not None
            if self._ending.wait(self.tracker.flush_seconds) and error is not None:
                time.sleep(0.5)

    def _send(self) -> Exception | None:
        """Bring the database up to date; returns what went wrong."""
        try:
            self._journal.send(self.tracker.store)
            self._settled.set()
            if self._journal.sent:
                self._journal.remove()
        except Exception as error:
            return error
        return None


def status_of(error: BaseException | None) -> str:
    """MLflow's name for how a run ended: exits by signal or Ctrl-C are KILLED, exceptions FAILED."""
    code = error.code if isinstance(error, SystemExit) else None
    if error is None or (isinstance(error, SystemExit) and not code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) or code in (130, 143) else "FAILED"


def metrics_of(results: Results, model: str) -> dict[str, float]:
    """One model's figures, flat, under the names that MLflow shows.

    Returns:
        `zeroshot/mean`, `zeroshot/<task>`, `retrieval/<task>/<metric>`, `cost/<kind>` and, for an expert,
        `routing/<task>` (the weight it got); those that the results have.
    """
    flat: dict[str, Figure] = {"zeroshot/mean": results.zeroshot.mean.get(model)}
    flat |= {f"zeroshot/{task}": figures.get(model) for task, figures in results.zeroshot.tasks.items()}
    for task, models in results.retrieval.tasks.items():
        flat |= {f"retrieval/{task}/{name}": value for name, value in models.get(model, {}).items()}
    flat |= {f"routing/{task}": weights.get(model) for task, weights in results.routing.items()}
    flat |= {f"cost/{kind}": value for kind, value in results.cost.get(model, Cost())}
    return {metric_name(name): float(value) for name, value in flat.items() if value is not None}


def _is_of_all_tasks(metric: str) -> bool:
    """Whether it is one of the few of a model, and not the accuracy or the weight in one of many tasks."""
    return metric == "zeroshot/mean" or metric.startswith(("retrieval/", "cost/"))


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
