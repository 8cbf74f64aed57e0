from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mode.files import sha256_of, write_aside


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "numbers.txt"
    with write_aside(path) as temporary:
        temporary.write_text("1")
        assert not path.exists()
    assert path.read_text() == "1"
    assert names(path.parent) == ["numbers.txt"]


def test_file_and_folder_replace_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with write_aside(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
        assert names(tmp_path / "folder") == ["old"]
    assert names(tmp_path / "folder") == ["new"]
    for content in ("first", "second"):
        with write_aside(tmp_path / "file") as temporary:
            temporary.write_text(content)
    assert (tmp_path / "file").read_text() == "second"
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("existing", ["file", "folder", None])
def test_error_leaves_everything_as_it_was(tmp_path: Path, existing: str | None) -> None:
    path = tmp_path / "out"
    if existing == "file":
        path.write_text("old")
    elif existing == "folder":
        path.mkdir()
        (path / "old").write_text("old")
    before = names(tmp_path)
    with pytest.raises(KeyError), write_aside(path) as temporary:  # noqa: PT012 (the block is what is tested)
        temporary.mkdir()
        (temporary / "half").write_text("half")
        raise KeyError
    assert names(tmp_path) == before
    if existing == "folder":
        assert names(path) == ["old"]


def test_writing_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    with pytest.raises(FileNotFoundError), write_aside(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "old"


def test_suffix_is_kept_for_writers_that_look_at_it(tmp_path: Path) -> None:
    with write_aside(tmp_path / "vectors.npy") as temporary:
        np.save(temporary, np.arange(3))
    assert np.load(tmp_path / "vectors.npy").tolist() == [0, 1, 2]


def test_leftover_of_a_killed_process_is_removed_and_of_a_living_one_kept(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom mode.files import write_aside\n"
        "with write_aside(pathlib.Path(sys.argv[1])) as t:\n"
        "    t.write_text('half'); print('ready', flush=True); sys.stdin.read()\n"
    )
    path = tmp_path / "out"
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        with write_aside(path) as temporary:
            temporary.write_text("whole")
        assert len(names(tmp_path)) == 2, "a living process keeps what it is writing"
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    assert len(names(tmp_path)) == 2
    with write_aside(path) as temporary:
        temporary.write_text("whole again")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_checksum(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()
