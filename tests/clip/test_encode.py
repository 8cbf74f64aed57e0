from __future__ import annotations

import pytest
import torch

from mode.clip.encode import encode_prompts, encode_text, encode_texts, takes_short_texts, without_padding
from mode.clip.model import Clip, build_model
from mode.params import ImageParams, ModelParams

IMAGE = ImageParams(size=32)
CAPTIONS = ["a red dog", "a blue dog sleeps", "the end", "one two three four five six seven eight nine"]


@pytest.fixture
def clip(vit: ModelParams) -> Clip:
    return build_model(vit, IMAGE, CAPTIONS, random_seed=0)


def test_texts_are_what_open_clip_encodes_whatever_the_batches(clip: Clip) -> None:
    with torch.no_grad():
        expected = clip.model.encode_text(clip.tokenizer(CAPTIONS), normalize=True)
    for batch_size in (1, 3, 100):
        torch.testing.assert_close(encode_texts(clip, CAPTIONS, batch_size=batch_size, device="cpu"), expected)


def test_no_texts_have_vectors_of_the_same_length(clip: Clip) -> None:
    assert encode_texts(clip, [], batch_size=2, device="cpu").shape == (0, 16)
    assert encode_prompts(clip, [], batch_size=2, device="cpu").shape == (0, 16)


def test_prompts_are_averaged_and_normalised_across_batches(clip: Clip) -> None:
    prompts = [["a red dog", "red"], ["blue"], ["the end of a dog", "two dogs", "five six"]]
    for batch_size in (1, 2, 4, 100):
        found = encode_prompts(clip, prompts, batch_size=batch_size, device="cpu")
        for row, group in zip(found, prompts, strict=True):
            mean = encode_texts(clip, group, batch_size=10, device="cpu").mean(dim=0)
            torch.testing.assert_close(row, mean / mean.norm())


def test_padding_changes_nothing(clip: Clip) -> None:
    assert takes_short_texts(clip.model)
    for texts in (CAPTIONS[:3], CAPTIONS, [""], ["dog"]):
        tokens = clip.tokenizer(texts)
        short = without_padding(tokens)
        assert short.shape[1] == min(8, max(len(text.split()) for text in texts) + 2)
        torch.testing.assert_close(encode_text(clip.model, short), clip.model.encode_text(tokens))
        assert torch.equal(encode_text(clip.model, tokens), clip.model.encode_text(tokens))
    assert without_padding(tokens[:0]).shape == (0, 8)


def test_a_text_tower_that_sees_padding_gets_full_texts(vit: ModelParams) -> None:
    assert vit.config is not None
    text = {**vit.config["text_cfg"], "no_causal_mask": True}
    clip = build_model(
        ModelParams(config={**vit.config, "text_cfg": text}, tokenizer="words"), IMAGE, CAPTIONS, random_seed=0
    )
    assert not takes_short_texts(clip.model)
