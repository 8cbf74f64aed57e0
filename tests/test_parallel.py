"""Many processes, one order; one of them that is killed is one line."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import psutil
import pytest

from mode.errors import ModeError
from mode.parallel import ordered_map


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return -number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_items_are_taken_as_they_are_needed(workers: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(4, 40):
            taken.append(number)
            yield number

    results = ordered_map(die_at_three, items(), workers)
    assert next(results) == -4
    assert len(taken) <= 1 + 2 * 2
    assert list(results) == [-number for number in range(5, 40)]


def test_a_process_that_is_killed_is_one_line_and_leaves_none_behind() -> None:
    before = psutil.Process().children(recursive=True)
    results = ordered_map(die_at_three, range(9), 2)
    with pytest.raises(ModeError, match=r"^one of 2 processes that work side by side was killed, [^\n]*$"):
        list(results)
    left = [each for each in psutil.Process().children(recursive=True) if each not in before]
    assert [each for each in left if "spawn_main" in " ".join(each.cmdline())] == []
