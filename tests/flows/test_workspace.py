"""One flow at a time, free ports, and runs whose process has gone."""

from __future__ import annotations

import logging
import socket
import threading
from pathlib import Path

import pytest

from flows import workspace as module
from flows.locks import Lock
from flows.ui import free_port, main
from flows.workspace import FLOW_LOCK, RUNS, dead_runs, forget_run, workspace
from mode.errors import ModeError


def test_impatient_flow_is_told_who_holds_the_project(tmp_path: Path) -> None:
    other = Lock.take(tmp_path / FLOW_LOCK, "pipeline run 'quick-fox'")
    with pytest.raises(ModeError, match="held by pipeline run 'quick-fox'"), workspace(tmp_path, wait=False):
        pytest.fail("two at once")
    assert other is not None
    other.close()


def test_patient_flow_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "get_run_logger", lambda: logging.getLogger("flows"))
    other = Lock.take(tmp_path / FLOW_LOCK, "pipeline run 'quick-fox'")
    assert other is not None
    threading.Timer(0.3, other.close).start()
    with caplog.at_level(logging.INFO), workspace(tmp_path, wait=True, poll_seconds=0.05):
        assert other.descriptor < 0
    assert caplog.messages == ["waiting: this project is held by pipeline run 'quick-fox'"]


def test_project_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), workspace(tmp_path, wait=False):
        raise RuntimeError
    with workspace(tmp_path, wait=False):
        pass


def test_dead_runs_are_those_that_nobody_holds(tmp_path: Path) -> None:
    assert dead_runs(tmp_path) == []
    for run in ("alive", "dead"):
        lock = Lock.take(tmp_path / RUNS / run, run)
        assert lock is not None
        if run == "dead":
            lock.close()
    assert dead_runs(tmp_path) == ["dead"]
    forget_run(tmp_path, "dead")
    forget_run(tmp_path, "dead")
    assert dead_runs(tmp_path) == []


def test_port_in_use_is_said_with_the_option_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prefect.yaml").touch()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["--prefect-port", str(port)]) == 1
    assert capsys.readouterr().err == (
        f"error: port {port} is in use (stop what listens there, or choose another: --prefect-port N)\n"
    )
    assert free_port(0, "") > 0


def test_page_outside_a_project_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 1
    assert "no prefect.yaml" in capsys.readouterr().err
