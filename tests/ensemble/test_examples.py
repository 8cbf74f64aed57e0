"""The examples of the docstrings and of the guide run as they stand."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import mode
from mode.ensemble import combine, model, rules


@pytest.mark.parametrize(("module", "least"), [(mode, 4), (model, 15), (rules, 4), (combine, 3)])
def test_docstrings(folder: Path, module: ModuleType, least: int) -> None:
    names = {"mode": mode, "np": np, "Image": Image}
    found = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert found.attempted >= least
    assert found.failed == 0


def test_the_guide(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guide = (Path(__file__).parent.parent.parent / "docs/guide.md").read_text(encoding="utf-8")
    section = guide.partition("## Using the ensemble")[2]
    [block] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(block, {})
    assert "expert-0" in capsys.readouterr().out
