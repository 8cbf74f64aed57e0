"""Routers of clusters of images, and of captions and images together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mode.clip.model import build_model, save_model
from mode.embedding.open_clip import OpenClipEmbedder
from mode.ensemble.combine import ImageWeights
from mode.ensemble.evidence import Captions
from mode.ensemble.router import Router
from mode.ensemble.views import part_of
from mode.errors import ModeError
from mode.params import ImageParams, RoutingParams, View
from tests.small import VIT

WORDS = ["a dog", "a cat", "one hammer", "a saw", "red dog", "old saw"]


EmbedderOf = Callable[[View], OpenClipEmbedder]


@pytest.fixture(scope="module")
def embedder_of(tmp_path_factory: pytest.TempPathFactory) -> EmbedderOf:
    """Embedders of an untrained seed, by view."""
    folder = tmp_path_factory.mktemp("models") / "seed"
    save_model(folder, build_model(VIT, ImageParams(size=16), WORDS, 0), {})
    return lambda view: OpenClipEmbedder.open(str(folder), view=view, device="cpu")


def test_captions_and_images_together_are_routed_by_the_captions_halves(
    embedder_of: EmbedderOf, tmp_path: Path
) -> None:
    """As a router of the captions alone is whose centres are the means of the captions' vectors."""
    texts = embedder_of("text").encode(WORDS)
    images = np.random.default_rng(0).standard_normal(texts.shape).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    both = np.hstack([texts, images]) / np.sqrt(2)
    of_both, of_texts = (
        {"animals": each[:2].mean(axis=0, keepdims=True), "tools": np.stack([each[2], each[3:5].mean(axis=0)])}
        for each in (both, texts)
    )
    router = Router.fit(of_both, embedder_of("both"), RoutingParams(), WORDS * 20, 0)
    expected = Router.fit(of_texts, embedder_of("text"), RoutingParams(), WORDS * 20, 0)
    task = [["a dog", "red dog"], ["one hammer"]]
    assert router.weights(task) == pytest.approx(expected.weights(task), rel=1e-3)
    assert router.temperature == pytest.approx(expected.temperature, rel=1e-3)
    router.save(tmp_path / "e")
    again = Router.load(tmp_path / "e")
    assert not again.by_image
    assert again.conditions["tools"].shape == (2, 16)


def test_evidence_of_captions_and_images_together_is_that_of_the_captions(embedder_of: EmbedderOf) -> None:
    texts = embedder_of("text").encode(WORDS)
    both = np.hstack([texts, texts[::-1]]) / np.sqrt(2)
    parts = {"animals": [0, 1, 4], "tools": [2, 3, 5]}
    of_both, of_texts = (
        Router.fit(
            {name: each[rows] for name, rows in parts.items()},
            embedder_of(view),
            RoutingParams(kind="evidence"),
            [],
            0,
            {name: Captions([WORDS[row] for row in rows], each[rows]) for name, rows in parts.items()},
        )
        for each, view in ((both, "both"), (texts, "text"))
    )
    task = [["a dog", "red dog"], ["one hammer"]]
    assert of_both.weights(task) == pytest.approx(of_texts.weights(task), rel=1e-3)
    assert of_both.evidence is not None
    assert of_texts.evidence is not None
    for name, expected in of_texts.evidence.vectors.items():
        np.testing.assert_allclose(of_both.evidence.vectors[name], expected, atol=1e-3)


def test_a_router_of_images_by_hand(embedder_of: EmbedderOf) -> None:
    """Distances 0 and 1 at a temperature of 2; and that it goes to zero where parts leave no doubt."""
    eye = np.eye(16, dtype=np.float32)
    conditions = {"a": eye[:1], "b": np.stack([eye[0] + eye[3], eye[5]])}
    router = Router(conditions, embedder_of("image"), RoutingParams(), temperature=2.0)
    odds = np.exp(-0.5)
    weights = router.image_weights(eye[[0, 5]])
    np.testing.assert_allclose(weights["a"], [1 / (1 + odds), np.exp(-1) / (1 + np.exp(-1))])
    np.testing.assert_allclose(weights["a"] + weights["b"], 1)


def test_the_temperature_is_larger_the_less_a_part_says(embedder_of: EmbedderOf) -> None:
    random = np.random.default_rng(0)
    conditions = {name: random.standard_normal((3, 16)).astype(np.float32) for name in "ab"}
    whole = random.standard_normal((300, 16)).astype(np.float32)
    temperatures = [
        Router.fit_to_images(
            conditions, embedder_of("image"), RoutingParams(), whole,
            whole + noise * random.standard_normal(whole.shape).astype(np.float32),
        ).temperature
        for noise in (0.1, 1.0, 3.0)
    ]  # fmt: skip
    assert temperatures == sorted(temperatures)  # type: ignore[type-var]
    assert temperatures[0] < temperatures[-1] / 10  # type: ignore[operator]


def test_a_saved_router_of_images_is_of_a_format_of_its_own(embedder_of: EmbedderOf, tmp_path: Path) -> None:
    """An older program would compare words with its conditions."""
    conditions = {"a": np.eye(16, dtype=np.float32)[:2], "b": np.eye(16, dtype=np.float32)[2:5]}
    router = Router(conditions, embedder_of("image"), RoutingParams(), temperature=0.5)
    router.save(tmp_path / "e")
    assert json.loads((tmp_path / "e/ensemble.json").read_text())["format"] == 2


def test_words_and_images_are_not_mixed_up(embedder_of: EmbedderOf) -> None:
    conditions = {"a": np.eye(16, dtype=np.float32)[:2]}
    of_images = Router(conditions, embedder_of("image"), RoutingParams(), temperature=0.5)
    with pytest.raises(ModeError, match=r"weighed by each image, not by words \(`mode evaluate`"):
        of_images.weights([["a dog"]])
    of_texts = Router(conditions, embedder_of("text"), RoutingParams(), temperature=0.5)
    with pytest.raises(ModeError, match="weighed by each image, not by words"):
        of_images.text_weights(["a dog"])
    with pytest.raises(ModeError, match="weighed by words, not by images"):
        of_texts.image_weights(np.eye(16))


def test_weights_by_image_by_hand() -> None:
    weights = ImageWeights({"a": np.array([1.0, 0.25, 0.0]), "b": np.array([0.0, 0.75, 1.0])})
    a, b = np.arange(6, dtype=np.float32).reshape(3, 2), np.full((3, 2), 10, np.float32)
    expected = [[0, 1], [0.25 * 2 + 7.5, 0.25 * 3 + 7.5], [10, 10]]
    np.testing.assert_allclose(weights.of_images(0, {"a": a, "b": b, "other": a}), expected)
    np.testing.assert_allclose(weights.of_images(1, {"a": a[1:], "b": b[1:]}), expected[1:])
    np.testing.assert_allclose(weights.of_texts(1, {"a": a.T[1:], "b": b.T[1:]}), np.transpose(expected)[1:])
    assert weights.of_images(0, {"a": a, "b": b}).dtype == np.float32


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (40, 30), (17, 5)])
def test_a_part_is_half_of_an_image(size: tuple[int, int]) -> None:
    pixels = np.arange(size[0] * size[1], dtype=np.uint32).reshape(size[::-1]).astype(np.int32)
    random, places = np.random.default_rng(0), set()
    for _ in range(200):
        part = np.array(part_of(Image.fromarray(pixels, "I"), random))
        assert part.shape == tuple(max(1, round(side * 0.5**0.5)) for side in size[::-1])
        top, left = divmod(int(part[0, 0]), size[0])
        assert np.array_equal(part, pixels[top : top + part.shape[0], left : left + part.shape[1]])
        places.add((top, left))
    if size == (17, 5):
        assert len(places) == 6 * 2  # every place that there is
