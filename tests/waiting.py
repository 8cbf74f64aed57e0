"""Waiting for a state rather than for a time: a busy machine may take as long as it likes."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable

#: Seconds after which a test gives up; no test depends on how much of them passes.
LONG = 1000.0


def wait_until(condition: Callable[[], object], describe: Callable[[], object] = str, seconds: float = LONG) -> None:
    """Return as soon as `condition` holds; fail with what `describe` says if that takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {seconds} s: {textwrap.shorten(str(describe()), 4000)}")
        time.sleep(0.05)
