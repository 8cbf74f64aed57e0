"""The database: the few things that are asked of MLflow, over its client, and the names that it allows."""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from mode.errors import ModeError
from mode.files import write_aside
from mode.tracking.journal import Header

#: MLflow's limits for one `log_batch` call.
BATCHES = {"metrics": 1_000, "params": 100, "tags": 100}
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
    "selectedColumns": ["metrics.`zeroshot/mean`", "metrics.`cost/samples_seen`", "metrics.`train/loss`"],
    "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "role"}]},
}


def database_uri(folder: Path) -> str:
    """MLflow's tracking (and registry) address of the database in a folder."""
    return f"sqlite:///{folder.absolute() / 'mlflow.db'}"


def make_database(folder: Path) -> None:
    """Make MLflow's database in a folder, without experiments of this project, if there is none: whole or not at all.

    MLflow makes its tables in some fifty steps, each for good: a process that ended between two of them, as a training
    that fails at once does, would leave a database that no later process can complete or open.
    """
    database = folder / "mlflow.db"
    if database.exists():
        return
    import_mlflow()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with write_aside(database) as temporary:
        SqlAlchemyStore(f"sqlite:///{temporary}", (folder / "artifacts").as_uri()).engine.dispose()


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
        from mlflow.entities import Param, RunTag

        run = self._existing(header.run_id)
        header.keeps_status = header.results and run is not None and not header.made
        if run is None:
            tags = {"mlflow.user": user(), "mlflow.source.name": "mode", "mlflow.source.type": "LOCAL"}
            run = self.client.create_run(
                self.experiment_id, start_time=header.started, tags=header.tags | tags, run_name=header.name
            )
            # Noted at once: if the database locks before the rest is in it, this run is gone on with.
            header.run_id, header.made = str(run.info.run_id), True
        elif not header.results:
            self.client.update_run(run.info.run_id, status="RUNNING")
        run_id = str(run.info.run_id)
        note = {"mlflow.note.content": header.description} if header.description else {}
        self.log(run_id, tags=[RunTag(*tag) for tag in (header.tags | note).items()])
        # A parameter that is logged already cannot change, so its new value becomes a tag.
        known, params = run.data.params, {metric_name(key): value for key, value in header.params.items()}
        self.log(run_id, params=[Param(key, value) for key, value in params.items() if key not in known])
        changed = [RunTag(f"changed.{key}", value) for key, value in params.items() if known.get(key, value) != value]
        self.log(run_id, tags=changed)
        curves = [self.client.get_metric_history(run_id, key) for key in run.data.metrics if key.startswith("train/")]
        steps = [point.step for curve in curves for point in curve]
        header.run_id, header.after = run_id, max(steps, default=-1)

    def log(self, run_id: str, **entries: Sequence[Any]) -> None:
        """Store MLflow's `metrics`, `params` or `tags` in as few calls as it allows."""
        for kind, listed in entries.items():
            for start in range(0, len(listed), BATCHES[kind]):
                self.client.log_batch(run_id, **{kind: listed[start : start + BATCHES[kind]]})

    def latest(self, tags: Mapping[str, str]) -> str | None:
        """Id of the latest run with all these tags."""
        quoted = {key: value.replace("'", "''") for key, value in tags.items()}
        condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in quoted.items())
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


def metric_name(name: str) -> str:
    """`name` as MLflow allows it: letters, digits, `_ - . : /` and spaces.

    >>> metric_name("retrieval/flickr8k/image_recall@10")
    'retrieval/flickr8k/image_recall_at_10'
    """
    return re.sub(r"[^/\w.\- :]", "_", name.replace("@", "_at_")).strip("/") or "_"


def page_addresses(folder: Path, address: str) -> dict[str, str]:
    """Where MLflow's page, which is at `address`, shows the comparison of all models, and each model's latest run.

    Returns:
        `comparison`, and every model by name -> address; empty without a database in `folder`.
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
    """MLflow, quiet: its settings are read on import."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    for name in ("mlflow.store.db.utils", "alembic"):  # whole tracebacks of errors that are handled here
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return mlflow


def is_temporary(error: BaseException) -> bool:
    """Whether an error passes by itself: a locked database or lock file, as opposed to a wrong call."""
    unavailable = getattr(error, "error_code", "") == "TEMPORARILY_UNAVAILABLE"
    return isinstance(error, Timeout) or unavailable or "database is locked" in str(error)


def is_of_the_store(error: BaseException) -> bool:
    """Whether an error comes from database, files or locks, which the user can mend, and not from this program."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("mlflow", "sqlalchemy")


def user() -> str:
    """Name of the account, for MLflow's page."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for the user
        return "unknown"
