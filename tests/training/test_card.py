from __future__ import annotations

import pytest
import torch

from mode.clip.model import build_model
from mode.params import ImageParams, ModelParams
from mode.training.card import chance, flops_per_pair, learnt_nothing


def test_flops_by_hand() -> None:
    """An image tower of one patch without attention, a text tower of one block over 8 tokens."""
    config = {
        "embed_dim": 4,
        "vision_cfg": {"layers": 0, "width": 8, "head_width": 8, "patch_size": 32},
        "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    }
    clip = build_model(ModelParams(config=config), ImageParams(size=32), None, random_seed=0)
    patch, image_projection = 2 * 3 * 32 * 32 * 8, 2 * 8 * 4
    linear = 2 * 8 * (16 * 3 * 16 + 16 * 16 + 2 * 16 * 64)  # queries, keys and values; output; both of the MLP
    attention = 2 * (2 * 8 * 8 * 16)  # scores, and the values weighted by them
    text_projection = 2 * 16 * 4
    # Backward costs twice the forward pass: gradients of input and of weight. Pixels need no gradient.
    assert flops_per_pair(clip) == 2 * patch + 3 * (image_projection + linear + attention + text_projection)


@pytest.mark.parametrize(
    ("loss", "batch", "nothing"),
    [(4.85, 128, True), (4.62, 128, True), (4.59, 128, False), (2.5, 128, False), (0.0, 1, False)],
)
def test_a_loss_next_to_chance_is_doubted(loss: float, batch: int, nothing: bool) -> None:
    """Chance at a batch of 128 is ln 128 = 4.852; 0.95 of it 4.609."""
    doubt = learnt_nothing("seed", loss, chance(batch))
    assert (doubt is not None) == nothing
    assert doubt is None or "chance is 4.85" in doubt


def test_chance_of_the_sigmoid_loss_is_the_least_that_one_number_for_all_pairs_gives() -> None:
    logits = torch.linspace(-12, 2, 1401, dtype=torch.float64)[:, None, None].expand(-1, 16, 16)
    labels = 2 * torch.eye(16, dtype=torch.float64) - 1
    losses = -torch.nn.functional.logsigmoid(labels * logits).sum(dim=(1, 2)) / 16
    assert chance(16, sigmoid=True) == pytest.approx(losses.min().item(), rel=1e-4)
