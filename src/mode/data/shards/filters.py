"""Which images of a tar are left out although nothing is wrong with them: their similarity, size, NSFW score ...

What is known of an image stands in the parquet beside its tar, as img2dataset and those who add scores later write it
(`00000.tar`, `00000.parquet`: a row for each key), or in its json. An image is kept if it meets all filters; one of
which nothing is known is left out, and counted as such.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa

from mode.data.shards.bounded import iter_rows, plain_values
from mode.data.shards.identity import unchanged
from mode.data.shards.places import open_bytes
from mode.errors import ModeError
from mode.params import parse_comparison

#: What an image is left out by of which nothing is known: no row, no json, no value (null, NaN), no number.
UNKNOWN = "nothing to filter by"

_SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}
#: Bytes of a parquet beside a tar: hundreds for each of a million images.
_LARGEST_SIDECAR = 2**28


class Filters:
    """Comparisons that an image has to meet, each as it stands in params.yaml.

    Attributes:
        columns: that they look at, each once.

    Example:
        >>> filters = Filters(["similarity >= 0.3", "NSFW == UNLIKELY"])
        >>> filters.fault({"similarity": 0.31, "NSFW": "NSFW"})
        'NSFW == UNLIKELY'
    """

    def __init__(self, filters: Sequence[str] = ()) -> None:
        self._comparisons = {text: parse_comparison(text) for text in filters}
        self.columns = list(dict.fromkeys(each.column for each in self._comparisons.values()))

    def __bool__(self) -> bool:
        return bool(self._comparisons)

    def fault(self, values: Mapping[str, Any]) -> str:
        """The first filter that an image with these values does not meet, `UNKNOWN`, or "" if it meets all."""
        for text, (column, sign, wanted) in self._comparisons.items():
            found = _comparable(values.get(column), wanted)
            if found is None:
                return UNKNOWN
            if not _SIGNS[sign](found, wanted):
                return text
        return ""


def _comparable(found: object, wanted: float | str) -> float | str | None:
    """What stands in a column as a number, if it is to be compared with one, else as a text; None if it is neither."""
    if not isinstance(found, (bool, int, float, str)):
        return None
    if isinstance(wanted, str):
        if isinstance(found, bool):  # True in Python, true in json
            return wanted if str(found).lower() == wanted.lower() else str(found)
        return None if isinstance(found, float) and math.isnan(found) else str(found)
    try:
        number = float(found)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def sidecar_of(tar: str) -> str:
    """Path or URL of the parquet that belongs to a tar."""
    return tar.removesuffix(".tar") + ".parquet"


def faults_in_sidecar(sidecar: str, root: Path, filters: Filters, keys: Collection[str]) -> dict[str, str]:
    """What the parquet beside a tar says of the images in it: key -> `Filters.fault`; of each key the first row counts.

    Args:
        sidecar: path relative to `root`, or absolute; or a URL.
        keys: of the images in the tar; other rows, such as those of images that were never fetched, are passed over.

    Raises:
        ModeError: it is missing, damaged or too large, changes meanwhile, or has no column `key` or none that a filter
            names.
    """
    try:
        with unchanged(sidecar, root) as found, closing(open_bytes(sidecar, root, size=found.size)) as file:
            if file.size > _LARGEST_SIDECAR:
                raise ModeError(f"{sidecar}: {file.size:,} bytes", f"at most {_LARGEST_SIDECAR:,} are read for filters")
            content = file.read(file.size, 0)
    except OSError as error:
        raise ModeError(f"{sidecar}: {error.strerror or error}", "`dvc repro` lists the files again") from None
    faults: dict[str, str] = {}
    rows: Iterable[tuple[Any, ...]] = iter_rows(pa.py_buffer(content), sidecar, ["key", *filters.columns], plain_values)
    for key, *values in rows:
        name = str(key)
        if name in keys and name not in faults:
            faults[name] = filters.fault(dict(zip(filters.columns, values, strict=True)))
    return faults
