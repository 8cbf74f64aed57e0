"""Which stages run, in which order, and what a failure costs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pytest

from flows.graph import make_pipeline
from flows.progress import Outcome, Progress

PIPELINE = {
    "data": [],
    "seed": ["data"],
    "dense": ["seed"],
    "expert@expert-0": ["seed"],
    "expert@expert-1": ["seed"],
    "expert@expert-2": ["seed"],
    "evaluate": ["dense", "expert@expert-0", "expert@expert-1", "expert@expert-2"],
    "report": ["evaluate"],
}


class Run:
    """All stages to their end: each ready one is started, and the first that was started ends first.

    Args:
        stale: stages that DVC calls out of date; default all.
        failing: stages that fail, with the reason.
        same: stages whose outputs are those of before.
    """

    def __init__(
        self,
        pipeline: Mapping[str, Collection[str]] = PIPELINE,
        stale: Collection[str] | None = None,
        failing: Mapping[str, str] | None = None,
        same: Collection[str] = (),
    ) -> None:
        failing = failing or {}
        progress = Progress(make_pipeline(pipeline), set(pipeline if stale is None else stale))
        self.started: list[str] = []
        self.changing: list[str] = []
        self.company: dict[str, bool] = {}
        self.outcome: Outcome = progress.outcome
        under_way: list[str] = []
        while not progress.ended:
            for stage in progress.ready():
                self.company[stage] = progress.has_company(stage)
                progress.start(stage)
                under_way.append(stage)
            stage = under_way.pop(0)
            self.started.append(stage)
            changes = progress.may_change(stage)
            self.changing += [stage] * changes
            if changes and stage in failing:
                progress.fail(stage, failing[stage])
            else:
                progress.succeed(stage, cached=not changes, changed=changes and stage not in same)


def test_all_stages_run_in_order() -> None:
    run = Run()
    assert run.started == list(PIPELINE)
    assert run.outcome == Outcome(done=list(PIPELINE))


def test_only_stages_whose_needs_have_ended_are_ready() -> None:
    progress = Progress(make_pipeline(PIPELINE), set(PIPELINE))
    assert progress.ready() == ["data"]
    progress.start("data")
    assert progress.ready() == []
    progress.succeed("data", cached=False, changed=True)
    assert progress.ready() == ["seed"]


def test_a_training_beside_others_has_company_and_others_have_none() -> None:
    company = Run().company
    assert not company["seed"]
    assert all(company[stage] for stage in ("dense", "expert@expert-0", "expert@expert-1", "expert@expert-2"))
    assert not company["evaluate"]


def test_stages_that_are_up_to_date_are_no_company() -> None:
    assert not Run(stale={"dense"}).company["dense"]


def test_nothing_runs_when_all_is_up_to_date() -> None:
    run = Run(stale=set())
    assert run.changing == []
    assert run.outcome == Outcome(cached=list(PIPELINE))


def test_a_change_runs_what_comes_after_it() -> None:
    assert Run(stale={"expert@expert-1"}).changing == ["expert@expert-1", "evaluate", "report"]


def test_a_stage_that_gives_the_same_again_changes_nothing_after_it() -> None:
    assert Run(stale={"data"}, same={"data"}).changing == ["data"]


def test_a_lost_expert_stops_nobody() -> None:
    outcome = Run(failing={"expert@expert-1": "no luck"}).outcome
    assert outcome.lost_experts == ["expert-1"]
    assert outcome.fatal == {}
    assert sorted(outcome.done) == sorted(PIPELINE.keys() - {"expert@expert-1"})


def test_a_lost_expert_has_the_ensemble_evaluated_anew() -> None:
    run = Run(stale={"expert@expert-1"}, failing={"expert@expert-1": "no luck"})
    assert run.changing == ["expert@expert-1", "evaluate", "report"]


def test_a_failed_dense_model_lets_the_experts_finish_and_stops_the_evaluation() -> None:
    outcome = Run(failing={"dense": "no luck"}).outcome
    assert outcome.fatal == {"dense": "no luck"}
    assert outcome.skipped == ["evaluate", "report"]
    assert {"expert@expert-0", "expert@expert-1", "expert@expert-2"} <= set(outcome.done)


def test_a_failed_seed_leaves_the_rest_untried() -> None:
    outcome = Run(failing={"seed": "no luck"}).outcome
    assert outcome.skipped == list(PIPELINE)[2:]
    assert outcome.done == ["data"]


def test_empty_pipeline() -> None:
    assert Run({}).outcome == Outcome()


@pytest.mark.parametrize("stage", ["seed", "dense-long", "expert@expert-0"])
def test_experts_alone_are_dispensable(stage: str) -> None:
    outcome = Outcome(failed={stage: "no luck"})
    assert bool(outcome.fatal) == (stage != "expert@expert-0")
