"""Waiting for a state rather than for a time: a busy machine may take as long as it likes."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable

#: Seconds without progress after which a test gives up; no test depends on how much of them passes.
LONG = 1000.0


def wait_until(
    condition: Callable[[], object],
    describe: Callable[[], object] = str,
    progress: Callable[[], object] = lambda: None,
    seconds: float = LONG,
) -> None:
    """Return as soon as `condition` holds.

    Args:
        condition: asked often at first, then twice a second.
        describe: what the failure says.
        progress: what tells steps of the way apart; the time counts from its last change.
        seconds: without progress, until it fails.
    """
    pause, at, deadline = 0.02, progress(), time.monotonic() + seconds
    while not condition():
        if (now := progress()) != at:
            at, deadline = now, time.monotonic() + seconds
        if time.monotonic() > deadline:
            raise AssertionError(f"no progress for {seconds} s: {textwrap.shorten(str(describe()), 4000)}")
        time.sleep(pause)
        pause = min(0.5, 1.2 * pause)
