"""What a stage is told of the machine."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import psutil
import pytest
import yaml
from prefect.logging import disable_run_logger

from flows import stage
from flows.devices import stage_settings
from tests.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]


def test_a_training_gets_its_share_of_threads_but_params_yaml_decides() -> None:
    settings = stage_settings({"MODE_DEVICE": "cpu"}, 3, "dask")
    assert settings["OMP_NUM_THREADS"] == "3"
    assert (settings["MODE_DEVICE"], settings["MODE_ENGINE"]) == ("cpu", "dask")
    assert "MODE_THREADS" not in settings


def test_what_is_not_given_is_left_to_params_yaml() -> None:
    assert stage_settings({}, 0, "") == {}
    assert stage_settings({"MODE_DEVICE": "cuda:1"}, 0, "") == {"MODE_DEVICE": "cuda:1"}


@pytest.mark.skipif(sys.platform != "linux", reason="a command is killed with its supervisor on Linux only")
@pytest.mark.parametrize(("environment", "seconds"), [(None, "0.25"), ("0.5", "0.5")])
def test_a_command_that_does_not_stop_has_the_seconds_of_params_yaml_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: str | None, seconds: str
) -> None:
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    params.setdefault("machine", {})["stop_seconds"] = 0.25
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.delenv("MODE_STOP_SECONDS", raising=False)
    if environment:
        monkeypatch.setenv("MODE_STOP_SECONDS", environment)
    monkeypatch.setattr(stage, "_stopping", threading.Event())
    deaf = "import os, signal, time; signal.signal(15, signal.SIG_IGN); open('pid', 'w').write('here'); time.sleep(600)"
    ended: list[BaseException] = []

    def run() -> None:
        with disable_run_logger():
            try:
                stage.run_command([sys.executable, "-c", deaf], {})
            except stage.StageStopped as stopped:
                ended.append(stopped)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: (tmp_path / "pid").is_file())
        started = [each for each in psutil.Process(os.getpid()).children() if "flows.supervise" in each.cmdline()]
        assert [each.environ()["MODE_STOP_SECONDS"] for each in started] == [seconds]
    finally:
        stage.stop_all()
    thread.join()
    assert "stopped" in str(ended[0])
    assert not started[0].is_running()
