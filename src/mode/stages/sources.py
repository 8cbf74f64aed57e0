"""Edits of a project: sources and experts that come and go, and watch.yaml."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mode.errors import ModeError
from mode.params import SourceParams, load_params, parse_params
from mode.stages.project import BUILT_IN, Project, write_text

#: Keys of watch.yaml.
_WATCHED = ("generated", "watched", "watched_tasks", "tasks_from", "watched_seed", "seed_from")


def add_source(root: Path, params: Path, name: str, shards: str, experts: int, fine: int | None) -> list[str]:
    """Enter a source and its experts in params.yaml and watch.yaml; returns the experts' names.

    params.yaml comes last: if the call is cut short, it can be made again.

    Raises:
        ModeError: the name is taken, or there are no shards; then no file is changed.
    """
    from mode import edit
    from mode.data.shards.manifest import build_manifest

    project = Project(root, load_params(params))
    if shards != BUILT_IN:
        build_manifest(SourceParams(shards=shards), project.root)
    text, added = edit.add_source(params.read_text(encoding="utf-8"), name, shards, experts, fine)
    keep_watch(project, name, generated=shards == BUILT_IN)
    write_text(params, text)
    return added


def remove_expert(root: Path, params: Path, name: str) -> None:
    """Take an expert out of params.yaml, and its model out of `models/`.

    params.yaml comes last: if the call is cut short, it can be made again.

    Raises:
        ModeError: there is no such expert.
    """
    import yaml

    from mode import edit

    project = Project(root, load_params(params))
    text = edit.remove_expert(params.read_text(encoding="utf-8"), name)
    for source in project.params.sources.keys() - parse_params(yaml.safe_load(text)).sources.keys():
        keep_watch(project, source, generated=None)
    for folder in (project.model(name), project.checkpoints / name):
        shutil.rmtree(folder, ignore_errors=True)
    write_text(params, text)


def check_names(project: Project) -> None:
    """See that DVC makes stages of no other names than those that were checked with the parameters.

    DVC reads params.yaml and watch.yaml by itself, and removes what a name leads to before it runs a stage.

    Raises:
        ModeError: DVC finds a source or an expert that the parameters do not have.
    """
    params, watch = _as_dvc_reads(project.params_file), _as_dvc_reads(project.watch_file)
    if strange := [key for key in watch if key not in _WATCHED]:
        raise ModeError(f"watch.yaml: {strange[0]}: unknown key", "edit params.yaml, not this file")
    sources, experts = list(project.params.sources), list(project.params.experts)
    for key, found, known in (
        ("params.yaml: sources", params.get("sources"), sources),
        ("params.yaml: experts", params.get("experts"), experts),
        ("watch.yaml: generated", watch.get("generated"), sources),
        ("watch.yaml: watched", watch.get("watched"), sources),
        ("watch.yaml: watched_tasks", watch.get("watched_tasks"), ["tasks"]),
        ("watch.yaml: watched_seed", watch.get("watched_seed"), ["seed"]),
    ):
        if not isinstance(found or [], list | dict):
            raise ModeError(f"{key}: names are wanted, not {found!r}")
        for name in found or []:
            if name not in known:
                raise ModeError(f"{key}: {name!r} is not among {', '.join(known)}", "take it out")


def _as_dvc_reads(path: Path) -> dict[str, Any]:
    """A file of YAML 1.2, which PyYAML would read as 1.1; nothing of one that is not there."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except YAMLError as error:
        raise ModeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content or {}, dict):
        raise ModeError(f"{path}: keys and values are wanted, not {content!r}")
    return content or {}


def keep_watch(project: Project, source: str, generated: bool | None) -> None:
    """Note in watch.yaml whether DVC makes this source's shards, or looks at them on every run, or (None) neither."""
    with _watch(project) as content:
        for group, belongs in (("generated", generated), ("watched", generated is False)):
            others = [other for other in content.get(group) or [] if other != source]
            content[group] = sorted([*others, source] if belongs else others)


def keep_tasks_watch(project: Project) -> None:
    """Note in watch.yaml whether DVC has to look at the task folders on every run."""
    given = project.params.evaluation.tasks != BUILT_IN
    with _watch(project) as content:
        content["watched_tasks"] = ["tasks"] if given else []
        # What the stage `tasks` depends on: the list of their files, or the code that draws the built-in ones, which in
        # a project without code is known by its version.
        code = project.version_file.name if project.version_file.is_file() else "src/mode/data/glyphs"
        content["tasks_from"] = str(project.tasks_manifest.relative_to(project.root)) if given else code


def keep_seed_watch(project: Project) -> None:
    """Note in watch.yaml whether the seed is made of files that DVC has to look at on every run."""
    seed, names = project.params.seed, project.names.relative_to(project.root)
    given = seed.pretrained and seed.is_local
    with _watch(project) as content:
        content["watched_seed"] = ["seed"] if given else []
        # What the stage `seed` depends on beside the rest: the list of these files, or a file that is always the same.
        content["seed_from"] = str(project.seed_manifest.relative_to(project.root) if given else names)


@contextmanager
def _watch(project: Project) -> Iterator[dict[str, Any]]:
    """watch.yaml, to be changed in place, its comment kept; a file that says the same already is left alone."""
    import yaml

    path = project.watch_file
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    before = yaml.safe_load("".join(lines)) or {}
    after = dict(before)
    yield after
    if after != before:
        comment = "".join(line for line in lines if line.startswith("#"))
        write_text(path, comment + yaml.safe_dump(after, sort_keys=False, default_flow_style=None))
