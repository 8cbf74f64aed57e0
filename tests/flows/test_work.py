"""One flow at a time in a project, and what it tells its stages of the engine."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

import flows.work
from flows.devices import Machine
from flows.locks import take
from flows.work import engine_for, pools_for, work, workspace
from mode.errors import ModeError
from mode.paths import Paths
from tests.waiting import wait_until

PARAMS = """
sources: {base: {shards: glyphs}}
experts: {}
model: {name: ViT-B-32}
machine: {engine: "tcp://host:8786"}
"""


@pytest.mark.parametrize(
    ("form", "environment", "expected"),
    [("local", "dask", "local"), ("", "dask", "dask"), ("", "", "tcp://host:8786")],
)
def test_the_form_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, environment: str, expected: str
) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.setenv("MODE_ENGINE", environment)
    assert engine_for(tmp_path, Machine(engine=form)) == expected


@pytest.mark.parametrize(
    ("form", "file", "queued"),
    [("", "local", False), ("", "slurm", True), ("slurm", "local", True), ("local", "slurm", False)],
)
def test_trainings_go_where_the_form_says_or_else_params_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, file: str, queued: bool
) -> None:
    text = PARAMS.replace('machine: {engine: "tcp://host:8786"}', f"machine: {{launch: {file}}}")
    (tmp_path / "params.yaml").write_text(text)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pool, jobs = pools_for(tmp_path, Machine.model_validate({"scheduler": form, "workers": 3}))
    assert [place.device for place in pool.places] == ["cpu"] * 3
    assert [place.settings["MODE_LAUNCH"] for place in pool.places] == ["local"] * 3
    assert ([place.device for place in jobs.places] if jobs else None) == (["slurm"] * 3 if queued else None)


def test_one_machine_is_not_several(tmp_path: Path) -> None:
    with pytest.raises(ModeError, match="nodes_per_training: 2 on one machine"):
        pools_for(tmp_path, Machine(scheduler="local", nodes_per_training=2))


def test_impatient_flow_is_told_who_holds_the_project(tmp_path: Path) -> None:
    other = take(Paths(tmp_path).flow_lock, "pipeline run 'quick-fox'")
    with pytest.raises(ModeError, match="held by pipeline run 'quick-fox'"), workspace(tmp_path, wait=False):
        pytest.fail("two at once")
    assert other is not None
    other.close()


def test_patient_flow_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(flows.work, "get_run_logger", lambda: logging.getLogger("flows"))
    other = take(Paths(tmp_path).flow_lock, "pipeline run 'quick-fox'")
    assert other is not None

    def leave_once_someone_waits() -> None:
        wait_until(lambda: caplog.messages)
        other.close()

    with caplog.at_level(logging.INFO):
        threading.Thread(target=leave_once_someone_waits).start()
        with workspace(tmp_path, wait=True, poll_seconds=0.05):
            assert other.closed
    assert caplog.messages == ["waiting: this project is held by pipeline run 'quick-fox'"]


def test_project_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), workspace(tmp_path, wait=False):
        raise RuntimeError
    with workspace(tmp_path, wait=False):
        pass


def test_a_folder_without_a_pipeline_is_no_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModeError, match=r"no dvc\.yaml"), work(Machine()):
        pytest.fail("no project")


def test_a_name_that_leads_elsewhere_is_refused_before_dvc_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").write_text(PARAMS.replace("experts: {}", "experts: {../docs: {cluster: 0}}"))
    monkeypatch.setattr(flows.work.flow_run, "get_flow_name", lambda: "flow")
    with pytest.raises(ModeError, match=r"experts\.\.\./docs.*should match"), work(Machine()):
        pytest.fail("let in")
