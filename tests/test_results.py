"""The results: a file is what is in memory, what is not there stays away, and a wrong file says what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mode.errors import ModeError
from mode.results import Cost, Results, SuiteFacts, natural

WHOLE: dict[str, Any] = {
    "zeroshot": {"mean": {"seed": 0.5, "expert-10": 1.0}, "tasks": {"dögs": {"seed": 0.5, "expert-10": 1.0}}},
    "retrieval": {"tasks": {"flickr8k": {"dense": {"image_recall@1": 0.25, "text_recall@10": None}}}},
    "routing": {"dögs": {"expert-2": 1e-05, "expert-10": 0.99999}},
    "details": {"dögs": {"seed": {"acc1": 0.5, "acc5": None}}},
    "tasks": {
        "dögs": {
            "kind": "classification",
            "metric": "acc1",
            "images": 4,
            "classes": 2,
            "templates": 1,
            "texts": 0,
            "hash": "ab",
        }
    },
    "stand_ins": {"expert-2": "seed"},
    "growth": {
        "tasks": {"dögs": {"order": ["expert-10"], "experts": [0, 1], "by_task": [0.5, 1.0], "reversed": [0.5, 1.0]}},
        "mean": {"experts": [0, 1], "by_task": [0.5, 1.0], "reversed": [0.5, 1.0]},
    },
    "cost": {"seed": {"samples_seen": 82944, "flops": 3179953520640, "seconds": 69.857}},
    "provenance": {"commit": None, "versions": {"torch": "2.9"}, "uncommitted_changes": False},
    "suite": {"name": "clip26", "missing": ["cars"]},
}


def test_a_file_is_saved_as_it_was_loaded(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(WHOLE, indent=2) + "\n")
    Results.load(tmp_path / "metrics.json").save(tmp_path / "again.json")
    saved = json.loads((tmp_path / "again.json").read_text())
    assert "mode:sha256" in saved.pop("checksum")
    assert json.dumps(saved) == json.dumps(WHOLE)
    again = (tmp_path / "again.json").read_bytes()
    Results.load(tmp_path / "again.json").save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == again


def test_a_figure_that_has_changed_is_noticed(tmp_path: Path) -> None:
    Results.model_validate(WHOLE).save(tmp_path / "metrics.json")
    text = (tmp_path / "metrics.json").read_text()
    (tmp_path / "metrics.json").write_text(text.replace("69.857", "69.957"))
    with pytest.raises(ModeError, match=r"metrics\.json: damaged"):
        Results.load(tmp_path / "metrics.json")


def test_a_part_that_is_missing_stays_missing(tmp_path: Path) -> None:
    part = {"zeroshot": {"mean": {"seed": 0.5}}, "growth": {"tasks": {}, "mean": {}}}
    results = Results.model_validate(part)
    assert results.routing == results.cost == {}
    results.save(tmp_path / "metrics.json")
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert {key: value for key, value in saved.items() if key != "checksum"} == part
    results.suite = SuiteFacts(name="clip26", missing=[])
    results.save(tmp_path / "metrics.json")
    assert Results.load(tmp_path / "metrics.json").suite == results.suite


def test_undefined_is_null_and_never_nan(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"zeroshot": {"mean": {"seed": NaN, "dense": 0.5}}}')
    results = Results.load(tmp_path / "metrics.json")
    assert results.zeroshot.mean == {"seed": None, "dense": 0.5}
    results.save(tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text())["zeroshot"]["mean"] == {"seed": None, "dense": 0.5}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"zeroshot": {"mean": {"seed": 0.5', "Invalid JSON"),
        ("", "Invalid JSON"),
        ("\ufffe".encode("utf-16").decode("latin-1"), "Invalid JSON"),
        ("[1, 2]", "should be an object"),
        ("{}", "it has no part of one"),
        ('{"model_name": "ViT-B-32"}', "it has no part of one"),
        ('{"zeroshot": [0.5]}', "zeroshot: "),
        ('{"zeroshot": {"mean": {"seed": "high"}}}', "zeroshot.mean.seed"),
        ('{"cost": {"seed": {"flops": true}}}', "cost.seed.flops"),
        ('{"tasks": {"dogs": {"kind": "quiz"}}}', "tasks.dogs.kind"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(content, "utf-8")
    with pytest.raises(ModeError) as raised:
        Results.load(path)
    assert str(raised.value).startswith(f"{path}: no metrics file: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModeError, match=r"metrics.json: no such file \(run `dvc repro` first\)"):
        Results.load(tmp_path / "metrics.json")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    Results.model_validate(WHOLE).save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        Results(provenance={"made": object()}).save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.json"]


def test_models_and_experts_are_whatever_has_a_figure_or_a_weight() -> None:
    results = Results.model_validate(WHOLE)
    assert results.models == ["seed", "expert-10", "dense"]
    assert results.experts == ["expert-2", "expert-10"]
    assert Results.model_validate({"cost": {"dense": {}, "tops": {}}}).experts == ["tops"]
    assert Results().models == Results().experts == []


COSTS = {
    "seed": Cost(samples_seen=27, flops=270, seconds=2.7),
    "expert-0": Cost(samples_seen=32, flops=320, seconds=3.2),
    "expert-1": Cost(samples_seen=33, flops=330, seconds=3.3),
}


def test_an_ensemble_costs_the_seed_and_the_experts_parts_after_it() -> None:
    costs = Results(cost=COSTS).costs
    assert costs["ensemble"] == costs["uniform"]
    assert costs["ensemble"].samples_seen == 27 + 5 + 6
    assert costs["ensemble"].flops == 270 + 50 + 60
    assert costs["ensemble"].seconds == pytest.approx(2.7 + 0.5 + 0.6)


def test_a_given_cost_of_the_ensemble_stands() -> None:
    given = Cost(samples_seen=1, flops=2, seconds=3)
    assert Results(cost={**COSTS, "ensemble": given}).costs["ensemble"] == given


@pytest.mark.parametrize("missing", ["seed", "expert-1"])
def test_a_cost_that_is_not_known_is_not_guessed(missing: str) -> None:
    known = {model: cost for model, cost in COSTS.items() if model != missing}
    results = Results(cost=known, routing={"t": {"expert-0": 0.5, "expert-1": 0.5}})
    assert results.costs["ensemble"] == Cost(samples_seen=None, flops=None, seconds=None)


def test_names_sort_by_their_numbers() -> None:
    names = ["expert-10", "expert-2", "fashion", "2", "expert"]
    assert sorted(names, key=natural) == ["2", "expert", "expert-2", "expert-10", "fashion"]
    assert sorted(["3²", "3", "²"], key=natural) == ["3", "3²", "²"]  # a digit of which Python makes no number
