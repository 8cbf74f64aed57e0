"""Run the pipeline with several random seeds and print the mean and standard deviation of every figure.

    python -m benchmarks.seeds --seeds 0 1 2 --out reports/seeds

Everything that is random depends on `random_seed`: the built-in data, the clusters, the first weights, the order of
samples.
Each run is an experiment of DVC in this folder (`dvc exp show` lists them); params.yaml is put back afterwards.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study import figures, markdown, mean_row, spreads
from mode.reporting.summary import comparison
from mode.results import Results
from mode.roles import EXPERT, ROLES, role_of

ORDER = [role.mean if role.many else role.name for role in ROLES]


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
    print(table([Results.load(path) for path in sorted(arguments.out.glob("*.json"))]))


def run(random_seed: int, out: Path) -> None:
    """One run of the pipeline; keeps its figures."""
    started = time.monotonic()
    if subprocess.run(["dvc", "exp", "run", "--set-param", f"random_seed={random_seed}"], check=False).returncode:
        sys.exit(f"error: dvc exp run failed with random_seed {random_seed}")
    print(f"random_seed {random_seed}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    shutil.copy("reports/metrics.json", out / f"{random_seed}.json")


def table(results: Sequence[Results]) -> str:
    """Markdown: one row per model, mean ± standard deviation in percent over the runs, and the cost."""
    if not results:
        return "no results"
    runs = [figures(each) for each in results]
    for models in runs:
        models[EXPERT.mean] = mean_row([row for model, row in models.items() if role_of(model) == EXPERT])
    cells = spreads(runs)
    cells["training samples"] = comparison(results[0])["samples_seen"].map("{:,.0f}".format)
    return markdown(cells.reindex(ORDER).fillna("–"))


if __name__ == "__main__":
    main()
