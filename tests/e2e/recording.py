"""Runs stages under observation and says what each read: parameters, functions of `mode`, files of the project.

    python recording.py OUTPUT STAGE[@KEY]...

It is called in a finished project by `test_recording.py`, and writes what it saw as JSON. Parameters are seen where an
attribute of a section is read after params.yaml was checked; code by the functions that were called, in any thread;
files by the kernel (inotify), since much is read by libraries that Python knows nothing of.
"""

from __future__ import annotations

import cProfile
import ctypes
import json
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType
from typing import Any

import mode
from mode import params as mode_params
from mode import stages

PACKAGE = Path(mode.__file__).parent


class Parameters:
    """Which keys of params.yaml are read: `training.lr`; or a section as a whole, `training`."""

    def __init__(self) -> None:
        self.read: set[str] = set()
        self._paths: dict[int, str] = {}
        self._kept: list[object] = []  # so that no id is used twice
        self._watching = False

    def watch(self) -> None:
        """See every attribute of a section that is read from now on."""
        section, recorder = mode_params.Section, self
        get, dump, copy, load = section.__getattribute__, section.model_dump, section.model_copy, stages.load_params

        def seen_get(self: Any, name: str) -> Any:
            value = get(self, name)
            if recorder._watching and name in type(self).model_fields and not isinstance(value, section | Names):
                recorder._note(self, name)
            return value

        def seen_dump(self: Any, **given: Any) -> Any:
            fields = set(type(self).model_fields)
            for name in fields & set(given.get("include") or fields) - set(given.get("exclude") or ()):
                recorder._note(self, name)
            with recorder.paused():
                return dump(self, **given)

        def seen_copy(self: Any, **given: Any) -> Any:
            with recorder.paused():
                copied = copy(self, **given)
                recorder._enter(copied, recorder._paths.get(id(self), ""))
            return copied

        def seen_load(path: Path) -> Any:
            with recorder.paused():
                loaded = load(path)
                recorder._enter(loaded, "")
            recorder._watching = True
            return loaded

        section.__getattribute__ = seen_get  # type: ignore[method-assign]
        section.model_dump = seen_dump  # type: ignore[method-assign, assignment]
        section.model_copy = seen_copy  # type: ignore[method-assign]
        stages.load_params = seen_load

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See nothing meanwhile."""
        before, self._watching = self._watching, False
        try:
            yield
        finally:
            self._watching = before

    def note(self, key: str) -> None:
        """A key was read."""
        if self._watching:
            self.read.add(key)

    def _note(self, section: Any, name: str) -> None:
        path = self._paths.get(id(section))
        if path is not None:
            self.note(f"{path}{name}")

    def _enter(self, section: Any, path: str) -> None:
        """Learn the places of a section and of those in it."""
        self._paths[id(section)] = path
        self._kept.append(section)
        for name, value in vars(section).items():
            if isinstance(value, mode_params.Section):
                self._enter(value, f"{path}{name}.")
            elif isinstance(value, dict) and any(isinstance(each, mode_params.Section) for each in value.values()):
                vars(section)[name] = Names(value, partial(self.note, f"{path}{name}"))
                for key, each in value.items():
                    self._enter(each, f"{path}{name}.{key}.")


class Names(dict[str, Any]):
    """Sections by name: to look one up reads nothing yet, to go through all reads the whole."""

    def __init__(self, content: dict[str, Any], note: Callable[[], None]) -> None:
        super().__init__(content)
        self._note = note

    def __iter__(self) -> Iterator[str]:
        self._note()
        return super().__iter__()

    def keys(self) -> Any:
        self._note()
        return super().keys()

    def values(self) -> Any:
        self._note()
        return super().values()

    def items(self) -> Any:
        self._note()
        return super().items()

    def __len__(self) -> int:
        self._note()
        return super().__len__()


class Code:
    """Which files of `mode` have functions that are called."""

    def __init__(self) -> None:
        self._profiles: list[cProfile.Profile] = []

    def watch(self) -> None:
        """See every call, in this thread and those begun from now on."""
        threading.setprofile(self._begin)  # type: ignore[arg-type]
        self._begin()

    def _begin(self, *_event: object) -> None:
        """Python's own profiler in this thread, which is written in C: a stage takes little longer under it."""
        profile = cProfile.Profile(subcalls=False, builtins=False)
        try:
            profile.enable()
        except ValueError:  # from Python 3.12 on, where the first one sees all threads
            sys.setprofile(None)
        else:
            self._profiles.append(profile)

    def stop(self) -> None:
        """See no more; what is still under way in other threads counts as called."""
        threading.setprofile(None)  # type: ignore[arg-type]
        for profile in self._profiles:
            profile.disable()

    def read(self) -> list[str]:
        """Paths from the project folder."""
        called = {entry.code for profile in self._profiles for entry in profile.getstats()}
        # The bodies of modules and classes, which an import runs, are no functions: they are not optimised.
        functions = {code for code in called if isinstance(code, CodeType) and code.co_flags & CO_OPTIMIZED}
        files = {Path(code.co_filename) for code in functions}
        return sorted(f"src/mode/{file.relative_to(PACKAGE)}" for file in files if file.is_relative_to(PACKAGE))


class Files:
    """Which files of the project are opened, by this process or any it starts: the kernel says so."""

    OPEN, IS_FOLDER = 0x20, 0x40000000

    def __init__(self, root: Path) -> None:
        self.root = root
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK)
        self._folders: dict[int, Path] = {}
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())]:
            watch = self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), self.OPEN)
            if watch < 0:
                raise OSError(ctypes.get_errno(), "inotify_add_watch", str(folder))
            self._folders[watch] = folder

    def read(self) -> list[str]:
        """Paths from the project folder, of all files opened since the last call."""
        found = set()
        while True:
            try:
                events = os.read(self._descriptor, 2**20)
            except BlockingIOError:
                return sorted(found)
            while events:
                watch, mask, _, length = struct.unpack_from("iIII", events)
                name = os.fsdecode(events[16 : 16 + length].rstrip(b"\0"))
                events = events[16 + length :]
                if name and not mask & self.IS_FOLDER and watch in self._folders:
                    found.add(str((self._folders[watch] / name).relative_to(self.root)))


def main(output: Path, addresses: list[str]) -> None:
    """Run the stages and write what each read."""
    root = Path.cwd()
    parameters = Parameters()
    parameters.watch()
    seen = {}
    for address in addresses:
        name, _, key = address.partition("@")
        code, files = Code(), Files(root)
        parameters.read = set()
        code.watch()
        try:
            stages.run_stage(name, key or None, root, root / "params.yaml")
        finally:
            code.stop()
        seen[address] = {"params": sorted(parameters.read), "code": code.read(), "files": files.read()}
    output.write_text(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
