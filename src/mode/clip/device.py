"""Where a model computes, and in which precision."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal, TypeVar

from mode.errors import ModeError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Pairs, images or texts in one forward pass on a CPU, at most: what a layer makes of them stays in the cache, and many
#: passes side by side need little memory.
CPU_BATCH = 64
#: Torch's number of threads is one for the whole process.
_THREADS = threading.Lock()

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
        reason = str(error).partition("\n")[0]
        raise ModeError(f"device '{device}' is not usable here: {reason}", "use auto, cpu, cuda or cuda:1") from None
    # cuDNN's attention, which torch prefers on Hopper from 2.11 on, gives gradients that are NaN for some texts with a
    # mask (pytorch/pytorch#196678), the probable reason why the loss of a ViT-B/16 in bfloat16 was NaN after 4 steps on
    # an H100. Torch has other kernels.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return picked


def fastest_precision(device: torch.device) -> Precision:
    """What inference runs in unless told otherwise: `amp` on a GPU, `fp32` on a CPU."""
    return "fp32" if device.type == "cpu" else "amp"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context to run a model in: bfloat16 autocast for `amp`; the other precisions need none."""
    import torch

    return torch.autocast(device.type, torch.bfloat16) if precision == "amp" else nullcontext()


def side_by_side(device: torch.device, forward: Callable[[Item], Result], batches: Sequence[Item]) -> list[Result]:
    """`forward` of every batch, in their order; on a CPU as many at a time as torch has threads, each in one of them.

    Several threads in one pass gain little where its matrices are small, and on a busy machine they wait for each other
    (docs/performance.md, "Embedding"). What comes out is what one thread makes of it, however many there are.

    Args:
        device: of the model.
        forward: a forward pass, which enters `inference_mode` and `autocast` itself: both are a thread's own.
        batches: what it takes.
    """
    import torch

    if device.type != "cpu":
        return [forward(batch) for batch in batches]
    with _THREADS:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads, thread_name_prefix="forward") as pool:
                return list(pool.map(forward, batches))
        finally:
            torch.set_num_threads(threads)
