"""Which runs of an experiment are next, and what they wait for. tests/e2e makes real ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flows.devices import Place
from flows.ledger import Ledger
from flows.locks import take
from flows.runner import Active, Runner
from mode.experiments.plan import plan_runs
from tests.flows.definitions import CONTENT, made_of
from tests.waiting import LONG


def test_it_says_once_what_runs_wait_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = made_of(a={})
    runs = plan_runs("x", made, CONTENT, {}, [0])
    runner = Runner(Ledger(tmp_path, "x", made, runs), runs)
    places = [Place("cpu", (tmp_path / name,), {}) for name in ("cpu-0", "cpu-1")]
    runner._say_who_is_before(runs, places)
    assert not capsys.readouterr().out
    locks = [take(place.locks[0], f"other-{number}, process 7") for number, place in enumerate(places)]
    for _ in range(2):
        runner._say_who_is_before(runs, places)
    assert capsys.readouterr().out == "waiting for other-0, process 7, other-1, process 7\n"
    assert all(locks)


def test_a_run_s_output_is_read_to_its_end_where_its_log_has_no_room(tmp_path: Path) -> None:
    """Or the run would wait, once the pipe is full, for ever."""
    made = made_of(a={})
    [run] = runs = plan_runs("x", made, CONTENT, {}, [0])
    code = "for number in range(100_000): print(number)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    active = Active(run, process, (), 0.0)
    with Path("/dev/full").open("ab", buffering=0) as log:
        Runner(Ledger(tmp_path, "x", made, runs), runs)._follow(active, log)
    assert (process.wait(LONG), active.tail[-1]) == (0, "99999")


def test_a_run_that_another_process_makes_is_waited_for(tmp_path: Path) -> None:
    made = made_of(a={})
    [run] = runs = plan_runs("x", made, CONTENT, {}, [0])
    runner = Runner(Ledger(tmp_path, "x", made, runs), runs)
    assert runner._next(runs, []) is run
    lock = take(runner.ledger.files(run).lock, "another experiment")
    assert lock is not None
    assert runner._next(runs, []) is None
    lock.close()
    assert runner._next(runs, []) is run
