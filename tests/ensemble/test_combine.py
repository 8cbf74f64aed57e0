"""The weights of single queries of a retrieval task, against loops over them."""

from __future__ import annotations

import numpy as np
import pytest

from mode.ensemble.combine import QueryWeights

TASK = {"a": 0.75, "b": 0.25, "seed": 0.0}


@pytest.fixture
def scores() -> dict[str, np.ndarray]:
    """Model -> cosines [5 texts, 4 images]."""
    random = np.random.default_rng(0)
    return {name: random.uniform(-1, 1, (5, 4)).astype(np.float32) for name in TASK}


@pytest.fixture
def texts() -> dict[str, np.ndarray]:
    """Model -> weight in each text; the seed has no weight in the task, but all of it in the last text."""
    a = np.array([0.9, 0.2, 0.5, 1.0, 0.0])
    seed = np.array([0.0, 0.0, 0.0, 0.0, 1.0])
    return {"a": a, "b": 1 - a - seed, "seed": seed}


@pytest.mark.parametrize("factor", [None, 7.0])
def test_a_text_has_its_own_weights(
    scores: dict[str, np.ndarray], texts: dict[str, np.ndarray], factor: float | None
) -> None:
    weights = QueryWeights(TASK, texts, factor)
    expected = [[sum(texts[n][t] * scores[n][t, i] for n in TASK) for i in range(4)] for t in range(5)]
    found = weights.of_texts(0, scores)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(weights.of_texts(3, {name: rows[3:] for name, rows in scores.items()}), found[3:])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[4], scores["seed"][4])


def test_an_image_has_the_weights_of_the_texts_that_it_seems_to_show(
    scores: dict[str, np.ndarray], texts: dict[str, np.ndarray]
) -> None:
    columns = {name: rows.T for name, rows in scores.items()}
    found = QueryWeights(TASK, texts, 7.0).of_images(0, columns)
    for image in range(4):
        odds = np.exp(7 * (0.75 * columns["a"][image] + 0.25 * columns["b"][image]))
        own = {name: (odds / odds.sum() * texts[name]).sum() for name in TASK}
        np.testing.assert_allclose(found[image], sum(own[n] * columns[n][image] for n in TASK), rtol=1e-5)


def test_by_the_papers_protocol_an_image_has_the_tasks_weights(
    scores: dict[str, np.ndarray], texts: dict[str, np.ndarray]
) -> None:
    columns = {name: rows.T for name, rows in scores.items()}
    found = QueryWeights(TASK, texts, None).of_images(0, columns)
    np.testing.assert_allclose(found, 0.75 * columns["a"] + 0.25 * columns["b"], rtol=1e-6)
    assert found.dtype == np.float32
