"""Stages on a disk that is full before its output is whole: one line, the old output, and the same bytes later."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from mode.errors import ModeError
from tests.killing import served
from tests.trust import tiny
from tests.trust.test_kills import contents

pytestmark = pytest.mark.e2e  # real stages

#: Stages, and the share of their output that there is room for.
STAGES = {
    ("data", "base"): 0.5,
    ("index", "base"): 0.5,
    ("embedder", None): 0.5,
    ("embed", "base"): 0.5,
    ("cluster", "base"): 0.0,
    ("assign", "base"): 0.0,
    ("expert", "expert-0"): 0.5,
    ("ensemble", None): 0.5,
    ("evaluate", None): 0.0,
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of its own of 128 MB."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def said(root: Path, name: str, key: str | None, note: Path) -> None:
    """Run a stage, and leave the line of the error that it ends with in a file on another disk."""
    try:
        tiny.stage(root, name, key)
    except ModeError as error:
        note.write_text(str(error))
        sys.exit(1)
    except OSError as error:  # as the command prints it
        note.write_text(f"{error.filename}: {error.strerror}")
        sys.exit(1)


@pytest.mark.parametrize(("name", "key"), STAGES, ids=lambda part: part or "")
def test_a_full_disk_is_one_line_and_costs_nothing(
    finished: Path, disk: Path, tmp_path: Path, name: str, key: str | None
) -> None:
    root, output, note = disk / "project", tiny.STAGES[name, key], tmp_path / "note"
    shutil.copytree(finished, root, symlinks=True, ignore=shutil.ignore_patterns("pending"))
    try:
        whole = contents(root / output)
        size = sum(path.stat().st_size for path in tiny.files_below(root / output))
        fill(disk, int(size * STAGES[name, key]))
        assert served(partial(said, root, name, key, note)) == 1
        line = note.read_text()
        assert "\n" not in line
        assert "No space left on device" in line
        assert str(root) in line
        assert contents(root / output) == whole
        (disk / "ballast").unlink()
        assert served(partial(said, root, name, key, note)) == 0, note.read_text()
        assert contents(root / output) == whole
        assert [path.name for path in root.rglob("*.tmp")] == []
    finally:
        with contextlib.suppress(FileNotFoundError):
            (disk / "ballast").unlink()
        shutil.rmtree(root)


def fill(disk: Path, room: int) -> None:
    """Leave so many bytes free, and no page more."""
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(disk).free - room, 1))
