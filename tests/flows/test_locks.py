"""Locks end with their holders."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.locks import Lock, holder, is_held
from tests.waiting import wait_until


def test_second_taker_gets_nothing_and_learns_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.lock"
    with Lock.take(path, "the first") or pytest.fail("not free"):
        assert Lock.take(path, "the second") is None
        assert holder(path) == "the first"
        assert is_held(path)
    assert not is_held(path)


def test_shorter_name_replaces_a_longer_one(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    for name in ("a rather long name", "short"):
        lock = Lock.take(path, name)
        assert lock is not None
        lock.close()
    assert holder(path) == "short"


def test_close_twice_leaves_other_files_alone(tmp_path: Path) -> None:
    lock = Lock.take(tmp_path / "a.lock", "me")
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
    lock = Lock.take(path, "me")
    assert lock is not None
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock.descriptor])
    lock.close()
    assert is_held(path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    wait_until(lambda: not is_held(path))
