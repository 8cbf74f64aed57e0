"""How far a run has come, and so which stages may run now. It only decides: `flows.schedule` runs them."""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx

from flows.graph import group, in_order
from mode import roles

#: Groups of stages that train: on a CPU they divide its threads. The others are short.
TRAININGS = frozenset(role.name for role in roles.TRAINED)
#: Failing stages of these groups do not stop what comes after them.
DISPENSABLE = frozenset(role.name for role in roles.ROLES if role.dispensable)
#: Groups that compute with torch: each takes a device. The others only need a core or two.
ON_DEVICE = TRAININGS | {roles.ENSEMBLE.name, "embedder", "embed", "evaluate", "variants"}


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
        failed = [stage.partition("@")[2] for stage in self.failed if group(stage) in DISPENSABLE]
        return sorted(self.absent + failed)

    @property
    def fatal(self) -> dict[str, str]:
        """Failures that others could not do without."""
        return {stage: why for stage, why in self.failed.items() if group(stage) not in DISPENSABLE}


class Progress:
    """What has ended of a pipeline (see `flows.graph`), what runs, and what waits; DVC calls some stages `stale`."""

    def __init__(self, pipeline: nx.DiGraph, stale: set[str]) -> None:
        self.pipeline, self.outcome = pipeline, Outcome()
        self.waiting, self.running = in_order(pipeline), set[str]()
        self._stale, self._changed = stale, set[str]()

    @property
    def ended(self) -> bool:
        """Whether nothing is left to run."""
        return not self.waiting and not self.running

    def ready(self) -> list[str]:
        """Waiting stages of which all that they need has ended, in the pipeline's order."""
        pending = {*self.waiting, *self.running}
        return [stage for stage in self.waiting if pending.isdisjoint(self.pipeline[stage])]

    def may_change(self, stage: str) -> bool:
        """Whether a ready stage is to be run; one that DVC called up to date is, if its input has changed since."""
        return stage in self._stale or not self._changed.isdisjoint(self.pipeline[stage])

    def has_company(self, stage: str) -> bool:
        """Whether another training runs now, or will beside this one."""
        others = {*self.running, *self.ready()} - {stage}
        return any(group(other) in TRAININGS and self.may_change(other) for other in others)

    def start(self, stage: str) -> None:
        """Note that a ready stage runs now."""
        self.waiting.remove(stage)
        self.running.add(stage)

    def succeed(self, stage: str, cached: bool, changed: bool) -> None:
        """Note that a stage has ended well: whether nothing had to be done, and whether its outputs are others now."""
        self.running.remove(stage)
        (self.outcome.cached if cached else self.outcome.done).append(stage)
        if changed:
            self._changed.add(stage)

    def fail(self, stage: str, reason: str) -> None:
        """Note that a stage has failed for good: what cannot do without it is skipped, the others still run."""
        self.running.remove(stage)
        self.outcome.failed[stage] = reason
        self._changed.add(stage)
        if group(stage) not in DISPENSABLE:
            lost = nx.ancestors(self.pipeline, stage)
            self.outcome.skipped += [other for other in self.waiting if other in lost]
            self.waiting = [other for other in self.waiting if other not in lost]
