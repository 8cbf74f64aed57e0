"""Runs whose process has gone."""

from __future__ import annotations

from pathlib import Path

from flows.locks import Lock
from flows.runs import all_dead, dead_runs, forget_run
from mode.paths import Paths


def test_dead_runs_are_those_that_nobody_holds(tmp_path: Path) -> None:
    assert dead_runs(tmp_path) == []
    locks = {run: Lock.take(Paths(tmp_path).live_runs / run, run) for run in ("alive", "dead")}
    assert dead_runs(tmp_path) == []
    for run, lock in locks.items():
        assert lock is not None
        assert not all_dead(tmp_path)
        if run == "dead":
            lock.close()
    assert dead_runs(tmp_path) == ["dead"]
    assert not all_dead(tmp_path)
    forget_run(tmp_path, "dead")
    forget_run(tmp_path, "dead")
    assert dead_runs(tmp_path) == []
    alive = locks["alive"]
    assert alive is not None
    alive.close()
    assert all_dead(tmp_path)
