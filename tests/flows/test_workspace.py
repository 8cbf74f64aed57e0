"""One flow at a time."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from flows import workspace as module
from flows.locks import Lock
from flows.workspace import workspace
from mode.errors import ModeError
from mode.paths import Paths
from tests.waiting import wait_until


def test_impatient_flow_is_told_who_holds_the_project(tmp_path: Path) -> None:
    other = Lock.take(Paths(tmp_path).flow_lock, "pipeline run 'quick-fox'")
    with pytest.raises(ModeError, match="held by pipeline run 'quick-fox'"), workspace(tmp_path, wait=False):
        pytest.fail("two at once")
    assert other is not None
    other.close()


def test_patient_flow_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "get_run_logger", lambda: logging.getLogger("flows"))
    other = Lock.take(Paths(tmp_path).flow_lock, "pipeline run 'quick-fox'")
    assert other is not None

    def leave_once_someone_waits() -> None:
        wait_until(lambda: caplog.messages)
        other.close()

    with caplog.at_level(logging.INFO):
        threading.Thread(target=leave_once_someone_waits).start()
        with workspace(tmp_path, wait=True, poll_seconds=0.05):
            assert other.descriptor < 0
    assert caplog.messages == ["waiting: this project is held by pipeline run 'quick-fox'"]


def test_project_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), workspace(tmp_path, wait=False):
        raise RuntimeError
    with workspace(tmp_path, wait=False):
        pass
