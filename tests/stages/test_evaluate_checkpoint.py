"""One model, unfinished or not, on the project's tasks: `mode evaluate --checkpoint`."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from mode.cli import main
from mode.evaluation.evaluate import evaluate_tasks
from mode.params import MachineParams, load_params
from mode.roles import SEED
from mode.stages.evaluation import evaluate_checkpoint
from mode.stages.project import Project
from mode.stages.training import training_of
from mode.training.checkpoint import open_checkpoint
from mode.training.loop import Interrupted, train
from tests.stages.test_beside import MODEL, root
from tests.stages.test_training import PARAMS

__all__ = ["root"]

TASKS = ["data/tasks/chess", "data/tasks/dice"]


@pytest.fixture(scope="module")
def stopped(root: Path) -> Path:
    """A project whose seed was interrupted after five of its eight steps: the checkpoint."""
    (root / "params.yaml").write_text(yaml.safe_dump({**PARAMS, "model": MODEL, "image": {"size": 32}}))
    (root / "data/tasks/tasks.json").write_text(json.dumps(TASKS))
    training = training_of(Project(root, load_params(root / "params.yaml")), SEED)

    def interrupt(step: int, _: dict[str, float]) -> None:
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    folder = root / "checkpoints/seed" / training.fingerprint[:12]
    with pytest.raises(Interrupted):
        train(training, root, MachineParams(device="cpu"), folder, interrupt, log_every=1)
    return folder / "checkpoint.safetensors"


@pytest.fixture(autouse=True)
def _inside(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def test_a_checkpoint_has_the_figures_of_its_model(stopped: Path) -> None:
    clip, step = open_checkpoint(stopped)
    assert step == 5
    wanted = evaluate_tasks({"x": clip}, None, [Path(task) for task in TASKS], MachineParams(device="cpu"))
    for given in (stopped, stopped.parent):
        found = evaluate_checkpoint(given, [], Path("params.yaml"), "cpu")
        assert {
            task: {"x": figures["step 5"]} for task, figures in found.zeroshot.tasks.items()
        } == wanted.zeroshot.tasks


def test_the_command_prints_a_table_of_any_model_folder(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mode.clip.model import save_model

    clip, _ = open_checkpoint(stopped)
    save_model(tmp_path / "kept/500", clip, {})
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--checkpoint", str(tmp_path / "kept/500"), "--tasks", TASKS[0], "--device", "cpu"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "500" in printed
    assert "chess" in printed
    assert "dice" not in printed


def copied(stopped: Path, folder: Path) -> Path:
    shutil.copytree(stopped.parent, folder)
    return folder / stopped.name


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *map(str, arguments)])
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


def test_bad_input_is_one_line(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither a model folder nor a checkpoint" in fails(capsys, "--checkpoint", "nowhere")
    assert "neither a model folder nor a checkpoint" in fails(capsys, "--checkpoint", "data")
    assert "no --suite" in fails(capsys, "--checkpoint", stopped, "--suite", "clip26")

    alone = copied(stopped, tmp_path / "alone")
    shutil.rmtree(alone.parent / "model")
    assert f"{alone.parent / 'model'}: missing" in fails(capsys, "--checkpoint", alone)

    cut = copied(stopped, tmp_path / "cut")
    cut.write_bytes(cut.read_bytes()[:-100])
    assert str(cut) in fails(capsys, "--checkpoint", cut)

    with_code = copied(stopped, tmp_path / "code")
    (with_code.parent / "model/run.py").write_text("print('planted')")
    assert f"{with_code.parent / 'model/run.py'}: a model folder with code" in fails(capsys, "--checkpoint", with_code)

    other = copied(stopped, tmp_path / "other")
    config = other.parent / "model/open_clip_config.json"
    content = json.loads(config.read_text())
    content["model_cfg"]["embed_dim"] = 8
    config.write_text(json.dumps(content))
    assert f"{other.parent / 'model'}: open_clip cannot open it" in fails(capsys, "--checkpoint", other)
