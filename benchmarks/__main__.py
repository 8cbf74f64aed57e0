"""Run the races, print one table, write `benchmarks/results.json`.

python -m benchmarks                                   everything that can run here
python -m benchmarks --only cluster,index --repeats 7  some groups or races
python -m benchmarks --quick                           tiny sizes, to see whether it works
python -m benchmarks --table                           the kept results as Markdown
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from benchmarks.harness import Input, Race, RaceFailed, Record, Size, run_race
from mode.parallel import cores
from mode.reporting.tables import wide_console

#: Modules with RACES, in the order of the pipeline.
GROUPS = ("index", "embed", "cluster", "assign", "load", "train", "evaluate", "predict", "nothing")
RESULTS = Path(__file__).with_name("results.json")
PACKAGES = (
    *("mode-clip", "torch", "torchvision", "open_clip_torch", "faiss-gpu", "faiss-cpu", "numpy", "scipy"),
    *("scikit-learn", "pillow", "transformers", "webdataset", "sentence-transformers", "clip-benchmark", "dvc"),
)


def main(arguments: list[str] | None = None) -> int:
    """See the module. Returns the exit code: 1 if a race failed to run; a missed target is a result like any other."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, formatter_class=as_written)
    parser.add_argument("--only", default="", help=f"groups ({', '.join(GROUPS)}) or races, separated by commas")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side (default 5)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; nothing is kept unless --out is given")
    parser.add_argument("--large", action="store_true", help="larger sizes (hours)")
    parser.add_argument("--photos", type=Path, help="folder with tars of photographs, in place of made pictures")
    parser.add_argument("--threads", type=int, help="of each process (default: all cores)")
    parser.add_argument("--work", type=Path, help="folder for inputs, kept (default: a temporary one)")
    parser.add_argument("--out", type=Path, help=f"where results go (default {RESULTS.name} in this folder)")
    parser.add_argument("--table", action="store_true", help="print the kept results as Markdown and stop")
    given = parser.parse_args(arguments)
    if given.table:
        print(markdown(json.loads((given.out or RESULTS).read_text(encoding="utf-8"))))
        return 0
    out = given.out or (None if given.quick else RESULTS)
    size: Size = "quick" if given.quick else "large" if given.large else "full"
    races = _chosen(given.only, size)
    _set_threads(given.threads or cores())
    with tempfile.TemporaryDirectory(prefix="mode-benchmarks-", ignore_cleanup_errors=True) as temporary:
        return _run(races, size, given.work or Path(temporary), given, out)


def _run(races: list[tuple[str, Race]], size: Size, work: Path, given: argparse.Namespace, out: Path | None) -> int:
    kept, failed = _kept(out), False
    for group, race in races:
        started = time.monotonic()
        _say(f"{race.name}: {race.step}")
        record = Record(race.name, race.step, notes=race.notes, not_run=_missing(race, work))
        folder = work / (race.inputs or group)
        if not record.not_run:
            inputs = Input(folder, size, given.photos, "cuda" if race.needs_gpu else "cpu")
            try:
                record = run_race(race, inputs, given.repeats, lambda line: _say(f"  {line}"))
            except RaceFailed as error:
                record.not_run, failed = f"failed: {error}", True
                _say(f"  failed: {error}")
        if given.work is None and race.name.startswith("cluster-disk"):
            shutil.rmtree(folder, ignore_errors=True)  # gigabytes that no other race needs
        row = {"group": group, "when": _when(given), "wall_seconds": round(time.monotonic() - started, 1)}
        kept["races"][race.name] = {**row, **json.loads(json.dumps(asdict(record), default=str))}
        if out is not None:
            _write(out, kept)  # after every race: an interrupted run has not been for nothing
    show({**kept, "races": {race.name: kept["races"][race.name] for _, race in races}})
    return int(failed)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _missing(race: Race, work: Path) -> str | None:
    """What the race needs and this machine lacks."""
    if race.needs_gpu and not has_gpu():
        return "no GPU"
    work.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(work).free < race.needs_gb * 1e9:
        return f"needs {race.needs_gb:.1f} GB of disk (--work names another folder)"
    return None


def _races() -> list[tuple[str, Race]]:
    """All, each with its group."""
    return [(group, race) for group in GROUPS for race in import_module(f"benchmarks.{group}").RACES]


def _chosen(only: str, size: str) -> list[tuple[str, Race]]:
    races = [(group, race) for group, race in _races() if size in race.sizes]
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    known = {*GROUPS, *(race.name for _, race in races)}
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"error: no race is called {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    return [(group, race) for group, race in races if not wanted or group in wanted or race.name in wanted]


def _set_threads(threads: int) -> None:
    """For the libraries of the processes that are started from here."""
    for library in ("OMP", "MKL", "OPENBLAS", "RAYON"):
        os.environ[f"{library}_NUM_THREADS"] = str(threads)
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}


def has_gpu() -> bool:
    """Whether there is one (asked without importing torch)."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).stdout.startswith(b"GPU")


def _when(given: argparse.Namespace) -> dict[str, Any]:
    """What a result has to be read with."""
    changed = _git("status", "--porcelain", "--untracked-files=no").splitlines()
    return {
        "commit": _git("rev-parse", "--short", "HEAD") or None,
        "uncommitted_changes": any("results.json" not in line for line in changed),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "repeats": given.repeats,
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "photos": given.photos is not None,
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(RESULTS.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def machine() -> dict[str, Any]:
    """CPU model, cores, memory, system."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        found = re.search(r"^model name\s*:(.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        model = found[1].strip() if found else model
    return {
        "cpu": model,
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.system(),
        "gpu": has_gpu(),
        "python": platform.python_version(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _kept(out: Path | None) -> dict[str, Any]:
    """Results of earlier runs, which stay until their race is run again."""
    races = json.loads(out.read_text(encoding="utf-8"))["races"] if out is not None and out.is_file() else {}
    return {"machine": machine(), "versions": _versions(), "races": races}


def _write(out: Path, kept: dict[str, Any]) -> None:
    races = {race.name: kept["races"][race.name] for _, race in _races() if race.name in kept["races"]}
    out.write_text(json.dumps({**kept, "races": races}, indent=1) + "\n", encoding="utf-8")


def show(results: dict[str, Any]) -> None:
    """One table on the terminal."""
    heads = ("race", "side", "median time", "peak memory", "quality", "target")
    table = Table(*heads, title="Races", title_justify="left")
    for name, record in results["races"].items():
        for row in rows_of(name, record):
            table.add_row(*row)
        table.add_section()
    wide_console().print(table)


def rows_of(name: str, record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of a race: a row per side, targets beside them."""
    if record["not_run"]:
        return [(name, "", "", "", "", f"not run: {record['not_run']}")]
    sides = []
    for side in record["sides"]:
        seconds = f"{_seconds(side['median'])} (CPU {_seconds(side['cpu_seconds'])})"
        memory = f"{max(side['peak_mb'], side['children_mb']):,.0f} MB"
        sides.append((side["name"], seconds, memory, figures_of(side["figures"])))
    lines = zip_longest([name], sides, map(verdict, record["targets"]))
    return [(head or "", *(side or [""] * 4), target or "") for head, side, target in lines]


def verdict(target: dict[str, Any]) -> str:
    """A target, what was measured, and whether it is met."""
    if target["value"] is None:
        return f"{target['target']}: not measured"
    return f"{target['target']}: {target['value']:.3g}, {'met' if target['met'] else 'MISSED'}"


def figures_of(figures: dict[str, Any]) -> str:
    """Figures as text."""
    numbers = {key.replace("_", " "): value for key, value in figures.items() if isinstance(value, int | float)}
    return ", ".join(f"{key} {value:{',.4g' if isinstance(value, float) else ','}}" for key, value in numbers.items())


def _seconds(value: float) -> str:
    return f"{value:,.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.1f} ms"


def markdown(results: dict[str, Any]) -> str:
    """The kept results for docs/performance.md."""
    where = results["machine"]
    gpu = "a GPU" if where["gpu"] else "no GPU"
    lines = [
        f"Measured on {where['cores']} cores ({where['cpu']}), {where['memory_gb']} GB, {gpu}.",
        "",
        "| race | side | time | peak memory | quality | target: measured |",
        "|---|---|---:|---:|---|---|",
    ]
    for name, record in results["races"].items():
        lines += ["| " + " | ".join(row) + " |" for row in rows_of(name, record)]
    whens = {(each["when"]["date"][:10], each["when"]["commit"]) for each in results["races"].values()}
    lines += ["", "Runs: " + ", ".join(f"{date} at {commit}" for date, commit in sorted(whens, key=str)) + "."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
