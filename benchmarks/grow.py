"""Does an expert that is added later help on its own domain, and does it leave everything else alone?

    python -m benchmarks.grow --shards DIR --later '^g' --tasks DIR/grocery_item DIR/fashion_article --seeds 0 1 2

Splits shards by the pairs' keys: those that match `--later` become a source of their own. For each seed: the pipeline
without them in a fresh clone, the evaluation, `mode add-source`, the pipeline again. Seeds may be run one by one, or at
the same time, with the same `--folder`: the table is of all that are done there. Prints the accuracy of the
ensemble before and after, and checks that no old model, cluster or assignment changed and which stages ran.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tarfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from benchmarks.orchestration import clone, environment

#: The setting for photographs at 48 pixels; byte pairs, since the new domain brings words of its own.
CHANGES: dict[str, dict[str, Any]] = {
    "embedding": {"dimensions": 128},
    "clustering": {"fine": 128},
    "image": {"size": 48, "flip": True, "shift": 4},
    "model": {
        "tokenizer": "model",
        "config": {
            "embed_dim": 128,
            "vision_cfg": {
                **{"image_size": 48, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32, "patch_size": None},
            },
            "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
        },
    },
    "training": {"epoch_samples": 3200, "dense_long": False},
}


def split(shards: Path, later: str, folder: Path) -> tuple[Path, Path]:
    """Two folders of tars: pairs whose key does not match `later`, and those that do."""
    parts = folder / "base", folder / "later"
    for part in parts:
        part.mkdir(parents=True, exist_ok=True)
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as source, ExitStack() as opened:
            written = [opened.enter_context(tarfile.open(part / path.name, "w")) for part in parts]
            for member in source:
                target = written[bool(re.match(later, Path(member.name).name))]
                target.addfile(member, source.extractfile(member))
    for part in parts:
        for path in part.glob("*.tar"):
            with tarfile.open(path) as tar:
                empty = not tar.getnames()
            if empty:
                path.unlink()
    return parts


def dvc(root: Path, *arguments: str) -> str:
    """Run DVC in the clone; what it printed."""
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def old_results(root: Path) -> dict[str, str]:
    """Hash of every output of every stage but those that join the experts."""
    stages = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    kept = {name: stage for name, stage in stages.items() if name not in ("ensemble", "evaluate", "report")}
    return {out["path"]: out["md5"] for stage in kept.values() for out in stage.get("outs", [])}


def grow(root: Path, base: Path, later: Path, tasks: list[Path], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics before and after the new source."""
    path = root / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for section, changes in CHANGES.items():
        params[section] |= changes
    params["random_seed"] = seed
    params["sources"]["base"]["shards"] = str(base)
    params["evaluation"]["tasks"] = [str(task) for task in tasks]
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    (root / "watch.yaml").write_text("generated: []\nwatched: [base]\n")
    dvc(root, "repro", "evaluate")
    before, old = json.loads((root / "reports/metrics.json").read_text()), old_results(root)
    command = [sys.executable, "-m", "mode.cli", "add-source", "later", str(later), "--fine", "32"]
    subprocess.run(command, cwd=root, env=environment(root), check=True)
    ran = re.findall(r"^Running stage '(.*)'", dvc(root, "repro", "evaluate"), re.MULTILINE)
    after, new = json.loads((root / "reports/metrics.json").read_text()), old_results(root)
    changed = [path for path in old if new.get(path) != old[path]]
    print(f"seed {seed}: old results that changed: {changed or 'none'}; stages that ran: {', '.join(ran)}", flush=True)
    return before, after


def figures(metrics: dict[str, Any]) -> dict[str, float]:
    """The ensemble's figure of each task."""
    found = {task: models["ensemble"] for task, models in metrics["zeroshot"]["tasks"].items()}
    for task, models in metrics["retrieval"]["tasks"].items():
        found[f"{task} image recall@10"] = models["ensemble"]["image_recall@10"]
    return found


def main() -> None:
    """Split, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--later", required=True, help="regular expression of the keys that come later")
    parser.add_argument("--tasks", type=Path, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, required=True, help="for the clones and the split shards")
    options = parser.parse_args()
    folder = options.folder.resolve()
    base, later = folder / "base", folder / "later"
    if not base.is_dir():
        split(options.shards.resolve(), options.later, folder)
    tasks = [task.resolve() for task in options.tasks]
    for seed in options.seeds:
        before, after = grow(clone(folder / f"seed-{seed}"), base, later, tasks, seed)
        weights = {task: weights.get("expert-4", 0.0) for task, weights in after["routing"].items()}
        content = {"before": figures(before), "after": figures(after), "weight of the new expert": weights}
        (folder / f"seed-{seed}.json").write_text(json.dumps(content, indent=2) + "\n")
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*.json"))]
    print(f"{len(runs)} seeds\n\n| task | without the new expert | with it | its weight |\n|---|---:|---:|---:|")
    for task in runs[0]["before"]:
        cells = [spread([100 * run[when][task] for run in runs]) for when in ("before", "after")]
        weight = statistics.mean(run["weight of the new expert"][task.split(" ")[0]] for run in runs)
        print(f"| {task} | {cells[0]} | {cells[1]} | {weight:.2f} |")


def spread(values: list[float]) -> str:
    """Mean and standard deviation, and the values themselves."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation} ({', '.join(f'{value:.1f}' for value in values)})"


if __name__ == "__main__":
    main()
