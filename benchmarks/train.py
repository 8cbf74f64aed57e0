"""Training: samples per second against open_clip's own training loop, on the same shards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import Input, Race, Run, Side, Target, faster
from benchmarks.pictures import captions, make_pictures, photographs, write_tars

Precision = Literal["fp32", "bf16", "amp"]
OURS, COMPILED, THEIRS = "mode", "mode, compiled", "open_clip_train"
#: The demo's model: an image of 32 x 32, 1.5 M parameters.
DEMO = Path(__file__).parents[1] / "params.yaml"
#: What a recipe sets to a number that does not matter here.
_LR = 1e-4


def _make_glyphs(given: Input) -> None:
    from mode.data.glyphs.dataset import write_glyph_shards
    from mode.params import GlyphParams

    pairs = 64 if given.size == "quick" else 5_120
    write_glyph_shards(
        GlyphParams(pairs=pairs, shard_pairs=pairs // 2), given.folder / "shards", random_seed=0, workers=1
    )
    _index(given)


def _make_pictures(given: Input) -> None:
    count = 16 if given.size == "quick" else 32 if given.device == "cpu" else 20_000
    images = photographs(given.photos, 2_000) if given.photos else make_pictures(min(count, 256))
    write_tars(given.folder / "shards", images, captions(count), max(1, count // 16))
    _index(given)


def _index(given: Input) -> None:
    from mode.data.shards.index import build_index
    from mode.data.shards.manifest import build_manifest
    from mode.params import IndexParams, SourceParams

    manifest = build_manifest(SourceParams(shards="shards"), given.folder)
    build_index(manifest, given.folder, given.folder / "index", IndexParams(check_images=False), workers=1)


def _recipe(model: str, batch: int, samples: int, precision: Precision, workers: int, device: str) -> Any:
    """Parameters of model, image, training and machine: one pass over `samples` pairs, no image seen twice."""
    from mode.params import ImageParams, MachineParams, ModelParams, TrainingParams, load_params

    demo = load_params(DEMO)
    training = TrainingParams(
        epoch_samples=samples,
        epochs=2,
        seed_epochs=1,
        batch_size=batch,
        lr=_LR,
        warmup=0,
        precision=precision,
    )
    machine = MachineParams(workers=workers, device=device, checkpoint_minutes=1_000.0)
    if model == "demo":
        return demo.model, demo.image, training, machine
    return ModelParams(name=model), ImageParams(size=224), training, machine


def _ours(
    given: Input,
    model: str,
    batch: int,
    steps: int,
    precision: Precision,
    workers: int,
    compiled: bool = False,
    steady: bool = False,
) -> Run:
    """One training; `steady`: timed from its first report on (step 20), when all compiling is over."""
    import time

    from mode.processes import use_huge_pages

    use_huge_pages()  # as every command of `mode` does
    import numpy as np
    import torch

    from mode.data.shards.index import PairIndex
    from mode.roles import SEED
    from mode.training.flops import flops_per_pair
    from mode.training.loop import train
    from mode.training.plan import Training, make_plan

    if given.size == "quick":
        batch, steps = 8, 2
    index = PairIndex.load(given.folder / "index")
    model_params, image, recipe, machine = _recipe(model, batch, batch * steps, precision, workers, given.device)
    recipe = recipe.model_copy(update={"compile": compiled})
    rows = np.arange(len(index))
    plan = make_plan(SEED, rows, recipe, len(index))
    training = Training(plan, index, model_params, image, recipe, random_seed=0)
    waits: list[float] = []
    reports: list[tuple[int, float]] = []  # step, time

    def report(step: int, figures: dict[str, float]) -> None:
        waits.append(figures["train/data_wait"])
        reports.append((step, time.perf_counter()))

    def run() -> dict[str, Any]:
        reports.clear()
        result = train(
            training,
            given.folder,
            machine=machine,
            checkpoint_dir=given.folder / "checkpoints",
            on_metrics=report,
        )
        seconds, samples = result.clip.card["own"]["seconds"], plan.samples
        if steady:
            seconds, samples = reports[-1][1] - reports[0][1], (reports[-1][0] - reports[0][0]) * batch
        flops = flops_per_pair(result.clip)
        figures = {
            "seconds": seconds,
            "samples_per_second": samples / seconds,
            "loss": result.clip.card["loss"],
            "gflop_per_pair": flops / 1e9,
            "gflop_per_second": flops * samples / seconds / 1e9,
            "data_wait": waits[-1],
        }
        if given.device == "cuda":
            figures["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            figures["utilisation"] = flops * samples / seconds / _peak_flops()
        return figures

    return run


def _theirs(given: Input, model: str, batch: int, steps: int, precision: Precision, workers: int) -> Run:
    """`open_clip_train`: its arguments, its webdataset pipeline, its `train_one_epoch`; the optimiser of its main."""
    import multiprocessing

    import open_clip
    import open_clip_train.data
    import torch
    from open_clip_train.data import get_wds_dataset
    from open_clip_train.params import parse_args
    from open_clip_train.scheduler import const_lr
    from open_clip_train.train import train_one_epoch

    from mode.clip.model import build_model, save_model
    from mode.data.shards.index import PairIndex

    multiprocessing.set_start_method("fork", force=True)  # Linux's default, which its loader's workers rely on
    logging.disable(logging.WARNING)
    # webdataset 1.0 marks the end of a tar by an empty sample, which open_clip 3.3 does not expect.
    expander = open_clip_train.data.tar_file_expander
    open_clip_train.data.tar_file_expander = partial(expander, eof_value=None)
    if given.size == "quick":
        batch, steps = 8, 2
    model_params, image, _, _ = _recipe(model, batch, batch * steps, precision, workers, given.device)
    index = PairIndex.load(given.folder / "index")
    texts = (caption for block in index.iter_captions() for caption in block)
    folder = given.folder / f"model-{model}"
    save_model(folder, build_model(model_params, image, texts, random_seed=0), {})
    shards = sorted((given.folder / "shards").glob("*.tar"))
    args = parse_args(
        [
            *("--train-data", "{" + ",".join(map(str, shards)) + "}", "--dataset-type", "webdataset"),
            *("--train-num-samples", str(batch * steps), "--batch-size", str(batch), "--workers", str(workers)),
            *("--precision", precision, "--grad-clip-norm", "1.0", "--lr", str(_LR), "--log-every-n-steps", "20"),
        ]
    )
    # What its main sets after parsing.
    for name, value in {
        **{"device": given.device, "rank": 0, "world_size": 1, "local_rank": 0},
        **{"distributed": False, "distill": False, "wandb": False, "tensorboard": False},
    }.items():
        setattr(args, name, value)

    def run() -> dict[str, Any]:
        network, _, preprocess = open_clip.create_model_and_transforms(
            f"local-dir:{folder}", precision=precision, device=given.device, output_dict=True
        )
        plain = [p for p in network.parameters() if p.ndim < 2]
        decayed = [p for p in network.parameters() if p.ndim >= 2]
        optimizer = torch.optim.AdamW(
            [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}],
            lr=args.lr,
            betas=(0.9, 0.98),
            eps=1e-6,
        )
        # Its inference transform, which is the cheaper one: random crops would have it do more than we do.
        data = {
            "train": get_wds_dataset(args, preprocess, True, tokenizer=open_clip.get_tokenizer(f"local-dir:{folder}"))
        }
        loss = open_clip.ClipLoss(cache_labels=True)
        losses = _Losses(loss)
        scheduler: Callable[[int], None] = const_lr(optimizer, args.lr, 0, steps)
        import time

        started = time.perf_counter()
        train_one_epoch(network, data, losses, 0, optimizer, None, scheduler, None, args)
        if given.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "samples_per_second": batch * steps / seconds,
            "loss": float(torch.stack(losses.seen).mean()),
        }

    return run


class _Losses:
    """open_clip's loss, and what it gave."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self.seen: list[Any] = []

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        found = self.loss(*arguments, **named)
        self.seen.append(next(iter(found.values())).detach().cpu())
        return found


def _peak_flops() -> float:
    """Dense bfloat16 operations a second of the GPU, as its maker states them; of others, as a large GEMM has them."""
    import time

    import torch

    stated = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}
    name = torch.cuda.get_device_name()
    for known, flops in stated.items():
        if known in name:
            return flops
    a, b = (torch.randn(8_192, 8_192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for rounds in (3, 20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(rounds):
            a @ b
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return 2 * 8_192**3 * 20 / seconds


def _inputs(model: str, gpu: bool) -> dict[str, Any]:
    """Pairs to train on: glyphs for the demo's model, pictures for the others, more of them on a GPU."""
    if model == "demo":
        return {"make": _make_glyphs, "inputs": "train-glyphs", "needs_gpu": gpu}
    return {"make": _make_pictures, "inputs": "train-pictures" + ("-gpu" if gpu else ""), "needs_gpu": gpu}


def _race(name: str, step: str, goal: float, *, gpu: bool = False, **settings: Any) -> Race:
    targets = [Target(f"at least {goal}x open_clip_train", faster(OURS, THEIRS), goal)]
    if gpu:
        targets += [
            Target("model FLOP utilisation at least 0.45", lambda sides: sides[OURS].figures["utilisation"], 0.45),
            Target(
                "waits for data less than 5% of the time", lambda sides: sides[OURS].figures["data_wait"], 0.05, True
            ),
        ]
    return Race(
        name=name,
        step=step,
        sides=(Side(OURS, partial(_ours, **settings)), Side(THEIRS, partial(_theirs, **settings))),
        targets=tuple(targets),
        **_inputs(settings["model"], gpu),
        sizes=("full", "large") if settings["model"] != "demo" else ("quick", "full", "large"),
        notes="one pass over the pairs, every image decoded; loading the model is not timed",
    )


def _compile_race(name: str, step: str, *, gpu: bool = False, **settings: Any) -> Race:
    """What `torch.compile` brings; no speed is asked for."""
    return Race(
        name=name,
        step=step,
        sides=(
            Side(OURS, partial(_ours, **settings, steady=True)),
            Side(COMPILED, partial(_ours, **settings, compiled=True, steady=True)),
        ),
        targets=(
            Target(
                "the same loss within 1%",
                lambda sides: abs(sides[COMPILED].figures["loss"] / sides[OURS].figures["loss"] - 1),
                0.01,
                at_most=True,
            ),
        ),
        **_inputs(settings["model"], gpu),
        sizes=("full", "large"),
        notes="timed from step 20 on, when all compiling is over",
    )


_DEMO: dict[str, Any] = {"model": "demo", "batch": 128, "precision": "fp32", "workers": 0}
_VIT_ON_GPU: dict[str, Any] = {"gpu": True, "model": "ViT-B-32", "batch": 1_024, "precision": "bf16", "workers": 12}

RACES = (
    _race(
        "train-demo",
        "train the demo's model, batch 128, fp32, 0 workers, 40 steps",
        1.3,
        steps=40,
        **_DEMO,
    ),
    _race(
        "train-vit-b-32",
        "train ViT-B/32 at 224, batch 16, fp32, 2 workers, 2 steps",
        1.0,
        model="ViT-B-32",
        batch=16,
        steps=2,
        precision="fp32",
        workers=2,
    ),
    _race(
        "train-vit-b-32-gpu",
        "train ViT-B/32 at 224 on a GPU, batch 1,024, bf16, 12 workers, 40 steps",
        1.2,
        steps=40,
        **_VIT_ON_GPU,
    ),
    _race(
        "train-vit-b-16-gpu",
        "train ViT-B/16 at 224 on a GPU, batch 512, bf16, 12 workers, 40 steps",
        1.2,
        gpu=True,
        model="ViT-B-16",
        batch=512,
        steps=40,
        precision="bf16",
        workers=12,
    ),
    _compile_race(
        "train-compile",
        "the demo's model with and without torch.compile, batch 128, fp32, 0 workers, 100 steps",
        steps=100,
        **_DEMO,
    ),
    _compile_race(
        "train-compile-gpu",
        "ViT-B/32 on a GPU with and without torch.compile, batch 1,024, bf16, 12 workers, 100 steps",
        steps=100,
        **_VIT_ON_GPU,
    ),
)
