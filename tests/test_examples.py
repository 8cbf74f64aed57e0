"""The examples of all docstrings, of the library and of the flows, and of the guide run as they stand."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mode

REPOSITORY = Path(__file__).parent.parent


def modules_with_examples() -> dict[str, int]:
    """Modules in whose source there are examples, and how many: found in the text, so that none is overlooked."""
    found = {}
    for base, package in ((REPOSITORY / "src", "mode"), (REPOSITORY, "flows")):
        for path in sorted((base / package).rglob("*.py")):
            examples = sum(line.lstrip().startswith(">>> ") for line in path.read_text("utf-8").splitlines())
            if examples:
                name = ".".join(path.relative_to(base).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = examples
    return found


@pytest.mark.parametrize(("name", "examples"), modules_with_examples().items())
def test_examples_run_as_they_stand(folder: Path, name: str, examples: int) -> None:
    """Those that cannot say `# doctest: +SKIP`, and above it why."""
    module = importlib.import_module(name)
    tests = doctest.DocTestFinder().find(module, extraglobs={"mode": mode, "np": np, "Image": Image})
    assert sum(len(test.examples) for test in tests) == examples, "in a docstring, where people and doctest look"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in tests:
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_the_guide(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guide = (REPOSITORY / "docs/guide.md").read_text(encoding="utf-8")
    section = guide.partition("## Using the ensemble")[2]
    [block] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(block, {})
    assert "expert-0" in capsys.readouterr().out
