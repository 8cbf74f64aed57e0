from __future__ import annotations

import pytest
import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from mode.clip.model import Clip, build_model
from mode.params import ImageParams, ModelParams
from mode.training.learner import Towers, backward

IMAGE = ImageParams(size=32)
CAPTIONS = ["a red dog", "a blue dog sleeps", "the end", "one two three four five six seven eight nine"]


@pytest.fixture
def clip(vit: ModelParams) -> Clip:
    return build_model(vit, IMAGE, CAPTIONS, random_seed=0)


def batch(clip: Clip, size: int) -> tuple[Tensor, Tensor]:
    images = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return images, clip.tokenizer([CAPTIONS[number % 3] for number in range(size)])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_the_gradient_is_that_of_the_loss_written_out(clip: Clip) -> None:
    images, tokens = batch(clip, 6)
    value = backward(Towers(clip.model), ClipLoss(), images, tokens)
    found = gradients(clip.model)
    image_features, text_features, scale = Towers(clip.model)(images, tokens)
    logits = scale * image_features @ text_features.T
    diagonal = torch.arange(6)
    naive = -(logits.log_softmax(dim=1)[diagonal, diagonal] + logits.log_softmax(dim=0)[diagonal, diagonal]).mean() / 2
    naive.backward()
    assert value.item() == pytest.approx(naive.item(), rel=1e-6)
    for name, expected in gradients(clip.model).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("passes", [2, 3, 6])
def test_accumulation_is_exact_over_the_whole_batch(clip: Clip, passes: int) -> None:
    images, tokens = batch(clip, 6)
    whole = backward(Towers(clip.model), ClipLoss(), images, tokens)
    expected = gradients(clip.model)
    value = backward(Towers(clip.model), ClipLoss(), images, tokens, passes)
    found = gradients(clip.model)
    assert value.item() == pytest.approx(whole.item(), rel=1e-6)
    assert found.keys() == expected.keys() == {name for name, _ in clip.model.named_parameters()}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_dropout_is_the_same_in_both_runs_of_a_pass(clip: Clip) -> None:
    """Gradients with accumulation equal those of one pass with the same masks: forgetting to reseed changes them."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = Towers(clip.model)

        def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            images = images * torch.bernoulli(torch.full_like(images, 0.5))
            features: tuple[Tensor, Tensor, Tensor] = self.towers(images, tokens)
            return features

    def reseed(number: int) -> None:
        torch.manual_seed(100 + number)

    images, tokens = batch(clip, 6)
    masked = []
    for number, part in enumerate(images.chunk(2)):
        reseed(number)
        masked.append(part * torch.bernoulli(torch.full_like(part, 0.5)))
    backward(Towers(clip.model), ClipLoss(), torch.cat(masked), tokens)
    expected = gradients(clip.model)
    backward(Dropping(), ClipLoss(), images, tokens, passes=2, reseed=reseed)
    for name, found in gradients(clip.model).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6)
