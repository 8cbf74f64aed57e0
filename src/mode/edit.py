"""params.yaml as text: changes that keep its comments and order, and all of it with explanations.

Adding never touches the lines of what is there already, so nothing old becomes out of date.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from mode.errors import ModeError
from mode.params import Params, explanations, parse_params


def add_source(text: str, name: str, shards: str, experts: int = 1, fine: int | None = None) -> tuple[str, list[str]]:
    """Add a source and one expert per coarse cluster of it.

    Args:
        text: params.yaml as it is.
        name, shards: of the new source, as in params.yaml.
        experts: its coarse clusters.
        fine: its fine clusters; default: as many as there are for one expert elsewhere, times `experts`.

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
    content["sources"][name] = CommentedMap(shards=shards, fine=fine, coarse=experts)
    taken = (int(match[1]) for key in params.experts if (match := re.fullmatch(r"expert-(\d+)", key)))
    first = 1 + max(taken, default=-1)
    names = [f"expert-{first + number}" for number in range(experts)]
    for cluster, expert in enumerate(names):
        entry = CommentedMap(source=name, cluster=cluster)
        entry.fa.set_flow_style()
        content["experts"][expert] = entry
    return _checked(content), names


def remove_expert(text: str, name: str) -> str:
    """Remove an expert; the source it was trained on stays as long as another expert, seed or embedder needs it.

    Raises:
        ModeError: there is no such expert.
    """
    content, params = _yaml().load(text), _params(text)
    if name not in params.experts:
        raise ModeError(f"no expert is called '{name}'", f"there are: {', '.join(params.experts)}")
    source = params.experts[name].source
    del content["experts"][name]
    needed = {expert.source for key, expert in params.experts.items() if key != name}
    if source not in needed | {params.training.source, params.embedding.fit_on}:
        del content["sources"][source]
    return _checked(content)


def set_values(text: str, values: Mapping[str, Any]) -> str:
    """Give keys of a params.yaml, such as `model.name`, other values. Raises `ModeError` if the result is not valid."""
    content = _yaml().load(text)
    for key, value in values.items():
        *path, last = key.split(".")
        section = content
        for name in path:
            section = section[name]
        section[last] = value
    return _checked(content)


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


def _checked(content: CommentedMap) -> str:
    text = _dump(content)
    _params(text)
    return text
