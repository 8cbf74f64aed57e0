"""What every race has in common: sides in processes of their own, taking turns; medians; targets; a record.

A race has two or more sides that do the same work; the first is this project. Each side lives in one process of its
own, so that its peak memory is its own, prepares itself (imports, opening files, building a model: not timed) and then
runs when it is told to. The sides take turns, so that whatever else the machine does meets all of them; the first round
warms up caches and does not count.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

#: `quick` is for the tests, `large` for a machine and a night of one's own.
Size = Literal["quick", "full", "large"]
#: Does the work once; returns figures about what came out (and may return `seconds` where it times only a part).
Run = Callable[[], dict[str, Any]]

#: Seconds after which a side is given up.
LIMIT = 900.0


@dataclass(frozen=True)
class Input:
    """What a side is prepared with.

    Attributes:
        folder: inputs of the race, and room for what a side writes.
        size: how much to do.
        photos: folder of photographs to use in place of made ones, if any.
        device: `cpu`, or `cuda` for the races that need a GPU.
    """

    folder: Path
    size: Size
    photos: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Side:
    """One way of doing the work.

    Attributes:
        name: of the tool.
        prepare: gives the run; a function of a module, so that another process can find it.
        repeats: timed runs at most, for a peer that takes far longer than all the others; default as asked for.
    """

    name: str
    prepare: Callable[[Input], Run]
    repeats: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a side did.

    Attributes:
        seconds: of each timed run.
        cpu_seconds: median processor time of a run, all threads and worker processes together: what is left of the
            comparison on a machine that does other things as well.
        peak_mb: most resident memory of the process during its runs (imports and inputs included).
        before_mb: resident memory before the first run.
        children_mb: most resident memory of one of its own worker processes.
        read_mb: bytes that the process asked the system to read in one run, in 10^6 (all `read` calls, cached or not).
        figures: what the last run returned.
    """

    seconds: list[float]
    cpu_seconds: float
    peak_mb: float
    before_mb: float
    children_mb: float
    read_mb: float
    figures: dict[str, Any]

    @property
    def median(self) -> float:
        """Median of the timed runs."""
        return statistics.median(self.seconds)


Outcomes = Mapping[str, Outcome]


@dataclass(frozen=True)
class Target:
    """What is to be reached.

    Attributes:
        text: the target in words.
        measure: the figure, from all sides.
        goal: what it has to be ...
        at_most: ... at most, or else at least.
    """

    text: str
    measure: Callable[[Outcomes], float]
    goal: float
    at_most: bool = False

    def judge(self, outcomes: Outcomes) -> dict[str, Any]:
        """The target with what was measured, and whether that is enough."""
        try:
            value = float(self.measure(outcomes))
        except KeyError as missing:
            return {"target": self.text, "value": None, "met": None, "why": f"no {missing}"}
        met = value <= self.goal if self.at_most else value >= self.goal
        return {"target": self.text, "value": value, "met": bool(met)}


@dataclass(frozen=True)
class Race:
    """The same work, done by each side.

    Attributes:
        name: unique, and what `--only` selects by (or by its group, the module's name).
        step: for people.
        sides: this project first.
        targets: what is to be reached.
        make: writes the inputs into the folder, in a process of its own; races with the same `inputs` share them.
        inputs: name of the inputs' folder; default the group's.
        needs_gpu: it is not run on a CPU.
        needs_gb: free disk for its inputs, in 10^9 bytes; it is not run where there is less.
        repeats: timed runs of each side at most; default as asked for. For runs that take minutes.
        compare: figures about all sides' results together, from what they wrote into the folder.
    """

    name: str
    step: str
    sides: tuple[Side, ...]
    targets: tuple[Target, ...] = ()
    make: Callable[[Input], None] | None = None
    inputs: str = ""
    needs_gpu: bool = False
    needs_gb: float = 0.0
    repeats: int | None = None
    compare: Callable[[Path], dict[str, float]] | None = None
    sizes: tuple[Size, ...] = ("quick", "full", "large")
    notes: str = ""


@dataclass
class Record:
    """A race as it is kept: see `run_race`."""

    name: str
    step: str
    sides: list[dict[str, Any]] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)
    together: dict[str, float] = field(default_factory=dict)
    notes: str = ""
    not_run: str | None = None
    load: list[float] = field(default_factory=list)


class RaceFailed(Exception):
    """A side stopped with an error, or took too long."""


def faster(ours: str, *others: str) -> Callable[[Outcomes], float]:
    """How many times as fast as the fastest of the others."""
    return lambda outcomes: min(outcomes[other].median for other in others) / outcomes[ours].median


def share_of_time(ours: str, other: str) -> Callable[[Outcomes], float]:
    """Our time over that of another."""
    return lambda outcomes: outcomes[ours].median / outcomes[other].median


def figure(side: str, name: str, over: str | None = None) -> Callable[[Outcomes], float]:
    """A figure of a side, or its ratio to the same figure of another side."""
    return lambda outcomes: outcomes[side].figures[name] / (outcomes[over].figures[name] if over else 1.0)


def run_race(race: Race, given: Input, repeats: int, say: Callable[[str], None] = lambda _: None) -> Record:
    """Run one race.

    Raises:
        RaceFailed: see there.
    """
    record = Record(race.name, race.step, notes=race.notes, load=[round(load, 2) for load in os.getloadavg()])
    if race.make is not None and not (given.folder / "made").exists():
        given.folder.mkdir(parents=True, exist_ok=True)
        say("making inputs")
        _in_process(race.make, given)
        (given.folder / "made").touch()
    workers = [_Worker(side, given) for side in race.sides]
    try:
        for worker in workers:
            worker.start()
        rounds = repeats if race.repeats is None else min(repeats, race.repeats)
        for turn in range(rounds + 1):
            for worker in workers if turn % 2 else workers[::-1]:
                if turn <= (worker.side.repeats or rounds):
                    worker.run(timed=turn > 0 or rounds == 0)
            say(f"round {turn} of {rounds}: " + ", ".join(f"{each.side.name} {each.last:.2f} s" for each in workers))
        outcomes = {worker.side.name: worker.finish() for worker in workers}
    finally:
        for worker in workers:
            worker.stop()
    record.together = race.compare(given.folder) if race.compare else {}
    for name, outcome in outcomes.items():
        if race.compare:  # targets see them as figures of our side
            outcome.figures.update(record.together if name == race.sides[0].name else {})
        record.sides.append({"name": name, "median": outcome.median, **vars(outcome)})
    record.targets = [target.judge(outcomes) for target in race.targets]
    return record


class _Worker:
    """One side's process, from here."""

    def __init__(self, side: Side, given: Input) -> None:
        self.side = side
        self._log = given.folder / f"{side.name.replace('/', ' ')}.log"
        self._messages: list[dict[str, Any]] = []
        self.last = float("nan")
        given.folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")  # a fork would carry this process's memory and threads along
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, side.prepare, given, self._log))

    def start(self) -> None:
        self._process.start()
        self._receive()

    def run(self, timed: bool) -> None:
        self._pipe.send("run")
        message = self._receive()
        self.last = message["seconds"]
        if timed:
            self._messages.append(message)

    def finish(self) -> Outcome:
        self._pipe.send("finish")
        memory = self._receive()
        return Outcome(
            seconds=[message["seconds"] for message in self._messages],
            cpu_seconds=statistics.median(message["cpu"] for message in self._messages),
            read_mb=statistics.median(message["read"] for message in self._messages) / 1e6,
            figures=self._messages[-1]["figures"],
            **memory,
        )

    def stop(self) -> None:
        if self._process.is_alive():
            with contextlib.suppress(OSError):
                self._pipe.send("stop")
            self._process.join(10)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()

    def _receive(self) -> dict[str, Any]:
        if not self._pipe.poll(LIMIT):
            raise RaceFailed(f"{self.side.name}: no answer in {LIMIT:.0f} s")
        try:
            message: dict[str, Any] = self._pipe.recv()
        except EOFError:
            raise RaceFailed(f"{self.side.name}: its process ended; see {self._log}") from None
        if "error" in message:
            raise RaceFailed(f"{self.side.name}: {message['error']}")
        return message


def _serve(pipe: Connection, prepare: Callable[[Input], Run], given: Input, log: Path) -> None:
    """A side's process: prepare, then run when told."""
    _write_to(log)
    try:
        run = prepare(given)
        gc.collect()
        before = _memory("VmRSS")
        _reset_peak()
        pipe.send({"ready": True})
        while (message := pipe.recv()) == "run":
            read, cpu, started = bytes_read(), _cpu_seconds(), time.perf_counter()
            figures = run()
            done = {"seconds": time.perf_counter() - started, "cpu": _cpu_seconds() - cpu, "read": bytes_read() - read}
            pipe.send({**done, "seconds": figures.pop("seconds", done["seconds"]), "figures": figures})
        if message == "finish":
            children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
            pipe.send({"peak_mb": _memory("VmHWM"), "before_mb": before, "children_mb": children})
            pipe.recv()
    except EOFError:
        pass
    except BaseException as error:
        traceback.print_exc()
        pipe.send({"error": f"{type(error).__name__}: {error}"})
    sys.stdout.flush()
    sys.stderr.flush()
    # Loaders leave threads and processes behind that an ordinary exit would wait for.
    os._exit(0)


def _in_process(function: Callable[[Input], None], given: Input) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_make, args=(function, given))
    process.start()
    process.join()
    if process.exitcode:
        raise RaceFailed(f"inputs could not be made; see {given.folder / 'make.log'}")


def _make(function: Callable[[Input], None], given: Input) -> None:
    _write_to(given.folder / "make.log")
    function(given)


def _write_to(log: Path) -> None:
    """Whatever tools print goes into a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)


def _memory(kind: str) -> float:
    """`VmRSS` (now) or `VmHWM` (most) of this process in 10^6 bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(kind):
                return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _reset_peak() -> None:
    """Forget how much memory the preparation took, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _cpu_seconds() -> float:
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def bytes_read() -> int:
    """Bytes that this process and its finished children have asked to read, from the page cache or the disk."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])
    return 0
