"""Runs of an experiment under way: which is next, where it fits, and what becomes of it.

Two runs that share a training do not start side by side: the second would make what the first is about to leave in the
cache. A run that was interrupted goes on in its clone, from its checkpoints.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO

from flows.clones import environment, prepared_clone
from flows.devices import Place, stage_settings
from flows.ledger import Ledger
from flows.locks import Lock, holder, is_held, take
from flows.overrides import set_params
from flows.supervise import STOPPED, errors_in, supervised
from mode.errors import ModeError
from mode.experiments.plan import PlannedRun
from mode.parallel import cores
from mode.params import load_params
from mode.reporting.summary import duration

_STARTED = re.compile(r"^Running stage '(.+)':")
#: A run that ended so was told to stop, and goes on the next time.
_TOLD = frozenset({STOPPED, 128 + signal.SIGINT})
POLL_SECONDS = 0.3


@dataclass
class Active:
    """A run under way."""

    run: PlannedRun
    process: subprocess.Popen[str]
    locks: tuple[Lock, ...]
    began: float
    follower: threading.Thread | None = None
    tail: list[str] = field(default_factory=list)
    told: bool = False


class Runner:
    """Makes runs of one experiment.

    Args:
        ledger: of all that are planned.
        chosen: those of them to make.
        keep: leave the clones, for a look at models and pages.
    """

    def __init__(self, ledger: Ledger, chosen: Sequence[PlannedRun], keep: bool = False) -> None:
        self.ledger, self.chosen, self.keep = ledger, chosen, keep
        self.failed: dict[str, str] = {}
        self._began = time.monotonic()
        self._stopping = self._said_who = False

    def make(self, places: Sequence[Place]) -> int:
        """Make the chosen that are not done, as many side by side as there are places; returns the exit code."""
        waiting = [run for run in self.chosen if not self.ledger.is_done(run)]
        active: list[Active] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._told)
        while waiting or active:
            waiting = [run for run in waiting if not self.ledger.is_done(run)]  # one like it may have been made by now
            while not self._stopping and (run := self._next(waiting, active)) and (room := self._room(run, places)):
                waiting.remove(run)
                try:
                    active.append(self._start(run, *room, places))
                except (ModeError, OSError) as error:
                    _let_go(room[1])
                    self._fail(run, error)
            for each in [each for each in active if each.process.poll() is not None]:
                active.remove(each)
                self._finish(each)
            if waiting and not active and not self._stopping and not any(map(self.ledger.has_its_start, waiting)):
                self.failed |= {run.name: "the run that it starts from has failed" for run in waiting}
                waiting.clear()
            if waiting and not active and not self._stopping:
                self._say_who_is_before(waiting, places)
            if self._stopping:
                waiting.clear()
                for each in active:
                    self._stop(each)
            time.sleep(POLL_SECONDS)
        self.ledger.collect()
        if self._stopping:
            print("stopped: the same command goes on from here", flush=True)
            return 130
        for name, why in self.failed.items():
            print(f"failed: {name}: {why}", file=sys.stderr, flush=True)
        return 1 if self.failed else 0

    def _told(self, _number: int, _frame: object) -> None:
        if not self._stopping:
            print("\nstopping: trainings write their checkpoints ...", file=sys.stderr, flush=True)
        self._stopping = True

    def _stop(self, active: Active) -> None:
        """Tell a run to write its checkpoint and end, once."""
        if not active.told:
            active.told = True
            active.process.terminate()

    def _next(self, waiting: Sequence[PlannedRun], active: Sequence[Active]) -> PlannedRun | None:
        """The first run of which nothing is being trained just now that it could take from the cache afterwards.

        One that starts from another's model waits for that.
        """
        under_way = {key for each in active for key in each.run.trainings} - self.ledger.made()
        ready = filter(self.ledger.has_its_start, waiting)
        return next(
            (run for run in ready if not run.trainings & under_way and not is_held(self.ledger.files(run).lock)), None
        )

    def _room(self, run: PlannedRun, places: Sequence[Place]) -> tuple[Place, tuple[Lock, ...]] | None:
        """A free place, locked, and the run's own lock; None: all places are taken, or it is being made.

        Another experiment may have the same run, and be made at the same time.
        """
        who = f"{run.name}, process {os.getpid()}"
        if own := take(self.ledger.files(run).lock, who):
            for place in places:
                if slot := place.take(who):
                    return place, (own, *slot.locks)
            own.close()
        return None

    def _say_who_is_before(self, waiting: Sequence[PlannedRun], places: Sequence[Place]) -> None:
        """Say once what all runs wait for: their own locks, or places, that others have."""
        locks = [*(self.ledger.files(run).lock for run in waiting), *(lock for place in places for lock in place.locks)]
        if not self._said_who and (holders := sorted({holder(lock) for lock in locks if is_held(lock)})):
            self._said_who = True
            print(f"waiting for {', '.join(holders)}", flush=True)

    def _start(self, run: PlannedRun, place: Place, locks: tuple[Lock, ...], places: Sequence[Place]) -> Active:
        """Start a run in its place, one of these, with its locks, which its last process frees."""
        clone = prepared_clone(self.ledger.root, self.ledger.files(run), run)
        # Runs on a GPU share the cores; on the CPU, each has one.
        threads = 1 if place.device == "cpu" else max(1, cores() // len(places))
        targets = ["evaluate", "variants"] if run.params.variants.arms else ["evaluate"]
        log = self.ledger.files(run).log.open("ab", buffering=0)
        process = supervised(
            [sys.executable, "-m", "dvc", "exp", "run", "--name", run.name, *set_params(run.overrides), *targets],
            environment(clone, self.ledger.root) | stage_settings(place.settings, threads, ""),
            load_params(self.ledger.paths.params_file).machine.stop_seconds,
            [lock.fileno() for lock in locks],
            folder=clone,
            alone=True,  # Ctrl-C reaches this process alone, which tells the others
        )
        active = Active(run, process, locks, time.monotonic())
        active.follower = threading.Thread(target=self._follow, args=(active, log), daemon=True)
        active.follower.start()
        self._say(run, f"started on {place.device}")
        return active

    def _follow(self, active: Active, log: FileIO) -> None:
        """Keep a run's output in its log, and say which stage it has come to.

        What a full disk has no room for is left out: nobody else reads what the run writes, and it would wait for that
        for ever.
        """
        assert active.process.stdout is not None
        with log:
            for raw in active.process.stdout:
                with suppress(OSError):
                    log.write(raw.encode())
                line = raw.rstrip()
                active.tail = [*active.tail[-20:], line]
                if found := _STARTED.match(line):
                    self._say(active.run, found[1])

    def _finish(self, active: Active) -> None:
        """Take over what a run has made, or note why there is nothing."""
        run, code = active.run, active.process.returncode
        assert active.follower is not None
        active.follower.join()  # its last line may be the one that says why
        try:
            if self._stopping:
                return
            if code in _TOLD:
                raise ModeError("stopped from outside", "the same command goes on from here")
            if code:
                why = [f"exit code {code}", *errors_in(active.tail)][-1]
                raise ModeError(f"{why} (see {self.ledger.files(run).log})")
            self.ledger.enter(run)
            if not self.keep:
                shutil.rmtree(self.ledger.files(run).clone, ignore_errors=True)
        except (ModeError, OSError) as error:
            self._fail(run, error)
            return
        finally:
            _let_go(active.locks)
        left = sum(not self.ledger.is_done(each) for each in self.chosen)
        self._say(run, f"done in {duration(time.monotonic() - active.began)}; {left} of {len(self.chosen)} runs left")
        self.ledger.collect()

    def _fail(self, run: PlannedRun, error: Exception) -> None:
        self.failed[run.name] = str(error)
        self._say(run, f"failed: {error}")

    def _say(self, run: PlannedRun, what: str) -> None:
        print(f"{duration(time.monotonic() - self._began):>12}  {run.run} seed {run.seed}: {what}", flush=True)


def _let_go(locks: Iterable[Lock]) -> None:
    for lock in locks:
        lock.close()
