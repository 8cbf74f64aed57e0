"""Experts as adapters against whole experts: accuracy, size on disk, memory, images/s. Trains all of it on the glyphs.

    OMP_NUM_THREADS=1 python -m benchmarks.adapters FOLDER [--ranks 4 16] [--pairs 8000] [--epochs 20] [--seeds 0 1 2]
    OMP_NUM_THREADS=1 python -m benchmarks.adapters FOLDER --memory 32 --model ViT-B-32
    OMP_NUM_THREADS=1 python -m benchmarks.adapters FOLDER --steps 16 --model ViT-B-32

FOLDER keeps what was trained: called again, it goes on. Every kind of expert branches from the same seed and sees the
same pairs as often. Accuracies are means over the built-in tasks, in percent; `merged`, `TIES` and `DARE` are those of
the experts as one model for each task. `KB on disk` is an expert's folder; `training, samples/s` is from the cards;
`images/s` is that of one expert's image tower in batches of 64, in processor time of one core, as it is loaded and
folded into one model. The time of the training is the machine's, whatever else it does: run it on a quiet one.

With `--memory N` nothing is trained: N adapters of each rank of one model with random weights are written, and resident
memory is compared between opening that model, all N adapters, and as many whole models as `--whole` says; each in a
process of its own.

With `--steps N` whole steps of N pairs are timed, of one model with random weights and of an adapter of each rank, in
processor time of one core; `by operations` is what their count says of the adapter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import yaml

from benchmarks.inference import of_variant, pixels_of
from benchmarks.inputs import model_params
from benchmarks.study import Row, Rows, figures, markdown, mean_row, spreads
from mode.planning.trial import cpu_seconds
from mode.results import Results
from mode.roles import EXPERT, role_of

REPOSITORY = Path(__file__).parent.parent
BATCH, BATCHES = 64, 16
#: Steps of `--steps`, of which the fastest counts.
STEPS = 8
#: How experts are merged -> the head of its column.
MERGES = {"weights": "merged", "ties": "TIES", "dare": "DARE"}
#: Trained once for all kinds of experts.
SHARED = ("seed", "dense")
DIGITS = {
    "KB on disk": 0,
    "training, samples/s": 0,
    "images/s": 0,
    "images/s, folded": 0,
    "MB in memory": 0,
    "MB on disk": 0,
    "steps, samples/s": 1,
    "times as fast": 2,
    "by operations": 2,
}
Result = TypeVar("Result")


def main() -> None:
    """Train what is missing, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pairs", type=int, default=8_000)
    parser.add_argument("--epochs", type=int, default=20, help="of the dense model; the seed has four fifths of them")
    parser.add_argument("--adapter", default="{}", help="more of training.adapter, as YAML: '{lr: 0.004}'")
    parser.add_argument("--memory", type=int, metavar="N", help="memory of N adapters of one model, and nothing else")
    parser.add_argument("--whole", type=int, default=2, help="of --memory: as many whole models beside them")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of N pairs of one model, and nothing else")
    parser.add_argument("--model", default="ViT-B-32", help="of --memory: open_clip's name; of --steps also: demo")
    arguments = parser.parse_args()
    if arguments.steps:
        print(markdown(spreads([steps(arguments.model, arguments.steps, arguments.ranks)], DIGITS, percent=False)))
        return
    if arguments.memory:
        rows = memory(arguments.folder, arguments.model, arguments.memory, arguments.ranks, arguments.whole)
        print(markdown(spreads([rows], DIGITS, percent=False)))
        return
    kinds: dict[str, dict[str, Any] | None] = {"whole": None}
    more = yaml.safe_load(arguments.adapter)
    also = "".join(f", {key} {value}" for key, value in more.items())
    kinds |= {f"LoRA, rank {rank}{also}": {"rank": rank, **more} for rank in arguments.ranks}
    runs: list[Rows] = []
    for random_seed in arguments.seeds:
        common = arguments.folder / str(random_seed)
        params = parameters(arguments.pairs, arguments.epochs, random_seed)
        prepare(common, params)
        runs.append({})
        for kind, adapter in kinds.items():
            root = branch(common, params, kind, adapter)
            runs[-1][kind] = in_new_process(measure, root)
            print(f"random seed {random_seed}, {kind}: {runs[-1][kind]}", file=sys.stderr, flush=True)
    print(markdown(spreads(runs, DIGITS, percent=False)))


def parameters(pairs: int, epochs: int, random_seed: int) -> dict[str, Any]:
    """Those of the demo, with fewer pairs and epochs."""
    params: dict[str, Any] = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    params["random_seed"] = random_seed
    params["glyphs"]["pairs"] = pairs
    params["training"] |= {"epochs": epochs, "seed_epochs": epochs * 4 // 5}
    return params


def prepare(root: Path, params: dict[str, Any]) -> None:
    """Data, clusters, the seed and the dense model, in `root`; what is there is kept."""
    if not (root / "models/seed").is_dir():
        for stage in ("data base", "tasks", "index base", "embedder", "embed base", "cluster base", "assign base"):
            run_stage(root, params, *stage.split())
    for model in SHARED:
        if not (root / "models" / model).is_dir():
            run_stage(root, params, model)


def branch(common: Path, params: dict[str, Any], kind: str, adapter: dict[str, Any] | None) -> Path:
    """A project with data, seed and dense model of `common`, and its own experts, ensemble and figures."""
    root = common / kind.replace(", ", "-").replace(" ", "-")
    if (root / "reports/metrics.json").is_file():
        return root
    params = {**params, "training": {**params["training"], "adapter": adapter}}
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "models/seed").is_dir():
        (root / "data").symlink_to((common / "data").resolve())
        for model in SHARED:
            shutil.copytree(common / "models" / model, root / "models" / model)
    for expert in params["experts"]:
        if not (root / "models" / expert).is_dir():
            run_stage(root, params, "expert", expert)
    for stage in ("ensemble", "evaluate"):
        run_stage(root, params, stage)
    return root


def run_stage(root: Path, params: dict[str, Any], name: str, key: str | None = None) -> None:
    """One stage of the pipeline, in this process."""
    from mode.stages import run_stage as run

    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    shutil.copy(REPOSITORY / "leakage.json", root)
    run(name, key, root.resolve(), root / "params.yaml")


def measure(root: Path) -> Row:
    """Figures of a finished project."""
    import torch

    from mode.clip.model import folded, load_model

    models = figures(Results.load(root / "reports/metrics.json"))
    experts = [name for name in models if role_of(name) is EXPERT]
    row = {name: 100 * models[name]["zero-shot"] for name in ("seed", "dense", "ensemble", "uniform")}
    row["an expert"] = 100 * mean_row([models[name] for name in experts])["zero-shot"]
    row |= merged(root, ["weights"] if load_model(root / "models" / experts[0]).adapter is None else [*MERGES])
    cards = [json.loads((root / "models" / name / "card.json").read_text()) for name in experts]
    row["KB on disk"] = statistics.fmean(size_of(root / "models" / name) / 1e3 for name in experts)
    row["training, samples/s"] = statistics.fmean(
        card["own"]["samples_seen"] / card["own"]["seconds"] for card in cards
    )
    clip = load_model(root / "models" / experts[0])
    pixels = torch.rand(BATCH, 3, clip.preprocess_cfg["size"], clip.preprocess_cfg["size"])
    for head, each in (("images/s", clip), ("images/s, folded", folded(clip))):
        network = each.model.eval()
        with torch.inference_mode():
            network.encode_image(pixels)
            seconds, _ = cpu_seconds(lambda: [network.encode_image(pixels) for _ in range(BATCHES)])  # noqa: B023
        row[head] = BATCH * BATCHES / seconds
    return row


def merged(root: Path, merges: list[str]) -> Row:
    """Zero-shot accuracies of the experts merged into one model for each task, in percent."""
    import mode
    from mode.clip.preprocess import Preprocess
    from mode.evaluation.tasks import open_tasks

    ensemble = mode.load(root / "models", device="cpu")
    preprocess = Preprocess(next(iter(ensemble.clips.values())))
    tasks = open_tasks([root / task for task in json.loads((root / "data/tasks/tasks.json").read_text())])
    tasks = [task for task in tasks if task.kind != "retrieval"]
    inputs = {task.name: preprocess.normalise(pixels_of(task, preprocess)) for task in tasks}
    return {MERGES[each]: of_variant(ensemble, tasks, inputs, {"merge": each})["zero-shot"] for each in merges}


def memory(folder: Path, model: str, adapters: int, ranks: list[int], whole: int) -> Rows:
    """Resident memory of one process that opens models, more than before it opened any; and all their files."""
    models = folder / "models"
    in_new_process(write_models, models, model, adapters, ranks)
    opened = {"1 whole model": ["seed"], f"{whole} whole models": ["seed"] * whole}
    opened |= {
        f"{adapters} adapters of rank {rank}": [f"rank-{rank}-{number}" for number in range(adapters)] for rank in ranks
    }
    rows: Rows = {}
    for kind, names in opened.items():
        used = in_new_process(resident, models, names, kind.endswith("whole models"))
        rows[kind] = {"MB in memory": used, "MB on disk": sum(size_of(models / name) for name in names) / 1e6}
    return rows


def steps(name: str, pairs: int, ranks: list[int]) -> Rows:
    """Samples/s in the fastest of some steps of a model, and of its adapters with what they save."""
    import torch
    from open_clip.loss import ClipLoss

    from mode.clip.model import adapted, build_model
    from mode.params import AdapterParams
    from mode.training.card import flops_per_pair

    model, image = model_params(name)
    words = [f"word{number} of a caption" for number in range(model.vocabulary)]
    rows: Rows = {}
    for rank in (None, *ranks):
        clip = build_model(model, image, words, 0)
        if rank is not None:
            clip = adapted(clip, AdapterParams(rank=rank), "seed", "0" * 64, 0)
        network, loss = clip.model.train(), ClipLoss()
        optimizer = torch.optim.AdamW([each for each in network.parameters() if each.requires_grad])
        pixels, tokens = torch.randn(pairs, 3, image.size, image.size), clip.tokenizer(words[:pairs])

        def step() -> None:
            loss(**network(pixels, tokens)).backward()  # noqa: B023
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023

        step()
        rate, flops = pairs / min(cpu_seconds(step)[0] for _ in range(STEPS)), flops_per_pair(clip)
        if rank is None:
            whole_rate, whole_flops = rate, flops
        rows["whole" if rank is None else f"adapter of rank {rank}"] = {
            "steps, samples/s": rate,
            "times as fast": rate / whole_rate,
            "by operations": whole_flops / flops,
        }
    return rows


def write_models(folder: Path, model: str, adapters: int, ranks: list[int]) -> None:
    """A model with random weights, and adapters of it whose deltas are random; what is there is kept."""
    import torch

    from mode.clip.folder import WEIGHTS
    from mode.clip.model import adapted, build_model, load_model, save_model
    from mode.files import sha256_of
    from mode.params import AdapterParams, ImageParams, ModelParams

    if not (folder / "seed").is_dir():
        save_model(folder / "seed", build_model(ModelParams(name=model), ImageParams(), None, 0), {})
    for rank in ranks:
        if (folder / f"rank-{rank}-{adapters - 1}").is_dir():
            continue
        digest = sha256_of(folder / "seed" / WEIGHTS)
        clip = adapted(load_model(folder / "seed"), AdapterParams(rank=rank), "seed", digest, 0)
        for number in range(adapters):
            with torch.no_grad():
                for name, parameter in clip.model.named_parameters():
                    if ".lora_B." in name:
                        parameter.normal_(std=1e-3)
            save_model(folder / f"rank-{rank}-{number}", clip, {})


def resident(folder: Path, names: list[str], apart: bool) -> float:
    """MB that models take once they are open, and have encoded an image; `apart`: each by itself."""
    import gc

    import peft  # noqa: F401  # so that libraries are in memory before
    import torch

    from benchmarks.harness import resident_mb
    from mode.clip.model import Clip, load_model, load_models

    before = resident_mb()
    clips: list[Clip] = (
        [load_model(folder / name) for name in names]
        if apart
        else list(load_models({name: folder / name for name in names}).values())
    )
    with torch.inference_mode():
        for clip in clips:
            clip.model.eval().encode_image(torch.rand(1, 3, 224, 224))
    gc.collect()
    return resident_mb() - before


def in_new_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Call it in a process that has done nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
