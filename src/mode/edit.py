"""params.yaml as text: changes that keep its comments and order, and all of it with explanations.

Adding never touches the lines of what is there already, so nothing old becomes out of date.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Container, Iterable, Mapping
from difflib import SequenceMatcher
from itertools import count, takewhile
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from mode.errors import ModeError
from mode.params import Params, SourceParams, explanations, parse_params


def add_source(
    text: str,
    name: str,
    shards: str,
    experts: int = 1,
    fine: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[str, list[str]]:
    """Add a source and one expert per coarse cluster of it.

    Args:
        text: params.yaml as it is.
        name, shards: of the new source, as in params.yaml.
        experts: its coarse clusters.
        fine: its fine clusters; default: as many as there are for one expert elsewhere, times `experts`.
        columns: its `image_column` and `caption_column`, if they have other names.

    Returns:
        The new text, and the names of the new experts.

    Raises:
        ModeError: the name is taken, or the result would not be a valid params.yaml.
    """
    content, params = _yaml().load(text), _params(text)
    if name in params.sources:
        raise ModeError(f"source '{name}' is there already: {params.sources[name].shards}", "choose another name")
    if fine is None:
        fine = experts * max(1, params.clustering.fine // params.clustering.coarse)
    content["sources"][name] = CommentedMap(shards=shards, **(columns or {}), fine=fine, coarse=experts)
    taken = (int(match[1]) for key in params.experts if (match := re.fullmatch(r"expert-(\d+)", key)))
    first = 1 + max(taken, default=-1)
    names = [f"expert-{first + number}" for number in range(experts)]
    for cluster, expert in enumerate(names):
        entry = CommentedMap(source=name, cluster=cluster)
        entry.fa.set_flow_style()
        content["experts"][expert] = entry
    return _checked(content, text), names


def add_arrival(text: str, source: str) -> tuple[str, str]:
    """Add a source that continues another one: it looks at the same place, and reads what is there in the same way.

    Args:
        text: params.yaml as it is.
        source: that is continued.

    Returns:
        The new text, and the new source's name: `base-2`, then `base-3`.

    Raises:
        ModeError: the result would not be a valid params.yaml.
    """
    content, params = _yaml().load(text), _params(text)
    name = _numbered(f"{source}-", params.sources)
    alike = yaml.safe_load(text)["sources"][source]
    kept = {key: value for key, value in alike.items() if key in ("shards", *SourceParams.READING)}
    content["sources"][name] = CommentedMap({**kept, "continues": source})
    return _checked(content, text), name


def add_updates(text: str, expert: str) -> tuple[str, list[str]]:
    """Add the updates of an expert by the sources that continue its own and that it has not seen: one for each.

    Its own learning rate and share of other pairs are theirs, too.

    Args:
        text: params.yaml as it is.
        expert: its name, or that of an update of it.

    Returns:
        The new text, and the names of the updates: `expert-2-v2`, then `expert-2-v3`.

    Raises:
        ModeError: no such expert, nothing new for it, or the result would not be a valid params.yaml.
    """
    content, params = _yaml().load(text), _params(text)
    names = params.versions_of(expert)
    if not names:
        raise ModeError(f"no expert is called '{expert}'", f"there are: {', '.join(params.experts)}")
    root = names[0]
    expert_params = params.experts[root]
    source, cluster = expert_params.source, expert_params.cluster
    own = expert_params.model_dump(include={"lr", "outside_share"}, exclude_none=True)
    new = params.unseen_by(root)
    if not new:
        entered = "`dvc repro` trains it if it is not yet trained, and " if names[-1] in params.updates else ""
        raise ModeError(
            f"{names[-1]}: there are no pairs that it has not seen",
            f"{entered}`mode arrivals {source}` looks for new shards",
        )
    if not content.get("updates"):
        content["updates"] = CommentedMap()
    added: list[str] = []
    for block in new:
        name = _numbered(f"{root}-v", {*params.experts, *params.updates, *added})
        entry = CommentedMap(continues=[*names, *added][-1], source=block, cluster=cluster, replays=source, **own)
        entry.fa.set_flow_style()
        content["updates"][name] = entry
        added.append(name)
    return _checked(content, text), added


def _numbered(stem: str, taken: Container[str]) -> str:
    """The first name of `STEM2`, `STEM3` ... that is free."""
    return next(name for number in count(2) if (name := f"{stem}{number}") not in taken)


def remove_expert(text: str, name: str) -> str:
    """Remove an expert, or the last update of one.

    The source that an expert was trained on stays as long as another expert, seed or embedder needs it, and so do those
    that continue it.

    Raises:
        ModeError: there is no such expert, or an update goes on from it.
    """
    content, params = _yaml().load(text), _params(text)
    if name not in {**params.experts, **params.updates}:
        raise ModeError(f"no expert is called '{name}'", f"there are: {', '.join([*params.experts, *params.updates])}")
    if later := [other for other, update in params.updates.items() if update.continues == name]:
        raise ModeError(f"{later[0]} goes on from {name}", f"remove {later[0]} first")
    if name in params.updates:
        del content["updates"][name]
        return _checked(content, text)
    source = params.experts[name].source
    del content["experts"][name]
    others = {expert.source for key, expert in params.experts.items() if key != name}
    needed = others | {params.training.source, params.embedding.fit_on}
    block = [source, *params.continuations_of(source)]
    if not needed.intersection(block):
        for each in block:
            del content["sources"][each]
    return _checked(content, text)


def set_values(text: str, values: Mapping[str, Any]) -> str:
    """Give keys of a params.yaml, such as `model.name`, other values. Raises `ModeError` if the result is not valid."""
    content = _yaml().load(text)
    for key, value in values.items():
        *path, last = key.split(".")
        section = content
        for name in path:
            section = section[name]
        section[last] = value
    return _checked(content, text)


def add_sections(text: str, names: Iterable[str]) -> tuple[str, list[str]]:
    """Append those sections that a params.yaml lacks, with nothing but defaults: DVC has to find what dvc.yaml names.

    Returns:
        The new text, and the names of what was added.

    Raises:
        ModeError: a section that has no default is missing.
    """
    content, values = yaml.safe_load(text), _params(text).model_dump(mode="json")
    missing = [name for name in names if name not in content]
    lines = [f"{name}: {{}}" if isinstance(values[name], dict) else f"{name}: {values[name]}" for name in missing]
    added = "".join(f"\n{line}\n" for line in lines)
    return f"{text.rstrip()}\n{added}" if missing else text, missing


def explained(params: Params, key: str = "") -> str:
    """Every parameter with its value, defaults included, and above it what it does; as YAML.

    Args:
        params: the values.
        key: a section or one parameter, such as `training` or `training.lr`; default all.

    Raises:
        ModeError: there is no such key.
    """
    values: Any = params.model_dump(mode="json")
    level = values
    for part in key.split(".") if key else []:
        if not isinstance(level, dict) or part not in level:
            raise ModeError(f"{key}: no such parameter", "`mode params` lists all")
        for other in [other for other in level if other != part]:
            del level[other]
        level = level[part]
    texts = dict(explanations())
    sections = (_dump(_explained({name: value}, texts)).strip() for name, value in values.items())
    return "\n\n".join(sections) + "\n"


def _explained(values: Any, texts: dict[str, str], path: str = "", indent: int = 0) -> Any:
    """A mapping with a comment above each key; `path` has `*` for the name of a source or an expert, as in `texts`."""
    if not isinstance(values, dict):
        return values
    mapping = CommentedMap()
    for key, value in values.items():
        here = f"{path}{key}" if f"{path}{key}" in texts else f"{path}*"
        is_section = any(known.startswith(f"{here}.") for known in texts)
        mapping[key] = _explained(value, texts, f"{here}.", indent + 2) if is_section else value
        if text := texts.get(here, ""):
            wrapped = textwrap.fill(text, 116 - indent, break_long_words=False, break_on_hyphens=False)
            mapping.yaml_set_comment_before_after_key(key, before=wrapped, indent=indent)
    return mapping


def _yaml() -> YAML:
    keeping = YAML()
    keeping.width = 120
    keeping.preserve_quotes = True
    # `key: null` stays as it is, in place of `key:` with nothing behind it.
    null = "tag:yaml.org,2002:null"
    keeping.representer.add_representer(type(None), lambda dumper, _: dumper.represent_scalar(null, "null"))
    return keeping


def _dump(content: CommentedMap) -> str:
    stream = io.StringIO()
    _yaml().dump(content, stream)
    return stream.getvalue()


def _params(text: str) -> Params:
    return parse_params(yaml.safe_load(text))


def _checked(content: CommentedMap, before: str) -> str:
    text = _within_its_section(before, _dump(content))
    _params(text)
    return text


def _within_its_section(before: str, after: str) -> str:
    """Leave blank lines and comments ahead of a section there, which ruamel counts to the end of the one before."""
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    lines: list[str] = []
    for kind, first, last, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        place = len(lines)
        if kind == "insert" and new[start].startswith(" "):
            place -= _between_sections(lines)
        elif kind == "delete" and (kept := _between_sections(old[first:last])):
            lines += old[last - kept : last]
        lines[place:place] = new[start:end]
    return "".join(lines)


def _between_sections(lines: list[str]) -> int:
    """How many of the last lines are blank or comments that are not indented."""
    return sum(1 for _ in takewhile(lambda line: re.match(r"#|\s*$", line), reversed(lines)))
