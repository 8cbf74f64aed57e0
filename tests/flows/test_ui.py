"""`make ui` where it cannot start."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from flows.ui import free_port, main


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
