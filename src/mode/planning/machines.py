"""The machines that a plan is for."""

from __future__ import annotations

from dataclasses import dataclass

from mode.errors import ModeError

CPU = "cpu"


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        peak_flops_per_second: bfloat16, dense (no sparsity), from the manufacturer's data sheet.
        memory_bytes: None: not known, and nothing is compared with it.
    """

    peak_flops_per_second: float
    memory_bytes: float | None = None


#: By the name in `--gpu`. NVIDIA's data sheets of the SXM modules; of an A100 the one of 80 GB.
GPUS = {
    "a100": Gpu(312e12, 80e9),
    "h100": Gpu(989e12, 80e9),
    "h200": Gpu(989e12, 141e9),
}


def gpu_called(name: str) -> Gpu:
    """The GPU of a name. Raises `ModeError` with the names that there are."""
    try:
        return GPUS[name.lower()]
    except KeyError:
        known = ", ".join([*GPUS, CPU])
        raise ModeError(
            f"--gpu: no GPU is known as '{name}'", f"there are {known}; another one takes --peak-tflops"
        ) from None


@dataclass(frozen=True)
class Cluster:
    """Machines of one kind.

    Attributes:
        nodes: machines.
        devices_per_node: GPUs of each; on CPUs, trainings that run side by side on each.
        device: `cpu`, or the name of the GPU.
        gpu: None on CPUs.
        cores_per_node: CPU cores of each machine.
        memory_bytes_per_node: None: not known, and nothing is compared with it.
        threads: cores of a training process, on CPUs.
        devices_per_training: devices that train one model together after the seed; the seed has `devices_of_seed`.
        is_elsewhere: data lie in a network file system, and not on a disk of this machine.
    """

    nodes: int
    devices_per_node: int
    device: str
    gpu: Gpu | None
    cores_per_node: int
    memory_bytes_per_node: float | None
    threads: int
    devices_per_training: int
    devices_of_seed: int
    is_elsewhere: bool

    def __post_init__(self) -> None:
        for what, count in (("training", self.devices_per_training), ("seed", self.devices_of_seed)):
            if count > self.devices:
                raise ModeError(
                    f"{count} devices for one {what}, but there are {self.devices}", "give more --gpus or --nodes"
                )
        if self.devices_per_training > self.devices_per_node and self.devices_per_training % self.devices_per_node:
            raise ModeError(
                f"{self.devices_per_training} devices for one training are not whole machines of"
                f" {self.devices_per_node}",
                "give a multiple of --gpus, or fewer",
            )

    @property
    def devices(self) -> int:
        """Of all machines together."""
        return self.nodes * self.devices_per_node

    @property
    def trainings_per_node(self) -> int:
        """Trainings that one machine has room for; 1 where a training takes several machines."""
        return max(1, self.devices_per_node // self.devices_per_training)

    @property
    def places(self) -> int:
        """Trainings that run side by side, each on whole devices."""
        if self.devices_per_training > self.devices_per_node:
            return self.nodes // (self.devices_per_training // self.devices_per_node)
        return self.nodes * self.trainings_per_node

    def cores_of(self, devices: int) -> float:
        """CPU cores that fall to so many devices."""
        return self.cores_per_node * devices / self.devices_per_node


def device_called(name: str) -> str:
    """What a plan calls a device: a key of `GPUS` for `NVIDIA H100 80GB HBM3`, else the name itself.

    >>> device_called("NVIDIA H100 80GB HBM3"), device_called("cpu")
    ('h100', 'cpu')
    """
    return next((kind for kind in GPUS if kind in name.lower()), name)
