"""Experts from a pretrained CLIP: what they gain on new domains, and what they forget of the old ones.

    python -m benchmarks.finetune --photos DIR --wide DIR --folder FOLDER [--seeds 0 1 2]

DIR has `train/` (tars) and `tasks/` (folders). A CLIP is trained on the old domains and saved by plain open_clip, as
somebody's checkpoint: a `.pt` as its trainings write it, a `.safetensors` file, and a folder. For each random seed
`mode init` then makes a project from it whose shards are the new domains, and `dvc repro` fine-tunes dense models and
full experts; a copy goes on with LoRA experts, in which only experts, ensemble and evaluation are made anew; another
copy has every fine-tuned model mixed with the seed (WiSE-FT), half and half.

Prints the model as it came and all that was made of it, on the new domains' tasks and on the old ones'. What is done in
FOLDER already is not done again. No figure of a test decides anything here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
import yaml
from safetensors.torch import save_file

from benchmarks.grow import CHANGES, split
from benchmarks.inference import of_variant, pixels_of
from benchmarks.study import Row, Rows, clone, dvc, environment, figures, markdown, set_params, spreads
from mode import edit
from mode.clip.model import load_model, save_sealed
from mode.clip.preprocess import Preprocess
from mode.evaluation.tasks import open_task
from mode.files import sha256_of
from mode.results import Results
from mode.training.mixing import mix

#: Keys of the pairs of the new domains, in each of the two sets: groceries; scenes, flowers, instruments, waste.
NEW = {"photos": "g", "wide": "[sfvmw]"}
#: Tasks of the new domains, and of the old ones.
TASKS = {
    "new": {"photos": ["grocery_item"], "wide": ["scenes", "flowers", "five_flowers", "instruments", "waste"]},
    "old": {
        "photos": ["fashion_article", "flickr8k_retrieval"],
        "wide": ["imagenette", "pacs_art", "pacs_cartoon", "pacs_photo", "pacs_sketch"],
    },
}
RETRIEVAL = "flickr8k_retrieval"
#: The pretrained model: as in `benchmarks.grow`, 160,000 samples.
PRETRAINING: dict[str, Any] = CHANGES | {
    "training.epoch_samples": 6400,
    "training.epochs": 25,
    "training.seed_epochs": 20,
}
#: The fine-tuning, chosen before any figure was seen: a quarter of the pretraining's highest rate, eight units each.
TUNING: dict[str, Any] = {
    "image.crop_scale": None,
    "image.flip": True,
    "image.shift": 4,
    "clustering.fine": 128,
    "training.epoch_samples": 3200,
    "training.epochs": 8,
    "training.batch_size": 128,
    "training.lr": 5e-4,
    "training.weight_decay": 0.1,
    "training.warmup": 20,
    "training.schedule": "wsd",
    "training.precision": "fp32",
    "machine.threads": 1,
    "machine.workers": 0,
    "machine.decode_threads": 2,
    "machine.device": "cpu",
}
#: Adapters take the higher rate that is usual for them.
ADAPTER: dict[str, Any] = {"training.adapter": {"kind": "lora", "rank": 16, "lr": 2e-3}}
#: Rows of the table by model, of the project and of its two copies.
FULL = {
    "seed": "as it came",
    "dense": "dense",
    "dense-long": "dense-long",
    "uniform": "full experts, uniform",
    "ensemble": "full experts",
}
LORA = {"uniform": "LoRA experts, uniform", "ensemble": "LoRA experts"}
HALF = {
    "dense": "dense, half the seed",
    "dense-long": "dense-long, half the seed",
    "ensemble": "full experts, half the seed",
}
EXPERTS = [f"expert-{number}" for number in range(4)]


def pretrain(folder: Path, shards: str) -> Path:
    """Train the model that is given to the projects; returns where plain open_clip has saved it."""
    theirs = folder / "theirs"
    if (theirs / "open_clip_config.json").is_file():
        return theirs
    root = folder / "pretraining"
    if not root.is_dir():
        clone(root)
    dvc(root, "exp", "run", *set_params(PRETRAINING | {"sources.base.shards": shards, "random_seed": 0}), "dense")
    network = open_clip.create_model(f"local-dir:{root / 'models/dense'}")
    weights = {name: each.contiguous() for name, each in network.state_dict().items()}
    config = json.loads((root / "models/dense/open_clip_config.json").read_text())
    torch.save({"epoch": 25, "name": "theirs", "state_dict": weights}, folder / "theirs.pt")
    save_file(weights, folder / "theirs.safetensors")
    (folder / "theirs.json").write_text(json.dumps(config["model_cfg"]))
    aside = folder / "theirs.aside"
    aside.mkdir(exist_ok=True)
    save_file(weights, aside / "open_clip_model.safetensors")
    shutil.copy(root / "models/dense/open_clip_config.json", aside)
    aside.rename(theirs)
    return theirs


def same_however_given(folder: Path) -> None:
    """A `.pt`, a `.safetensors` file and a folder have to give the same seed."""
    forms = {"pt": ("theirs.json", "theirs.pt"), "safetensors": ("theirs.json", "theirs.safetensors")}
    digests = {}
    with tempfile.TemporaryDirectory() as aside:
        for form, (name, weights) in {**forms, "folder": ("local-dir:theirs", "")}.items():
            out = Path(aside) / form
            command = [sys.executable, "-m", "mode.cli", "get-model", name, str(out)]
            subprocess.run([*command, *(["--weights", weights] if weights else [])], cwd=folder, check=True)
            digests[form] = sha256_of(out / "open_clip_model.safetensors")
    print(f"the seed's weights, by the form that they were given in: {digests}")
    assert len(set(digests.values())) == 1


def tune(root: Path, theirs: Path, shards: str, tasks: list[Path], random_seed: int) -> None:
    """A project of its own from the given model, with all of its models."""
    if not root.is_dir():
        command = [sys.executable, "-m", "mode.cli", "init", str(root), "--preset", "finetune", "--shards", shards]
        command += [part for task in tasks for part in ("--tasks", str(task))]
        subprocess.run([*command, "--seed-model", f"local-dir:{theirs}"], check=True)
        change(root, TUNING | {"random_seed": random_seed})
    dvc(root, "repro")


def with_adapters(root: Path, full: Path) -> None:
    """The same project with LoRA experts: seed, clusters and baselines are those of the other."""
    if (root / "reports/metrics.json").is_file():
        return
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(full, root, symlinks=True)
    for made in (*(root / "models" / expert for expert in EXPERTS), root / "reports"):
        shutil.rmtree(made)
    change(root, ADAPTER)
    for stage in (*(["expert", expert] for expert in EXPERTS), ["ensemble"], ["evaluate"]):
        subprocess.run([sys.executable, "-m", "mode.cli", "stage", *stage], cwd=root, check=True, env=environment(root))


def with_half_the_seed(root: Path, full: Path) -> None:
    """The same project, every fine-tuned model mixed with the seed, as `training.seed_share: 0.5` does."""
    if (root / "reports/metrics.json").is_file():
        return
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(full, root, symlinks=True)
    shutil.rmtree(root / "reports")
    seed = load_model(root / "models/seed").model.state_dict()
    for name in ("dense", "dense-long", *EXPERTS):
        clip = load_model(root / "models" / name)
        clip.model.load_state_dict(mix(clip.model.state_dict(), seed, 0.5))
        shutil.rmtree(root / "models" / name)
        save_sealed(root / "models" / name, clip, clip.card)
    subprocess.run([sys.executable, "-m", "mode.cli", "stage", "evaluate"], cwd=root, check=True, env=environment(root))


def change(root: Path, changes: dict[str, Any]) -> None:
    """Change params.yaml."""
    path = root / "params.yaml"
    path.write_text(edit.set_values(path.read_text(), changes))


def rows_of(root: Path, names: dict[str, str]) -> Rows:
    """Figures of some models of a project, and of its experts merged for each task; `names`: model -> row."""
    import mode

    rows: Rows = {}
    known = figures(Results.load(root / "reports/metrics.json"), most_tasks=100)
    for model, row in names.items():
        rows[row] = summary({head: 100 * value for head, value in known[model].items()})
    ensemble = mode.load(root / "models", device="cpu")
    preprocess = Preprocess(next(iter(ensemble.clips.values())))
    tasks = [
        open_task(Path(task)) for task in yaml.safe_load((root / "params.yaml").read_text())["evaluation"]["tasks"]
    ]
    merged: Row = {}
    for task in tasks:
        inputs = {task.name: preprocess.normalise(pixels_of(task, preprocess))}
        own = of_variant(ensemble, [task], inputs, {"merge": "weights"})
        merged |= {
            f"{task.name} {head.split(' ', 1)[1]}" if "recall" in head else task.name: value
            for head, value in own.items()
            if head == task.name or "recall" in head
        }
    rows[f"{names['ensemble']}, merged"] = summary(merged)
    return rows


def summary(row: Row) -> Row:
    """The mean over the new tasks and over the old ones, and the old retrieval."""

    def mean(which: str) -> float:
        listed = [task for group in TASKS[which].values() for task in group if task != RETRIEVAL]
        return statistics.fmean(row[task] for task in listed)

    return {
        "new domains": mean("new"),
        "old domains": mean("old"),
        "old image recall@10": row[f"{RETRIEVAL} image recall@10"],
        "old text recall@10": row[f"{RETRIEVAL} text recall@10"],
        **{task: row[task] for group in TASKS["new"].values() for task in group},
    }


def rows_of_seed(folder: Path, theirs: Path, tasks: list[Path], seed: int) -> Rows:
    """Train everything with one random seed, and what came of it."""
    full, lora, half = (folder / f"{kind}-{seed}" for kind in ("full", "lora", "half"))
    tune(full, theirs, f"{folder}/new-*/*.tar", tasks, seed)
    with_adapters(lora, full)
    with_half_the_seed(half, full)
    rows: Rows = {}
    for root, names in ((full, FULL), (lora, LORA), (half, HALF)):
        rows |= rows_of(root, names)
    return rows


def main() -> None:
    """Split, pretrain, tune, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in NEW:
        parser.add_argument(f"--{name}", type=Path, required=True, help="a folder with train/ and tasks/")
    parser.add_argument("--folder", type=Path, required=True, help="for everything that is made")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: the pretrained model alone")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    for name, keys in NEW.items():
        if not (folder / f"old-{name}").is_dir():
            split(getattr(options, name) / "train", keys, (folder / f"old-{name}", folder / f"new-{name}"))
    theirs = pretrain(folder, f"{folder}/old-*/*.tar")
    runs = []
    tasks = [
        (getattr(options, name) / "tasks" / task).resolve()
        for group in TASKS.values()
        for name, listed in group.items()
        for task in listed
    ]
    if options.seeds:
        same_however_given(folder)
    for seed in options.seeds:
        kept = folder / f"rows-{seed}.json"
        if not kept.is_file():
            kept.write_text(json.dumps(rows_of_seed(folder, theirs, tasks, seed), indent=2) + "\n")
        runs.append(json.loads(kept.read_text()))
    if runs:
        print(markdown(spreads(runs, percent=False)))


if __name__ == "__main__":
    main()
