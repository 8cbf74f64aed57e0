"""One process or many: what `torchrun` started, and what its processes have to agree on."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mode.clip.device import pick_device
from mode.errors import ModeError, first_line


@dataclass(frozen=True)
class Group:
    """The processes of one training.

    Attributes:
        rank, world: this process's number, and how many there are.
        device: where this one computes.
        local_rank, local_world: as `rank` and `world`, among the processes of this machine.
        machines: of each process the number of its machine.
    """

    rank: int
    world: int
    device: torch.device
    local_rank: int = 0
    local_world: int = 1
    machines: tuple[int, ...] = (0,)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def leads_machine(self) -> bool:
        """Whether this process keeps the files in order that the processes of this machine share."""
        return self.local_rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """Each flag: is it set in any process? All have to ask at the same step, and wait for one another."""
        # Tensors on the CPU go through gloo: no wait for a GPU.
        raised = torch.tensor(flags, dtype=torch.int32)
        if self.world > 1:
            dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def agree(self, *numbers: int) -> bool:
        """Whether all processes ask with the same whole numbers; all have to ask."""
        highest, lowest = torch.tensor(numbers), torch.tensor(numbers)
        if self.world > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
            dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        return bool((highest == lowest).all())

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes, element by element; `values` on any device, the result on the CPU."""
        values = values.detach().double().cpu()
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world


def process_group(device: str) -> Group:
    """Join the processes that `torchrun` started, or be the only one.

    Args:
        device: `auto` is the GPU of this process's number if there is one, else the CPU.

    Raises:
        ModeError: the device does not exist here, or the environment is not one that `torchrun` makes.
    """
    world, local_rank = _from_environment("WORLD_SIZE", 1), _from_environment("LOCAL_RANK", 0)
    chosen = pick_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world == 1:
        return Group(0, 1, chosen)
    # open_clip's loss says it at the first step of every process.
    warnings.filterwarnings("ignore", r"torch\.distributed\.nn\.functional", FutureWarning)
    if not dist.is_initialized():
        # Once in a process: a second group would look up the closed addresses of the first in torchrun's store.
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
        except RuntimeError as error:  # another one found a fault and was gone before this one had joined
            rank = _from_environment("RANK", 0)
            message = f"process {rank} could not join the others: {first_line(error)}"
            raise ModeError(message, "see their output") from None
        atexit.register(dist.destroy_process_group)
    local_world = _from_environment("LOCAL_WORLD_SIZE", 1)
    return Group(dist.get_rank(), dist.get_world_size(), chosen, local_rank, local_world, _machines(local_rank))


def _machines(local_rank: int) -> tuple[int, ...]:
    """Of each process the number of its machine: `torchrun` gives the processes of one neighbouring numbers."""
    firsts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(firsts, torch.tensor([int(local_rank == 0)]))
    return tuple((torch.cat(firsts).cumsum(0) - 1).clamp(min=0).tolist())


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ModeError(f"{name}: '{value}' is not a number", "start several processes with torchrun")
    return int(value)


@contextmanager
def ending_together() -> Iterator[None]:
    """No process leaves before the others: `torchrun` stops all as soon as one has ended.

    The first of them has files to write when the others have nothing left to do. An error does not wait.
    """
    try:
        yield
    finally:
        told_or_done = isinstance(sys.exception(), SystemExit | None)  # told to stop: all are
        if told_or_done and dist.is_available() and dist.is_initialized():
            dist.all_reduce(torch.zeros(1))
