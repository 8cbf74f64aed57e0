"""Linear probes: against scikit-learn's own, on features made by hand, at the ends of the regularisation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mode.evaluation import probes
from mode.evaluation.probes import choose_strength, fit_offset, fit_scratch, halves, probe, probe_rows
from mode.evaluation.tasks import Task


def task_of(labels: np.ndarray, classes: int, metric: str = "acc1") -> Task:
    return Task("t", "classification", (), metric, ("c",) * classes, ("{c}",), labels.astype(np.int64))


def clip(factor: float) -> Any:
    """As much of a model as a probe asks for: its factor from cosines to logits."""
    return SimpleNamespace(model=SimpleNamespace(logit_scale=torch.tensor(factor).log()))


def unit(values: np.ndarray) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor(values, dtype=torch.float32), dim=1)


def example(
    count: int = 12, classes: int = 3, spread: float = 0.3
) -> tuple[Task, dict[str, Tensor], dict[str, Tensor]]:
    """Two experts of which each tells one class from the rest, and class texts that say nothing."""
    random = np.random.default_rng(0)
    labels = np.arange(count * classes) % classes
    images, texts = {}, {}
    for number, name in enumerate(("a", "b")):
        features = random.normal(0, spread, (len(labels), 4))
        features[:, number] += labels == number
        features[:, 3] += 1
        images[name], texts[name] = unit(features), unit(random.normal(size=(classes, 4)))
    return task_of(labels, classes), images, texts


CLIPS = {"a": clip(10.0), "b": clip(20.0)}
WEIGHTS = {"a": 0.75, "b": 0.25}


class TestFits:
    def test_from_nothing_the_offset_probe_is_scikit_learns(self) -> None:
        random = np.random.default_rng(1)
        features, labels = random.normal(size=(40, 5)), np.arange(40) % 3
        theirs = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-8).fit(features, labels)
        found = fit_offset(features, np.zeros((40, 3)), labels, 2.0)(features, np.zeros((40, 3)))
        np.testing.assert_allclose(found, theirs.decision_function(features), atol=1e-3)

    def test_regularised_away_it_is_zero_shot(self) -> None:
        random = np.random.default_rng(2)
        features, logits = random.normal(size=(20, 5)), random.normal(size=(20, 4))
        found = fit_offset(features, logits, np.arange(20) % 4, 1e-9)(features, logits)
        np.testing.assert_allclose(found, logits, atol=1e-6)

    def test_two_classes_have_two_columns(self) -> None:
        features = np.array([[-1.0], [-2.0], [1.0], [2.0]])
        for fit in (fit_scratch, fit_offset):
            scores = fit(features, np.zeros((4, 2)), np.array([0, 0, 1, 1]), 10.0)(features, np.zeros((4, 2)))
            assert scores.argmax(axis=1).tolist() == [0, 0, 1, 1]

    def test_the_strength_is_that_of_the_least_loss_on_what_was_not_fitted(self) -> None:
        random = np.random.default_rng(3)
        labels = np.arange(48) % 3
        noise, signal = random.normal(size=(48, 6)), np.eye(3)[labels] + random.normal(0, 0.02, (48, 3))
        nothing = np.zeros((48, 3))
        assert choose_strength(fit_scratch, noise, nothing, labels) == min(probes.STRENGTHS)
        assert choose_strength(fit_scratch, signal, nothing, labels) == max(probes.STRENGTHS)
        losses = []
        for strength in probes.STRENGTHS:
            folds = probes.StratifiedKFold(4, shuffle=True, random_state=probes.SEED).split(noise, labels)
            parts = [
                log_softmax(fit_offset(noise[a], nothing[a], labels[a], strength)(noise[b], nothing[b]), axis=1)[
                    np.arange(len(b)), labels[b]
                ]
                for a, b in folds
            ]
            losses.append(-np.concatenate(parts).sum())
        best = probes.STRENGTHS[int(np.argmin(losses))]
        assert choose_strength(fit_offset, noise, nothing, labels) == best


@pytest.mark.parametrize("counts", [[4, 4], [4, 5, 7], [9, 4, 4, 31]])
def test_halves_have_each_class_in_both(counts: list[int]) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    fitted, scored = halves(labels)
    assert sorted([*fitted, *scored]) == list(range(len(labels)))
    for part in (fitted, scored):
        of_class = np.bincount(labels[part], minlength=len(counts))
        assert all(abs(found - count / 2) < 1 for found, count in zip(of_class, counts, strict=True))
        assert of_class.min() >= 2
    assert all((a == b).all() for a, b in zip(halves(labels), (fitted, scored), strict=True))


class TestProbe:
    def test_together_experts_know_what_none_knows_alone(self) -> None:
        task, images, texts = example(count=24)
        found = probe(task, images, texts, WEIGHTS, CLIPS)
        accuracy = {row: figures["acc1"] for row, figures in found.items()}
        assert set(accuracy) == set(probe_rows([], ["a", "b"]))
        assert accuracy["probe concatenated"] > 0.8 > accuracy["probe experts, mean"] > 0.5
        assert accuracy["probe initialised concatenated"] > 0.8

    def test_zero_shot_is_that_of_the_scored_half(self) -> None:
        task, images, texts = example()
        dense = {**images, "dense": images["a"]}, {**texts, "dense": texts["a"]}, {**CLIPS, "dense": clip(3.0)}
        found = probe(task, dense[0], dense[1], WEIGHTS, dense[2])
        _, scored = halves(task.labels)
        cosines = {name: (images[name] @ texts[name].T).numpy()[scored] for name in images}

        def accuracy(scores: np.ndarray) -> float:
            return float((scores.argmax(axis=1) == task.labels[scored]).mean())

        assert found["probe zero-shot dense"]["acc1"] == accuracy(cosines["a"])
        both = [accuracy(cosines["a"]), accuracy(cosines["b"])]
        assert found["probe zero-shot experts, mean"]["acc1"] == pytest.approx(np.mean(both))
        routed = 0.75 * cosines["a"] + 0.25 * cosines["b"]
        assert found["probe zero-shot concatenated"]["acc1"] == accuracy(routed)
        image, text = (images["a"] + images["b"]) / 2, 0.75 * texts["a"] + 0.25 * texts["b"]
        assert found["probe zero-shot added"]["acc1"] == accuracy((image @ text.T).numpy()[scored])

    def test_on_noise_it_is_no_better_than_chance(self) -> None:
        """More features than images: had it seen the labels of the scored half, it would be right about all of them."""
        random = np.random.default_rng(5)
        images = {name: unit(random.normal(size=(96, 100))) for name in WEIGHTS}
        texts = {name: unit(random.normal(size=(3, 100))) for name in WEIGHTS}
        found = probe(task_of(np.arange(96) % 3, 3), images, texts, WEIGHTS, CLIPS)
        assert all(figures["acc1"] < 0.55 for figures in found.values())

    def test_too_few_images_of_a_class_give_no_figure(self) -> None:
        task, images, texts = example(count=3)
        assert probe(task, images, texts, WEIGHTS, CLIPS) == {}
        task, images, texts = example(count=8)
        assert probe(task_of(task.labels, 4), images, texts, WEIGHTS, CLIPS) == {}  # none of the fourth class

    def test_one_class_alone_gives_no_figure(self) -> None:
        task, images, texts = example(classes=1)
        assert probe(task, images, texts, WEIGHTS, CLIPS) == {}

    def test_the_metric_of_the_task(self) -> None:
        task, images, texts = example(classes=2)
        found = probe(task_of(task.labels, 2, "roc_auc"), images, texts, WEIGHTS, CLIPS)
        assert all(0 <= figures["roc_auc"] <= 1 for figures in found.values())
        assert found["probe concatenated"]["roc_auc"] > 0.9
