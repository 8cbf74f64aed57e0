"""Parameters of a run as `dvc exp run -S` takes them: in Hydra's grammar, where a text may hold anything."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from mode.errors import ModeError


def set_params(overrides: Mapping[str, Any]) -> list[str]:
    """Arguments of `dvc exp run` in Hydra's grammar; a section is replaced, not merged.

    Raises:
        ModeError: a value that cannot be passed on.

    >>> set_params({"clustering.coarse": 2, "full": ["expert-0"]})
    ['-S', '++clustering.coarse=2', '-S', '++full=["expert-0"]']
    """
    arguments = []
    for key, value in overrides.items():
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key, re.ASCII):
            raise ModeError(f"{key}: cannot be passed on to DVC as a key", "write it in params.yaml")
        try:
            written = _hydra(value)
        except ValueError as error:
            raise ModeError(f"{key}: {error}") from None
        if isinstance(value, dict):
            arguments += ["-S", f"++{key}=null"]  # whatever is there goes
        arguments += ["-S", f"++{key}={written}"]
    return arguments


def _hydra(value: Any) -> str:
    """A value in Hydra's grammar, https://hydra.cc/docs/advanced/override_grammar/basic. `ValueError`: it has none."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_hydra_key(str(key))}:{_hydra(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    if isinstance(value, str):
        if "${" in value:
            raise ValueError(f"'{value}': `${{` cannot be passed on to DVC")
        return QuotedString(value, Quote.double).with_quotes()
    if isinstance(value, float) and "." not in repr(value):
        # DVC writes 1e-06, which is a text in YAML.
        raise ValueError(f"{value!r} cannot be passed on to DVC: write it in params.yaml")
    if value is not None and not isinstance(value, int | float):  # a date, say, which YAML knows
        raise ValueError(f"{value!r} cannot be passed on to DVC")
    return json.dumps(value)


def _hydra_key(key: str) -> str:
    if not re.fullmatch(r"[\w/\-+.$%*@?|\\()\[\]{}:=, \t]+", key, re.ASCII):
        raise ValueError(f"'{key}' cannot be passed on to DVC as a key: letters, digits and /-+.%*@?|()[]{{}}:=, can")
    return re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", key)
