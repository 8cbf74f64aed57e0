"""The machinery of the races, on races that take no time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks.harness import Input, Outcome, Race, RaceFailed, Run, Target, faster, figure, run_race


def _make(given: Input) -> None:
    (given.folder / "input.txt").write_text("7", encoding="utf-8")


def _counting(given: Input) -> Run:
    """Notes the order of runs, which both sides share, and says which process it lives in."""
    number = int((given.folder / "input.txt").read_text(encoding="utf-8"))

    def run() -> dict[str, Any]:
        return {"seconds": 2.0, "number": number, "process": os.getpid()}

    return run


def _holding(given: Input) -> Run:
    """Holds 200 MB while it is prepared and lets go of them, then 50 MB while it runs."""
    held = np.ones(25_000_000)
    del held

    def run() -> dict[str, Any]:
        return {"seconds": 4.0, "sum": float(np.ones(6_250_000).sum()), "process": os.getpid()}

    return run


def _failing(given: Input) -> Run:
    raise ValueError("out of luck")


def test_sides_take_turns_in_processes_of_their_own(tmp_path: Path) -> None:
    said: list[str] = []
    race = Race(
        "toy",
        "toys",
        {"ours": _counting, "theirs": _holding},
        (
            Target("twice as fast", faster("ours", "theirs"), 2.0),
            Target("at most 6", figure("ours", "number"), 6, at_most=True),
            Target("unknown", figure("ours", "nothing"), 1.0),
        ),
        make=_make,
    )
    record = run_race(race, Input(tmp_path / "toy", "quick"), 3, said.append)
    ours, theirs = record.sides
    assert ours["seconds"] == [2.0] * 3
    assert ours["figures"]["number"] == 7
    assert len({os.getpid(), ours["figures"]["process"], theirs["figures"]["process"]}) == 3
    assert [target["met"] for target in record.targets] == [True, False, None]
    assert [target["value"] for target in record.targets] == [2.0, 7.0, None]
    # 50 MB of the run, without the 200 MB of its preparation.
    assert 40 < theirs["peak_mb"] - theirs["before_mb"] < 120
    assert len(said) == 1 + 4  # inputs, then a warm-up and three rounds


def test_a_failing_side_is_named(tmp_path: Path) -> None:
    race = Race("toy", "toys", {"ours": _counting, "theirs": _failing}, make=_make)
    with pytest.raises(RaceFailed, match="theirs: ValueError: out of luck"):
        run_race(race, Input(tmp_path / "toy", "quick"), 1)


def test_median_is_of_the_timed_runs() -> None:
    assert Outcome([5.0, 1.0, 2.0], 0, 0, 0, 0, 0, {}).median == 2.0


def test_table_says_what_was_missed_and_what_was_not_run() -> None:
    side = {
        "name": "mode",
        "median": 0.05,
        "cpu_seconds": 2.0,
        "peak_mb": 120.0,
        "children_mb": 0.0,
        "figures": {"loss": 1.25},
    }
    record = {"not_run": None, "sides": [side], "targets": [{"target": "2x", "value": 1.5, "met": False}]}
    when = {"commit": "abc", "date": "2026-01-01 00:00 UTC"}
    results = {
        "machine": {"cores": 2, "cpu": "a CPU", "memory_gb": 8, "gpu": False},
        "races": {"a": {**record, "when": when}, "b": {"not_run": "no GPU", "sides": [], "targets": [], "when": when}},
    }
    table = command.markdown(results)
    assert "| a | mode | 50.0 ms (CPU 2.00 s) | 120 MB | loss 1.25 | 2x: 1.5, MISSED |" in table
    assert "| b |  |  |  |  | not run: no GPU |" in table


def test_unknown_races_are_refused() -> None:
    with pytest.raises(SystemExit, match="no race is called nonsense"):
        command.main(["--only", "nonsense", "--quick"])


def test_a_race_for_which_there_is_no_room_is_not_run(tmp_path: Path) -> None:
    sides = {"ours": _counting}
    assert command._missing(Race("toy", "toys", sides, needs_gb=1e-6), tmp_path / "work") is None
    why = command._missing(Race("toy", "toys", sides, needs_gb=1e9), tmp_path)
    assert why == "needs 1000000000.0 GB of disk (--work names another folder)"


def test_every_race_has_its_own_name_and_targets() -> None:
    races = [race for size in ("quick", "full", "large") for _, race in command._chosen("", size)]
    assert len({race.name for race in races}) == len({id(race) for race in races})
    assert all(race.targets for race in races)


@pytest.mark.parametrize(
    "only", ["index,assign,help", pytest.param("cluster-balanced,load-all,evaluate", marks=pytest.mark.e2e)]
)
def test_races_run_and_agree(only: str, tmp_path: Path) -> None:
    """At tiny sizes; times mean nothing there, but what comes out has to be the same on all sides."""
    out = tmp_path / "results.json"
    assert command.main(["--quick", "--only", only, "--repeats", "1", "--threads", "1", "--out", str(out)]) == 0
    races = json.loads(out.read_text(encoding="utf-8"))["races"]
    assert all(record["not_run"] in (None, "no GPU") for record in races.values())
    for record in races.values():
        for target in record["targets"]:
            about_results = any(word in target["target"] for word in ("same", "identical", "exact", "1.1x the mean"))
            assert target["met"] or not about_results, target
