"""A plan as people read it."""

from __future__ import annotations

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mode.planning.account import Plan, StagePlan
from mode.planning.machines import CPU
from mode.reporting.summary import quantity
from mode.reporting.tables import wide_console

#: Below these a figure says nothing.
_HOURS, _BYTES = 1 / 3600, 1e3


def size(count: float) -> str:
    """Bytes as people say them.

    >>> size(1.8e9), size(6.14e11), size(0)
    ('1.8 GB', '614 GB', '–')
    """
    if count < _BYTES:
        return "–"
    number, _, prefix = quantity(count).partition(" ")
    return f"{number} {prefix}B"


def wall(hours: float) -> str:
    """Hours as people say them: seconds, minutes, hours, or days from 100 hours on.

    >>> wall(0.01), wall(0.5), wall(3.25), wall(200), wall(0)
    ('36 s', '30 min', '3.2 h', '8.3 days', '–')
    """
    if hours < _HOURS:
        return "–"
    for unit, length in (("days", 24.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= (100 if unit == "days" else length):
            count = hours / length
            return f"{count:.0f} {unit}" if unit == "min" and count >= 10 else f"{count:.1f} {unit}"
    return f"{hours * 3600:.0f} s"


def stage_cells(plan: Plan) -> pd.DataFrame:
    """The stages and a last row for all, as text; a column of costs only where there is a price."""
    unit = "process" if plan.device == CPU else "GPU"
    cells = pd.DataFrame([_row(stage, unit) for stage in plan.stages])
    total = {
        "stage": "all",
        "disk": size(plan.disk_bytes),
        "memory, machine": size(plan.node_memory_bytes),
        _plural(unit): f"{plan.nodes * plan.devices_per_node:,}",
        "time": wall(plan.hours),
        f"{unit} hours": _hours(plan.device_hours),
        "cost": "–" if plan.cost is None else f"{plan.cost:,.0f}",
        "waits for": plan.bottleneck,
    }
    cells = pd.concat([cells, pd.DataFrame([total])], ignore_index=True).fillna("–")
    left_out = ["cost"] * (plan.cost is None) + ["memory, GPU"] * (plan.device == CPU)
    return cells.drop(columns=left_out)


def gpu_lines(plan: Plan) -> list[str]:
    """What the memory of a GPU is for in the trainings, a line for the seed and one for the others, if they differ.

    Without a GPU, or for a model that cannot be traced, there is none.
    """
    lines: dict[str, str] = {}
    for stage in plan.stages:
        memory = stage.gpu_memory
        if memory is None or stage.samples is None:
            continue
        parts = {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "moments": memory.moments,
            "buckets of gradients": memory.buckets,
            "activations": memory.activations,
            "loss": memory.loss,
            "CUDA": memory.context,
        }
        account = " + ".join(f"{part} {size(count)}" for part, count in parts.items() if count >= _BYTES)
        room = "" if memory.usable is None else f"; of {size(memory.of or 0.0)} it may take {size(memory.usable)}"
        largest = "" if not memory.largest_batch else f": the largest training.batch_size is {memory.largest_batch:,}"
        lines.setdefault(
            f"{memory.batch:,} pairs in a pass: {account} = {size(memory.total)}{room}{largest}", stage.stage
        )
    names = [*lines.values()] if len(lines) > 1 else ["trainings"]
    return [f"a GPU of {name}, {line}" for name, line in zip(names, lines, strict=False)]


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print what is planned, the stages, what does not fit, and the rates with where each comes from."""
    console = console or wide_console()
    pairs = ", ".join(f"{quantity(count)} pairs of {source}" for source, count in plan.pairs.items())
    console.print(
        f"{pairs}; {escape(plan.model)}, {quantity(plan.parameters)} parameters, {quantity(plan.flops_per_pair)}FLOP a"
        f" pair in training; an epoch has {quantity(plan.epoch_samples)} samples",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_machines(plan), highlight=False, soft_wrap=True)
    console.print()
    console.print(_stages(plan))
    for line in gpu_lines(plan):
        console.print(escape(line), highlight=False, soft_wrap=True)
    for shortage in plan.shortages:
        console.print(f"[red]too little:[/red] {escape(shortage)}", highlight=False, soft_wrap=True)
    if plan.rented_cost is not None:
        console.print(
            f"all GPUs rented from beginning to end: {_hours(plan.rented_device_hours)} hours, {plan.rented_cost:,.0f}",
            highlight=False,
        )
    for note in plan.notes:
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    console.print()
    console.print(_rates(plan))


def _row(stage: StagePlan, unit: str) -> dict[str, str]:
    return {
        "stage": stage.stage,
        "samples": "–" if stage.samples is None else quantity(stage.samples),
        "disk": size(stage.disk_bytes),
        "memory, process": size(stage.process_memory_bytes),
        "memory, machine": size(stage.node_memory_bytes),
        "memory, GPU": size(0.0 if stage.gpu_memory is None else stage.gpu_memory.total),
        _plural(unit): f"{stage.devices:,}" if stage.devices else "–",
        "from": wall(stage.begins_at_hours),
        "time": wall(stage.hours),
        f"{unit} hours": _hours(stage.device_hours),
        "cost": "–" if not stage.cost else f"{stage.cost:,.0f}",
        "waits for": stage.bottleneck or "–",
    }


def _plural(unit: str) -> str:
    return f"{unit}es" if unit.endswith("s") else f"{unit}s"


def _hours(hours: float) -> str:
    """Hours as a bare number.

    >>> _hours(9032.4), _hours(0.034), _hours(0)
    ('9,032', '0.034', '–')
    """
    if hours < _HOURS:
        return "–"
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _machines(plan: Plan) -> str:
    nodes = f"{plan.nodes} machines, each with" if plan.nodes > 1 else "one machine with"
    if plan.device == CPU:
        return f"{nodes} {plan.cores_per_node} cores and no GPU; {plan.devices_per_node} training(s) at a time"
    return (
        f"{nodes} {plan.devices_per_node} {plan.device.upper()} and {plan.cores_per_node} cores; the seed on"
        f" {plan.devices_of_seed} GPUs, every other training on {plan.devices_per_training}"
    )


def _stages(plan: Plan) -> Table:
    cells = stage_cells(plan)
    shown = Table(header_style="bold", box=None)
    for head in cells.columns:
        shown.add_column(head, justify="left" if head in ("stage", "waits for") else "right", no_wrap=True)
    for number, line in enumerate(cells.to_numpy()):
        if number == len(cells) - 1:
            shown.add_section()
        shown.add_row(*(escape(str(cell)) for cell in line), style="bold" if number == len(cells) - 1 else "")
    return shown


def _rates(plan: Plan) -> Table:
    shown = Table(header_style="bold", box=None)
    shown.add_column("rate", no_wrap=True)
    shown.add_column("", justify="right", no_wrap=True)
    shown.add_column("from", no_wrap=True)
    for name, rate in plan.rates.items():
        value = "–" if rate.value is None else f"{rate.value:,.4g}" if rate.value < 1e4 else quantity(rate.value)
        shown.add_row(name, value, escape(rate.source))
    return shown
