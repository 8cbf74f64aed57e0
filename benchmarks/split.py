"""Shards by the pairs' keys: `python -m benchmarks.split SHARDS FOLDER NAME=PATTERN ...`.

FOLDER/NAME gets tars with the pairs of SHARDS whose key matches the regular expression PATTERN from its beginning; what
matches none is left out. `experiments/domains.yaml` says which it needs.
"""

from __future__ import annotations

import argparse
import re
import sys
import tarfile
from contextlib import ExitStack
from pathlib import Path


def split(shards: Path, patterns: dict[str, str], folder: Path) -> dict[str, int]:
    """Write `folder`/NAME for each pattern; returns how many files each got.

    Raises:
        FileExistsError: one of them is there already.
    """
    counts = dict.fromkeys(patterns, 0)
    for name in patterns:
        (folder / name).mkdir(parents=True)
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as source, ExitStack() as opened:
            tars = {
                name: opened.enter_context(tarfile.open(folder / name / path.name, "w", format=tarfile.USTAR_FORMAT))
                for name in patterns
            }
            for member in source:
                key = Path(member.name).name
                if found := next((name for name, pattern in patterns.items() if re.match(pattern, key)), None):
                    tars[found].addfile(member, source.extractfile(member))
                    counts[found] += 1
        for name in patterns:
            with tarfile.open(folder / name / path.name) as written:
                empty = written.next() is None
            if empty:
                (folder / name / path.name).unlink()
    return counts


def main() -> None:
    """Split, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("patterns", nargs="+", metavar="NAME=PATTERN")
    options = parser.parse_args()
    patterns = dict(part.split("=", 1) for part in options.patterns)
    try:
        for name, count in split(options.shards, patterns, options.folder).items():
            print(f"{name}: {count:,} files")
    except FileExistsError as error:
        sys.exit(f"error: {error.filename} is there already")


if __name__ == "__main__":
    main()
