"""A new arm is a row of the table: results that have it show it everywhere, with no other change."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from mode import roles
from mode.reporting.page import render_page
from mode.reporting.plots import all_plots
from mode.reporting.summary import comparison, verdict
from mode.reporting.tables import markdown
from mode.results import Results
from mode.roles import ENSEMBLE, EXPERT, FULL, SEED, Role, role_of
from mode.tracking.runs import Tracker

WIDE = Role(
    "dense-wide", "dense", "the wide dense model", "A dense model of twice the width.", pairs="all", colour="#654321"
)
MEANS = {"seed": 0.4, "full-1": 0.5, "full-0": 0.3, "dense-wide": 0.55, "expert-0": 0.5, "ensemble": 0.6}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Results:
    """Of a run with one more arm, and with copies of experts on all pairs."""
    monkeypatch.setattr(roles, "ROLES", (*roles.ROLES[:3], WIDE, *roles.ROLES[3:]))
    zeroshot = {"mean": MEANS, "tasks": {"dogs": MEANS}}
    cost = {"seed": {"samples_seen": 10}} | {name: {"samples_seen": 20} for name in MEANS if name != "seed"}
    return Results.model_validate({"zeroshot": zeroshot, "cost": cost, "routing": {"dogs": {"expert-0": 1.0}}})


def test_names_belong_to_roles(results: Results) -> None:
    assert [role_of(name) for name in ("full-1", "full", "expert-3", "tops")] == [FULL, EXPERT, EXPERT, EXPERT]
    assert role_of("dense-wide") == WIDE
    assert results.experts == ["expert-0"]


def test_tables_and_verdict_have_the_new_arms(results: Results) -> None:
    names = ["seed", "dense-wide", "fulls, mean", "full-0", "full-1", "expert-0", "ensemble"]
    assert list(comparison(results).index) == names
    assert comparison(results).at["fulls, mean", "zeroshot"] == pytest.approx(0.4)
    assert [line.split(" | ")[0] for line in markdown(results).splitlines()[2:]] == [f"| {name}" for name in names]
    said = " ".join(verdict(results))
    assert (
        "5.0 points over the wide dense model and 20.0 points over a model on everything, as long as an expert" in said
    )


def test_plots_and_page_have_the_new_arms(results: Results) -> None:
    curves = {name: [(0.0, 2.0), (10.0, 1.0)] for name in MEANS}
    drawn = all_plots(results, (), curves)
    assert "gains-dense-wide" in drawn
    assert {"full-0", "dense-wide"} <= {label.get_text() for label in drawn["accuracy"].axes[0].get_yticklabels()}
    assert {"full-0", "dense-wide"} <= {str(line.get_label()) for line in drawn["training"].axes[0].get_lines()}
    page = render_page(results, (), curves)
    assert '<tr class="single" style="--k:#009e73"><th scope="row"><i class="dot"></i>full-0</th>' in page
    assert page.count('<div class="tile" style="--k:#654321"><span>dense-wide</span>') == 1
    assert WIDE.note in page
    assert 'id="gains-dense-wide"' in page


def test_mlflow_has_the_new_arms(results: Results, tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    ids = tracker.log_results(results, dict.fromkeys(["seed", "dense-wide", "full-0", "full-1", "expert-0"]))
    for model in MEANS:
        run = MlflowClient(tracker.uri).get_run(str(ids[model]))
        assert run.data.tags["role"] == role_of(model).kind
        assert run.data.tags["mlflow.note.content"] == role_of(model).note
        assert run.data.metrics["zeroshot/mean"] == MEANS[model]


def test_every_arm_says_what_it_is() -> None:
    assert len({role.name for role in roles.ROLES}) == len(roles.ROLES)
    assert all(role.label and role.note for role in roles.ROLES)
    assert (SEED.trained, EXPERT.trained, ENSEMBLE.trained) == (True, True, False)
