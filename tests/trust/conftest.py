"""One tiny project, whole, for all of these tests: to be copied, and left as it was found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.once import made_once
from tests.trust import tiny


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny project after all of its stages but the report; not to be touched."""
    return made_once(tmp_path_factory, "tiny", tiny.make)


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be worked in."""
    shutil.copytree(finished, tmp_path / "project", symlinks=True)
    return tmp_path / "project"
