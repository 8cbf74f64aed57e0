"""Plans: which trainings there are, which are shared, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mode.errors import ModeError
from mode.experiments.definition import Experiment, load_experiment
from mode.experiments.plan import new_work, overridden, plan_runs, plan_table
from mode.params import parse_params
from mode.roles import DENSE, DENSE_LONG, SEED
from mode.training.plan import make_plan

REPOSITORY = Path(__file__).parents[2]
CONTENT: dict[str, Any] = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
DEFINITIONS = sorted((REPOSITORY / "experiments").glob("*.yaml"))


def experiment(runs: dict[str, Any], **more: Any) -> Experiment:
    return Experiment.model_validate({"title": "t", "question": "q", "runs": runs, "rows": {}, **more})


def test_trainings_in_common_are_counted_once() -> None:
    runs = plan_runs("x", experiment({"a": {}, "random": {"set": {"clustering.strategy": "random"}}}), CONTENT, {}, [0])
    left = new_work(runs)
    assert [work.model for work in left["x-a-0"]] == ["seed", "dense", "dense-long", *(f"expert-{n}" for n in range(4))]
    assert [work.model for work in left["x-random-0"]] == [f"expert-{n}" for n in range(4)]
    table = plan_table(runs, [], 1000.0, 2)
    unit = 3072
    assert table["samples"].tolist() == [72 * unit, 20 * unit, 92 * unit]  # 27 + 5 + 20 + 4 x 5, and 4 x 5 again
    assert table["hours"].tolist() == pytest.approx([0.06144, 0.0170667, 0.0392533], rel=1e-4)
    assert plan_table(runs, ["x-a-0"], None, 1)["trainings"].tolist() == [0, 4, 4]
    elsewhere = [work.key for work in left["x-a-0"][:3]]  # seed and dense models, of another experiment's run
    assert plan_table(runs, [], None, 1, elsewhere)["trainings"].tolist() == [4, 4, 8]


def test_a_source_that_is_added_trains_nothing_anew() -> None:
    sources = {**CONTENT["sources"], "later": {"shards": "glyphs", "continues": "base", "families": {"chess": 4}}}
    update = {"continues": "expert-1", "source": "later", "cluster": 1, "replays": "base"}
    later = {"set": {"sources": sources, "updates": {"expert-1-v2": update}}}
    made = experiment({"a": {}, "later": later}, rows={"updated": ["later", "expert-1-v2"]})
    left = new_work(plan_runs("x", made, CONTENT, {}, [0]))
    assert [work.model for work in left["x-later-0"]] == ["expert-1-v2"]
    with pytest.raises(ModeError, match="run 'later' will have no arm 'expert-1'"):  # its update stands in its place
        plan_runs("x", experiment({"later": later}, rows={"it": ["later", "expert-1"]}), CONTENT, {}, [0])


def test_other_random_seeds_share_nothing_and_routing_alone_shares_all() -> None:
    runs = plan_runs("x", experiment({"a": {}, "paper": {"set": {"routing.kind": "paper"}}}), CONTENT, {}, [0, 1])
    assert [len(work) for work in new_work(runs).values()] == [7, 0, 7, 0]
    assert len({run.key for run in runs}) == 4


def test_a_run_is_known_wherever_its_folders_lie(tmp_path: Path) -> None:
    def planned(folder: str, epochs: int = 32) -> list[Any]:
        made = experiment(
            {
                "first": {"set": {"sources.base.shards": "{photos}/train", "training.epochs": epochs}},
                "second": {"starts_from": ["first", "dense"], "set": {"training.lr": 0.1}},
                "built-in": {},
            },
            data={"photos": "photographs"},
        )
        return plan_runs("x", made, CONTENT, {"photos": tmp_path / folder}, [0])

    here, there, longer = planned("here"), planned("there"), planned("here", epochs=33)
    assert [run.identity for run in here] == [run.identity for run in there]
    assert [a.key == b.key for a, b in zip(here, there, strict=True)] == [False, False, True]
    # A run is another one if that which it starts from is.
    assert [a.identity == b.identity for a, b in zip(here, longer, strict=True)] == [False, False, True]
    assert len({run.identity for run in here}) == 3


def test_a_row_of_an_arm_that_its_run_will_not_have_is_refused() -> None:
    def planned(arm: str, **own: Any) -> None:
        rows = {"a row": ["a", arm]}
        plan_runs("x", experiment({"a": own}, rows=rows, variants=["top-1", "by-range", "probe"]), CONTENT, {}, [0])

    for arm in ("seed", "dense-long", "expert-3", "experts, mean", "uniform", "ensemble", "top-1", "by-range-2"):
        planned(arm)
    planned("probe zero-shot experts, mean")
    planned("full-expert-0", set={"full": ["expert-0"]})
    planned("uniform-full", set={"full": ["expert-0"]})
    for arm in ("ensembel", "expert-4", "uniform-full", "merged", "top-2", "full-expert-0"):
        with pytest.raises(ModeError, match=f"^experiments/x.yaml: rows.a row: run 'a' will have no arm '{arm}'"):
            planned(arm)
    with pytest.raises(ModeError, match="no arm 'dense-long'"):
        planned("dense-long", set={"baselines.dense_long": False})


def test_samples_are_those_of_the_trainings() -> None:
    [run] = plan_runs("x", experiment({"a": {}}), CONTENT, {}, [0])
    recipe, rows = parse_params(CONTENT).training, np.zeros(1, np.int64)
    samples = {work.model: work.samples for work in run.work}
    for role in (SEED, DENSE, DENSE_LONG):
        parent = None if role is SEED else Path("seed")
        assert samples[role.name] == make_plan(role, rows, recipe, 1, experts=4, parent=parent).samples


def test_overridden_leaves_the_content_alone() -> None:
    content = {"a": {"b": 1, "c": 2}}
    assert overridden(content, {"a.b": 3, "d.e": 4, "a.c": {"f": 5}}) == {"a": {"b": 3, "c": {"f": 5}}, "d": {"e": 4}}
    assert content == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    ("made", "data", "message"),
    [
        (experiment({"a": {}}, data={"photos": "photographs"}), {}, "x needs photographs (--data photos=FOLDER)"),
        (experiment({"a": {}}), {"photos": Path()}, "--data photos: x has no data of that name (it needs none)"),
        (experiment({"a": {"set": {"clustering.fin": 1}}}), {}, "experiments/x.yaml: a: clustering.fin: unknown"),
        (experiment({"a": {"only": ["expert-9"]}}), {}, "experiments/x.yaml: a: experts.expert-9.cluster: 9, but"),
    ],
)
def test_bad_input_is_one_line(made: Experiment, data: dict[str, Path], message: str) -> None:
    with pytest.raises(ModeError) as refused:
        plan_runs("x", made, CONTENT, data)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", DEFINITIONS, ids=lambda path: path.stem)
@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
def test_every_definition_can_be_planned(path: Path, quick: bool) -> None:
    made = load_experiment(path)
    runs = plan_runs(path.stem, made, CONTENT, {name: Path("/data") / name for name in made.data}, [0], quick)
    assert [run.run for run in runs] == [*made.runs]
    assert quick or len({run.key for run in runs}) == len(runs)


def keys(name: str) -> set[str]:
    return {run.key for run in plan_runs(name, load_experiment(REPOSITORY / f"experiments/{name}.yaml"), CONTENT, {})}


def test_accuracy_against_cost_needs_no_run_of_its_own() -> None:
    assert keys("figure4") == keys("tables1-2") | keys("figure3")
    assert keys("headline") < keys("tables1-2")


@pytest.mark.parametrize("name", ["branch", "experts-fixed-total"])
def test_totals_are_equal(name: str) -> None:
    runs = plan_runs(name, load_experiment(REPOSITORY / f"experiments/{name}.yaml"), CONTENT, {}, [0])
    for run in runs:
        assert sum(work.samples for work in run.work if work.model.startswith(("seed", "expert-"))) == 47 * 6144
