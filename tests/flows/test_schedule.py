"""Stages in order, side by side, on slots: with stages that end at once in place of DVC's."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from flows import schedule
from flows.devices import DevicePool, places_for
from flows.graph import Graph
from flows.locks import is_held
from flows.schedule import Outcome, Retries, Schedule

PIPELINE = {
    "data": [],
    "seed": ["data"],
    "dense": ["seed"],
    "expert@expert-0": ["seed"],
    "expert@expert-1": ["seed"],
    "expert@expert-2": ["seed"],
    "evaluate": ["dense", "expert@expert-0", "expert@expert-1", "expert@expert-2"],
    "report": ["evaluate"],
}


class Ended:
    """A future of a stage that runs in a thread."""

    def __init__(self, work: Any) -> None:
        self.state: State[Any] = Completed()
        self._callbacks: list[Any] = []
        self._thread = threading.Thread(target=self._run, args=(work,))

    def _run(self, work: Any) -> None:
        self.state = work()
        for callback in self._callbacks:
            callback(self)

    def add_done_callback(self, callback: Any) -> None:
        self._callbacks.append(callback)
        self._thread.start()

    def wait(self) -> None:
        """Done already when it calls back."""


class Stages:
    """Stages that write dvc.lock as DVC does, and note how they were run."""

    def __init__(self, root: Path, results: dict[str, State[Any]], same: set[str]) -> None:
        self.root, self.results, self.same = root, results, same
        self.ran: dict[str, dict[str, Any]] = {}
        self.side_by_side = 0
        self._running = 0
        self._guard = threading.Lock()

    def submit(self, stage: str, **how: Any) -> Ended:
        return Ended(lambda: self._work(stage, how))

    def _work(self, stage: str, how: dict[str, Any]) -> State[Any]:
        with self._guard:
            self.ran[stage] = how
            self._running += 1
            self.side_by_side = max(self.side_by_side, self._running)
        time.sleep(0.02)
        with self._guard:
            self._running -= 1
            if how["up_to_date"]:
                return Completed(name="Cached")
            if stage not in self.same:
                path = self.root / "dvc.lock"
                content = yaml.safe_load(path.read_text()) if path.is_file() else {"stages": {}}
                content["stages"][stage] = {"outs": [{"path": stage, "md5": str(time.monotonic_ns())}]}
                path.write_text(yaml.safe_dump(content))
        return self.results.get(stage, Completed())


class Run:
    """A schedule that has run."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.stages = Stages(root, options.get("results", {}), options.get("same", set()))
        self.places = places_for("cpu", options.get("workers", 2), 1, root)
        pipeline = Graph.of(options.get("pipeline", PIPELINE))
        stale = options.get("stale", set(pipeline.needs))
        pool = DevicePool(self.places, cores=4)
        self.outcome: Outcome = Schedule(
            root, pipeline, stale, pool, Retries(), (), self.stages.submit, engine="dask"
        ).run()  # type: ignore[arg-type]

    @property
    def really_ran(self) -> list[str]:
        return [stage for stage, how in self.stages.ran.items() if not how["up_to_date"]]


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    monkeypatch.setattr(schedule, "get_run_logger", lambda: logging.getLogger("flows"))


def test_all_stages_run_in_order(tmp_path: Path) -> None:
    run = Run(tmp_path)
    order = list(run.stages.ran)
    assert order[:2] == ["data", "seed"]
    assert order[-2:] == ["evaluate", "report"]
    assert sorted(run.outcome.done) == sorted(PIPELINE)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_as_many_side_by_side_as_there_are_places(tmp_path: Path, workers: int) -> None:
    run = Run(tmp_path, workers=workers)
    assert run.stages.side_by_side == workers
    assert not any(is_held(place.lock) for place in run.places)


def test_stage_alone_gets_all_threads_and_others_their_part(tmp_path: Path) -> None:
    ran = Run(tmp_path).stages.ran
    assert (ran["seed"]["device"], ran["seed"]["threads"]) == ("cpu", 4)
    assert {ran[stage]["threads"] for stage in ("dense", "expert@expert-0", "expert@expert-1")} == {2}
    assert (ran["data"]["device"], ran["data"]["threads"]) == ("", 0)


def test_every_stage_is_told_the_engine(tmp_path: Path) -> None:
    assert {how["engine"] for how in Run(tmp_path).stages.ran.values()} == {"dask"}


def test_nothing_runs_when_all_is_up_to_date(tmp_path: Path) -> None:
    run = Run(tmp_path, stale=set())
    assert run.really_ran == []
    assert sorted(run.outcome.cached) == sorted(PIPELINE)


def test_a_change_runs_what_comes_after_it(tmp_path: Path) -> None:
    assert Run(tmp_path, stale={"expert@expert-1"}).really_ran == ["expert@expert-1", "evaluate", "report"]


def test_a_stage_that_gives_the_same_again_changes_nothing_after_it(tmp_path: Path) -> None:
    assert Run(tmp_path, stale={"data"}, same={"data"}).really_ran == ["data"]


@pytest.mark.parametrize("state", [Failed(message="no luck"), Cancelled(message="stopped")])
def test_a_lost_expert_stops_nobody(tmp_path: Path, state: State[Any]) -> None:
    outcome = Run(tmp_path, results={"expert@expert-1": state}).outcome
    assert outcome.lost_experts == ["expert-1"]
    assert outcome.fatal == {}
    assert sorted(outcome.done) == sorted(PIPELINE.keys() - {"expert@expert-1"})


def test_a_lost_expert_has_the_ensemble_evaluated_anew(tmp_path: Path) -> None:
    run = Run(tmp_path, stale={"expert@expert-1"}, same={"expert@expert-1"}, results={"expert@expert-1": Failed()})
    assert "evaluate" in run.really_ran


def test_a_failed_dense_model_lets_the_experts_finish_and_stops_the_evaluation(tmp_path: Path) -> None:
    outcome = Run(tmp_path, results={"dense": Failed(message="no luck")}).outcome
    assert outcome.fatal == {"dense": "no luck"}
    assert outcome.skipped == ["evaluate", "report"]
    assert {"expert@expert-0", "expert@expert-1", "expert@expert-2"} <= set(outcome.done)


def test_a_failed_seed_leaves_the_rest_untried(tmp_path: Path) -> None:
    outcome = Run(tmp_path, results={"seed": Failed(message="no luck")}).outcome
    assert len(outcome.skipped) == len(PIPELINE) - 2
    assert outcome.done == ["data"]


def test_empty_pipeline(tmp_path: Path) -> None:
    assert Run(tmp_path, pipeline={}).outcome == Outcome()
