"""Where a model computes, and in which precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from mode.errors import ModeError, first_line

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
Network = TypeVar("Network", bound="torch.nn.Module")

#: `fp32`; `bf16` (weights and activations); `amp` (weights in float32, bfloat16 autocast).
Precision = Literal["fp32", "bf16", "amp"]


def pick_device(device: str, number: int | None = None) -> torch.device:
    """The device of that name, once a tensor has been made there.

    Args:
        device: `auto` (the GPU where there is one, else the CPU), `cpu`, `cuda`, `cuda:1` ...
        number: of the GPU that `auto` and `cuda` mean; default torch's current one.

    Raises:
        ModeError: the name is unknown, or there is no such device here.
    """
    import torch  # here, because `lsa` needs none and importing it takes seconds

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and number is not None:
        device = f"cuda:{number}"
    try:
        picked = torch.device(device)
        torch.empty(1, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise ModeError(
            f"device '{device}' is not usable here: {first_line(error)}", "use auto, cpu, cuda or cuda:1"
        ) from None
    # cuDNN's attention, which torch prefers on Hopper from 2.11 on, gives gradients that are NaN for some texts with a
    # mask (pytorch/pytorch#196678), and misreads a mask of another precision than theirs (pytorch/pytorch#191612).
    # Torch has other kernels.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return picked


def without_numbers(network: Network) -> Network:
    """A copy on torch's `meta` device; the numbers are never copied, which would take as much memory once more."""
    tensors = chain(network.parameters(), network.buffers())
    return copy.deepcopy(network, {id(each): _on_meta(each) for each in tensors})


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    shape = tensor.detach().to("meta")
    return torch.nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else shape


def fastest_precision(device: torch.device) -> Precision:
    """What inference runs in unless told otherwise: `amp` on a GPU, `fp32` on a CPU."""
    return "fp32" if device.type == "cpu" else "amp"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context to run a model in: bfloat16 autocast for `amp`; the other precisions need none."""
    import torch

    return torch.autocast(device.type, torch.bfloat16) if precision == "amp" else nullcontext()


class Run(Protocol):
    """`map`, many items at a time."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> list[Result]:
        """Results of `function`, in the order of the items."""


@contextmanager
def side_by_side(device: torch.device, at_once: int | None = None) -> Iterator[Run]:
    """Call a function for many items: on a CPU several at a time, on a GPU one after another.

    Two small models, or two small batches, on two cores take about half the time of one after the other on both, where
    torch's threads wait for each other in every operation (docs/performance.md, "Embedding"). The calling thread's
    number of torch threads is divided among them; it keeps such a share itself meanwhile, since more threads than cores
    wait for each other in its own small operations as well.

    Args:
        device: of the models.
        at_once: items at a time, as far as there are threads; default one for each thread: what comes out then is what
            one thread makes of it, however many there are.

    Yields:
        What calls a function, in threads of their own: `inference_mode` and `autocast` are for the function to enter.
    """
    import torch

    threads = torch.get_num_threads()
    workers = min(threads, threads if at_once is None else at_once) if device.type == "cpu" else 1
    if workers <= 1:
        yield lambda function, items: [function(item) for item in items]
        return
    with ThreadPoolExecutor(workers) as pool:
        torch.set_num_threads(threads // workers)  # of this thread, and of those begun from now on: the pool's
        try:
            yield lambda function, items: list(pool.map(function, items))
        finally:
            torch.set_num_threads(threads)
