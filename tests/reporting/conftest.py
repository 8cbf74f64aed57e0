"""A run's results as they come out of the pipeline, made up but of realistic size and spread."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from mode.reporting.summary import Cluster
from mode.results import Results

FAMILIES = """
alphabetic-presentation arabic armenian arrows blackletter-capitals block-elements box-drawing braille chess
cherokee control-pictures currency cyrillic deseret devices dice dingbat-digits dominoes double-struck emoticons
enclosed-letters ethiopic-numbers fractions georgian greek hebrew hexagrams integrals lao letterlike lisu
mathematical-operators monograms music nko number-forms ogham parentheses planets playing-cards quotation-marks
relations religious roman-numerals runic script-capitals sets stars superscripts tifinagh weather zodiac
"""
WORDS = (
    ["letter", "cyrillic", "capital", "greek", "armenian", "hebrew", "georgian", "tifinagh"],
    ["hexagram", "domino", "tile", "die", "face", "vertical", "horizontal", "trigram"],
    ["arrow", "relation", "operator", "less", "greater", "integral", "set", "equal"],
    ["playing", "card", "chess", "hearts", "spades", "zodiac", "smiling", "cat"],
)


FAMILY_NAMES = FAMILIES.split()


def make_metrics(tasks: Sequence[str] = FAMILY_NAMES, experts: int = 4, retrieval: bool = False) -> Results:
    """Results of one run; the same for the same arguments."""
    rng = random.Random(0)
    names = [f"expert-{number}" for number in range(experts)]
    level = {"seed": 0.42, "dense": 0.55, "dense-long": 0.615, "uniform": 0.58, "ensemble": 0.605}
    level |= dict.fromkeys(names, 0.52)
    accuracy: dict[str, dict[str, float]] = {}
    weights: dict[str, dict[str, float]] = {}
    for task in tasks:
        ease, home = rng.uniform(-0.3, 0.3), rng.randrange(experts)
        figures = {model: mid + ease + rng.gauss(0, 0.04) for model, mid in level.items()}
        figures[names[home]] += 0.08
        accuracy[task] = {model: round(min(max(value, 0.02), 1.0), 4) for model, value in figures.items()}
        raw = [rng.random() * 0.2 + (1.5 if number == home else 0.1) for number in range(experts)]
        weights[task] = {name: weight / sum(raw) for name, weight in zip(names, raw, strict=True)}
    samples = {"seed": 27, "dense": 32, "dense-long": 27 + 5 * experts} | dict.fromkeys(names, 32)
    cost = {
        model: {"samples_seen": units * 5_120, "flops": units * 5_120 * 4.1e8, "seconds": units * 5.1}
        for model, units in samples.items()
    }
    metrics: dict[str, Any] = {
        "zeroshot": {
            "mean": {model: sum(row[model] for row in accuracy.values()) / len(tasks) for model in level},
            "tasks": accuracy,
        },
        "retrieval": {"tasks": {}},
        "routing": weights,
        "cost": cost,
        "provenance": {
            "commit": "3f2a9c1d0b7e4f5a6c8d9e0f1a2b3c4d5e6f7a8b",
            "params": "9d5ed678fe57bcca610140957afab571",
            "routing": "calibrated, temperature 0.031",
            "machine": "2 CPU cores, 8 GiB",
            "packages": {"torch": "2.15.0", "open_clip_torch": "3.3.0"},
        },
    }
    if retrieval:
        metrics["retrieval"]["tasks"]["flickr8k"] = {
            model: {f"{way}_recall@{k}": round(mid * k / 40, 4) for way in ("image", "text") for k in (1, 5, 10)}
            for model, mid in level.items()
        }
    return Results.model_validate(metrics)


@pytest.fixture(scope="session")
def results() -> Results:
    return make_metrics(retrieval=True)


@pytest.fixture(scope="session")
def few() -> Results:
    """Results on three tasks, which are drawn quickly."""
    return make_metrics(FAMILY_NAMES[:3])


@pytest.fixture(scope="session")
def clusters() -> list[Cluster]:
    sizes = (15_804, 14_377, 16_120, 13_699)
    return [
        Cluster("base", number, size, words, f"expert-{number}")
        for number, (size, words) in enumerate(zip(sizes, WORDS, strict=True))
    ]


@pytest.fixture(scope="session")
def curves() -> dict[str, list[tuple[float, float]]]:
    """Training loss by model: (samples seen, loss)."""
    ends = {"seed": (0, 27), "dense": (27, 32), "dense-long": (27, 47)} | {f"expert-{i}": (27, 32) for i in range(4)}
    rng = random.Random(1)
    return {
        model: [
            (unit * 5_120 / 4, 4.8 / (1 + unit / 12) + rng.gauss(0, 0.05) - (0.3 if "expert" in model else 0))
            for unit in range(first * 4, last * 4)
        ]
        for model, (first, last) in ends.items()
    }
