"""Run the pipeline with several random seeds and print the mean and standard deviation of every figure.

    python -m benchmarks.seeds --seeds 0 1 2 --out reports/seeds

Everything that is random depends on `random_seed`: the built-in data, the clusters, the first weights, the order of
samples.
Each run is an experiment of DVC in this folder (`dvc exp show` lists them); params.yaml is put back afterwards.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import Rows, figures, markdown, read_metrics, spreads
from mode.reporting.summary import comparison
from mode.results import Results
from mode.roles import EXPERT

ORDER = ["seed", "dense", "dense-long", EXPERT.mean, "uniform", "ensemble"]


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
            for random_seed in arguments.seeds:
                run(random_seed, arguments.out)
        finally:
            params.write_text(before, encoding="utf-8")
    print(table([read_metrics(path) for path in sorted(arguments.out.glob("*.json"))]))


def run(random_seed: int, out: Path) -> None:
    """One run of the pipeline; keeps its figures."""
    started = time.monotonic()
    if subprocess.run(["dvc", "exp", "run", "--set-param", f"random_seed={random_seed}"], check=False).returncode:
        sys.exit(f"error: dvc exp run failed with random_seed {random_seed}")
    print(f"random_seed {random_seed}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    shutil.copy("reports/metrics.json", out / f"{random_seed}.json")


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row per model, mean ± standard deviation in percent over the runs, and the cost."""
    if not results:
        return "no results"
    cells = spreads([with_mean(figures(metrics)) for metrics in results])
    samples = comparison(Results.model_validate(results[0]))["samples_seen"]
    cells["training samples"] = samples.map("{:,.0f}".format)
    return markdown(cells.reindex(ORDER).fillna("–"))


def with_mean(models: Rows) -> Rows:
    """With a row for the mean of the experts."""
    experts = [row for model, row in models.items() if model.startswith("expert-")]
    return models | {EXPERT.mean: {head: statistics.fmean(row[head] for row in experts) for head in experts[0]}}


if __name__ == "__main__":
    main()
