"""Progress where there is no terminal."""

from __future__ import annotations

import io
import os

from mode.progress import Progress


def test_a_log_gets_a_line_with_rate_and_figures() -> None:
    log = io.StringIO()
    with Progress("index", total=1200, unit="shards", stream=log) as bar:
        bar.update(1200, bad=3)
    [line] = log.getvalue().splitlines()
    assert line.startswith("index: 1,200 of 1,200 shards, ")
    assert line.endswith(" shards/s, bad 3")


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
