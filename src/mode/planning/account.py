"""What a plan says, as `mode plan --json` writes it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GpuMemory(_Record):
    """Memory that a process needs of its GPU, in bytes, as if all of it were there at once.

    Attributes:
        context, weights, gradients, moments, buckets, activations, loss: see `mode.planning.sizes.GpuBytes`.
        total: of these.
        of: what the GPU has; None: not known.
        usable: of that, without the share that is left free.
        batch: pairs, images or texts of one pass.
        largest_batch: the largest `training.batch_size` that fits, on as many GPUs and in as many passes; 0: not even
            one of a pair for each; None: the stage trains nothing, or it is not known what the GPU has.
        passes: the smallest `training.accumulate` with which the batch fits; None: there is none, or as above.
    """

    context: float
    weights: float
    gradients: float = 0.0
    moments: float = 0.0
    buckets: float = 0.0
    activations: float
    loss: float = 0.0
    total: float
    of: float | None
    usable: float | None
    batch: int
    largest_batch: int | None = None
    passes: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the GPU has as much, as far as is known."""
        return self.usable is None or self.total <= self.usable


class StagePlan(_Record):
    """One stage.

    Attributes:
        stage: as `dvc repro` calls it.
        samples: of a training.
        disk_bytes: of its output.
        process_memory_bytes, node_memory_bytes: of each process, and of all on one machine at that time.
        gpu_memory: of each process on a GPU; None: it uses none, or its model cannot be traced.
        devices: GPUs (on CPUs: training processes) that it computes on.
        begins_at_hours, hours: wall time; 0 hours: not worth a figure.
        device_hours: devices x hours.
        cost: of these; None without a price.
        bottleneck: the resource that it waits for most.
        phases: hours that each resource needs, phase by phase.
    """

    stage: str
    samples: int | None = None
    disk_bytes: float = 0.0
    process_memory_bytes: float = 0.0
    node_memory_bytes: float = 0.0
    gpu_memory: GpuMemory | None = None
    devices: int = 0
    begins_at_hours: float = 0.0
    hours: float = 0.0
    device_hours: float = 0.0
    cost: float | None = None
    bottleneck: str = ""
    phases: list[dict[str, float]] = []


class UsedRate(_Record):
    """A rate, and where it comes from."""

    value: float | None
    source: str


class Plan(_Record):
    """All of it; the totals are of `stages`.

    Attributes:
        model, flops_per_pair, parameters: of every CLIP that is trained.
        pairs: by source.
        epoch_samples: of one epoch of a training.
        nodes, devices_per_node, device, cores_per_node, devices_per_training, devices_of_seed: the machines.
        stages: in the order in which they begin.
        disk_bytes: of all outputs.
        node_memory_bytes: the most that one machine needs at a time.
        hours: wall time from the first stage to the last.
        device_hours: that stages compute on devices; `rented_device_hours` all of them, from beginning to end.
        cost, rented_cost: of these; None without a price.
        bottleneck: the resource that the critical path waits for most.
        shortages: what does not fit the machines, a sentence each.
        rates: by name.
        notes: what else a reader has to know.
    """

    model: str
    flops_per_pair: float
    parameters: int
    pairs: dict[str, int]
    epoch_samples: int
    nodes: int
    devices_per_node: int
    device: str
    cores_per_node: int
    devices_per_training: int
    devices_of_seed: int
    stages: list[StagePlan]
    disk_bytes: float
    node_memory_bytes: float
    hours: float
    device_hours: float
    rented_device_hours: float
    cost: float | None
    rented_cost: float | None
    bottleneck: str
    shortages: list[str]
    rates: dict[str, UsedRate]
    notes: list[str]
