"""Progress where there is no terminal."""

from __future__ import annotations

import contextlib
import io
import os

import pytest

from mode import progress
from mode.progress import Progress


def test_a_log_gets_a_line_with_rate_and_figures() -> None:
    log = io.StringIO()
    with Progress("index", total=1200, unit="shards", stream=log) as bar:
        bar.update(1200, bad=3)
    [line] = log.getvalue().splitlines()
    assert line.startswith("index: 1,200 of 1,200 shards, ")
    assert line.endswith(" shards/s, bad 3")


def test_time_of_something_else_is_no_part_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    bar = Progress("train", stream=io.StringIO())
    clock[0] = 110.0
    bar.update(50)
    bar.leave_out(100.0)
    assert bar.rate == 5.0


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    with Progress("index", unit="shards", stream=log) as bar:
        bar.update(1)
        assert log.getvalue() == ""
        monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
        bar.update(1)
        assert log.getvalue().startswith("index: 2 shards, ")


def test_what_an_earlier_run_has_done_is_counted_but_not_into_the_rate() -> None:
    log = io.StringIO()
    with Progress("train", total=1000, unit="samples", done=990, stream=log):
        pass
    assert log.getvalue() == "train: 990 of 1,000 samples, 0.00 samples/s\n"


def test_a_terminal_gets_a_bar() -> None:
    """A pseudo-terminal, as a shell gives one."""
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal, Progress("index", total=3, unit="shards", stream=terminal) as bar:
        bar.update(3, bad=1)
    said = b""
    with contextlib.suppress(OSError):  # its end: nobody has it open for writing any more
        while part := os.read(reader, 65_536):
            said += part
    os.close(reader)
    assert b"3/3" in said
    assert b"shards/s, bad 1" in said


def test_work_goes_on_when_nobody_reads_its_progress() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(os.dup(writer), "wb", buffering=0) as file:
        stream = io.TextIOWrapper(file, write_through=True)
        with Progress("index", stream=stream) as bar:
            bar.update(1)
        assert bar.done == 1
        stream.detach()
    os.close(writer)
