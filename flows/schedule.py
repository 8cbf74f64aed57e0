"""Runs stages in DVC's order, side by side where that allows it, each on a slot of its own."""

from __future__ import annotations

import queue
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture

from flows.devices import DevicePool, Machine, Slot
from flows.graph import group, results
from flows.progress import ON_DEVICE, TRAININGS, Outcome, Progress
from flows.stage import run_stage, stop_all


@dataclass
class Schedule:
    """The stages of one flow run.

    Attributes:
        pool: places on this machine.
        jobs: places in the queue of a scheduler, for all trainings; None: they run on this machine.
        machine: how often stages are tried again.
        held: locks that every stage is handed.
        engine: where captions are embedded and assigned; empty: as params.yaml says.
    """

    root: Path
    progress: Progress
    pool: DevicePool
    jobs: DevicePool | None
    machine: Machine
    held: tuple[int, ...]
    engine: str
    _said_waiting: bool = False
    _slots: dict[str, Slot] = field(default_factory=dict)
    _before: dict[str, Any] = field(default_factory=dict)
    _ended: queue.Queue[tuple[str, PrefectFuture[Any]]] = field(default_factory=queue.Queue)

    def run(self) -> Outcome:
        """Run all stages; stages that do not need a failed one still run."""
        try:
            while not self.progress.ended:
                for stage in self.progress.ready():
                    if self._has_room(stage):
                        self._start(stage)
                if not self.progress.running:
                    self._say_waiting()
                with suppress(queue.Empty):
                    self._note_end(*self._ended.get(timeout=0.5))
        except BaseException:
            stop_all()
            raise
        finally:
            for slot in self._slots.values():
                slot.free()
        return self.progress.outcome

    def _pool_of(self, stage: str) -> DevicePool:
        return self.jobs if self.jobs and group(stage) in TRAININGS else self.pool

    def _has_room(self, stage: str) -> bool:
        pool = self._pool_of(stage)
        return sum(self._pool_of(other) is pool for other in self.progress.running) < len(pool.places)

    def _start(self, stage: str) -> None:
        """Start a stage, unless it needs a device and none is free."""
        runs, slot, pool = self.progress.may_change(stage), None, self._pool_of(stage)
        if runs and takes_device(stage, self.engine):
            slot = pool.take(f"{stage} in {self.root}")
            if slot is None:
                return
            self._slots[stage] = slot
            get_run_logger().info("%s runs on %s", stage, slot.place.device)
        self.progress.start(stage)
        self._before[stage] = results(self.root).get(stage)
        shares = slot is not None and group(stage) in TRAININGS
        machine = self.machine
        task = run_stage.with_options(retries=machine.retries, retry_delay_seconds=machine.retry_delay)
        future = task.submit(
            stage=stage,
            place=dict(slot.place.settings) if slot else {},
            threads=pool.threads(alone=not self.progress.has_company(stage)) if shares else 0,
            held=(*self.held, *(lock.fileno() for lock in slot.locks)) if slot else self.held,
            up_to_date=not runs,
            engine=self.engine,
        )
        future.add_done_callback(lambda future: self._ended.put((stage, future)))

    def _note_end(self, stage: str, future: PrefectFuture[Any]) -> None:
        if slot := self._slots.pop(stage, None):
            slot.free()
        future.wait()  # it calls back before its last state is there
        state: State[Any] = future.state
        before, after = self._before.pop(stage), results(self.root).get(stage)
        if state.is_completed():
            self.progress.succeed(stage, cached=state.name == "Cached", changed=after != before)
        else:
            reason = state.message or state.name or "failed"
            self.progress.fail(stage, reason)
            get_run_logger().error("%s: %s", stage, reason)

    def _say_waiting(self) -> None:
        if not self._said_waiting:
            self._said_waiting = True
            places = [*self.pool.places, *(self.jobs.places if self.jobs else ())]
            held = ", ".join(f"{place.device}: {place.holders()}" for place in places)
            get_run_logger().info("waiting for a device (%s)", held)


def takes_device(stage: str, engine: str) -> bool:
    """Whether a stage computes on a device of this machine; captions that a scheduler elsewhere embeds do not."""
    return group(stage) in ON_DEVICE and not (group(stage) == "embed" and "://" in engine)
