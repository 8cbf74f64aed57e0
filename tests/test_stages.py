"""What the environment may ask of a stage, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from mode.errors import ModeError
from mode.stages import run_stage

PARAMS = Path(__file__).parent.parent / "params.yaml"


@pytest.mark.parametrize(
    ("variables", "stage", "message"),
    [
        ({"WORLD_SIZE": "2"}, ("embed", "base"), "stage embed is no training .torchrun is for seed, dense"),
        ({"MODE_PROCESSES": "0"}, ("seed", None), "MODE_PROCESSES: Input should be greater than 0, not 0"),
        ({"MODE_PROCESSES": "2", "MODE_DEVICE": "cuda:1"}, ("seed", None), "2 processes, but one device, cuda:1"),
        ({"MODE_NODES": "2"}, ("seed", None), "machine.nodes: 2 machines, but this is no job that has them"),
        ({"MODE_LAUNCH": "pbs"}, ("seed", None), "MODE_LAUNCH"),
        ({"MODE_LAUNCH": "slurm"}, ("expert", "../docs"), "no expert is called"),
        ({"MODE_LAUNCH": "slurm", "MODE_SLURM": "{partition: a b}"}, ("seed", None), "MODE_SLURM: .*not 'a b'"),
        ({}, ("seed", "base"), "stage seed takes no key"),
        ({}, ("embed", None), "stage embed needs a key"),
        ({}, ("sow", None), "no stage is called 'sow'"),
    ],
)
def test_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    stage: tuple[str, str | None],
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ModeError, match=message):
        run_stage(*stage, tmp_path, PARAMS)
    assert list(tmp_path.iterdir()) == []
