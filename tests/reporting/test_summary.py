from __future__ import annotations

from typing import Any

import pytest

from mode.reporting.summary import (
    best,
    comparison,
    doubts,
    duration,
    headline,
    percent,
    quantity,
    recall_names,
    rows,
    times,
    verdict,
)
from mode.results import Results
from mode.roles import EXPERT

PARTS: dict[str, Any] = {
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


SMALL = Results.model_validate(PARTS)


def with_costs(**costs: dict[str, float]) -> Results:
    return Results.model_validate({**PARTS, "cost": costs})


def test_rows_are_in_the_order_of_the_method() -> None:
    table = rows(comparison(SMALL))
    assert [row.model for row in table] == [
        "seed",
        "dense",
        "dense-long",
        EXPERT.mean,
        "expert-2",
        "expert-10",
        "ensemble",
    ]
    assert table[3].zeroshot == pytest.approx(0.4)
    assert table[3].samples_seen == pytest.approx(32.5)
    assert [row.model for row in table if row.single] == ["expert-2", "expert-10"]


def test_one_expert_needs_no_mean() -> None:
    one = Results.model_validate({"zeroshot": {"mean": {"tops": 0.5, "dense": 0.4}}})
    assert list(comparison(one).index) == ["dense", "tops"]


def test_the_ensemble_costs_the_seed_and_the_experts_parts_after_it() -> None:
    assert comparison(SMALL).at["ensemble", "multiple"] == pytest.approx(380 / 320)


def test_multiples_fall_back_on_samples() -> None:
    costs = {"dense": {"samples_seen": 32, "flops": 1}, "seed": {"samples_seen": 64}, "tops": {"flops": 3}}
    multiples = comparison(with_costs(**costs))["multiple"]
    assert multiples["seed"] == 2
    assert multiples["tops"] == 3
    assert comparison(with_costs(seed={"samples_seen": 64}))["multiple"].isna().all()
    assert comparison(with_costs(seed={"flops": 64}, dense={"flops": 0}))["multiple"].isna().all()


def test_recalls_are_means_over_tasks_at_the_largest_cut_up_to_ten() -> None:
    table = comparison(SMALL)
    assert recall_names(table) == ["image_recall@5", "text_recall@5"]
    expected = {"image_recall@1": 0.2, "image_recall@5": 0.4, "text_recall@5": 0.4}
    assert table.loc["dense", [*expected]].to_dict() == pytest.approx(expected)
    assert table.loc["seed", [*expected]].isna().all()


def test_ties_are_all_best_and_a_mean_never() -> None:
    table = comparison(SMALL)
    assert set(table.index[best(table["zeroshot"], table)]) == {"dense-long", "ensemble"}
    mean = table["zeroshot"].where(table["mean"], 0.2)
    assert EXPERT.mean not in table.index[best(mean, table)]
    assert not best(table["zeroshot"] * float("nan"), table).any()


def test_the_verdict_says_losses_too(results: Results) -> None:
    said = " ".join(verdict(results))
    mean = results.zeroshot.mean
    assert f"{100 * mean['ensemble']:.1f} % zero-shot accuracy over 52 tasks" in said
    assert f"gains {100 * (mean['ensemble'] - mean['dense']):.1f} points over the dense model," in said
    lost = 100 * (mean["dense-long"] - mean["ensemble"])
    assert f"loses {lost:.1f} points to the dense model of equal total cost" in said
    assert "1.47 times" in said
    assert "level with the dense model of equal total cost" in " ".join(verdict(SMALL))


def test_experts_that_answer_with_the_seed_are_named() -> None:
    said = " ".join(verdict(SMALL.model_copy(update={"stand_ins": {"expert-3": "seed"}})))
    assert "expert-3 is not trained yet: seed answers for it." in said


def test_nothing_is_made_of_nothing() -> None:
    assert rows(comparison(Results())) == []
    assert verdict(Results()) == []
    assert headline(Results()) == {}


def test_undefined_figures_are_missing() -> None:
    undefined = {"zeroshot": {"mean": {"dense": None, "seed": float("nan")}, "tasks": {"t": {"dense": None}}}}
    table = comparison(Results.model_validate(undefined))
    assert list(table.index) == ["seed", "dense"]
    assert table["zeroshot"].isna().all()


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


def test_the_same_doubt_of_several_models_is_one_sentence() -> None:
    cards = {name: {"doubt": f"{name} has learnt next to nothing."} for name in ("seed", "dense", "expert-0")}
    [sentence] = doubts(cards | {"expert-1": {}})
    assert sentence.startswith("seed, dense and expert-0 have learnt next to nothing, their loss is that of chance")
    assert doubts({"seed": {}}) == []
