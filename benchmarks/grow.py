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
import math
import re
import statistics
import subprocess
import sys
import tarfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from benchmarks.study import Row, clone, dvc, environment, figures, markdown, set_params, spread
from mode.results import Results

#: The setting for photographs at 48 pixels; byte pairs, since the new domain brings words of its own.
CHANGES: dict[str, Any] = {
    "embedding.dimensions": 128,
    "clustering.fine": 128,
    "image.size": 48,
    "image.flip": True,
    "image.shift": 4,
    "model.tokenizer": "model",
    "model.config.embed_dim": 128,
    "model.config.vision_cfg.image_size": 48,
    "model.config.text_cfg.context_length": 32,
    "+model.config.text_cfg.vocab_size": 49408,  # `+`: a new key
    "model.config.text_cfg.width": 128,
    "training.epoch_samples": 3200,
    "baselines.dense_long": False,
    "watch.yaml:generated": [],
    "watch.yaml:watched": ["base"],
}


def split(shards: Path, later: str, parts: tuple[Path, Path]) -> None:
    """Two folders of tars: pairs whose key does not match `later`, and those that do."""
    for part in parts:
        part.mkdir(parents=True, exist_ok=True)
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as source, ExitStack() as opened:
            written = [opened.enter_context(tarfile.open(part / path.name, "w")) for part in parts]
            for member in source:
                target = written[bool(re.match(later, Path(member.name).name))]
                target.addfile(member, source.extractfile(member))
            empty = [Path(str(tar.name)) for tar in written if not tar.getmembers()]
        for tar_file in empty:
            tar_file.unlink()


def old_results(root: Path) -> dict[str, str]:
    """Hash of every output of every stage but those that join the experts."""
    stages = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    kept = {name: stage for name, stage in stages.items() if name not in ("ensemble", "evaluate", "report")}
    return {out["path"]: out["md5"] for stage in kept.values() for out in stage.get("outs", [])}


def grow(root: Path, base: Path, later: Path, tasks: list[Path], random_seed: int, held_out: int = 0) -> dict[str, Row]:
    """Figures before and after the new source, and the weights of its expert."""
    places = {
        "sources.base.shards": str(base),
        "evaluation.tasks": [str(task) for task in tasks],
        "training.held_out": held_out,
    }
    dvc(root, "exp", "run", *set_params(CHANGES | places | {"random_seed": random_seed}), "evaluate")
    before, old = Results.load(root / "reports/metrics.json"), old_results(root)
    command = [sys.executable, "-m", "mode.cli", "add-source", "later", str(later), "--fine", "32"]
    subprocess.run(command, cwd=root, env=environment(root), check=True)
    ran = dvc(root, "repro", "evaluate")
    after, new = Results.load(root / "reports/metrics.json"), old_results(root)
    changed = [path for path in old if new.get(path) != old[path]]
    said = f"old results that changed: {changed or 'none'}; stages that ran: {', '.join(ran)}"
    print(f"random_seed {random_seed}: {said}")
    weights = {task: weights.get("expert-4") or 0.0 for task, weights in after.routing.items()}
    return {"before": of_ensemble(before), "after": of_ensemble(after), "weight of the new expert": weights}


def of_ensemble(results: Results) -> Row:
    """The ensemble's figure of each task: its accuracy, or image recall@10."""
    own = figures(results, most_tasks=math.inf)["ensemble"]
    del own["zero-shot"]
    return {head: value for head, value in own.items() if "recall@" not in head or head.endswith(" image recall@10")}


def table(runs: list[dict[str, Row]]) -> str:
    """Markdown: a row per task, in percent over the runs, each of which is named too."""
    rows = {}
    for task in runs[0]["before"]:
        row = {}
        for head, when in (("without the new expert", "before"), ("with it", "after")):
            values = [100 * run[when][task] for run in runs]
            row[head] = f"{spread(values)} ({', '.join(f'{value:.1f}' for value in values)})"
        weight = statistics.mean(run["weight of the new expert"][task.split(" ")[0]] for run in runs)
        rows[task] = row | {"its weight": f"{weight:.2f}"}
    return markdown(pd.DataFrame.from_dict(rows, orient="index"))


def main() -> None:
    """Split, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--later", required=True, help="regular expression of the keys that come later")
    parser.add_argument("--tasks", type=Path, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=int, default=0, help="images of each source, to compare routing rules on")
    parser.add_argument("--folder", type=Path, required=True, help="for the clones and the split shards")
    options = parser.parse_args()
    folder = options.folder.resolve()
    base, later = folder / "base", folder / "later"
    if not base.is_dir():
        split(options.shards.resolve(), options.later, (base, later))
    tasks = [task.resolve() for task in options.tasks]
    for random_seed in options.seeds:
        content = grow(clone(folder / f"seed-{random_seed}"), base, later, tasks, random_seed, options.held_out)
        (folder / f"seed-{random_seed}.json").write_text(json.dumps(content, indent=2) + "\n")
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*.json"))]
    print(f"{len(runs)} seeds\n\n{table(runs)}")


if __name__ == "__main__":
    main()
