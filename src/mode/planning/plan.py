"""The plan of a run: disk, memory, hours and cost of every stage, on machines of one kind.

The stages run as `dvc repro` and the flows run them: what prepares the data one after the other; then the seed on all
devices that it is given; then the dense models and the experts, each as soon as there is room for it; then the
evaluation. How long each training is `mode.training.plan` says, as it does when they are trained.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from mode.planning import hours as h
from mode.planning.account import Plan, StagePlan, UsedRate
from mode.planning.machines import Cluster
from mode.planning.needs import Needs, Workload
from mode.planning.rates import SourcedRates
from mode.roles import EXPERT

#: Share of a source's images below which an epoch is likely one of another, smaller source.
_SHORT_EPOCH = 0.01
#: What makes room on a GPU for the same batch.
_MAKES_ROOM = "machine.grad_checkpointing (of transformers) and more GPUs make room, too"


def make_plan(work: Workload, cluster: Cluster, sourced: SourcedRates, price: float | None = None) -> Plan:
    """Work out a plan.

    Args:
        work: what is to be done.
        cluster: where.
        sourced: how fast, and how large data are.
        price: of a device's hour, in any currency.

    Raises:
        ModeError: a training is too short for its steps or its warm-up, as `mode.training.plan` says.
    """
    needs = Needs(work, cluster, sourced.rates)
    stages, waits = _scheduled(needs, work.params.embedding.kind == "seed", cluster.places)
    stages = [_priced(stage, price) for stage in stages]
    wall = max(stage.begins_at_hours + stage.hours for stage in stages)
    rented = wall * cluster.devices
    return Plan(
        model=work.model.name,
        flops_per_pair=work.model.flops_per_pair,
        parameters=work.model.parameters,
        pairs=dict(work.pairs),
        epoch_samples=needs.epoch_samples,
        nodes=cluster.nodes,
        devices_per_node=cluster.devices_per_node,
        device=cluster.device,
        cores_per_node=cluster.cores_per_node,
        devices_per_training=cluster.devices_per_training,
        devices_of_seed=cluster.devices_of_seed,
        stages=stages,
        disk_bytes=sum(stage.disk_bytes for stage in stages),
        node_memory_bytes=max(stage.node_memory_bytes for stage in stages),
        hours=wall,
        device_hours=sum(stage.device_hours for stage in stages),
        rented_device_hours=rented,
        cost=None if price is None else sum(stage.cost or 0.0 for stage in stages),
        rented_cost=None if price is None else price * rented,
        bottleneck=max(waits, key=lambda resource: waits[resource], default=""),
        shortages=_shortages(stages, cluster, work.params.training.batch_size),
        rates={
            name: UsedRate(value=value, source=sourced.sources[name])
            for name, value in sourced.rates.model_dump().items()
        },
        notes=_notes(work, cluster, sourced),
    )


def queue(durations: Sequence[float], places: int) -> tuple[list[float], list[int]]:
    """When each job begins, and at which place: in this order, each where there is room first.

    >>> queue([2, 3, 1], places=2)
    ([0.0, 0.0, 2.0], [0, 1, 0])
    """
    free = [(0.0, place) for place in range(places)]
    begins, where = [], []
    for duration in durations:
        begin, place = heapq.heappop(free)
        heapq.heappush(free, (begin + duration, place))
        begins.append(begin)
        where.append(place)
    return begins, where


def _scheduled(needs: Needs, seed_embeds: bool, places: int) -> tuple[list[StagePlan], dict[str, float]]:
    """All stages with their beginnings, and hours by the resource that the critical path waits for.

    Args:
        needs: of the stages.
        seed_embeds: the embedder is made from the seed, and waits for it.
        places: for trainings side by side.
    """
    seed, others = needs.trainings()
    before, after = needs.preparation()
    done: list[StagePlan] = []
    waits: dict[str, float] = {}
    clock = 0.0

    def one_by_one(stages: Sequence[StagePlan]) -> None:
        nonlocal clock
        for stage in stages:
            done.append(stage.model_copy(update={"begins_at_hours": clock}))
            clock += stage.hours
            _add(waits, stage)

    one_by_one([*before, *seed, *after] if seed_embeds else [*before, *after, *seed])
    begins, taken = queue([stage.hours for stage in others], places)
    done += [
        stage.model_copy(update={"begins_at_hours": clock + begin}) for stage, begin in zip(others, begins, strict=True)
    ]
    ends = [begin + stage.hours for stage, begin in zip(others, begins, strict=True)]
    if ends:
        last = taken[ends.index(max(ends))]
        for stage, place in zip(others, taken, strict=True):
            if place == last:
                _add(waits, stage)
        clock += max(ends)
    one_by_one(needs.conclusion())
    return done, waits


def _priced(stage: StagePlan, price: float | None) -> StagePlan:
    return stage if price is None else stage.model_copy(update={"cost": price * stage.device_hours})


def _add(waits: dict[str, float], stage: StagePlan) -> None:
    for resource, wait in h.waiting_hours(stage.phases).items():
        waits[resource] = waits.get(resource, 0.0) + wait


def _shortages(stages: Sequence[StagePlan], cluster: Cluster, batch: int) -> list[str]:
    """What the machines have too little of: memory of their own, and of their GPUs."""
    return _shortages_of_machines(stages, cluster) + _shortages_of_gpus(stages, batch)


def _shortages_of_gpus(stages: Sequence[StagePlan], batch: int) -> list[str]:
    """A sentence for all stages that need as much, with what helps."""
    short: dict[str, list[str]] = {}
    for stage in stages:
        memory = stage.gpu_memory
        if memory is None or memory.usable is None or memory.fits:
            continue
        what = f"{memory.total / 1e9:,.0f} GB are needed of {memory.usable / 1e9:,.0f} GB that a GPU has to give"
        if memory.largest_batch is None:
            advice = "a smaller machine.inference_batch or machine.models_mb"
        elif memory.passes is not None:
            advice = (
                f"with training.accumulate: {memory.passes} they fit, in a third more time, or with"
                f" training.batch_size {memory.largest_batch:,} in place of {batch:,}; {_MAKES_ROOM}"
            )
        else:
            advice = f"no number of passes fits; {_MAKES_ROOM}"
        short.setdefault(f"{what}; {advice}", []).append(stage.stage)
    return [f"{', '.join(names)}: {what}" for what, names in short.items()]


def _shortages_of_machines(stages: Sequence[StagePlan], cluster: Cluster) -> list[str]:
    if cluster.memory_bytes_per_node is None:
        return []
    return [
        f"{stage.stage}: {stage.node_memory_bytes / 1e9:,.0f} GB of memory are needed on a machine that has"
        f" {cluster.memory_bytes_per_node / 1e9:,.0f} GB"
        for stage in stages
        if stage.node_memory_bytes > cluster.memory_bytes_per_node
    ]


def _notes(work: Workload, cluster: Cluster, sourced: SourcedRates) -> list[str]:
    notes = []
    recipe = work.params.training
    images = work.pairs[recipe.source] / sourced.rates.captions_per_image
    if recipe.epoch_samples and recipe.epoch_samples < _SHORT_EPOCH * images:
        notes.append(
            f"an epoch has {recipe.epoch_samples:,} samples, of {images:,.0f} images:"
            " `--set training.epoch_samples=null` makes it all of them"
        )
    worked_out = cluster.gpu is not None and sourced.rates.training_samples_per_second is None
    if worked_out and not work.model.is_large:
        notes.append(
            f"a model of {work.model.flops_per_pair / 1e9:.2g} GFLOP a pair does not fill a GPU, and trains far slower"
            " than this: measure it there, or give training_samples_per_second (--rates)"
        )
    if cluster.gpu is not None and None in {each.footprint for each in (work.model, work.model.adapter) if each}:
        notes.append("the memory of a GPU is not planned: a tower of this model cannot be traced without numbers")
    if work.model.adapter is not None and not work.model.is_large:
        notes.append(f"{EXPERT.name}s are adapters, which of so small a model are taken to train as fast as whole ones")
    return notes
