from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode.data.loading.selection import Pairs
from mode.errors import ModeError
from mode.params import ExpertParams, TrainingParams, UpdateParams
from mode.roles import DENSE, DENSE_LONG, EXPERT, SEED, UNIFORM, UPDATE, Role
from mode.training.plan import Schedule, TrainPlan, make_plan

PAIRS = Pairs.of(np.arange(10), np.arange(10))
PARENT = Path("models/seed")
#: An arm that no table has.
FULL = Role("full", "dense", "a full model", "", parent="seed", pairs="all", length="expert", many=True)


def plan(role: Role, schedule: str = "wsd", **details: Any) -> TrainPlan:
    training = TrainingParams(
        epoch_samples=100, epochs=32, seed_epochs=27, batch_size=10, warmup=5, lr=1.0, schedule=schedule
    )  # type: ignore[arg-type]
    return make_plan(role, PAIRS, training, images=7, **details)


def test_seed_then_dense_cover_the_steps_of_one_dense_training() -> None:
    for schedule in ("wsd", "cosine"):
        seed, dense, straight = plan(SEED, schedule), plan(DENSE, schedule, parent=PARENT), plan(DENSE, schedule)
        assert (seed.first_step, seed.last_step) == (0, 270)
        assert (dense.first_step, dense.last_step) == (270, 320)
        assert (straight.first_step, straight.last_step) == (0, 320)
        assert dense.stream_start == seed.stream_stop == 2_700
        assert dense.stream_stop == straight.stream_stop == 3_200
        assert [straight.schedule.rate(step) for step in range(320)] == [
            (seed if step < 270 else dense).schedule.rate(step) for step in range(320)
        ]


def test_dense_long_has_the_steps_of_seed_and_experts() -> None:
    wsd = plan(DENSE_LONG, parent=PARENT, experts=5)
    assert (wsd.first_step, wsd.last_step) == (270, 270 + 5 * 50)
    assert wsd.schedule.rate(270) == 1.0
    assert wsd.schedule.rate(395) == 0.5
    assert wsd.parent == PARENT


def test_dense_long_with_a_cosine_starts_from_scratch() -> None:
    cosine = plan(DENSE_LONG, "cosine", parent=PARENT, experts=4)
    assert (cosine.first_step, cosine.last_step, cosine.stream_start, cosine.parent) == (0, 470, 0, None)
    assert cosine.schedule.rate(237) == pytest.approx(0.5, abs=0.01)


def test_an_expert_branches_off_with_its_own_stream_steps_and_rate() -> None:
    own = ExpertParams(source="other", cluster=2, epochs=10, lr=0.5)
    expert = plan(EXPERT, key="tops", expert=own, parent=PARENT)
    assert (expert.name, expert.source, expert.cluster) == ("tops", "other", 2)
    assert (expert.first_step, expert.last_step, expert.stream_start) == (270, 370, 0)
    assert expert.samples == expert.stream_stop == 1_000
    assert expert.position(271) == 10
    assert [expert.schedule.rate(step) for step in (270, 320)] == [0.5, 0.25]


def test_another_arm_needs_no_more_than_its_row() -> None:
    """Many models on all pairs: each is as long as its expert, and has a stretch of the stream of its own."""
    experts = {f"expert-{number}": ExpertParams(cluster=number) for number in range(3)}
    plans = [plan(FULL, key=key, expert=expert, parent=PARENT) for key, expert in experts.items()]
    assert [each.name for each in plans] == ["full-expert-0", "full-expert-1", "full-expert-2"]
    assert {(each.cluster, each.first_step, each.last_step, each.parent) for each in plans} == {
        (None, 270, 320, PARENT)
    }
    assert [each.stream_start for each in plans] == [2_700, 3_200, 3_700]
    assert plan(FULL, key="own", expert=ExpertParams(cluster=0, epochs=10, lr=0.5), parent=PARENT).steps == 100


def test_what_is_derived_from_models_is_not_trained() -> None:
    with pytest.raises(ValueError, match="uniform is not trained"):
        plan(UNIFORM)


def test_an_epoch_is_one_pass_over_the_images_unless_set() -> None:
    training = TrainingParams(epochs=4, seed_epochs=2, batch_size=10, warmup=0)
    assert make_plan(SEED, PAIRS, training, images=55).last_step == 11


@pytest.mark.parametrize(
    ("role", "details", "message"),
    [
        (EXPERT, {"key": "tops"}, "tops: needs a seed"),
        (DENSE_LONG, {"parent": PARENT}, "needs experts"),
    ],
)
def test_what_makes_no_plan_is_refused(role: Role, details: dict[str, Any], message: str) -> None:
    with pytest.raises(ModeError, match=message):
        plan(role, **details)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 2_000}, "warmup .* exceeds the seed's 20 steps"),
        ({"batch_size": 500}, "too few for steps of 500"),
    ],
)
def test_settings_that_allow_no_training_are_refused(settings: dict[str, int], message: str) -> None:
    training = TrainingParams(**{"epochs": 4, "seed_epochs": 2, "batch_size": 10, "warmup": 0, **settings})  # type: ignore
    with pytest.raises(ModeError, match=message):
        make_plan(SEED, PAIRS, training, images=100)


def test_no_pairs_are_refused() -> None:
    with pytest.raises(ModeError, match="no pairs"):
        make_plan(SEED, Pairs.of(np.arange(0), np.arange(10)), TrainingParams(), images=1)


def test_wsd_by_hand() -> None:
    wsd = Schedule("wsd", lr=1.0, warmup=2, branch=4, end=8)
    assert [wsd.rate(step) for step in range(8)] == [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_by_hand() -> None:
    cosine = Schedule("cosine", lr=2.0, warmup=1, branch=4, end=5)
    expected = [2.0, 2.0, 1 + math.cos(math.pi / 4), 1.0, 1 + math.cos(3 * math.pi / 4)]
    assert [cosine.rate(step) for step in range(5)] == pytest.approx(expected)


def test_an_expert_of_equal_length_follows_the_dense_cosine() -> None:
    dense = Schedule("cosine", lr=1.0, warmup=3, branch=20, end=30)
    expert = Schedule("cosine", lr=1.0, warmup=3, branch=20, end=30, dense_end=30)
    assert [expert.rate(step) for step in range(20, 30)] == [dense.rate(step) for step in range(20, 30)]


def test_a_longer_expert_runs_the_rest_of_the_cosine_over_its_own_steps() -> None:
    dense = Schedule("cosine", lr=1.0, warmup=0, branch=20, end=30)
    expert = Schedule("cosine", lr=1.0, warmup=0, branch=20, end=40, dense_end=30)
    assert [expert.rate(20 + 2 * step) for step in range(10)] == pytest.approx(
        [dense.rate(20 + step) for step in range(10)]
    )


@given(
    kind=st.sampled_from(["wsd", "cosine"]),
    warmup=st.integers(0, 50),
    stable=st.integers(0, 50),
    decay=st.integers(1, 50),
)
def test_rate_rises_then_never_rises_again_and_ends_near_zero(kind: str, warmup: int, stable: int, decay: int) -> None:
    branch = warmup + stable
    schedule = Schedule(kind, lr=3.0, warmup=warmup, branch=branch, end=branch + decay)  # type: ignore[arg-type]
    rates = [schedule.rate(step) for step in range(branch + decay)]
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(0 < rate <= 3.0 for rate in rates)
    assert schedule.rate(branch + decay) == pytest.approx(0.0, abs=1e-12)


def tuned(role: Role, schedule: str = "wsd", **details: Any) -> TrainPlan:
    """From a pretrained seed: no step of a seed, a warm-up for everyone."""
    training = TrainingParams(
        epoch_samples=100, epochs=4, seed_epochs=0, batch_size=10, warmup=10, lr=1.0, schedule=schedule
    )  # type: ignore[arg-type]
    return make_plan(role, PAIRS, training, images=7, parent=PARENT, **details)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_from_a_pretrained_seed_every_model_has_a_schedule_of_its_own(schedule: str) -> None:
    plans = [
        tuned(DENSE, schedule),
        tuned(DENSE_LONG, schedule, experts=3),
        tuned(EXPERT, schedule, key="e", expert=ExpertParams(cluster=0)),
        tuned(EXPERT, schedule, key="e", expert=ExpertParams(cluster=0, epochs=8, lr=0.5)),
    ]
    assert [(each.first_step, each.last_step) for each in plans] == [(0, 40), (0, 120), (0, 40), (0, 80)]
    for each in plans:
        assert (each.parent, each.stream_start) == (PARENT, 0)
        highest = each.schedule.lr
        assert each.schedule.rate(0) == highest / 10
        assert each.schedule.rate(9) == each.schedule.rate(10) == highest
        middle = 10 + (each.last_step - 10) // 2
        assert each.schedule.rate(middle) == pytest.approx(highest / 2)
        assert each.schedule.rate(each.last_step) == pytest.approx(0, abs=1e-12)


def test_a_fine_tuning_shorter_than_its_warmup_is_refused() -> None:
    training = TrainingParams(epoch_samples=100, epochs=1, seed_epochs=0, batch_size=10, warmup=10)
    with pytest.raises(ModeError, match=r"training\.warmup \(10 steps\) is not shorter than dense \(10\)"):
        make_plan(DENSE, PAIRS, training, images=7, parent=PARENT)


def test_a_fine_tuning_needs_the_pretrained_seed() -> None:
    training = TrainingParams(epoch_samples=100, epochs=1, seed_epochs=0, batch_size=10, warmup=1)
    with pytest.raises(ModeError, match="dense: needs the pretrained seed"):
        make_plan(DENSE, PAIRS, training, images=7)


def test_a_schedule_can_begin_at_the_branch() -> None:
    """With no moments to go on with, the warm-up begins there."""
    schedule = Schedule("wsd", 1.0, warmup=10, branch=100, end=160, start=100)
    assert [schedule.rate(step) for step in (100, 109, 110, 135, 160)] == [0.1, 1.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_an_update_warms_up_and_falls_anew_after_the_last_step_of_the_expert(schedule: str) -> None:
    """An expert has 50 steps here; four tenths of its pairs are 20 steps, of which 5 are warm-up."""
    own = UpdateParams(continues="expert-1", source="base-2", cluster=1, replays="base")
    parent = Path("models/expert-1")
    found = plan(UPDATE, schedule, key="v2", expert=own, parent=parent, begins=320, share=0.4)
    assert (found.name, found.source, found.cluster, found.parent) == ("v2", "base-2", 1, parent)
    assert (found.first_step, found.last_step, found.stream_start) == (320, 340, 0)
    rates = [found.schedule.rate(step) for step in range(320, 341)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0
    assert rates[-1] == pytest.approx(0.0)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_an_update_is_never_longer_than_an_expert_unless_it_says_so() -> None:
    own = UpdateParams(continues="expert-1", source="base-2", cluster=1, replays="base")
    details: dict[str, Any] = {"key": "v2", "parent": PARENT, "begins": 7}
    assert plan(UPDATE, expert=own, share=3.0, **details).steps == 50
    assert plan(UPDATE, expert=own, share=1e-9, **details).steps == 1
    assert plan(UPDATE, expert=own, share=0.06, **details).schedule.warmup == 0
    longer = own.model_copy(update={"epochs": 8, "lr": 0.5})
    assert plan(UPDATE, expert=longer, share=0.1, **details).steps == 80
    assert plan(UPDATE, expert=longer, share=0.1, **details).schedule.lr == 0.5
