"""Each run's journal, a file of its own."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from mode.tracking.store import Store

log = logging.getLogger(__name__)


@dataclass
class Header:
    """First line of a journal: all that is needed to create or continue the run.

    Attributes:
        run_id: of the run, once it is known.
        made: the run was made for this journal.
        after: steps up to this one were logged by the run that is continued; `None` until it was looked up.
        results: the metrics are results, which stand at one step: those that the run has already are dropped by value.
        keeps_status: results were added to a run that is over: how it ended is not theirs to say.
    """

    name: str
    tags: dict[str, str]
    params: dict[str, str]
    description: str = ""
    run_id: str | None = None
    made: bool = False
    after: int | None = None
    results: bool = False
    keeps_status: bool = False
    started: int = field(default_factory=lambda: now())


class Journal:
    """What a run has logged and the database does not have yet: a header and lines of JSON.

    The process that writes to it holds its lock, so a journal without a holder belongs to a run that is over.
    Sending is safe to repeat: each line carries the time of its logging, and MLflow stores no point of the same run,
    metric, step, time and value twice.
    """

    def __init__(self, path: Path, header: Header, lock: FileLock, lines: list[dict[str, Any]]) -> None:
        self.path, self.header, self.lock = path, header, lock
        self.sent = False
        self._lines = lines
        self._thread_lock = threading.Lock()

    @classmethod
    def create(cls, folder: Path, header: Header) -> Self:
        """A new journal, held by this process."""
        path = folder / f"{uuid.uuid4().hex}.jsonl"
        lock = cls._lock_of(path)
        lock.acquire()
        journal = cls(path, header, lock, [])
        journal._write()
        return journal

    @classmethod
    def adopt(cls, path: Path) -> Self | None:
        """The journal of a run that is over, held by this process from now on; `None` if its run is in progress."""
        lock = cls._lock_of(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        try:
            header, *lines = read_lines(path)
            return cls(path, Header(**header), lock, lines)
        except (OSError, ValueError, TypeError):  # removed by another process in the meantime, or not a journal
            lock.release()
            if not path.exists():
                path.with_suffix(".lock").unlink(missing_ok=True)
            return None

    @property
    def over(self) -> bool:
        """Whether the journal says how the run ended."""
        return any("status" in line for line in self._lines)

    def append(self, step: int, values: dict[str, float]) -> None:
        """Note metrics."""
        self._append({"step": step, "time": now(), "values": values})

    def end(self, status: str) -> None:
        """Note that the run is over."""
        self._append({"status": status, "time": now()})

    def send(self, store: Store) -> None:
        """Bring the database up to date; raises whatever MLflow raises, and keeps what was not sent."""
        from mlflow.entities import Metric

        with self._thread_lock:
            lines = list(self._lines)
        if self.header.after is None:
            try:
                store.open_run(self.header)
            finally:
                self._drop(0)  # so that another process continues the same run, also one that is made by half
        run_id = str(self.header.run_id)
        store.log(run_id, metrics=[Metric(*point) for point in self._points(lines, store)])
        ends = [line for line in lines if "status" in line]
        for line in ends if not self.header.keeps_status else []:
            store.client.set_terminated(run_id, status=line["status"], end_time=line["time"])
        if lines:
            self._drop(len(lines))
        self.sent = bool(ends)

    def remove(self) -> None:
        """The run is over and all is sent."""
        self.path.unlink(missing_ok=True)
        self.lock.release()
        self.path.with_suffix(".lock").unlink(missing_ok=True)

    def _points(self, lines: list[dict[str, Any]], store: Store) -> Iterator[tuple[str, float, int, int]]:
        """(metric, value, time, step) of what the run does not have yet."""
        known = store.client.get_run(self.header.run_id).data.metrics if self.header.results and lines else {}
        for line in lines:
            for name, value in line.get("values", {}).items():
                seen = same(known.get(name), value) if self.header.results else line["step"] <= (self.header.after or 0)
                if not seen:
                    yield name, value, line["time"], line["step"]

    def _append(self, line: dict[str, Any]) -> None:
        with self._thread_lock:
            self._lines.append(line)
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:  # a full disk; the line is still in memory
                log.warning("MLflow: cannot write %s: %s", self.path, error.strerror)

    def _drop(self, count: int) -> None:
        """Forget the first `count` lines: they are in the database."""
        with self._thread_lock:
            del self._lines[:count]
            self._write()

    def _write(self) -> None:
        aside = self.path.with_suffix(".new")
        aside.write_text("".join(json.dumps(line) + "\n" for line in [vars(self.header), *self._lines]), "utf-8")
        aside.replace(self.path)

    @staticmethod
    def _lock_of(path: Path) -> FileLock:
        # Taken by one thread and released by another.
        return FileLock(path.with_suffix(".lock"), thread_local=False)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A journal's lines; a last one that was cut off by a kill is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def same(known: float | None, value: float) -> bool:
    """Whether a stored value is this one; NaN is itself."""
    return known is not None and (known == value or (math.isnan(known) and math.isnan(value)))


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
