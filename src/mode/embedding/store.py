"""The folder an embedder is kept in: `embedder.json` says what it is, the files beside it are its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mode.errors import ModeError
from mode.files import write_aside

_RECORD = "embedder.json"


@contextmanager
def embedder_folder(folder: Path, kind: str, **record: Any) -> Iterator[Path]:
    """A folder to write an embedder's files into, moved to `folder` when complete; `record` is kept in its JSON."""
    with write_aside(folder) as temporary:
        temporary.mkdir()
        (temporary / _RECORD).write_text(json.dumps({"kind": kind, **record}, indent=2), encoding="utf-8")
        yield temporary


def read_record(folder: Path) -> dict[str, Any]:
    """What `embedder_folder` recorded. Raises `ModeError` where there is no embedder."""
    try:
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        raise ModeError(f"{folder}: no embedder there", "run the stage that builds it") from None
    return record
