"""`make audit` never calls dependencies safe that nobody has looked up."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parent.parent / ".ci/audit.py"
CLEAN = {"name": "a", "version": "1", "vulns": []}
SKIPPED = {"name": "b", "skip_reason": "not found"}
FAULTY = {"name": "c", "version": "2", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["3"]}]}


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("dependencies", "excepted", "code", "line"),
    [
        ([CLEAN], {}, 0, "1 of 1 dependencies were looked up"),
        ([CLEAN, FAULTY], {}, 1, "c 2: PYSEC-1: fixed in 3"),
        ([CLEAN, FAULTY], {"CVE-1": "it is not used"}, 0, "c 2: PYSEC-1: excepted: it is not used"),
        ([CLEAN, SKIPPED], {}, 2, "1 of 2 dependencies were looked up"),
        ([FAULTY, SKIPPED], {}, 1, "c 2: PYSEC-1: fixed in 3"),
        ([], {}, 2, "0 of 0 dependencies were looked up"),
    ],
)
def test_what_is_found_decides_the_exit_code(
    audit: ModuleType, dependencies: list[object], excepted: dict[str, str], code: int, line: str
) -> None:
    found, lines = audit.judge(json.dumps({"dependencies": dependencies}), excepted)
    assert found == code
    assert line in lines


@pytest.mark.parametrize("printed", ["", "Traceback", "[]", "{}"])
def test_without_a_database_nothing_is_checked(audit: ModuleType, printed: str) -> None:
    assert audit.judge(printed, {}) == (2, ["the database of advisories cannot be reached: nothing was checked"])


def test_every_exception_has_its_reason(audit: ModuleType) -> None:
    assert audit.exceptions()
    assert all(len(reason) > 20 for reason in audit.exceptions().values())
