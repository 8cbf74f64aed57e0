"""Definitions: what is refused, and what a run's parameters are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mode.errors import ModeError
from mode.experiments.definition import Experiment, load_experiment

LEAST: dict[str, Any] = {
    "title": "A title",
    "question": "What is it?",
    "runs": {"a": {}, "b": {"experts": 2, "expert": {"epochs": 3}, "set": {"clustering.fine": 8, "x.y": "own"}}},
    "rows": {"A": ["a", "dense"], "B": ["b", "ensemble"]},
}


def test_overrides_worked_out_by_hand() -> None:
    made = Experiment.model_validate(
        {
            **LEAST,
            "set": {"x.y": "all", "sources.base.shards": {"{photos}/train": 1.0}, "evaluation.tasks": ["{photos}/t"]},
            "data": {"photos": "photographs"},
            "variants": ["top-1"],
            "quick": {"set": {"clustering.fine": 4}},
        }
    )
    folders = {"photos": Path("/p")}
    shared = {"sources.base.shards": {"/p/train": 1.0}, "evaluation.tasks": ["/p/t"], "variants.arms": ["top-1"]}
    assert made.overrides("a", 5, folders) == {"random_seed": 5, "x.y": "all", **shared}
    assert made.overrides("b", 0, folders, quick=True) == {
        "random_seed": 0,
        "clustering.coarse": 2,
        "experts": {
            "expert-0": {"source": "base", "cluster": 0, "epochs": 3},
            "expert-1": {"source": "base", "cluster": 1, "epochs": 3},
        },
        "clustering.fine": 4,
        "x.y": "own",
        **shared,
    }


def test_only_some_experts_of_many() -> None:
    made = Experiment.model_validate({**LEAST, "experts": 4, "runs": {"a": {"only": ["expert-3"]}, "b": {}}})
    found = made.overrides("a", 0, {})
    assert found["clustering.coarse"] == 4
    assert found["experts"] == {"expert-3": {"source": "base", "cluster": 3}}
    assert [*made.overrides("b", 0, {})["experts"]] == [f"expert-{n}" for n in range(4)]


def test_a_mean_has_a_name_and_other_metrics_are_their_own() -> None:
    made = Experiment.model_validate({**LEAST, "means": {"games": ["chess", "dice"]}})
    assert [made.measured(metric) for metric in ("games", "cats", "zero-shot")] == ["chess, dice", "cats", "zero-shot"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means": {"zero-shot": ["chess"]}}, "means: zero-shot: is the mean over all tasks"),
        ({"means": {"a, b": ["chess"]}}, "means.a, b"),
        ({"means": {"games": []}}, "means.games: "),
        ({"title": None}, "title: "),
        ({"titel": "x"}, "titel: Extra inputs are not permitted"),
        ({"runs": {}}, "runs: "),
        ({"runs": {"No Name": {}}}, "runs.No Name"),
        ({"rows": {"A": ["c", "dense"]}}, "rows.A: no run is called 'c'"),
        ({"rows": {"A": "a"}}, "rows.A: "),
        ({"compare": [{"row": "A", "than": "C"}]}, "compare.0: no row is called 'C'"),
        ({"compare": [{"row": "A", "than": "A", "metrics": ["chess"]}]}, "compare.0: 'chess' is none of `metrics`"),
        ({"figure": {"x": {"c": 1.0}}}, "figure.x: no run is called 'c'"),
        ({"seeds": [0, 0]}, "seeds: one is there twice"),
        ({"seeds": []}, "seeds: "),
        ({"seeds": [-1]}, "seeds.0: "),
        ({"set": {"x": "{photos}"}}, "set: {photos} stands for a folder, but `data` has no 'photos'"),
        ({"set": {"x": {"{photos}/train": 1.0}}}, "set: {photos} stands for a folder"),
        ({"quick": {"set": {"x": ["{photos}"]}}}, "set: {photos} stands for a folder"),
        ({"runs": {"a": {"expert": {"epochs": 3}}, "b": {}}}, "runs.a.expert: of which experts?"),
        ({"runs": {"a": {"only": []}, "b": {}}}, "runs.a.only: "),
        ({"runs": {"a": {"only": ["../expert-0"]}, "b": {}}}, "runs.a.only.0: "),
        (
            {"runs": {"a": {"starts_from": ["a", "dense"]}, "b": {}}},
            "runs.a: starts from 'a', which is no run above it",
        ),
        ({"runs": {"a": {}, "b": {"starts_from": ["a", "../../.."]}}}, "runs.b.starts_from: "),
        ({"runs": {"a": {"experts": 10**9}, "b": {}}}, "runs.a.experts: "),
        ({"runs": {"a": {}, "b": {}, "a..b": {}}}, "runs.a..b"),
        ({"runs": {"a": {}, "b": {"set": {"random_seed": 1}}}}, "runs.b.set.random_seed: `seeds` says"),
        ({"set": {"random_seed": 1}}, "set.random_seed: `seeds` says"),
        ({"seeds": [2**32]}, "seeds.0: "),
        ({"data": {"my-photos": "photographs"}}, "data.my-photos"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**LEAST, **change}))
    with pytest.raises(ModeError) as refused:
        load_experiment(path)
    assert str(refused.value).startswith(f"{path}: {message}")
    assert "\n" not in str(refused.value)


BOMB = b"a: &a [1, 1]\n" + b"".join(b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 9)) for n in b"bcdefgh")


@pytest.mark.parametrize(
    "content", [b"a: [", b"\xff\xfe", b"[1]", b"", b"a: 2026-02-31", 5000 * b"[", b"&a [*a]", BOMB]
)
def test_what_is_no_definition_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ModeError) as refused:
        load_experiment(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_a_folder_and_a_name_that_is_none_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").mkdir()
    with pytest.raises(ModeError, match=r"mine\.yaml: cannot be read: Is a directory$"):
        load_experiment(tmp_path / "mine.yaml")
    for name in ("a..b", "-a", ".a", "a.", "A b", 65 * "a"):
        with pytest.raises(ModeError, match=r"yaml: no name for an experiment"):
            load_experiment(tmp_path / f"{name}.yaml")


def test_an_unknown_name_says_which_there_are(tmp_path: Path) -> None:
    (tmp_path / "length.yaml").touch()
    with pytest.raises(ModeError, match=r"no experiment is called 'lenght' \(there are: length\)"):
        load_experiment(tmp_path / "lenght.yaml")
