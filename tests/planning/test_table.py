"""What people read of a plan."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from mode.planning.machines import Cluster
from mode.planning.plan import Workload, make_plan
from mode.planning.rates import sourced
from mode.planning.table import print_plan, size, stage_cells, wall


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (0, "–"),
        (1 / 3600, "1 s"),
        (1 / 60, "1.0 min"),
        (0.5, "30 min"),
        (1, "1.0 h"),
        (99, "99.0 h"),
        (240, "10.0 days"),
    ],
)
def test_times(hours: float, text: str) -> None:
    assert wall(hours) == text


@pytest.mark.parametrize(("count", "text"), [(0, "–"), (999, "–"), (2_500, "2.5 kB"), (6.14e11, "614 GB")])
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_the_table_has_all_stages_their_sum_and_every_source(
    workload: Callable[..., Workload], machines: Callable[..., Cluster]
) -> None:
    plan = make_plan(workload(), machines(nodes=2, memory=1e9), sourced(("mine.yaml", {"image_bytes": 7.0})), price=2.0)
    cells = stage_cells(plan)
    assert [*cells["stage"]] == [*(stage.stage for stage in plan.stages), "all"]
    assert cells["cost"].iloc[-1] == f"{plan.cost:,.0f}"
    file = io.StringIO()
    print_plan(plan, Console(file=file, width=160))
    printed = file.getvalue()
    assert "\x1b" not in printed  # no colours where there is no terminal
    assert "too little: seed: 1 GB of memory are needed on a machine that has 1 GB" in printed
    line = next(line for line in printed.splitlines() if "image_bytes" in line)
    assert line.split() == ["image_bytes", "7", "mine.yaml"]


def test_without_a_price_there_is_no_cost(workload: Callable[..., Workload], machines: Callable[..., Cluster]) -> None:
    assert "cost" not in stage_cells(make_plan(workload(), machines(), sourced()))
