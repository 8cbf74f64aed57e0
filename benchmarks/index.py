"""The index of tar shards: keys, captions and where the images lie."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Input, Race, Run, Target, bytes_read, faster, figure
from benchmarks.inputs import make_shards, manifest_of, tars_of

#: Pairs, and pairs in a tar.
SIZES = {"quick": (40, 20), "full": (10_000, 2_500), "large": (40_000, 10_000)}


def _make(given: Input) -> None:
    make_shards(given, *SIZES[given.size])


def _ours(given: Input) -> Run:
    """`build_index`, with nothing left out: the parquet file is written, bad members are accounted for."""
    from mode.data.shards.index import PairIndex, build_index
    from mode.params import IndexParams

    manifest = manifest_of(given.folder)
    least = sum(_least_bytes(path) for path in tars_of(given.folder / "shards"))

    def run() -> dict[str, Any]:
        before = bytes_read()
        report = build_index(manifest, given.folder, given.folder / "index", IndexParams(check_images=False), workers=1)
        read = bytes_read() - before
        index = PairIndex.load(given.folder / "index")
        return {
            "pairs": report.pairs,
            "characters": sum(len(text) for block in index.iter_captions() for text in block),
            "read_over_headers_and_texts": read / least,
        }

    return run


def _least_bytes(path: str) -> int:
    """Headers of all members, and the content of those that are no image."""
    from mode.data.shards.tar import members

    with Path(path).open("rb") as file:
        listed = list(members(file.fileno(), os.fstat(file.fileno()).st_size))
    return sum(512 + (0 if member.name.endswith(".jpg") else member.size) for member in listed) + 512


def _webdataset(given: Input) -> Run:
    """Keys and captions, as the documentation iterates a dataset; images are read past, for a tar is a stream to it."""
    import webdataset

    tars = tars_of(given.folder / "shards")

    def run() -> dict[str, Any]:
        dataset = webdataset.WebDataset(tars, shardshuffle=False).to_tuple("__key__", "txt")
        found = [(key, text.decode()) for key, text in dataset]
        return {"pairs": len(found), "characters": sum(len(text) for _, text in found)}

    return run


def _tarfile(given: Input) -> Run:
    """Seekable, so that it passes over images as well; member, offset and caption."""
    tars = tars_of(given.folder / "shards")

    def run() -> dict[str, Any]:
        pairs = []
        for path in tars:
            with tarfile.open(path, "r:") as tar:
                place = None
                for member in tar:
                    if member.name.endswith(".jpg"):
                        place = (member.offset_data, member.size)
                    elif member.name.endswith(".txt") and (file := tar.extractfile(member)):
                        pairs.append((member.name[:-4], place, file.read().decode()))
        return {"pairs": len(pairs), "characters": sum(len(text) for _, _, text in pairs)}

    return run


LEAST = "bytes read at most 1.3x headers and texts"
RACES = (
    Race(
        name="index",
        step="index 10,000 pairs in 4 tars, image bytes passed over",
        sides={"mode": _ours, "webdataset": _webdataset, "tarfile": _tarfile},
        targets=(
            Target("at least 3x the faster of the two", faster("mode", "webdataset", "tarfile"), 3.0),
            Target(LEAST, figure("mode", "read_over_headers_and_texts"), 1.3, at_most=True),
            Target("the same pairs as webdataset", figure("mode", "pairs", over="webdataset"), 1.0),
            Target("the same characters", figure("mode", "characters", over="webdataset"), 1.0),
        ),
        make=_make,
        inputs="pictures",
        notes="one process each; ours also writes the parquet index and reads img2dataset's json beside the txt",
    ),
)
