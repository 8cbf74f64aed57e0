"""Progress of long work: a bar with rates on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

#: Seconds between two lines where there is no terminal (a log, DVC's or Prefect's capture).
LINE_EVERY = 10.0


class Progress:
    """Counts units of work and shows how fast they go.

    Args:
        description: what is being done, such as `index base`.
        total: units to do; `None` if unknown.
        unit: what is counted, in the plural.
        done: units that an earlier, interrupted run has done already; they do not count into the rate.
        stream: where to write; default standard error, so that results on standard output stay clean.

    Example:
        >>> with Progress("index", total=2, unit="shards") as bar:
        ...     bar.update(1)
        ...     bar.update(1, bad=3)
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        unit: str = "items",
        done: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = self._done_before = done
        self._figures: dict[str, float | str] = {}
        self._stream = stream or sys.stderr
        self._started = self._last_line = time.monotonic()
        self._bar: RichProgress | None = None
        console = Console(file=self._stream)
        if console.is_terminal:
            self._bar = RichProgress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                _RateColumn(self),
                TimeRemainingColumn(),
                console=console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(description, total=total, completed=done)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._write_line()

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self._done_before) / max(time.monotonic() - self._started, 1e-9)

    def update(self, count: int = 1, **figures: float | str) -> None:
        """Count `count` more units; `figures` (a loss, a share) are shown beside the rate."""
        self.done += count
        self._figures.update(figures)
        if self._bar:
            self._bar.update(self._task, completed=self.done)
        elif time.monotonic() - self._last_line >= LINE_EVERY:
            self._write_line()

    def leave_out(self, seconds: float) -> None:
        """Seconds in which something else was done do not count into the rate."""
        self._started += seconds

    def status(self) -> str:
        """Rate and figures, such as `1,234 pairs/s, loss 2.31`."""
        shown = [f"{self.rate:,.0f} {self.unit}/s" if self.rate >= 10 else f"{self.rate:.2f} {self.unit}/s"]
        for name, value in self._figures.items():
            shown.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        return ", ".join(shown)

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        of_total = f" of {self.total:,}" if self.total is not None else ""
        line = f"{self.description}: {self.done:,}{of_total} {self.unit}, {self.status()}\n"
        with contextlib.suppress(BrokenPipeError):  # who read it has gone; a training has still to write its checkpoint
            self._stream.write(line)
            self._stream.flush()


class _RateColumn(ProgressColumn):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        super().__init__()

    def render(self, task: Task) -> Text:  # noqa: ARG002 (rich's signature)
        return Text(self._progress.status(), style="cyan")
