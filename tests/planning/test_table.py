"""What people read of a plan."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from mode.planning.machines import Cluster, Gpu
from mode.planning.needs import Workload
from mode.planning.plan import make_plan
from mode.planning.rates import sourced
from mode.planning.table import gpu_lines, print_plan, size, stage_cells, wall


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
    assert "weights 4 MB + gradients 4 MB + moments 8 MB" in printed
    line = next(line for line in printed.splitlines() if "image_bytes" in line)
    assert line.split() == ["image_bytes", "7", "mine.yaml"]


def test_without_a_price_there_is_no_cost(workload: Callable[..., Workload], machines: Callable[..., Cluster]) -> None:
    assert "cost" not in stage_cells(make_plan(workload(), machines(), sourced()))


def test_on_cpus_no_memory_of_a_gpu_is_shown(
    workload: Callable[..., Workload], machines: Callable[..., Cluster]
) -> None:
    on_cpu = replace(machines(), device="cpu", gpu=None)
    plan = make_plan(workload(), on_cpu, sourced())
    assert "memory, GPU" not in stage_cells(plan)
    assert gpu_lines(plan) == []


def test_what_a_gpu_holds_is_a_line_for_the_seed_and_one_for_the_others(
    workload: Callable[..., Workload], machines: Callable[..., Cluster]
) -> None:
    with_memory = replace(machines(gpus=2, per_training=1), gpu=Gpu(1e12, 2e9))
    seed, dense = gpu_lines(make_plan(workload(), with_memory, sourced()))
    assert seed.startswith("a GPU of seed, 50 pairs in a pass: ")
    assert "buckets of gradients 4 MB + activations 53 MB" in seed
    assert dense.startswith("a GPU of dense, 100 pairs in a pass: ")
    assert "of 2 GB it may take 1.8 GB: the largest training.batch_size is" in dense
