"""Where a model computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mode.errors import ModeError

if TYPE_CHECKING:
    import torch


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        ModeError: a GPU is asked for and there is none.
    """
    import torch  # here, because `lsa` needs none and importing it takes seconds

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise ModeError(f"device '{device}': unknown", "use auto, cpu, cuda or cuda:1") from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ModeError(f"device '{device}': there are {torch.cuda.device_count()} GPUs", "use auto or cpu")
    return picked
