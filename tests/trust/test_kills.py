"""Every stage, killed at any instant: run again, it ends byte for byte as if nothing had happened.

By default a few instants of most stages; `--seed N` chooses others, and `--full` kills each stage at every step that
changes what lies on the disk, and at a hundred instants more.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mode.checksums import MANIFEST
from tests.killing import KILL, TERM, Clock, end_at, instants, served
from tests.trust import tiny

pytestmark = pytest.mark.e2e  # real stages, again and again

#: Instants of a stage by default: of those that take a part of a second, and of the others.
FEW = {"data": 3, "index": 4, "embed": 4, "assign": 3, "ensemble": 3, "cluster": 2}
#: What tells the time, and is another in each run: of a model's card and of an evaluation.
TIMES = {"seconds", "mlflow_run"}


@pytest.mark.parametrize(("name", "key"), tiny.STAGES, ids=lambda part: part or "")
def test_a_killed_stage_ends_as_if_nothing_had_happened(
    finished: Path, tmp_path: Path, name: str, key: str | None, seed: int, full: bool
) -> None:
    if (name, key) in (("report", None), ("expert", "expert-1"), ("dense", None)) and not full:
        pytest.skip("slow, or like another one: with --full")
    output, ran = tiny.STAGES[name, key], tmp_path / "counted"
    random = np.random.default_rng([seed, *name.encode()])

    def copy(root: Path) -> Path:
        shutil.copytree(finished, root, symlinks=True, ignore=shutil.ignore_patterns("pending"))
        return root

    def picked(clock: Clock, most: int | None) -> list[tuple[Clock, int]]:
        """Instants of the stage, in some order."""
        shutil.rmtree(ran, ignore_errors=True)
        count = instants(clock, partial(tiny.stage, copy(ran), name, key), tmp_path / "count")
        return [(clock, 1 + int(place)) for place in random.permutation(count)[:most]]

    chosen = [*picked("steps", None), *picked("calls", 100)] if full else picked("files", FEW.get(name, 1))
    whole = contents(ran / output)
    if name != "report":  # the page is not in the finished project
        assert contents(finished / output) == whole, "the stage does not do the same twice"
    for number, (clock, instant) in enumerate(chosen):
        root = copy(tmp_path / "killed")
        code = end_at(instant, clock, (KILL, TERM)[number % 2], partial(tiny.stage, root, name, key), served)
        where = f"{name} {key or ''}, {instant} of the {clock}, signal {(KILL, TERM)[number % 2].name}"
        assert code in (0, -KILL, -TERM, 128 + TERM), where
        # A stage may find its old output, as under `mode stage`, or nothing, as under DVC.
        if code and output != "reports" and random.random() < 0.5:
            remove(root / output)
        assert served(partial(tiny.stage, root, name, key)) == 0, where
        assert contents(root / output) == whole, where
        assert [path.name for path in root.rglob("*.tmp")] == [], where
        shutil.rmtree(root)


def contents(output: Path) -> dict[str, object]:
    """What all files of an output hold, but for what tells the time."""
    assert output.exists()
    found: dict[str, object] = {}
    for path in tiny.files_below(output):
        content: object = path.read_bytes()
        if path.name in ("card.json", "metrics.json"):
            content = without_times(json.loads(path.read_bytes()))
        elif path.name == MANIFEST:
            content = [line for line in path.read_text().splitlines() if not line.endswith("  card.json")]
        if output.name == "reports" and path.suffix in (".html", ".md", ".svg", ".png"):
            content = None  # the times of trainings stand in them
        found[str(path.relative_to(output))] = content
    return found


def without_times(content: object) -> object:
    if isinstance(content, dict):
        kept = {key: without_times(value) for key, value in content.items() if key not in TIMES}
        return {key: value for key, value in kept.items() if key not in ("checksum", "uncommitted_changes")}
    return [without_times(value) for value in content] if isinstance(content, list) else content


def remove(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)
