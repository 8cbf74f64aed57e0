from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mode.errors import ModeError
from mode.files import is_there, make_room, only_writer, sha256_of, write_aside
from tests.killing import KILL, end_at


def cannot_exchange(one: Path, other: Path) -> bool:
    """As on a file system such as NFS."""
    return False


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


@pytest.mark.parametrize(("umask", "usual"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_are_as_readable_as_the_umask_lets_them_be(tmp_path: Path, umask: int, usual: int) -> None:
    """Safetensors lets only the owner read what it writes; a script's own right to be run stays."""
    before = os.umask(umask)
    try:
        with write_aside(tmp_path / "folder") as temporary:
            (temporary / "below").mkdir(parents=True)
            save_file({"weight": np.zeros(1)}, temporary / "below" / "model.safetensors")
            (temporary / "run.sh").touch(0o700)
        with write_aside(tmp_path / "file.safetensors") as temporary:
            save_file({"weight": np.zeros(1)}, temporary)
    finally:
        os.umask(before)
    paths = (tmp_path / "folder" / "below" / "model.safetensors", tmp_path / "file.safetensors")
    assert [path.stat().st_mode & 0o777 for path in paths] == [usual, usual]
    assert (tmp_path / "folder" / "run.sh").stat().st_mode & 0o777 == usual | 0o700
    assert names(tmp_path) == ["file.safetensors", "folder"]


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


def shapes(parent: Path) -> dict[str, Path]:
    """What may be at a path before: nothing, a file, a folder, links to them as DVC makes them, a link to nothing."""
    cache = parent / "cache"
    (cache / "folder").mkdir(parents=True)
    (cache / "folder/old").write_text("cached")
    (cache / "file").write_text("cached")
    made = {kind: parent / kind / "out" for kind in ("nothing", "file", "folder", "link", "folder link", "dangling")}
    for path in made.values():
        path.parent.mkdir()
    made["file"].write_text("old")
    made["folder"].mkdir()
    (made["folder"] / "old").write_text("old")
    made["link"].symlink_to(cache / "file")
    made["folder link"].symlink_to(cache / "folder")
    made["dangling"].symlink_to(cache / "gone")
    return made


def write(path: Path, kind: str) -> None:
    with write_aside(path) as temporary:
        if kind == "folder":
            temporary.mkdir()
            (temporary / "new").write_text("new")
        else:
            temporary.write_text("new")


def content(path: Path) -> str:
    return (path / "new" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_anything_is_replaced_by_anything(
    tmp_path: Path, new: str, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr("mode.files._exchange", cannot_exchange)
    for path in shapes(tmp_path).values():
        write(path, new)
        assert content(path) == "new"
        assert path.is_dir() == (new == "folder")
        assert not path.is_symlink()
        assert names(path.parent) == ["out"]
    assert (tmp_path / "cache/file").read_text() == (tmp_path / "cache/folder/old").read_text() == "cached"
    assert names(tmp_path / "cache") == ["file", "folder"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_folder(
    tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr("mode.files._exchange", cannot_exchange)
    path, both, step, code = tmp_path / "model", ("config", "weights"), 0, -1

    def write_both() -> None:
        with write_aside(path) as temporary:
            temporary.mkdir()
            for name in both:
                (temporary / name).write_text("new")

    while code:
        step += 1
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name in both:
            (path / name).write_text("old")
        code = end_at(step, "steps", KILL, write_both)
        assert code in (0, -KILL)
        assert path.is_dir() or not exchanges
        assert is_there(path)
        assert len({(path / name).read_text() for name in both}) == 1
        write_both()
        assert names(tmp_path) == ["model"]
        assert (path / "weights").read_text() == "new"
    assert step > 15


def test_a_reader_always_finds_one_of_the_two(tmp_path: Path) -> None:
    path, ended = tmp_path / "model", threading.Event()
    write(path, "folder")
    missed: list[int] = []

    def look() -> None:
        while not ended.is_set():
            if not (path / "new").is_file():
                missed.append(1)

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(100):
        write(path, "folder")
    ended.set()
    reader.join()
    assert not missed


def test_an_interrupt_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, where the file system cannot exchange."""
    path, replace = tmp_path / "model", Path.replace
    path.mkdir()
    (path / "old").write_text("old")

    def interrupted(self: Path, target: Path) -> Path:
        moved = replace(self, target)
        if target.name.endswith(".previous"):
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr("mode.files._exchange", cannot_exchange)
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, "folder")
    assert content(path) == "new"
    assert names(tmp_path) == ["model"]


def test_content_and_names_are_on_the_disk_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        steps.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write(tmp_path / "model", "folder")
    assert sorted(steps[:2]) == ["model", "new"]
    assert steps[2:] == ["rename", tmp_path.name]


def test_one_writer_at_a_time_and_the_other_is_told_who(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom mode.files import only_writer\n"
        "with only_writer(pathlib.Path(sys.argv[1]), 'models/expert-0'):\n"
        "    print('ready', flush=True); sys.stdin.read()\n"
    )
    lock = tmp_path / "locks" / "expert-0.lock"
    command = [sys.executable, "-c", code, str(lock)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        said = rf"models/expert-0 is being written by process {holder.pid} on "
        with pytest.raises(ModeError, match=said), only_writer(lock, "models/expert-0"):
            raise AssertionError
    finally:
        holder.kill()
        holder.communicate()
    with only_writer(lock, "models/expert-0"):
        pass


def test_room_is_taken_or_refused_with_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "some").write_bytes(b"some")
    make_room(tmp_path / "some", 100)
    assert (tmp_path / "some").read_bytes() == b"some" + bytes(96)
    make_room(tmp_path / "new", 8192)
    assert (tmp_path / "new").stat().st_blocks * 512 >= 8192
    make_room(tmp_path / "empty", 0)
    assert (tmp_path / "empty").read_bytes() == b""
    code = (
        "import resource, signal, sys, pathlib\nfrom mode.files import make_room\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "make_room(pathlib.Path(sys.argv[1]), 20_000)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "large")]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert re.search(r"ModeError: .*large: File too large: 20,000 bytes are needed, [\d,]+ are free", refused.stderr)
    assert not (tmp_path / "large").exists()
