"""Nothing to do: how long it takes to be told so."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import yaml

from benchmarks.harness import Input, Race, Run, Target

#: Stages of the toy project: as many as a mixture of sixteen experts has.
STAGES = {"quick": 3, "full": 30, "large": 100}
DVC = [sys.executable, "-m", "dvc"]
REPRO = [*DVC, "repro"]


def _make(given: Input) -> None:
    """A toy project whose stages depend on parameters, files and each other, all up to date."""
    files = ["source.txt", *(f"out-{number}.txt" for number in range(STAGES[given.size]))]
    stages = {
        f"stage-{number}": {"cmd": f"cp {source} {out}", "deps": [source], "params": ["value"], "outs": [out]}
        for number, (source, out) in enumerate(pairwise(files))
    }
    (given.folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False), encoding="utf-8")
    (given.folder / "params.yaml").write_text("value: 1\n", encoding="utf-8")
    (given.folder / "source.txt").write_text("content\n", encoding="utf-8")
    for command in (["git", "init", "-q"], [*DVC, "init", "-q"], [*DVC, "config", "core.analytics", "false"], REPRO):
        subprocess.run(command, cwd=given.folder, check=True)


def _repro(given: Input) -> Run:
    return lambda: {"nothing_to_do": int("up to date" in _printed(REPRO, given.folder))}


def _help(_: Input) -> Run:
    command = [sys.executable, "-m", "mode.cli", "--help"]
    return lambda: {"lines": len(_printed(command).splitlines())}


def _printed(command: list[str], folder: Path | None = None) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


RACES = (
    Race(
        name="repro-nothing",
        step="`dvc repro` of 30 stages with nothing to do",
        sides={"dvc repro": _repro},
        targets=(Target("at most 3 s", lambda sides: sides["dvc repro"].median, 3.0, at_most=True),),
        make=_make,
        inputs="toy",
    ),
    Race(
        name="help",
        step="`mode --help`",
        sides={"mode --help": _help},
        targets=(Target("at most 0.5 s", lambda sides: sides["mode --help"].median, 0.5, at_most=True),),
        inputs="help",
    ),
)
