"""Tracking against real SQLite databases of MLflow."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mode.errors import ModeError
from mode.results import Results
from mode.roles import role_of
from mode.tracking import journal
from mode.tracking.runs import Tracker, flatten, metrics_of, status_of
from mode.tracking.store import VIEW_TAG, metric_name, page_addresses
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder; making MLflow's tables takes seconds, copying them does not."""
    folder = tmp_path_factory.mktemp("template") / "mlruns"
    Tracker(folder).prepare()
    return folder


@pytest.fixture
def tracker(template: Path, tmp_path: Path) -> Tracker:
    folder = tmp_path / "mlruns"
    folder.mkdir()
    source, target = sqlite3.connect(template / "mlflow.db"), sqlite3.connect(folder / "mlflow.db")
    with source, target:
        source.backup(target)
        # An experiment knows its artifact folder by its full path.
        target.execute(
            "UPDATE experiments SET artifact_location = ? WHERE name = 'mode'", [(folder / "artifacts").as_uri()]
        )
    source.close()
    target.close()
    return Tracker(folder, flush_seconds=0.2, patience=60)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the database exclusively for the length of the block."""
    with closing(sqlite3.connect(folder / "mlflow.db", isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


def open_database(tracker: Tracker) -> tuple[MlflowClient, str]:
    """MLflow's own client, and the id of the project's experiment."""
    client = MlflowClient(tracker.uri)
    experiment = client.get_experiment_by_name("mode")
    assert experiment is not None
    return client, experiment.experiment_id


def test_a_process_that_ends_while_tables_are_made_leaves_no_database(tmp_path: Path) -> None:
    """MLflow goes on from the last table that it has noted, and fails where the next one is there already."""
    program = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import Engine, event
from mode.tracking.runs import Tracker

@event.listens_for(Engine, "after_cursor_execute")
def end(connection, cursor, statement, *_):
    if "ADD COLUMN client_request_id" in statement:
        os.kill(os.getpid(), signal.SIGKILL)

Tracker(Path(sys.argv[1])).prepare()
"""
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "mlflow.db").exists()
    tracker = Tracker(tmp_path)
    tracker.prepare()
    assert open_database(tracker)[1]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} <= {"pending", "artifacts"}


def test_a_comparison_in_a_database_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    with pytest.raises(ModeError, match=r"MLflow: cannot open the database in .*: .*not a database"):
        Tracker(tmp_path).compare("dense", "ensemble")


def test_pages_of_the_comparison_and_of_each_models_latest_run(tracker: Tracker) -> None:
    page = "http://127.0.0.1:5000"
    assert page_addresses(tracker.folder / "elsewhere", page) == {}
    client, experiment = open_database(tracker)
    comparison = f"{page}/#/experiments/{experiment}/runs?viewStateShareKey=mode"
    assert page_addresses(tracker.folder, page) == {"comparison": comparison}
    ids = [client.create_run(experiment, start_time=n, run_name=name).info.run_id for n, name in enumerate("aab", 1)]
    client.delete_run(ids[2])
    pages = page_addresses(tracker.folder, page)
    assert pages == {"comparison": comparison, "a": f"{page}/#/experiments/{experiment}/runs/{ids[1]}"}
    with locked(tracker.folder):
        assert page_addresses(tracker.folder, page) == {}


def test_an_older_experiment_gets_the_saved_view(tracker: Tracker) -> None:
    client, experiment = open_database(tracker)
    client.set_experiment_tag(experiment, VIEW_TAG, "{}")
    Tracker(tracker.folder).prepare()
    view = json.loads(client.get_experiment(experiment).tags[VIEW_TAG])
    assert view["orderByKey"] == "metrics.`zeroshot/mean`"
    assert view["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "role"}]


def history(tracker: Tracker, run_id: str | None, key: str = "train/loss") -> list[tuple[int, float]]:
    points = open_database(tracker)[0].get_metric_history(str(run_id), key)
    return sorted((point.step, point.value) for point in points)


def run_of(tracker: Tracker, run_id: str | None) -> Any:
    return open_database(tracker)[0].get_run(str(run_id))


def latest(tracker: Tracker, name: str) -> Any:
    """MLflow's latest run of a name; None if there is none."""
    client, experiment = open_database(tracker)
    return next(iter(client.search_runs([experiment], f"attributes.run_name = '{name}'")), None)


PARTS: dict[str, Any] = {
    "zeroshot": {
        "mean": {"dense": 0.5, "expert-0": 0.4, "uniform": 0.45, "ensemble": 0.6},
        "tasks": {"chess": {"dense": 0.5, "expert-0": 0.4, "uniform": 0.45, "ensemble": 0.6}},
    },
    "retrieval": {"tasks": {"flickr": {"dense": {"image_recall@1": 0.1, "text_recall@10": None}}}},
    "routing": {"chess": {"expert-0": 1.0}},
    "cost": {"dense": {"samples_seen": 100, "flops": 2e12, "seconds": 3.5}},
}
RESULTS = Results.model_validate(PARTS)


def test_names_are_the_same_for_all_roles() -> None:
    assert metrics_of(RESULTS, "dense") == {
        "zeroshot/mean": 0.5,
        "zeroshot/chess": 0.5,
        "retrieval/flickr/image_recall_at_1": 0.1,
        "cost/samples_seen": 100.0,
        "cost/flops": 2e12,
        "cost/seconds": 3.5,
    }
    assert metrics_of(RESULTS, "expert-0") == {"zeroshot/mean": 0.4, "zeroshot/chess": 0.4, "routing/chess": 1.0}
    assert metrics_of(Results(), "dense") == {}


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("zeroshot/mean", "zeroshot/mean"),
        ("a(b)/c+d", "a_b_/c_d"),
        ("recall@5", "recall_at_5"),
        ("", "_"),
        ("/x/", "x"),
    ],
)
def test_metric_names_that_mlflow_takes(name: str, allowed: str) -> None:
    assert metric_name(name) == allowed


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": [1, 2]}) == {"a.b.c": 1, "a.d": None, "e": [1, 2]}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError("x"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (SystemExit(1), "FAILED"),
        (SystemExit(0), "FINISHED"),
    ],
)
def test_status_says_how_a_run_ended(error: BaseException | None, status: str) -> None:
    assert status_of(error) == status


def test_a_run_with_tags_params_and_metrics(tracker: Tracker) -> None:
    params = {"training": {"lr": 0.002, "betas": [0.9, 0.98]}, "random_seed": 0, "long": "x" * 7_000}
    with tracker.run("expert-1", "expert", expert="expert-1", source="base", params=params) as run:
        for step in range(2_500):  # more than MLflow takes in one batch
            run.log(step, {"train/loss": 1 / (step + 1)})
        run.log(2_500, {"train/loss": float("nan")})
    stored = run_of(tracker, run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "expert-1"
    assert {key: stored.data.tags[key] for key in ("role", "expert", "source")} == {
        "role": "expert",
        "expert": "expert-1",
        "source": "base",
    }
    assert stored.data.tags["mlflow.note.content"] == role_of("expert-1").note
    assert stored.data.params["training.lr"] == "0.002"
    assert stored.data.params["training.betas"] == "[0.9, 0.98]"
    points = history(tracker, run.run_id)
    assert points[:2_500] == [(step, 1 / (step + 1)) for step in range(2_500)]
    assert len(points) == 2_501
    assert not list(tracker.pending.iterdir())


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_breaks_keeps_its_metrics(tracker: Tracker, error: type[BaseException], status: str) -> None:
    run = tracker.run("seed", "seed")

    def train() -> None:
        with run:
            run.log(1, {"train/loss": 2.0})
            raise error

    with pytest.raises(error):
        train()
    assert run_of(tracker, run.run_id).info.status == status
    assert history(tracker, run.run_id) == [(1, 2.0)]


def test_resuming_logs_nothing_twice_and_takes_changed_parameters(tracker: Tracker) -> None:
    with tracker.run("dense", "dense", params={"lr": 0.1, "old": 1}) as run:
        for step in range(10):
            run.log(step, {"train/loss": float(step)})
    with tracker.run("dense", "dense", params={"lr": 0.2, "new": 3}, run_id=run.run_id) as again:
        for step in range(5, 15):  # the checkpoint was older than the last metric
            again.log(step, {"train/loss": float(step)})
    assert again.run_id == run.run_id
    assert history(tracker, run.run_id) == [(step, float(step)) for step in range(15)]
    stored = run_of(tracker, run.run_id)
    assert stored.data.params == {"lr": "0.1", "old": "1", "new": "3"}
    assert stored.data.tags["changed.lr"] == "0.2"
    assert stored.info.status == "FINISHED"


def test_a_run_that_goes_on_where_the_clock_is_an_hour_behind(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known of it is told by steps: nothing is logged twice, and the last value is that of the last step."""
    with tracker.run("dense", "dense") as run:
        for step in range(10):
            run.log(step, {"train/loss": float(step)})
    real = journal.now
    monkeypatch.setattr(journal, "now", lambda: real() - 3_600_000)
    with tracker.run("dense", "dense", run_id=run.run_id) as again:
        for step in range(5, 15):
            again.log(step, {"train/loss": float(step)})
    assert history(tracker, run.run_id) == [(step, float(step)) for step in range(15)]
    assert run_of(tracker, run.run_id).data.metrics["train/loss"] == 14


def test_resuming_a_run_that_was_deleted_starts_a_new_one(tracker: Tracker) -> None:
    with tracker.run("dense", "dense") as run:
        run.log(3, {"train/loss": 1.0})
    open_database(tracker)[0].delete_run(str(run.run_id))
    for reference in (run.run_id, "0" * 32):
        with tracker.run("dense", "dense", run_id=reference) as new:
            new.log(1, {"train/loss": 1.0})
        assert new.run_id not in (run.run_id, reference)
        assert history(tracker, new.run_id) == [(1, 1.0)]


WORKERS = """
import os, sys
from pathlib import Path
from mode.tracking.runs import Tracker
from mode.tracking.store import import_mlflow

import_mlflow()  # once for all of them: it takes seconds
children = []
for name in sys.argv[2:]:
    children.append(os.fork())
    if not children[-1]:
        with Tracker(Path(sys.argv[1]), flush_seconds=0.05).run(name, "expert", expert=name) as run:
            for step in range(150):
                run.log(step, {"train/loss": step / 2})
        sys.exit()
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def test_four_processes_on_a_fresh_database(tmp_path: Path) -> None:
    """They used to collide when the tables were made; the last line of defence, for `prepare` runs before them."""
    names = [f"expert-{number}" for number in range(4)]
    command = [sys.executable, "-c", WORKERS, str(tmp_path / "mlruns"), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tracker = Tracker(tmp_path / "mlruns")
    for name in names:
        found = latest(tracker, name)
        assert found.info.status == "FINISHED"
        assert history(tracker, found.info.run_id) == [(step, step / 2) for step in range(150)]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from mode.tracking.runs import Tracker
with Tracker(Path(sys.argv[1]), flush_seconds=60).run("seed", "seed") as run:
    print(run.run_id, flush=True)
    for step in range(5):
        run.log(step, {"train/loss": float(step)})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_logged_is_sent_by_the_next_one(tracker: Tracker) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tracker.folder)], capture_output=True, text=True, check=False
    )
    run_id = killed.stdout.strip()
    assert history(tracker, run_id) == []
    tracker.prepare()
    assert history(tracker, run_id) == [(step, float(step)) for step in range(5)]
    assert run_of(tracker, run_id).info.status == "KILLED"
    assert not list(tracker.pending.iterdir())
    with tracker.run("seed", "seed", run_id=run_id) as run:
        for step in range(3, 7):
            run.log(step, {"train/loss": float(step)})
    assert history(tracker, run_id) == [(step, float(step)) for step in range(7)]
    assert run_of(tracker, run_id).info.status == "FINISHED"


def test_sending_a_journal_again_adds_nothing(tracker: Tracker) -> None:
    """A process may die after the database took a batch and before the journal was cut."""
    with tracker.run("seed", "seed") as run:
        run.log(1, {"train/loss": 2.0})
        assert run.run_id
        [journal] = tracker.pending.glob("*.jsonl")
        header, line = vars(run.header), {"step": 1, "time": 1_700_000_000_000, "values": {"train/loss": 3.0}}
    for _ in range(2):
        journal.write_text(json.dumps({**header, "after": 0}) + "\n" + json.dumps(line) + "\n", "utf-8")
        assert tracker.send_pending() == 1
    assert history(tracker, run.run_id) == [(1, 2.0), (1, 3.0)]


def test_a_journal_that_was_cut_off_in_a_line_is_sent_up_to_it(tracker: Tracker) -> None:
    tracker.prepare()
    header = {"name": "seed", "tags": {"role": "seed"}, "params": {}}
    line = {"step": 4, "time": 1_700_000_000_000, "values": {"train/loss": 3.0}}
    (tracker.pending / "cut.jsonl").write_text(
        json.dumps(header) + "\n" + json.dumps(line) + '\n{"step": 5, "ti', "utf-8"
    )
    (tracker.pending / "empty.jsonl").write_text("", "utf-8")
    assert tracker.send_pending() == 1
    assert history(tracker, latest(tracker, "seed").info.run_id) == [(4, 3.0)]


def test_logging_does_not_wait_for_a_locked_database(tracker: Tracker, caplog: pytest.LogCaptureFixture) -> None:
    tracker.prepare()
    with tracker.run("expert-0", "expert") as run:
        run.log(0, {"train/loss": 9.0})
        assert run.run_id
        with locked(tracker.folder):  # whoever waited for it at each step would still wait when the test is given up
            for step in range(1, 200):
                run.log(step, {"train/loss": float(step)})
    assert history(tracker, run.run_id) == [(0, 9.0)] + [(step, float(step)) for step in range(1, 200)]
    assert not [record for record in caplog.records if "kept" in record.message]


def test_a_database_locked_from_beginning_to_end_loses_nothing(tracker: Tracker) -> None:
    tracker.patience = 1.0
    tracker.prepare()
    with locked(tracker.folder), tracker.run("expert-0", "expert", params={"lr": 1}) as run:
        run.log(7, {"train/loss": 1.5})
        assert run.run_id is None
    # In a training the process would end here, and the next one would send the journal.
    wait_until(lambda: latest(tracker, "expert-0") and latest(tracker, "expert-0").info.status == "FINISHED")
    found = latest(tracker, "expert-0")
    assert history(tracker, found.info.run_id) == [(7, 1.5)]
    assert found.data.params == {"lr": "1"}
    assert found.info.status == "FINISHED"


@pytest.mark.parametrize("results", [False, True])
def test_a_database_that_locks_while_a_run_is_made_has_it_once(
    tracker: Tracker, caplog: pytest.LogCaptureFixture, results: bool
) -> None:
    """A run is made in several steps; another program may lock the database between two of them."""
    run = tracker.run("expert-0", "expert", params={"lr": 0.1})
    run.header.results = results
    with closing(sqlite3.connect(tracker.folder / "mlflow.db", isolation_level=None)) as connection:
        refuse = "BEGIN SELECT RAISE(ABORT, 'database is locked'); END"
        connection.execute(f"CREATE TRIGGER refuse BEFORE INSERT ON params {refuse}")
        with run:
            run.log(1, {"train/loss": 1.5})
            wait_until(lambda: "goes on without the database" in caplog.text)
            connection.execute("DROP TRIGGER refuse")
    client, experiment = open_database(tracker)
    [found] = client.search_runs([experiment], "attributes.run_name = 'expert-0'")
    assert (found.info.run_id, found.info.status, found.data.params) == (run.run_id, "FINISHED", {"lr": "0.1"})
    assert history(tracker, run.run_id) == [(1, 1.5)]


def test_a_run_that_is_half_made_at_a_kill_is_gone_on_with(tracker: Tracker) -> None:
    header = journal.Header(name="expert-0", tags={}, params={"lr": "0.1"})
    tracker.prepare()
    with closing(sqlite3.connect(tracker.folder / "mlflow.db", isolation_level=None)) as connection:
        refuse = "BEGIN SELECT RAISE(ABORT, 'database is locked'); END"
        connection.execute(f"CREATE TRIGGER refuse BEFORE INSERT ON params {refuse}")
        killed = journal.Journal.create(tracker.pending, header)
        with pytest.raises(MlflowException, match="database is locked"):
            killed.send(tracker.store)
        killed.lock.release()
        connection.execute("DROP TRIGGER refuse")
    assert tracker.send_pending() == 1
    client, experiment = open_database(tracker)
    [found] = client.search_runs([experiment], "attributes.run_name = 'expert-0'")
    assert (found.info.status, found.data.params) == ("KILLED", {"lr": "0.1"})


def test_results_go_to_the_runs_of_their_models(tracker: Tracker, tmp_path: Path) -> None:
    runs: dict[str, str | None] = {}
    for name, role in (("dense", "dense"), ("expert-0", "expert")):
        with tracker.run(name, role) as run:  # type: ignore[arg-type]
            run.log(10, {"train/loss": 1.0})
        runs[name] = run.run_id
    ended = run_of(tracker, runs["dense"]).info.end_time
    page, plots = tmp_path / "index.html", tmp_path / "plots"
    page.write_text("<p>", "utf-8")
    plots.mkdir()
    (plots / "a.csv").write_text("x", "utf-8")
    ids = tracker.log_results(RESULTS, runs, params={"routing": {"kind": "calibrated"}}, artifacts=[page, plots])
    assert {name: ids[name] for name in runs} == runs
    for model in RESULTS.models:
        data = run_of(tracker, ids[model]).data
        assert {key: value for key, value in data.metrics.items() if key != "train/loss"} == metrics_of(RESULTS, model)
        assert data.tags["role"] == role_of(model).kind
        assert data.tags["mlflow.note.content"] == role_of(model).note
    assert run_of(tracker, runs["dense"]).info.end_time == ended
    assert run_of(tracker, ids["ensemble"]).data.params == {"routing.kind": "calibrated"}
    stored = open_database(tracker)[0].list_artifacts(str(ids["ensemble"]))
    assert sorted(artifact.path for artifact in stored) == ["index.html", "plots"]

    mean = {**PARTS["zeroshot"]["mean"], "ensemble": 0.7}
    better = Results.model_validate({**PARTS, "zeroshot": {**PARTS["zeroshot"], "mean": mean}})
    assert tracker.log_results(better, runs) == ids
    assert [value for _, value in history(tracker, ids["ensemble"], "zeroshot/mean")] == [0.6, 0.7]
    assert len(history(tracker, ids["dense"], "zeroshot/mean")) == 1

    assert tracker.log_results(better, {}) == ids  # the latest runs of these models

    other = tracker.log_results(RESULTS, {**runs, "expert-0": None})  # other experts, another ensemble
    assert other["ensemble"] != ids["ensemble"]


def test_all_arms_of_a_run_of_an_experiment_are_one_run(tracker: Tracker) -> None:
    variants = Results.model_validate({"zeroshot": {"mean": {"top-1": 0.6}, "tasks": {"chess": {"top-1": 0.6}}}})
    tags = {"experiment": "length", "run": "2x", "random_seed": "1"}
    tracker.log_arms("length-2x-1", [RESULTS, variants], params={"training.epochs": 2}, tags=tags)
    wait_until(lambda: latest(tracker, "length-2x-1") and latest(tracker, "length-2x-1").info.status == "FINISHED")
    data = latest(tracker, "length-2x-1").data
    assert data.metrics["dense/zeroshot/mean"] == metrics_of(RESULTS, "dense")["zeroshot/mean"]
    assert data.metrics["top-1/zeroshot/mean"] == 0.6
    assert not [name for name in data.metrics if "zeroshot" in name and not name.endswith("/mean")]
    assert data.params == {"training.epochs": "2"}
    assert data.tags.items() >= tags.items()
    assert data.tags["mlflow.note.content"].startswith("All arms of a run of the experiment length")


def test_compare_shows_only_parameters_that_differ(tracker: Tracker) -> None:
    with tracker.run("dense", "dense", params={"lr": 1, "same": "x", "gone": 0}) as first:
        first.log(0, {"train/loss": 2.0})
    with tracker.run("expert-0", "expert", params={"lr": 2, "same": "x"}) as second:
        second.log(0, {"train/loss": 1.0, "cost/seconds": 5.0})
    comparison = tracker.compare("dense", str(second.run_id)[:8])
    assert comparison.names == ("dense", "expert-0")
    assert comparison.runs == (first.run_id, second.run_id)
    assert comparison.params == {"gone": ("0", None), "lr": ("1", "2")}
    assert comparison.metrics == {"cost/seconds": (None, 5.0), "train/loss": (2.0, 1.0)}
    with pytest.raises(ModeError, match=r"nothing: no such run \(.*dense"):
        tracker.compare("dense", "nothing")


def next_millisecond() -> None:
    now = time.time_ns() // 10**6
    wait_until(lambda: time.time_ns() // 10**6 > now)


def test_a_name_means_its_latest_run(tracker: Tracker) -> None:
    ids = []
    for _ in range(2):
        with tracker.run("dense", "dense") as run:
            pass
        ids.append(run.run_id)
        next_millisecond()  # by which runs are ordered
    assert tracker.compare("dense", "dense").runs == (ids[1], ids[1])


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    tracker = Tracker(tmp_path / "file" / "mlruns", patience=1)
    with pytest.raises(ModeError, match="cannot"):
        tracker.prepare()
    with pytest.raises(ModeError, match="cannot write"), tracker.run("seed", "seed"):
        pass


@pytest.mark.parametrize("held", ["mlflow.lock", "pending.lock"])
def test_prepare_gives_up_on_a_lock_that_stays(tracker: Tracker, held: str) -> None:
    from filelock import FileLock

    tracker.patience = 0.1
    with FileLock(tracker.folder / held), pytest.raises(ModeError, match="does another program hold"):
        tracker.prepare()


def test_experiment_opens_as_a_table_of_models(tracker: Tracker) -> None:
    client, number = open_database(tracker)
    experiment = client.get_experiment(number)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert "zeroshot/mean" in experiment.tags["mlflow.note.content"]
