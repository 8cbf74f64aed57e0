"""Models between a fine-tuned one and its seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mode.training.mixing import SHARES, best_share, mix


def test_a_mixture_is_the_weighted_mean_of_all_numbers_but_counts() -> None:
    own = {"a": torch.tensor([1.0, 2.0]), "n": torch.tensor(7)}
    seed = {"a": torch.tensor([3.0, 6.0], dtype=torch.bfloat16), "n": torch.tensor(1)}
    mixed = mix(own, seed, 0.25)
    assert mixed["a"].tolist() == [1.5, 3.0]
    assert (mixed["a"].dtype, int(mixed["n"])) == (torch.float32, 7)
    assert mix(own, seed, 0.0)["a"].tolist() == [1.0, 2.0]
    assert mix(own, seed, 1.0)["a"].tolist() == [3.0, 6.0]


@pytest.mark.parametrize(("wanted", "share"), [(0.0, 0.0), (3.0, 0.3), (10.0, 1.0), (-5.0, 0.0)])
def test_the_share_with_the_least_loss_wins(wanted: float, share: float) -> None:
    """From 0 (the model) to 10 (the seed): the loss is the distance from a number between them."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    found, losses = best_share(model, {"weight": torch.tensor([[10.0]])}, lambda: abs(model.weight.item() - wanted))
    assert found == share
    assert list(losses) == list(SHARES)
    assert model.weight.item() == pytest.approx(10 * share)


def test_equal_losses_leave_the_model_as_it_is() -> None:
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    assert best_share(model, {"weight": torch.tensor([[10.0]])}, lambda: 1.0)[0] == 0.0
    assert model.weight.item() == before
