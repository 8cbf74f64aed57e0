from __future__ import annotations

from typing import Any

import pytest

from mode.reporting.summary import (
    EXPERTS_MEAN,
    Cost,
    best,
    costs_of,
    duration,
    experts_of,
    headline,
    multiple_of,
    natural,
    percent,
    quantity,
    recall_names,
    rows,
    times,
    verdict,
)

SMALL: dict[str, Any] = {
    "zeroshot": {
        "mean": {"ensemble": 0.6, "seed": 0.4, "expert-10": 0.5, "expert-2": 0.3, "dense": 0.5, "dense-long": 0.6},
        "tasks": {},
    },
    "retrieval": {
        "tasks": {
            "a": {"dense": {"image_recall@1": 0.1, "image_recall@5": 0.2, "text_recall@5": 0.4}},
            "b": {"dense": {"image_recall@1": 0.3, "image_recall@5": 0.6, "text_recall@5": None}},
        }
    },
    "routing": {"t": {"expert-2": 0.3, "expert-10": 0.7}},
    "cost": {
        "seed": {"samples_seen": 27, "flops": 270, "seconds": 2.7},
        "dense": {"samples_seen": 32, "flops": 320, "seconds": 3.2},
        "expert-2": {"samples_seen": 32, "flops": 320, "seconds": 3.2},
        "expert-10": {"samples_seen": 33, "flops": 330, "seconds": 3.3},
    },
}


def test_rows_are_in_the_order_of_the_method() -> None:
    table = rows(SMALL)
    assert [row.model for row in table] == [
        "seed",
        "dense",
        "dense-long",
        EXPERTS_MEAN,
        "expert-2",
        "expert-10",
        "ensemble",
    ]
    assert table[3].zeroshot == pytest.approx(0.4)
    assert table[3].cost.samples == pytest.approx(32.5)


def test_the_ensemble_costs_the_seed_and_the_experts_parts_after_it() -> None:
    assert costs_of(SMALL)["ensemble"] == Cost(27 + 5 + 6, 270 + 50 + 60, pytest.approx(2.7 + 0.5 + 0.6))
    assert rows(SMALL)[-1].multiple == pytest.approx(380 / 320)


def test_a_given_cost_of_the_ensemble_stands() -> None:
    given = {**SMALL, "cost": {**SMALL["cost"], "ensemble": {"samples_seen": 1, "flops": 2, "seconds": 3}}}
    assert costs_of(given)["ensemble"] == Cost(1, 2, 3)


@pytest.mark.parametrize("missing", ["seed", "expert-2"])
def test_a_cost_that_is_not_known_is_not_guessed(missing: str) -> None:
    cost = {model: given for model, given in SMALL["cost"].items() if model != missing}
    assert costs_of({**SMALL, "cost": cost})["ensemble"] == Cost()


def test_multiples_fall_back_on_samples() -> None:
    assert multiple_of(Cost(samples=64), Cost(samples=32, flops=1)) == 2
    assert multiple_of(Cost(flops=3, samples=64), Cost(samples=32, flops=1)) == 3
    assert multiple_of(Cost(samples=64), Cost()) is None


def test_recalls_are_means_over_tasks_at_the_largest_cut_up_to_ten() -> None:
    assert recall_names(SMALL) == ["image_recall@5", "text_recall@5"]
    dense = next(row for row in rows(SMALL) if row.model == "dense")
    assert dense.recalls == pytest.approx({"image_recall@1": 0.2, "image_recall@5": 0.4, "text_recall@5": 0.4})


def test_ties_are_all_best_and_the_experts_mean_never() -> None:
    table = rows(SMALL)
    assert best(table, {row.model: row.zeroshot for row in table}) == {"dense-long", "ensemble"}
    assert best(table, {EXPERTS_MEAN: 1.0, "dense": 0.2}) == {"dense"}
    assert best(table, {}) == set()


def test_the_verdict_says_losses_too(metrics: dict[str, Any]) -> None:
    said = " ".join(verdict(metrics))
    mean = metrics["zeroshot"]["mean"]
    assert f"{100 * mean['ensemble']:.1f} % zero-shot accuracy over 52 tasks" in said
    assert f"gains {100 * (mean['ensemble'] - mean['dense']):.1f} points over the dense model," in said
    lost = 100 * (mean["dense-long"] - mean["ensemble"])
    assert f"loses {lost:.1f} points to the dense model of equal total cost" in said
    assert "1.47 times" in said
    assert "level with the dense model of equal total cost" in " ".join(verdict(SMALL))


def test_experts_that_answer_with_the_seed_are_named() -> None:
    said = " ".join(verdict({**SMALL, "stand_ins": {"expert-3": "seed"}}))
    assert "expert-3 is not trained yet: seed answers for it." in said


def test_nothing_is_made_of_nothing() -> None:
    assert rows({}) == []
    assert verdict({}) == []
    assert headline({}) == {}
    assert experts_of({}) == []


def test_undefined_figures_are_missing() -> None:
    undefined = {"zeroshot": {"mean": {"dense": None, "seed": float("nan")}, "tasks": {"t": {"dense": None}}}}
    assert [(row.model, row.zeroshot) for row in rows(undefined)] == [("seed", None), ("dense", None)]


def test_headline_has_the_means() -> None:
    content = headline(SMALL)
    assert content["zeroshot"]["ensemble"] == 0.6
    assert content["cost"]["ensemble"] == 1.1875
    assert content["image_recall@5"] == {"dense": 0.4}


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (percent(0.0), "0.0"),
        (percent(1.0), "100.0"),
        (quantity(None), "–"),
        (quantity(0), "0"),
        (quantity(999.9), "1 k"),
        (quantity(999_900), "1 M"),
        (quantity(-12_345), "-12.3 k"),
        (quantity(1_000), "1 k"),
        (quantity(2.5e18), "2.5 E"),
        (duration(59.4), "59 s"),
        (duration(59.6), "1 min 0 s"),
        (duration(3_600), "1 h 0 min"),
        (times(1.468), "1.47×"),
    ],
)
def test_figures_as_text(shown: str, text: str) -> None:
    assert shown == text


def test_names_sort_by_their_numbers() -> None:
    names = ["expert-10", "expert-2", "fashion", "2", "expert"]
    assert sorted(names, key=natural) == ["2", "expert", "expert-2", "expert-10", "fashion"]
