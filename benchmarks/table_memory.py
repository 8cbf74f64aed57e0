"""What indexing a table costs in memory and time: `python -m benchmarks.table_memory FOLDER --rows 2000000`.

Makes up a csv of so many rows, of half as many images (many spellings of the path of one file) with two captions each,
far apart in the table; a tenth of the rows has an empty caption, and goes to quarantine. A process of its own indexes
it without decoding. Printed is the memory that it takes at most beyond what it had before, and the time. FOLDER needs
400 bytes a row; what is made there is removed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from mode.data.shards.index import build_index
from mode.data.shards.manifest import build_manifest
from mode.params import IndexParams, SourceParams

TABLE = "pairs.csv"


def make(folder: Path, rows: int) -> None:
    """A table of so many rows, and the one image that it names in many ways."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    with (folder / TABLE).open("w", encoding="utf-8") as file:
        file.write("image,caption\n")
        for row in range(rows):
            spelling = f"{row % (rows // 2):024b}".replace("0", "./").replace("1", ".//")
            caption = "" if row % 10 == 9 else f"a photograph of thing {row:010d} among many others"
            file.write(f"{spelling}a.png,{caption}\n")


def measure(folder: Path) -> dict[str, float]:
    """Index the table: megabytes at most beyond those before, seconds, and pairs."""
    manifest = build_manifest(SourceParams(shards=TABLE), folder)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    params = IndexParams(check_images=False, max_bad_share=1.0)
    report = build_index(manifest, folder, folder / "index", params, workers=1)
    seconds = time.perf_counter() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"grown_mb": grown * 1024 / 1e6, "seconds": seconds, "pairs": report.pairs, "bad": report.bad}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.folder)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        make(Path(name), given.rows)
        command = [sys.executable, "-m", "benchmarks.table_memory", name, "--measure"]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
