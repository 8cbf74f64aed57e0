"""Checkpoints: what is damaged, or says nonsense, is refused in one line and never resumed from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mode.errors import ModeError
from mode.training.checkpoint import (
    RunState,
    check_checkpoint,
    load_branch_state,
    load_checkpoint,
    save_branch_state,
    save_checkpoint,
)
from tests.bits import flipped


def trained() -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, *trained(), RunState(7, [0.5], [0.25, 0.5], 1.5, 2), "fingerprint")
    return path


def test_saved_and_resumed(checkpoint: Path) -> None:
    assert check_checkpoint(checkpoint)
    (model, optimizer), (other, fresh) = trained(), trained()
    nn.init.zeros_(other.weight)
    fresh.state.clear()
    state = load_checkpoint(checkpoint, other, fresh, "fingerprint")
    assert state == RunState(7, [0.5], [0.25, 0.5], 1.5, 2)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(fresh.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])


def test_a_flipped_bit_is_one_line(checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    for bit in np.random.default_rng(0).choice(8 * len(whole), 200, replace=False).tolist():
        checkpoint.write_bytes(flipped(whole, bit))
        with pytest.raises(ModeError, match=r"checkpoint\.safetensors: ") as refused:
            load_checkpoint(checkpoint, *trained(), "fingerprint")
        assert "\n" not in str(refused.value)
        with pytest.raises(ModeError):
            check_checkpoint(checkpoint)


def rewrite(path: Path, **metadata: str | None) -> None:
    """Other metadata, and no checksum: as an older version, or a stranger, might have it."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        record = file.metadata()
    record = json.loads(record["record"]) if "record" in record else record
    before = {key: value for key, value in record.items() if key != "sha256"}
    save_file(tensors, path, {key: value for key, value in (before | metadata).items() if value is not None})


STATE = {"step": 7, "losses": [], "recent": [0.5], "seconds": 1.0, "bad_images": 0}


@pytest.mark.parametrize(
    "state",
    [None, "", "[]", "7", "{}"]
    + [json.dumps({**STATE, **wrong}) for wrong in (
        {"step": -1}, {"step": 1.5}, {"step": None}, {"step": "7"}, {"bad_images": -1}, {"seconds": -1.0},
        {"seconds": float("nan")}, {"losses": [float("inf")]}, {"recent": ["x"]}, {"recent": None}, {"more": 1})],
)  # fmt: skip
def test_a_state_that_is_missing_or_nonsense_is_refused(checkpoint: Path, state: str | None) -> None:
    rewrite(checkpoint, state=state)
    with pytest.raises(ModeError, match="says nothing sound of how far the training was"):
        load_checkpoint(checkpoint, *trained(), "fingerprint")


def test_one_of_an_older_version_is_resumed(checkpoint: Path) -> None:
    rewrite(checkpoint, state=json.dumps(STATE))
    assert load_checkpoint(checkpoint, *trained(), "fingerprint").step == 7
    assert not check_checkpoint(checkpoint)


@pytest.mark.parametrize("record", ["", "[]", "3", '{"step": 7}', "[" * 100_000])
def test_a_record_that_is_none_is_refused(checkpoint: Path, record: str) -> None:
    with safe_open(checkpoint, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, checkpoint, {"record": record})
    with pytest.raises(ModeError, match="its metadata cannot be read"):
        load_checkpoint(checkpoint, *trained(), "fingerprint")


def test_any_process_writes_the_same_bytes(tmp_path: Path) -> None:
    """Models that others branch from are compared by their bytes."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.training.test_checkpoint import trained
from mode.training.checkpoint import save_branch_state
save_branch_state(Path(sys.argv[1]), *trained(), 7)
"""
    files = [tmp_path / str(number) for number in range(2)]
    started = [subprocess.Popen([sys.executable, "-c", program, str(file)]) for file in files]
    assert [process.wait() for process in started] == [0] * 2
    assert len({file.read_bytes() for file in files}) == 1


def test_another_model_is_refused_in_one_line(checkpoint: Path) -> None:
    other = nn.Linear(4, 4)
    with pytest.raises(ModeError, match="does not fit the model") as refused:
        load_checkpoint(checkpoint, other, torch.optim.AdamW(other.parameters()), "fingerprint")
    assert "\n" not in str(refused.value)


def test_branch_state_without_or_with_another_step(tmp_path: Path) -> None:
    path = tmp_path / "branch_state.safetensors"
    save_branch_state(path, *trained(), 7)
    load_branch_state(path, *trained(), 7)
    changes: list[dict[str, Any]] = [{"step": None}, {"step": "-7"}, {"step": "x"}]
    for change in changes:
        rewrite(path, **change)
        with pytest.raises(ModeError, match="branches off at 7"):
            load_branch_state(path, *trained(), 7)
