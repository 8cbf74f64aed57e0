"""Imports run downwards: a room of `src/mode` imports rooms below it alone, also inside functions and for types."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "mode"

#: From the ground up. A module is in the room with the longest name that its own begins with; the empty one is `mode`.
ROOMS = (
    "errors", "permutation", "processes", "progress", "files", "checksums", "sealed_parquet", "vectors", "columns",
    "parallel", "roles", "params", "results", "engine", "edit", "paths", "door", "slurm", "data.images", "data.glyphs",
    "data.shards", "data.loading", "data", "clip", "embedding", "clustering", "ensemble", "training", "evaluation",
    "tracking", "reporting", "experiments", "planning", "integrity", "", "stages", "app", "cli",
)  # fmt: skip

#: What else may be imported only here: a library or a folder of this repository, and the rooms that may.
OUTSIDE = {"mlflow": {"tracking"}, "prefect": set[str](), "dvc": set[str](), "flows": set[str]()}


def room_of(module: str) -> str:
    """The room of a module, its name given without `mode.`."""
    parts = module.split(".")
    return next(name for end in range(len(parts), -1, -1) if (name := ".".join(parts[:end])) in ROOMS)


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported anywhere in a file of `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [*base, *(node.module or "").split(".")] if node.module else base
            yield from ((node.lineno, ".".join([*names, alias.name])) for alias in node.names)


def faults(source: Path) -> list[str]:
    """Every import below `source`, the folder of `mode`, that runs upwards or reaches for what its room must not."""
    found = []
    for file in sorted(source.rglob("*.py")):
        relative = file.relative_to(source)
        package = list(relative.parent.parts)
        module = ".".join(package if file.stem == "__init__" else [*package, file.stem])
        room = room_of(module)
        if not room and module:
            found.append(f"{relative} is in no room: give it one in ROOMS")
        for line, name in imports(ast.parse(file.read_text(encoding="utf-8")), ["mode", *package]):
            top, _, inside = name.partition(".")
            if top == "mode" and ROOMS.index(room_of(inside)) > ROOMS.index(room):
                found.append(f"{relative}:{line} imports {name}, which lies above `{room}`")
            if room not in OUTSIDE.get(top, {room}):
                found.append(f"{relative}:{line} imports {name}, which only {sorted(OUTSIDE[top]) or 'nobody'} may")
    return found


def test_imports_run_downwards() -> None:
    assert len(list(SOURCE.rglob("*.py"))) > 50
    assert faults(SOURCE) == []


def test_what_would_run_upwards_is_named(tmp_path: Path) -> None:
    planted = {
        "files.py": "def late() -> None:\n    from mode.training.loop import train\n",
        "data/shards/tar.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..loading import store\n",
        "clip/model.py": "import os\nimport mode.data.images\nimport mode.stages.training\n",
        "stages/reports.py": "import mlflow.tracking\nfrom mode import load, params\n",
        "tracking/runs.py": "import mlflow\nfrom flows import ui\n",
        "clip/encode.py": "from mode import load\n",
        "attic.py": "",
    }
    for name, text in planted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert faults(tmp_path) == [
        "attic.py is in no room: give it one in ROOMS",
        "clip/encode.py:1 imports mode.load, which lies above `clip`",
        "clip/model.py:3 imports mode.stages.training, which lies above `clip`",
        "data/shards/tar.py:3 imports mode.data.loading.store, which lies above `data.shards`",
        "files.py:2 imports mode.training.loop.train, which lies above `files`",
        "stages/reports.py:1 imports mlflow.tracking, which only ['tracking'] may",
        "tracking/runs.py:2 imports flows.ui, which only nobody may",
    ]
