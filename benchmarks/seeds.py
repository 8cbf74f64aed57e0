"""Run the pipeline with several random seeds and print the mean and standard deviation of every figure.

    python benchmarks/seeds.py --seeds 0 1 2 --out reports/seeds

Everything that is random depends on `random_seed`: the built-in data, the clusters, the first weights, the order of
samples.
Each run is an ordinary `dvc repro` in this folder; params.yaml is put back afterwards.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ORDER = ["seed", "dense", "dense-long", "experts, mean", "uniform", "ensemble"]


def main() -> None:
    """Run, collect, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("reports/seeds"), help="keeps each run's metrics.json")
    parser.add_argument("--print-only", action="store_true", help="only print what --out holds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.print_only:
        params = Path("params.yaml")
        before = params.read_text(encoding="utf-8")
        try:
            for seed in arguments.seeds:
                run(params, before, seed, arguments.out)
        finally:
            params.write_text(before, encoding="utf-8")
    print(table([json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.out.glob("*.json"))]))


def run(params: Path, before: str, seed: int, out: Path) -> None:
    """One `dvc repro` with `seed`; keeps its figures and the seconds it took."""
    params.write_text(re.sub(r"(?m)^random_seed: .*$", f"random_seed: {seed}", before), encoding="utf-8")
    started = time.monotonic()
    if subprocess.run(["dvc", "repro"], check=False).returncode:
        sys.exit(f"error: dvc repro failed with random_seed {seed}")
    print(f"random_seed {seed}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    shutil.copy("reports/metrics.json", out / f"{seed}.json")


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row per model, mean ± standard deviation in percent over the runs, and the cost."""
    if not results:
        return "no results"
    columns = {"zero-shot mean": [zeroshot(result, "mean") for result in results]}
    tasks = results[0]["zeroshot"]["tasks"]
    if len(tasks) <= 6:
        columns |= {task: [zeroshot(result, task) for result in results] for task in tasks}
    for task, figures in results[0]["retrieval"]["tasks"].items():
        for name in next(iter(figures.values())):
            columns[f"{task} {name}"] = [with_mean(pick(result, task, name)) for result in results]
    lines = [f"| model | {' | '.join(columns)} | training samples |", "|---|" + "---:|" * (len(columns) + 1)]
    for model in ORDER:
        cells = [spread([run[model] for run in runs if model in run]) for runs in columns.values()]
        cost = results[0]["cost"].get(model, results[0]["cost"].get("expert-0", {})).get("samples_seen")
        lines.append(f"| {model} | {' | '.join(cells)} | {cost:,} |")
    return "\n".join(lines)


def zeroshot(result: dict[str, Any], task: str) -> dict[str, float]:
    """Model -> accuracy of a task, or of their mean."""
    return with_mean(result["zeroshot"]["mean"] if task == "mean" else result["zeroshot"]["tasks"][task])


def pick(result: dict[str, Any], task: str, name: str) -> dict[str, float]:
    """Model -> one recall of a retrieval task."""
    return {model: figures[name] for model, figures in result["retrieval"]["tasks"][task].items()}


def with_mean(figures: dict[str, float]) -> dict[str, float]:
    """Add the mean of the experts."""
    experts = [value for model, value in figures.items() if model.startswith("expert-")]
    return {**figures, "experts, mean": statistics.fmean(experts)} if experts else figures


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, in percent."""
    if not values:
        return "–"
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
