"""SIGTERM and SIGINT as a request to stop at the next step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self


class Interrupted(Exception):
    """A training was asked to stop, and has left a checkpoint.

    Attributes:
        signal: `signal.SIGTERM` or `signal.SIGINT`.
        exit_code: 143 or 130, as a shell reports a command ended by that signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number


class Interruption:
    """Notes SIGTERM or SIGINT while it is open; a second Ctrl-C ends the process at once.

    A second SIGTERM changes nothing: those who stop a tree of processes send it to each, and again through each parent.
    Outside the main thread, where Python allows no handler, it notes nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = self.signal or number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
