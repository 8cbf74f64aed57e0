"""Edits of a project: sources, experts and shards that come and go, and watch.yaml."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mode.errors import ModeError, in_one_line
from mode.params import SourceParams, load_params, parse_params
from mode.stages.project import BUILT_IN, Project, write_text

#: Keys of watch.yaml.
_WATCHED = ("generated", "watched", "watched_tasks", "tasks_from", "watched_seed", "seed_from", "clustered", "assigned")


def add_source(
    root: Path,
    params: Path,
    name: str,
    shards: str,
    experts: int,
    fine: int | None,
    columns: Mapping[str, str] | None = None,
) -> list[str]:
    """Enter a source and its experts in params.yaml and watch.yaml; returns the experts' names.

    params.yaml comes last: if the call is cut short, it can be made again.

    Raises:
        ModeError: the name is taken, or there are no shards; then no file is changed.
    """
    from mode import edit
    from mode.data.shards.manifest import build_manifest

    project = Project(root, load_params(params))
    if shards != BUILT_IN:
        build_manifest(SourceParams.model_validate({"shards": shards, **(columns or {})}), project.root)
    text, added = edit.add_source(params.read_text(encoding="utf-8"), name, shards, experts, fine, columns)
    keep_watch(project, name, generated=shards == BUILT_IN)
    _enter(project, params, text)
    return added


@dataclass(frozen=True)
class Arrival:
    """Shards that have come to a source.

    Attributes:
        source: that has been there.
        name: of the source that continues it with these shards.
        shards, bytes: how many, how large together.
    """

    source: str
    name: str
    shards: int
    bytes: int


def find_arrival(root: Path, params: Path, source: str, enter: bool = True) -> Arrival:
    """Look for shards that have come to a source since it was listed, and make a source of them that continues it.

    Nothing that was made of the source is touched: from now on it has the shards that it had, by name
    (`mode.data.shards.arrivals`). params.yaml comes last: if the call is cut short, it can be made again.

    Args:
        root, params: the project, and its params.yaml.
        source: one that continues no other.
        enter: change the project; False: only look.

    Raises:
        ModeError: no such source, one in which nothing can arrive, or nothing has arrived; an old shard has changed or
            gone; arrivals.json is damaged. Then no file is changed.
    """
    from mode import edit
    from mode.data.shards.arrivals import Arrivals, compare
    from mode.data.shards.manifest import Manifest, build_manifest

    project = Project(root, load_params(params))
    own = project.source(source)
    if own.continues is not None:
        raise ModeError(f"source '{source}' continues '{own.continues}'", f"`mode arrivals {own.continues}`")
    if own.shards == BUILT_IN:
        raise ModeError(
            f"source '{source}' is built in: nothing arrives in it", "`mode add-source` adds shards of yours"
        )
    arrivals = Arrivals.load(project.arrivals)
    if not project.manifest(source).is_file():
        raise ModeError(f"source '{source}' has not been listed yet", "`dvc repro`, or `dvc pull` in a fresh clone")
    before = Manifest.load(project.manifest(source))
    if before.kind == "table":
        raise ModeError(
            f"{own.shards}: a table, which is changed and not continued", "`mode add-source` adds another one"
        )
    known = {source: before}
    entered: set[str] = set()  # what earlier arrivals have, listed yet or not
    for other in project.params.continuations_of(source):
        if project.params.sources[other].shards != own.shards:
            continue
        entered |= {*(arrivals.of(other, project.params.sources) or ())}
        if project.manifest(other).is_file():
            known[other] = Manifest.load(project.manifest(other))
    new = [shard for shard in compare(build_manifest(own, project.root), known) if shard.path not in entered]
    if not new:
        total = len(entered | {shard.path for shard in before.shards})
        raise ModeError(f"nothing has arrived: all {total:,} shards of '{source}' are known")
    text, name = edit.add_arrival(params.read_text(encoding="utf-8"), source)
    if enter:
        names = {source: [shard.path for shard in before.shards], **arrivals.names, name: [shard.path for shard in new]}
        Arrivals(names).save(project.arrivals)
        keep_watch(project, name, generated=False)
        _enter(project, params, text)
    return Arrival(source, name, len(new), sum(shard.size for shard in new))


def check_arrivals(project: Project) -> None:
    """Stop where DVC would make all of a source anew for the sake of shards that have come to it.

    It is called before DVC removes the list of what was there. Shards that have gone are another matter: what was made
    of them has to be made anew anyway. Of a source that has a list in arrivals.json, new shards wait: that is said, and
    nothing stops.

    Raises:
        ModeError: vectors were made of a source, and more shards lie where it looks than those that it had.
    """
    from mode.data.shards.arrivals import Arrivals
    from mode.data.shards.manifest import Manifest, names_of

    arrivals = Arrivals.load(project.arrivals)
    for source, own in project.params.sources.items():
        if own.shards == BUILT_IN or own.continues is not None or not project.vectors(source).is_file():
            continue
        if not project.manifest(source).is_file():
            continue
        before = Manifest.load(project.manifest(source))
        if before.kind == "table":
            continue
        alike = [other for other, each in project.params.sources.items() if each.shards == own.shards]
        listed = [names for other in alike if (names := arrivals.names.get(other)) is not None]
        known = {*(shard.path for shard in before.shards), *(name for names in listed for name in names)}
        there = set(names_of(own.shards, project.root))
        if not (new := sorted(there - known)) or known - there:
            continue
        count = f"{len(new):,} new shard{'s' if len(new) > 1 else ''}"
        if listed:
            print(f"{source}: {count} wait{'s' if len(new) == 1 else ''} for `mode arrivals {source}`", flush=True)
            continue
        listing = project.shards(source).relative_to(project.root)
        raise ModeError(
            f"source '{source}' has {count}, {new[0]}{' ...' if len(new) > 1 else ''}: all of it would be made anew",
            f"`mode arrivals {source}` has them embedded alone; to make all of it anew, `rm -r {listing}` first",
        )


def add_updates(root: Path, params: Path, expert: str) -> list[str]:
    """Enter the trainings that take an expert on through the sources that have continued its own since.

    Args:
        root, params: the project, and its params.yaml.
        expert: its name, or that of an update of it.

    Returns:
        The names of the new models, one for each source that the expert has not seen, in the order of these.

    Raises:
        ModeError: no such expert, or none that can be trained on; or there is nothing new for it.
    """
    from mode import edit

    project = Project(root, load_params(params))
    text, added = edit.add_updates(params.read_text(encoding="utf-8"), expert)
    _enter(project, params, text)
    return added


def _enter(project: Project, params: Path, text: str) -> None:
    """Replace params.yaml, and before it what watch.yaml has to say of it."""
    import yaml

    keep_clusters_watch(Project(project.root, parse_params(yaml.safe_load(text))))
    write_text(params, text)


def remove_expert(root: Path, params: Path, name: str) -> None:
    """Take an expert, or an update of one, out of params.yaml, and its model out of `models/`.

    params.yaml comes last: if the call is cut short, it can be made again.

    Raises:
        ModeError: there is no such expert, or a later update goes on from it.
    """
    import yaml

    from mode import edit
    from mode.data.shards.arrivals import Arrivals

    project = Project(root, load_params(params))
    text = edit.remove_expert(params.read_text(encoding="utf-8"), name)
    unneeded = sorted(project.params.sources.keys() - parse_params(yaml.safe_load(text)).sources.keys())
    for source in unneeded:
        keep_watch(project, source, generated=None)
    arrivals = Arrivals.load(project.arrivals)
    if (left := arrivals.without(unneeded)) != arrivals:
        left.save(project.arrivals)
    for folder in (project.model(name), project.checkpoints / name):
        shutil.rmtree(folder, ignore_errors=True)
    _enter(project, params, text)


def check_names(project: Project) -> None:
    """See that DVC makes stages of no other names than those that were checked with the parameters.

    DVC reads params.yaml and watch.yaml by itself, and removes what a name leads to before it runs a stage.

    Raises:
        ModeError: DVC finds a source or an expert that the parameters do not have.
    """
    params, watch = _as_dvc_reads(project.params_file), _as_dvc_reads(project.watch_file)
    if strange := [key for key in watch if key not in _WATCHED]:
        raise ModeError(f"watch.yaml: {strange[0]}: unknown key", "edit params.yaml, not this file")
    sources, experts, updates = (
        list(each) for each in (project.params.sources, project.params.experts, project.params.updates)
    )
    for key, found, known in (
        ("params.yaml: sources", params.get("sources"), sources),
        ("params.yaml: experts", params.get("experts"), experts),
        ("params.yaml: updates", params.get("updates"), updates),
        ("watch.yaml: generated", watch.get("generated"), sources),
        ("watch.yaml: watched", watch.get("watched"), sources),
        ("watch.yaml: watched_tasks", watch.get("watched_tasks"), ["tasks"]),
        ("watch.yaml: watched_seed", watch.get("watched_seed"), ["seed"]),
        ("watch.yaml: clustered", watch.get("clustered"), sources),
        ("watch.yaml: assigned", watch.get("assigned"), sources),
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
        raise ModeError(f"{path}: not valid YAML: {in_one_line(error)}") from None
    if not isinstance(content or {}, dict):
        raise ModeError(f"{path}: keys and values are wanted, not {content!r}")
    return content or {}


def keep_watch(project: Project, source: str, generated: bool | None) -> None:
    """Note in watch.yaml whether DVC makes this source's shards, or looks at them on every run, or (None) neither."""
    with _watch(project) as content:
        for group, belongs in (("generated", generated), ("watched", generated is False)):
            others = [other for other in content.get(group) or [] if other != source]
            content[group] = sorted([*others, source] if belongs else others)


def keep_whole_watch(project: Project) -> None:
    """Note in watch.yaml all that the parameters say, where others than these may have been noted, or none."""
    for source, params in project.params.sources.items():
        keep_watch(project, source, generated=params.shards == BUILT_IN)
    keep_tasks_watch(project)
    keep_seed_watch(project)
    keep_clusters_watch(project)


def keep_clusters_watch(project: Project) -> list[str]:
    """Note in watch.yaml which sources are clustered, and to whose clusters the pairs of each are assigned.

    Returns:
        The sources of which it said something else.
    """
    params = project.params
    with _watch(project) as content:
        before = dict(content)
        content["clustered"] = [source for source in params.sources if params.root_of(source) == source]
        content["assigned"] = {source: params.root_of(source) for source in params.sources}
        assigned = before.get("assigned") or {}
        if content == before:
            return []
        return [name for name, root in content["assigned"].items() if assigned.get(name) != root] or [*params.sources]


def keep_sources_watch(project: Project) -> list[str]:
    """Note in watch.yaml what `keep_clusters_watch` does, and of sources that it does not know where their shards are.

    One whose shards are now elsewhere is left to its stage `data`, which is there and notes it.

    Returns:
        The sources of which it said something else.
    """
    watch = _as_dvc_reads(project.watch_file)
    known = {*(watch.get("generated") or []), *(watch.get("watched") or [])}
    new = [source for source in project.params.sources if source not in known]
    for source in new:
        keep_watch(project, source, generated=project.source(source).shards == BUILT_IN)
    return [*dict.fromkeys([*new, *keep_clusters_watch(project)])]


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
