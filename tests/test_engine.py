"""The engine in this process, and what is refused before any cluster starts."""

from __future__ import annotations

import pytest

from mode.engine import open_engine
from mode.errors import ModeError


def test_local_keeps_order_and_reads_nothing_ahead() -> None:
    taken: list[int] = []

    def items():
        for number in range(3):
            taken.append(number)
            yield number

    with open_engine("local", processes=4) as engine:
        results = engine(lambda number: (number, list(taken)), items())
        assert list(results) == [(0, [0]), (1, [0, 1]), (2, [0, 1, 2])]
        assert list(engine(str, [])) == []


@pytest.mark.parametrize("setting", ["gpu", "", "Dask", "host:8786"])
def test_unknown_engine_is_refused(setting: str) -> None:
    with pytest.raises(ModeError, match=r"machine\.engine: there is no engine"), open_engine(setting, processes=1):
        pass
