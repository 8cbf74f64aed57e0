"""A fine-tuned model mixed with the seed that it goes on from: WiSE-FT (Wortsman et al., arXiv 2109.01903, equation 1).

Between the two lie models that keep much of what either knows. How far to go is chosen by the loss on held-out training
pairs; no task and no label of a test has a say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

#: Shares of the seed that are tried: the model as it is comes first, and wins where the losses are equal.
SHARES = tuple(number / 10 for number in range(11))


def mix(own: Mapping[str, Tensor], seed: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 - share) of `own` and `share` of `seed`, tensor by tensor; counts of batch norms stay `own`'s.

    Args:
        own, seed: state dicts of one architecture.
        share: of the seed, 0 to 1.

    Example:
        >>> mix({"a": torch.tensor([0.0])}, {"a": torch.tensor([4.0])}, 0.25)["a"].item()
        1.0
    """
    return {
        name: torch.lerp(tensor, seed[name].to(tensor), share) if tensor.is_floating_point() else tensor
        for name, tensor in own.items()
    }


def best_share(
    model: nn.Module, seed: Mapping[str, Tensor], loss: Callable[[], float]
) -> tuple[float, dict[float, float]]:
    """The share of the seed with the least loss; the model is left mixed with it.

    Args:
        model: changed in place.
        seed: state dict of the seed.
        loss: of the model as it is when this is called.

    Returns:
        The share, and the loss of every one that was tried.
    """
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = {}
    for share in SHARES:
        model.load_state_dict(mix(own, seed, share))
        losses[share] = loss()
    best = min(SHARES, key=losses.__getitem__)
    model.load_state_dict(mix(own, seed, best))
    return best, losses
