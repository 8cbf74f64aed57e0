"""Locks end with their holders."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.locks import all_dead, dead_runs, forget_run, holder, is_held, take
from mode.paths import Paths
from tests.waiting import wait_until


def test_second_taker_gets_nothing_and_learns_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.lock"
    with take(path, "the first") or pytest.fail("not free"):
        assert take(path, "the second") is None
        assert holder(path) == "the first"
        assert is_held(path)
    assert not is_held(path)


def test_shorter_name_replaces_a_longer_one(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    for name in ("a rather long name", "short"):
        lock = take(path, name)
        assert lock is not None
        lock.close()
    assert holder(path) == "short"


def test_close_twice_leaves_other_files_alone(tmp_path: Path) -> None:
    lock = take(tmp_path / "a.lock", "me")
    assert lock is not None
    lock.close()
    with (tmp_path / "other").open("w") as other:  # gets the same descriptor
        lock.close()
        other.write("still open")
    assert (tmp_path / "other").read_text() == "still open"


def test_missing_lock_is_free(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "none")
    assert holder(tmp_path / "none") == "unknown"


def test_child_that_was_handed_the_lock_keeps_it_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    lock = take(path, "me")
    assert lock is not None
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock.fileno()])
    lock.close()
    assert is_held(path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    wait_until(lambda: not is_held(path))


def test_dead_runs_are_those_that_nobody_holds(tmp_path: Path) -> None:
    assert dead_runs(tmp_path) == []
    locks = {run: take(Paths(tmp_path).live_runs / run, run) for run in ("alive", "dead")}
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
