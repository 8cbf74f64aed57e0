"""What every race has in common: sides in processes of their own, taking turns; medians; targets; a record.

A race has two or more sides that do the same work; the first is this project. Each side lives in one process of its
own, so that its peak memory is its own, prepares itself (imports, opening files, building a model: not timed) and then
runs when it is told to. The sides take turns, so that whatever else the machine does meets all of them; the first round
warms up caches and does not count.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mode.processes import die_with_parent

#: `quick` is for the tests, `large` for a machine and a night of one's own.
Size = Literal["quick", "full", "large"]
#: Does the work once; returns figures about what came out (and may return `seconds` where it times only a part).
Run = Callable[[], dict[str, Any]]

#: Seconds after which a side is given up.
LIMIT = 900


@dataclass(frozen=True)
class Input:
    """What a side is prepared with.

    Attributes:
        folder: inputs of the race, and room for what a side writes.
        photos: folder of photographs to use in place of made ones, if any.
        device: `cpu`, or `cuda` for the races that need a GPU.
    """

    folder: Path
    size: Size
    photos: Path | None = None
    device: str = "cpu"


#: Prepares a side: a function of a module, so that another process can find it.
Prepare = Callable[[Input], Run]


@dataclass(frozen=True)
class Outcome:
    """What a side did.

    Attributes:
        seconds: of each timed run.
        cpu_seconds: median processor time of a run, all threads and worker processes together.
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
    """What is to be reached: `text` says it in words; what is measured has to be at least the goal, or `at_most`."""

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
        return {"target": self.text, "value": value, "met": value <= self.goal if self.at_most else value >= self.goal}


@dataclass(frozen=True)
class Race:
    """The same work, done by each side.

    Attributes:
        name: unique, and what `--only` selects by (or by its group, the module's name).
        step: what is done, for people.
        sides: ways of doing it, by the tool's name; this project first.
        make: writes the inputs into the folder, in a process of its own; races with the same `inputs` share them.
        inputs: name of the inputs' folder; default the group's.
        needs_gpu: it is not run on a CPU.
        needs_gb: free disk for its inputs, in 10^9 bytes; it is not run where there is less.
        repeats: timed runs of each side at most; default as asked for. For runs that take minutes.
        compare: figures about all sides' results together, from what they wrote into the folder.
    """

    name: str
    step: str
    sides: Mapping[str, Prepare]
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
    given.folder.mkdir(parents=True, exist_ok=True)
    if race.make is not None and not (given.folder / "made").exists():
        say("making inputs")
        with _process("making inputs", given.folder / "make.log", limit=0) as call:
            call(race.make, given)
        (given.folder / "made").touch()
    outcomes = _outcomes(race, given, repeats if race.repeats is None else min(repeats, race.repeats), say)
    if race.compare:
        record.together = race.compare(given.folder)
        outcomes[next(iter(race.sides))].figures.update(record.together)  # targets see them as figures of our side
    record.sides = [{"name": name, "median": outcome.median, **vars(outcome)} for name, outcome in outcomes.items()]
    record.targets = [target.judge(outcomes) for target in race.targets]
    return record


def _outcomes(race: Race, given: Input, rounds: int, say: Callable[[str], None]) -> dict[str, Outcome]:
    """Prepare the sides, have them take turns, and ask what they used; without rounds the warm-up is what counts."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in race.sides}
    with ExitStack() as opened:
        logs = {name: given.folder / f"{name.replace('/', ' ')}.log" for name in runs}
        calls = {name: opened.enter_context(_process(name, log)) for name, log in logs.items()}
        for name, prepare in race.sides.items():
            calls[name](_prepare, prepare, given)
        for turn in range(rounds + 1):
            for name in runs if turn % 2 else reversed(runs):
                runs[name].append(calls[name](_run))
            taken = ", ".join(f"{name} {own[-1]['seconds']:.2f} s" for name, own in runs.items())
            say(f"round {turn} of {rounds}: {taken}")
        return {name: _outcome(own[1:] or own, calls[name](_memory_use)) for name, own in runs.items()}


def _outcome(runs: list[dict[str, Any]], memory: dict[str, float]) -> Outcome:
    seconds, cpu, read = ([run[key] for run in runs] for key in ("seconds", "cpu", "read"))
    used = {"cpu_seconds": statistics.median(cpu), "read_mb": statistics.median(read) / 1e6, **memory}
    return Outcome(seconds, figures=runs[-1]["figures"], **used)


@contextmanager
def _process(name: str, log: Path, limit: int = LIMIT) -> Iterator[Callable[..., Any]]:
    """Yields a function that calls others in a process of its own, the same one every time.

    What is printed there is added to `log`; a call may take `limit` seconds (0: as long as it takes).
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would carry this process's memory and threads along
    pool = ProcessPoolExecutor(1, spawn, _begin, (log,))

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return pool.submit(_call, limit, function, *arguments).result()
        except BrokenProcessPool:
            too_long = f" or took longer than {limit} s" if limit else ""
            raise RaceFailed(f"{name}: its process ended{too_long}; see {log}") from None
        except (Exception, SystemExit) as error:
            raise RaceFailed(f"{name}: {type(error).__name__}: {error}") from error

    try:
        yield call
    finally:
        # Loaders leave threads and processes behind that an ordinary exit would wait for.
        with suppress(BrokenProcessPool):
            pool.submit(os._exit, 0)
        pool.shutdown()


def _begin(log: Path) -> None:
    die_with_parent()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)


def _call(limit: int, function: Callable[..., Any], *arguments: Any) -> Any:
    signal.alarm(limit)  # ends the process, whatever it hangs in
    try:
        return function(*arguments)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        signal.alarm(0)
        sys.stdout.flush()


#: In a side's process: its `run`, and `before_mb` as in `Outcome`.
_prepared: dict[str, Any] = {}


def _prepare(prepare: Prepare, given: Input) -> None:
    _prepared["run"] = prepare(given)
    gc.collect()
    _prepared["before_mb"] = _memory("VmRSS")
    with suppress(OSError):  # forget how much memory the preparation took, where the system can (Linux)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _run() -> dict[str, Any]:
    read, cpu, started = bytes_read(), _cpu_seconds(), time.perf_counter()
    figures = _prepared["run"]()
    done = {"seconds": time.perf_counter() - started, "cpu": _cpu_seconds() - cpu, "read": bytes_read() - read}
    return {**done, "seconds": figures.pop("seconds", done["seconds"]), "figures": figures}


def _memory_use() -> dict[str, float]:
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    return {"peak_mb": _memory("VmHWM"), "before_mb": _prepared["before_mb"], "children_mb": children}


def _memory(kind: str) -> float:
    """`VmRSS` (now) or `VmHWM` (most) of this process in 10^6 bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(kind):
                return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def resident_mb() -> float:
    """Memory of this process now, in 10^6 bytes."""
    return _memory("VmRSS")


def _cpu_seconds() -> float:
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def bytes_read() -> int:
    """Bytes that this process and its finished children have asked to read, from the page cache or the disk."""
    with suppress(OSError):
        return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])
    return 0
