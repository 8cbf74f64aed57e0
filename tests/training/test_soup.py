"""Weights learned by layer: against differences of the loss itself, and at their ends."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mode.clip.model import Clip, build_model, folded, load_model
from mode.clip.preprocess import Preprocess
from mode.errors import ModeError
from mode.params import ImageParams, ModelParams
from mode.training.learner import Towers, loss_of
from mode.training.soup import layers_of, learn_weights, learned_soup
from tests.adapters import write_adapter, write_base

CAPTIONS = ["a red dog", "a blue dog", "two cats", "one house"]
COLOURS = torch.tensor([[220, 30, 30], [30, 50, 220], [30, 200, 40], [230, 220, 40]])


def pairs(batches: int, size: int = 8, seed: int = 0) -> list[tuple[Tensor, list[str]]]:
    """Noisy pictures of one colour for each caption."""
    random, found = torch.Generator().manual_seed(seed), []
    for _ in range(batches):
        labels = torch.arange(size) % len(CAPTIONS)
        noise = torch.randint(-12, 13, (size, 3, 32, 32), generator=random)
        pixels = (COLOURS[labels][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)
        found.append((pixels, [CAPTIONS[label] for label in labels.tolist()]))
    return found


def untrained(model: ModelParams, seed: int = 0) -> Clip:
    return build_model(model, ImageParams(size=32), CAPTIONS, seed)


def trained(model: ModelParams) -> Clip:
    clip = untrained(model)
    towers, optimizer = Towers(clip.model.train()), torch.optim.AdamW(clip.model.parameters(), lr=3e-3)
    for images, captions in pairs(30):
        optimizer.zero_grad()
        features = towers(Preprocess(clip).normalise(images), clip.tokenizer(captions))
        torch.autograd.backward([loss_of(clip.model)(*features)])
        optimizer.step()
    clip.model.eval()
    return clip


def loss_at(clips: dict[str, Clip], weights: dict[str, Tensor], batch: tuple[Tensor, list[str]]) -> float:
    """The loss of the mean by these weights of each layer [models], in float64."""
    first, layers = next(iter(clips.values())), layers_of(next(iter(clips.values())).model)
    model = copy.deepcopy(first.model).double().train()
    states = [dict(clip.model.double().named_parameters()) for clip in copy.deepcopy([*clips.values()])]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.zero_()
            for share, state in zip(weights[layers[key]], states, strict=True):
                parameter.add_(share * state[key])
        images = Preprocess(first).normalise(batch[0]).double()
        image = torch.nn.functional.normalize(model.encode_image(images), dim=-1)
        text = torch.nn.functional.normalize(model.encode_text(first.tokenizer(batch[1])), dim=-1)
        logits = model.logit_scale.exp() * image @ text.T
        here = torch.arange(len(logits))
        return float(-(logits.log_softmax(1)[here, here] + logits.log_softmax(0)[here, here]).mean() / 2)


def same(one: Clip, other: Clip) -> bool:
    states = [clip.model.state_dict() for clip in (one, other)]
    return all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_a_step_goes_against_the_differences_of_the_loss(request: pytest.FixtureRequest, family: str) -> None:
    model = request.getfixturevalue(family)
    clips = {name: untrained(model, seed) for seed, name in enumerate(["a", "b", "c"])}
    [batch] = pairs(1)
    found = learn_weights(clips, [batch], rate=0.01)
    layers, width = [*dict.fromkeys(layers_of(clips["a"].model).values())], 1e-3
    assert [*found] == layers
    moved = 0
    for layer in layers:
        logits = torch.tensor(list(found[layer].values())).log()
        for number in range(3):
            differences = []
            for sign in (1, -1):
                shifted = torch.zeros(3, dtype=torch.float64)
                shifted[number] = sign * width
                equal = {each: torch.full((3,), 1 / 3, dtype=torch.float64) for each in layers}
                differences.append(loss_at(clips, equal | {layer: shifted.softmax(0)}, batch))
            slope = (differences[0] - differences[1]) / (2 * width)
            if abs(slope) > 1e-5:  # Adam's first step is against the gradient of each number
                moved += 1
                others = [logits[n] for n in range(3) if n != number]
                assert (logits[number] - max(others) < 1e-4) if slope > 0 else (logits[number] - min(others) > -1e-4)
    assert moved > len(layers)


def test_a_broken_layer_is_given_little_weight(vit: ModelParams) -> None:
    good, broken = trained(vit), trained(vit)
    with torch.no_grad():
        for name, parameter in broken.model.named_parameters():
            if layers_of(broken.model)[name] == "image 1":
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    weights = learn_weights({"good": good, "broken": broken}, pairs(40, seed=1), rate=0.1)
    assert weights["image 1"]["good"] > 0.75
    assert all(sum(each.values()) == pytest.approx(1) for each in weights.values())
    # Where they are the same there is nothing to choose.
    assert weights["text 0"]["good"] == pytest.approx(0.5, abs=0.01)


def test_the_model_is_the_mean_by_the_weights(vit: ModelParams) -> None:
    clips = {"a": untrained(vit, 1), "b": untrained(vit, 2)}
    before = copy.deepcopy(clips)
    soup, weights = learned_soup(clips, pairs(3), []), learn_weights(clips, pairs(3))
    states = {name: clip.model.state_dict() for name, clip in clips.items()}
    for name, layer in layers_of(soup.model).items():
        mean = sum(weights[layer][each] * states[each][name] for each in clips)
        torch.testing.assert_close(soup.model.state_dict()[name], mean, rtol=1e-6, atol=1e-7)
    assert len(weights) > 6
    assert not soup.model.training
    assert soup.card == {}
    assert all(same(clips[name], before[name]) for name in clips)


def test_statistics_are_those_of_the_images(resnet: ModelParams) -> None:
    clips = {"a": untrained(resnet, 1), "b": untrained(resnet, 1)}
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    soup = learned_soup(clips, pairs(2), [images])
    seen = clips["a"].model.visual.conv1(images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(soup.model.visual.bn1.running_mean, seen.mean(1).detach(), rtol=1e-3, atol=1e-5)
    with pytest.raises(ModeError, match="normalisation statistics need images"):
        learned_soup(clips, pairs(2), [])


def test_adapters_are_folded(vit: ModelParams, tmp_path: Path) -> None:
    base = write_base(tmp_path / "seed", vit)
    for seed, name in enumerate(["a", "b"], start=1):
        write_adapter(tmp_path / name, base, seed)
    adapters = {name: load_model(tmp_path / name) for name in ("a", "b")}
    soup = learned_soup(adapters, pairs(2), [])
    assert soup.adapter is None
    assert same(soup, learned_soup({name: folded(clip) for name, clip in adapters.items()}, pairs(2), []))


def test_pairs_are_read_as_they_are_used(vit: ModelParams) -> None:
    taken = []

    def few() -> Iterator[tuple[Tensor, list[str]]]:
        for number, batch in enumerate(pairs(3)):
            taken.append(number)
            yield batch

    learn_weights({"a": untrained(vit, 1), "b": untrained(vit, 2)}, few())
    assert taken == [0, 1, 2]


class TestBadInput:
    def test_without_pairs_there_is_nothing_to_learn_from(self, vit: ModelParams) -> None:
        with pytest.raises(ModeError, match=r"^there is no pair to learn a soup's weights on \([^\n]*\)$"):
            learned_soup({"a": untrained(vit)}, [], [])
        [(images, captions)] = pairs(1)
        alone = [(images[:1], captions[:1]), (images[:0], [])]
        with pytest.raises(ModeError, match="there is no pair to learn"):
            learned_soup({"a": untrained(vit)}, alone, [])

    def test_a_batch_of_none_changes_nothing(self, vit: ModelParams) -> None:
        clips = {"a": untrained(vit, 1), "b": untrained(vit, 2)}
        [(images, captions)] = pairs(1)
        empty: tuple[Tensor, list[str]] = (images[:0], [])
        assert learn_weights(clips, [empty, (images, captions), empty]) == learn_weights(clips, [(images, captions)])

    def test_models_of_another_shape(self, vit: ModelParams) -> None:
        config = {**(vit.config or {}), "embed_dim": 8}
        other = untrained(vit.model_copy(update={"config": config}))
        with pytest.raises(ModeError, match=r"b has other parameters than a \(only models of one seed"):
            learned_soup({"a": untrained(vit), "b": replace(other)}, pairs(1), [])
