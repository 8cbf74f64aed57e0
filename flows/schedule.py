"""Runs stages in DVC's order, side by side where that allows it, each on a slot of its own."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture

from flows import graph as dvc
from flows.devices import DevicePool, Slot
from flows.graph import Graph
from flows.locks import holder
from flows.stage import run_stage, stop_all

#: Groups of stages that compute with torch: each takes a device. The others only need a core or two.
ON_DEVICE = frozenset({"seed", "dense", "dense-long", "expert", "embedder", "embed", "ensemble", "evaluate"})
#: Those that train: on a CPU they divide its threads. The others are short, and give other bits with other threads.
TRAININGS = frozenset({"seed", "dense", "dense-long", "expert"})
#: Failing stages of this group do not stop what comes after them.
DISPENSABLE = frozenset({"expert"})


@dataclass
class Outcome:
    """How the stages of a run ended.

    Attributes:
        done: ran; cached: were up to date; failed: with the reason; skipped: not tried, for want of what they need.
        absent: experts that are not there and were not asked for.
    """

    done: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    @property
    def lost_experts(self) -> list[str]:
        """Experts that the ensemble has to do without, by name."""
        return sorted(
            [*self.absent, *(stage.partition("@")[2] for stage in self.failed if group(stage) in DISPENSABLE)]
        )

    @property
    def fatal(self) -> dict[str, str]:
        """Failures that others could not do without."""
        return {stage: why for stage, why in self.failed.items() if group(stage) not in DISPENSABLE}


@dataclass(frozen=True)
class Retries:
    """How often a failing stage is tried again, and after how many seconds."""

    times: int = 2
    delay: float = 5.0


def group(stage: str) -> str:
    """`expert` of `expert@expert-0`."""
    return stage.partition("@")[0]


class Schedule:
    """The stages of one flow run.

    Args:
        root: of the project.
        pipeline: stages to run, and what each needs of the others.
        stale: stages that DVC says are not up to date.
        pool: where those that compute may do so.
        retries: of every stage.
        held: locks that every stage is handed.
        runner: submits a stage and returns its future; the default is the Prefect task.
        engine: where captions are embedded and assigned; empty: as the environment says.
    """

    def __init__(
        self,
        root: Path,
        pipeline: Graph,
        stale: set[str],
        pool: DevicePool,
        retries: Retries,
        held: Iterable[int] = (),
        runner: Callable[..., PrefectFuture[Any]] | None = None,
        engine: str = "",
    ) -> None:
        self.root, self.pipeline, self.pool = root, pipeline, pool
        self.stale = set(stale)
        self.held, self.engine = tuple(held), engine
        self.outcome = Outcome()
        self._submit = runner or run_stage.with_options(retries=retries.times, retry_delay_seconds=retries.delay).submit
        self._waiting = list(pipeline.needs)
        self._changed: set[str] = set()
        self._said_waiting = False
        self._slots: dict[str, Slot | None] = {}
        self._before: dict[str, Any] = {}
        self._ended: queue.Queue[tuple[str, PrefectFuture[Any]]] = queue.Queue()

    def run(self) -> Outcome:
        """Run all stages; stages that do not need a failed one still run."""
        with ExitStack() as cleanup:
            cleanup.callback(self._free_all)
            try:
                while self._waiting or self._slots:
                    self._start_ready()
                    if self._waiting or self._slots:
                        self._await_one()
            except BaseException:
                stop_all()
                raise
        return self.outcome

    def _start_ready(self) -> None:
        for stage in list(self._waiting):
            state = self._readiness(stage)
            if state == "lost":
                self._waiting.remove(stage)
                self.outcome.skipped.append(stage)
            elif state == "ready" and len(self._slots) < len(self.pool):
                self._start(stage)

    def _readiness(self, stage: str) -> str:
        """`ready`, `waits`, or `lost`: what it needs will never be there."""
        needs = self.pipeline.needs[stage]
        if any(need in self.outcome.fatal or need in self.outcome.skipped for need in needs):
            return "lost"
        ended = {*self.outcome.done, *self.outcome.cached, *self.outcome.failed}
        return "ready" if needs <= ended else "waits"

    def _may_change(self, stage: str) -> bool:
        """Whether a stage that is ready is to be run; one that DVC called up to date is, if its input changed since."""
        return stage in self.stale or not self.pipeline.needs[stage].isdisjoint(self._changed)

    def _start(self, stage: str) -> None:
        """Start a stage, unless it needs a device and none is free."""
        computes = group(stage) in ON_DEVICE and self._may_change(stage)
        slot = self.pool.take(f"{stage} in {self.root}") if computes else None
        if computes and slot is None:
            return
        self._waiting.remove(stage)
        self._slots[stage] = slot
        self._before[stage] = dvc.results(self.root).get(stage)
        device = slot.place.device if slot else ""
        threads = self.pool.threads(alone=not self._has_company(stage)) if group(stage) in TRAININGS and slot else 0
        if slot:
            get_run_logger().info("%s runs on %s", stage, device)
        future = self._submit(
            stage=stage,
            device=device,
            threads=threads,
            held=(*self.held, slot.lock.descriptor) if slot else self.held,
            up_to_date=not self._may_change(stage),
            engine=self.engine,
        )
        future.add_done_callback(partial(self._note_end, stage))

    def _note_end(self, stage: str, future: PrefectFuture[Any]) -> None:
        self._ended.put((stage, future))

    def _has_company(self, stage: str) -> bool:
        """Whether another training runs now, or will beside this one."""
        if any(group(other) in TRAININGS and slot for other, slot in self._slots.items() if other != stage):
            return True
        ready = [other for other in self._waiting if group(other) in TRAININGS and self._readiness(other) == "ready"]
        return any(self._may_change(other) for other in ready)

    def _await_one(self) -> None:
        """Wait a little for a stage to end, and note how it did."""
        if not self._slots:
            self._say_waiting()
        try:
            stage, future = self._ended.get(timeout=0.5)
        except queue.Empty:
            return
        slot = self._slots.pop(stage)
        if slot:
            slot.lock.close()
        future.wait()  # it calls back before its last state is there
        self._note(stage, future.state)

    def _note(self, stage: str, state: State[Any]) -> None:
        before = self._before.pop(stage)
        if not state.is_completed():
            reason = state.message or state.name or "failed"
            self.outcome.failed[stage] = reason
            self._changed.add(stage)
            get_run_logger().error("%s: %s", stage, reason)
            return
        (self.outcome.cached if state.name == "Cached" else self.outcome.done).append(stage)
        if dvc.results(self.root).get(stage) != before:
            self._changed.add(stage)

    def _say_waiting(self) -> None:
        if not self._said_waiting:
            self._said_waiting = True
            held = ", ".join(f"{place.device}: {holder(place.lock)}" for place in self.pool.places)
            get_run_logger().info("waiting for a device (%s)", held)

    def _free_all(self) -> None:
        for slot in self._slots.values():
            if slot:
                slot.lock.close()
