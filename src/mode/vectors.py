"""Files of unit vectors: `.npy`, with a checksum and what they are made from behind the array."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mode.checksums import ADVICE, SEAL
from mode.errors import ModeError, in_one_line
from mode.files import is_there

#: Numbers of a unit vector are at most 1; a little more is rounding.
LARGEST = 1.001


def load_vectors(path: Path) -> np.ndarray:
    """Vectors of an index, memory-mapped read-only.

    Raises:
        ModeError: there are none, or the file is damaged: it is not of the length that it has to be. Its numbers are
            looked at where they are used (`mode.clustering.rows`).
    """
    vectors, _ = _open_vectors(path)
    return vectors


def origin_of(path: Path) -> dict[str, str]:
    """What vectors are made from, as `embed_index` was told. Raises as `load_vectors`."""
    _, origin = _open_vectors(path)
    return origin


def _open_vectors(path: Path) -> tuple[np.memmap, dict[str, str]]:
    if not is_there(path):
        raise ModeError(f"{path}: no such file", "run the embedding stage")
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        if vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32) or not vectors.flags.c_contiguous:
            raise ValueError(f"{vectors.dtype} {list(vectors.shape)}")
        with path.open("rb") as file:
            file.seek(vectors.offset + vectors.nbytes)
            end = file.read(1 << 16)
        origin: dict[str, str] = {}
        if end:
            text, mark, _ = end.partition(b" <")
            origin = json.loads(text)
            if not mark or len(end) != len(trailer_of(origin)):
                raise ValueError("it is not of the length that it has to be")
    except OSError:
        raise
    except Exception as error:  # what numpy's parser of a damaged header runs into is not to be foreseen
        raise ModeError(f"{path}: damaged, or not an array of vectors: {in_one_line(error)}", ADVICE) from None
    return vectors, origin


def header_of(pairs: int, dimensions: int) -> bytes:
    """What an `.npy` file begins with."""
    header = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False}
    np.lib.format.write_array_header_1_0(header, {**about, "shape": (pairs, dimensions)})
    return header.getvalue()


def trailer_of(origin: Mapping[str, str]) -> bytes:
    """What stands behind the array, where other readers of `.npy` files do not look."""
    return f"\n{json.dumps(dict(origin), sort_keys=True)} {SEAL.blank}\n".encode()


def within(numbers: np.ndarray, largest: float) -> bool:
    """Whether all numbers are finite and none is farther from 0 than `largest`.

    Floats of one sign have the order of their bits, so that two maxima over whole numbers say it, which a processor
    finds as fast as it reads; NaN and infinity are the highest. No copy is made.

    Args:
        numbers: float16, float32 or float64, of any shape.
        largest: at least 0.

    Example:
        >>> within(np.array([-1, 0.5], np.float16), 1), within(np.array([np.nan, 0], np.float16), 1)
        (True, False)
    """
    if not numbers.size:
        return True
    numbers = np.ascontiguousarray(numbers)
    width = numbers.dtype.itemsize
    signed, unsigned = np.dtype(f"i{width}"), np.dtype(f"u{width}")
    limit, sign = int(numbers.dtype.type(largest).view(unsigned)), 1 << (8 * width - 1)
    # As signed numbers all negative floats are below 0; as unsigned ones all are above the positive ones.
    return int(numbers.view(signed).max()) <= limit and int(numbers.view(unsigned).max()) <= sign + limit
