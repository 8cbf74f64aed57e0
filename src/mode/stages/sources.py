"""Edits of a project: sources and experts that come and go, and watch.yaml."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mode.params import SourceParams, load_params
from mode.stages.project import BUILT_IN, Project

#: Groups of sources in watch.yaml.
WATCH_GROUPS = ("generated", "watched")


def add_source(root: Path, params: Path, name: str, shards: str, experts: int, fine: int | None) -> list[str]:
    """Enter a source and its experts in params.yaml and watch.yaml; returns the experts' names.

    Raises:
        ModeError: the name is taken, or there are no shards; then no file is changed.
    """
    from mode import edit
    from mode.data.shards.manifest import build_manifest

    project = Project(root, load_params(params))
    if shards != BUILT_IN:
        build_manifest(SourceParams(shards=shards), project.root)
    text, added = edit.add_source(params.read_text(encoding="utf-8"), name, shards, experts, fine)
    _replace_text(params, text)
    keep_watch(project, name, generated=shards == BUILT_IN)
    return added


def remove_expert(root: Path, params: Path, name: str) -> None:
    """Take an expert out of params.yaml, and its model out of `models/`.

    Raises:
        ModeError: there is no such expert.
    """
    from mode import edit

    project = Project(root, load_params(params))
    text = edit.remove_expert(params.read_text(encoding="utf-8"), name)
    _replace_text(params, text)
    left = set(load_params(params).sources)
    for source in set(project.params.sources) - left:
        keep_watch(project, source, generated=None)
    for folder in (project.model(name), project.checkpoints / name):
        shutil.rmtree(folder, ignore_errors=True)


def _replace_text(path: Path, text: str) -> None:
    from mode.files import write_aside

    with write_aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def keep_watch(project: Project, source: str, generated: bool | None) -> None:
    """Note in watch.yaml whether DVC makes this source's shards, or looks at them on every run, or (None) neither."""
    groups = dict(zip(WATCH_GROUPS, (generated, generated is False), strict=True))

    def enter(content: dict[str, Any]) -> None:
        for group, belongs in groups.items():
            others = [other for other in content.get(group) or [] if other != source]
            content[group] = sorted([*others, source] if belongs else others)

    _edit_watch(project, enter)


def keep_tasks_watch(project: Project) -> None:
    """Note in watch.yaml whether DVC has to look at the task folders on every run."""
    given = project.params.evaluation.tasks != BUILT_IN

    def enter(content: dict[str, Any]) -> None:
        content["watched_tasks"] = ["tasks"] if given else []
        # What the stage `tasks` depends on: the list of their files, or the code that draws the built-in ones.
        content["tasks_from"] = "data/tasks-manifest.json" if given else "src/mode/data/glyphs"

    _edit_watch(project, enter)


def _edit_watch(project: Project, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change watch.yaml, its comment kept; a file that says the same already is left alone."""
    import yaml

    path = project.watch_file
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    before = yaml.safe_load("".join(lines)) or {}
    after = dict(before)
    edit(after)
    if after != before:
        comment = "".join(line for line in lines if line.startswith("#"))
        _replace_text(path, comment + yaml.safe_dump(after, sort_keys=False, default_flow_style=None))
