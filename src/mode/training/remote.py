"""Copies of a training's checkpoints where they outlive the machine: at a URL that fsspec knows.

A copy is a tar of what a training goes on from (the checkpoint, its curve, its run in MLflow ...), and beside it a note
of its size and SHA-256, written last: a copy without one is unfinished, and one that differs from it is passed over.
Copies of a training lie in a folder that its fingerprint names, so that one address serves many projects.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import re
import shutil
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from mode.data.shards.places import filesystem_of, patiently
from mode.errors import ModeError
from mode.files import sha256_of, write_aside
from mode.parallel import Threads

log = logging.getLogger(__name__)

#: A note, or the tar that it is of.
_COPY = re.compile(r"step-(\d{1,12})\.(json|tar)")
#: Bytes that are read and written at once.
_AT_ONCE = 8 * 2**20
#: Largest note, in bytes: there is a line in it.
_NOTE = 4096


class RemoteCheckpoints:
    """The copies of one training's checkpoints.

    What fails here ends no training: it is a warning, and the next checkpoint is another attempt.

    Args:
        url: of all copies; fsspec has to know it, and finds credentials where its libraries look for them.
        name: of the model.
        fingerprint: of the training.
        minutes: between two copies.
        keep: how many stay.
    """

    def __init__(self, url: str, name: str, fingerprint: str, minutes: float, keep: int) -> None:
        self.url = f"{url.rstrip('/')}/{name}/{fingerprint[:12]}"
        self._name, self._seconds, self._keep = name, minutes * 60, keep
        self._threads = Threads(1, "checkpoint copies")  # a process that ends waits for none
        self._under_way: Future[None] | None = None
        self._last = time.monotonic()

    def fetch(self, folder: Path) -> int | None:
        """Put the newest whole copy in the place of `folder`; returns its step, None if there is none.

        Raises:
            ModeError: the address cannot be asked, or the copies there are all damaged: to begin anew would cost what
                they were made for.
        """
        steps = self._steps()
        for step in reversed(steps):
            try:
                with write_aside(folder) as temporary:
                    temporary.mkdir()
                    self._unpack(step, temporary)
            except (ModeError, OSError, tarfile.TarError, ValueError) as error:
                log.warning("%s: copy of step %d: %s", self._name, step, error)
            else:
                return step
        if steps:
            raise ModeError(f"{self.url}: {len(steps)} copies of checkpoints, none whole", "remove them to start again")
        return None

    def offer(self, folder: Path, step: int) -> None:
        """Begin to copy the checkpoint just written in `folder`, if it is time and the last copy is done.

        The copy is made beside the training, of the files as they are now.
        """
        busy = self._under_way is not None and not self._under_way.done()
        if not busy and time.monotonic() - self._last >= self._seconds:
            self._begin(folder, step)

    def finish(self, folder: Path, step: int, until: float = math.inf) -> None:
        """Copy the last checkpoint of a training that is being stopped, after the copy that is under way.

        Args:
            folder: of the checkpoint.
            step: that it is of.
            until: when to return, in seconds of `time.monotonic`; default: when it is there. What is not there by then
                is no copy, for it has no note, and the one before stands.
        """
        self._begin(folder, step)
        try:
            self._wait(max(0.0, until - time.monotonic()))
        except TimeoutError:
            log.warning("%s: no time was left to copy step %s (machine.stop_seconds)", self._name, f"{step:,}")

    def catch_up(self) -> None:
        """Have the next checkpoint copied at once: what lies here may be newer than any copy."""
        self._last = -math.inf

    def clear(self) -> None:
        """Remove all copies of a training that is done."""
        self._wait()
        try:
            filesystem, path = filesystem_of(self.url)
            if patiently(self.url, lambda: filesystem.exists(path)):
                patiently(self.url, lambda: filesystem.rm(path, recursive=True))
        except (ModeError, OSError) as error:
            log.warning("%s: its copies of checkpoints stay: %s", self._name, error)

    def _begin(self, folder: Path, step: int) -> None:
        names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        # What is hidden is being written, and moved into place later.
        whole = [name for name in names if not any(part.startswith(".") for part in name.parts)]
        files = [(name, (folder / name).open("rb")) for name in whole]
        self._under_way = self._threads.submit(partial(self._copy, files, step))

    def _wait(self, seconds: float = math.inf) -> None:
        if self._under_way is not None:
            self._under_way.result(None if math.isinf(seconds) else seconds)

    def _copy(self, files: Sequence[tuple[Path, IO[bytes]]], step: int) -> None:
        """Write a copy, then its note, then remove older ones. What goes wrong is logged."""
        try:
            filesystem, path = filesystem_of(self.url)
            patiently(self.url, lambda: filesystem.makedirs(path, exist_ok=True))
            note = patiently(self.url, lambda: _write_tar(filesystem, f"{path}/step-{step}.tar", files))
            patiently(self.url, lambda: filesystem.pipe_file(f"{path}/step-{step}.json", json.dumps(note).encode()))
            self._remove_older(step)
            self._last = time.monotonic()  # of one that was made: what failed is tried again with the next checkpoint
        except (ModeError, OSError) as error:
            log.warning("%s: step %d was not copied: %s", self._name, step, error)
        finally:
            for _, file in files:
                file.close()

    def _remove_older(self, step: int) -> None:
        """Remove copies beyond those that are kept, and what one that was cut short before `step` has left."""
        filesystem, path = filesystem_of(self.url)
        there = self._there()
        first = min(sorted(there["json"])[-self._keep :], default=0)
        cut = {each for each in there["tar"] - there["json"] if each < step}
        for suffix in ("json", "tar"):  # the note first: without it, it is no copy
            for old in sorted(each for each in there[suffix] if each < first or each in cut):
                patiently(self.url, partial(filesystem.rm_file, f"{path}/step-{old}.{suffix}"))

    def _steps(self) -> list[int]:
        """Steps of the copies that have a note, in order."""
        return sorted(self._there()["json"])

    def _there(self) -> dict[str, set[int]]:
        """Steps of which there is a note (`json`), and of which there is a tar (`tar`)."""
        filesystem, path = filesystem_of(self.url)
        there: dict[str, set[int]] = {"json": set(), "tar": set()}
        with suppress(FileNotFoundError):
            for name in patiently(self.url, lambda: filesystem.ls(path, detail=False, refresh=True)):
                if match := _COPY.fullmatch(str(name).rpartition("/")[2]):
                    there[match[2]].add(int(match[1]))
        return there

    def _unpack(self, step: int, folder: Path) -> None:
        """Write the files of a copy into `folder`. What is in a copy is believed only if its checksum is right."""
        filesystem, path = filesystem_of(self.url)
        note = json.loads(patiently(self.url, lambda: filesystem.cat_file(f"{path}/step-{step}.json", 0, _NOTE)))
        if not isinstance(note, dict) or set(note) != {"sha256", "bytes"}:
            raise ModeError("its note is damaged")
        local = folder / "copy.tar"
        patiently(self.url, lambda: filesystem.get_file(f"{path}/step-{step}.tar", str(local)))
        if {"sha256": sha256_of(local), "bytes": local.stat().st_size} != note:
            raise ModeError("is damaged, its checksum is another one")
        # One by one: `extractall` can refuse what lies outside from Python 3.11.4 on, and Debian 12 has 3.11.2.
        with tarfile.open(local, "r:") as tar:
            for member in tar:
                target = (folder / member.name).resolve()
                content = tar.extractfile(member) if member.isfile() else None
                if content is None or not target.is_relative_to(folder.resolve()):
                    raise ModeError(f"has {member.name}, which is no file of a checkpoint")
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, target.open("xb") as file:
                    shutil.copyfileobj(content, file)
        local.unlink()


def _write_tar(filesystem: Any, path: str, files: Sequence[tuple[Path, IO[bytes]]]) -> dict[str, object]:
    """Write open files into a tar; returns its size and checksum."""
    with filesystem.open(path, "wb", block_size=_AT_ONCE) as target:
        sums = _Summed(target)
        with tarfile.open(fileobj=sums, mode="w|", bufsize=_AT_ONCE) as tar:
            for name, file in files:
                file.seek(0)
                member = tarfile.TarInfo(name.as_posix())
                member.size = file.seek(0, io.SEEK_END)
                file.seek(0)
                tar.addfile(member, file)
    return {"sha256": sums.digest.hexdigest(), "bytes": sums.size}


class _Summed(io.RawIOBase):
    """A file to write to that keeps count of what went through."""

    def __init__(self, target: IO[bytes]) -> None:
        self._target, self.digest, self.size = target, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.digest.update(content)
        self.size += len(content)
        return self._target.write(content)
