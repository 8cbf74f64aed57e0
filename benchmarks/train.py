"""Training: samples per second against open_clip's own training loop, on the same shards."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from benchmarks.harness import Input, Prepare, Race, Run, Target, faster, figure
from benchmarks.inputs import index_shards, make_shards, model_params

#: Steps after which open_clip's loop has looked at its first two losses.
_SETTLED = 21
OURS, COMPILED, THEIRS = "mode", "mode, compiled", "open_clip_train"
#: What a recipe sets to a number that does not matter here.
_LR = 1e-4


@dataclass(frozen=True)
class Setting:
    """What both sides train: one pass, no image seen twice. `model`: see `model_params`."""

    model: str
    batch: int
    steps: int
    precision: Literal["fp32", "bf16", "amp"] = "fp32"
    workers: int = 0
    gpu: bool = False

    @property
    def samples(self) -> int:
        """Pairs of the pass."""
        return self.batch * self.steps

    def at(self, size: str) -> Setting:
        """The same, or a tiny one to see whether it works."""
        return replace(self, batch=8, steps=2) if size == "quick" else self


def _make_glyphs(given: Input) -> None:
    from mode.data.glyphs.dataset import write_glyph_shards
    from mode.params import GlyphParams

    pairs = 64 if given.size == "quick" else 5_120
    params = GlyphParams(pairs=pairs, shard_pairs=pairs // 2)
    write_glyph_shards(params, given.folder / "shards", random_seed=0, workers=1)
    index_shards(given.folder)


def _make_pictures(given: Input) -> None:
    count = 32 if given.device == "cpu" else 20_000
    make_shards(given, count, count // 16)
    index_shards(given.folder)


def ours(
    given: Input,
    setting: Setting,
    compiled: bool = False,
    steady: bool = False,
    decode: Literal["fast", "exact", "gpu"] = "fast",
) -> Run:
    """One training; `steady`: timed from its first report on (step 20), when all compiling is over."""
    import numpy as np
    import torch

    from mode.data.loading.selection import Pairs
    from mode.data.shards.index import PairIndex
    from mode.params import MachineParams, TrainingParams
    from mode.processes import use_huge_pages
    from mode.roles import SEED
    from mode.training.card import flops_per_pair
    from mode.training.loop import train
    from mode.training.plan import Training, make_plan

    use_huge_pages()  # as every command of `mode` does
    setting = setting.at(given.size)
    index = PairIndex.load(given.folder / "index")
    model, image = model_params(setting.model)
    image = image.model_copy(update={"decode": decode})
    about: dict[str, Any] = {"batch_size": setting.batch, "precision": setting.precision, "compile": compiled}
    recipe = TrainingParams(epoch_samples=setting.samples, epochs=2, seed_epochs=1, lr=_LR, warmup=0, **about)
    machine = MachineParams(workers=setting.workers, device=given.device, checkpoint_minutes=1_000.0)
    plan = make_plan(SEED, Pairs.of(np.arange(len(index)), index.image), recipe, len(index))
    training = Training(plan, index, model, image, recipe, random_seed=0)
    checkpoints = given.folder / "checkpoints"
    reports: list[tuple[int, float, float]] = []  # step, time, share of it that waits for data

    def report(step: int, figures: dict[str, float]) -> None:
        reports.append((step, time.perf_counter(), figures["train/data_wait"]))

    def run() -> dict[str, Any]:
        reports.clear()
        result = train(training, given.folder, machine=machine, checkpoint_dir=checkpoints, on_metrics=report)
        seconds, samples = result.clip.card["own"]["seconds"], plan.samples
        if steady:
            seconds, samples = reports[-1][1] - reports[0][1], (reports[-1][0] - reports[0][0]) * setting.batch
        flops = flops_per_pair(result.clip)
        figures = {
            "seconds": seconds,
            "samples_per_second": samples / seconds,
            "loss": result.clip.card["loss"],
            "gflop_per_pair": flops / 1e9,
            "gflop_per_second": flops * samples / seconds / 1e9,
            "data_wait": reports[-1][2],
        }
        if len(reports) > 1:  # once workers have started and all is compiled
            after, ends = reports[0], reports[-1]
            figures["samples_per_second_then"] = (ends[0] - after[0]) * setting.batch / (ends[1] - after[1])
        if given.device == "cuda":
            figures["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            figures["utilisation"] = flops * samples / seconds / peak_flops()
        return figures

    return run


def theirs(given: Input, setting: Setting) -> Run:
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
    setting = setting.at(given.size)
    index = PairIndex.load(given.folder / "index")
    texts = (caption for block in index.iter_captions() for caption in block)
    folder = given.folder / f"model-{setting.model}"
    save_model(folder, build_model(*model_params(setting.model), texts, random_seed=0), {})
    shards = sorted((given.folder / "shards").glob("*.tar"))
    command = (
        f"--dataset-type webdataset --train-num-samples {setting.samples} --batch-size {setting.batch}"
        f" --workers {setting.workers} --precision {setting.precision}"
        f" --grad-clip-norm 1.0 --lr {_LR} --log-every-n-steps 20"
    )
    args = parse_args(["--train-data", "{" + ",".join(map(str, shards)) + "}", *command.split()])
    # What its main sets after parsing.
    vars(args).update(device=given.device, rank=0, world_size=1, local_rank=0)
    vars(args).update(dict.fromkeys(("distributed", "distill", "wandb", "tensorboard"), False))
    clip_loss = open_clip.ClipLoss(cache_labels=True)
    losses: list[torch.Tensor] = []
    began: list[float] = []  # each step, about: a GPU computes behind, by no more than a step or two

    def loss(*arguments: Any, **named: Any) -> Any:
        found = clip_loss(*arguments, **named)
        losses.append(next(iter(found.values())).detach())  # on its device: to look at it would be to wait for it
        began.append(time.perf_counter())
        return found

    def run() -> dict[str, Any]:
        losses.clear()
        began.clear()
        network, _, preprocess = open_clip.create_model_and_transforms(
            f"local-dir:{folder}", precision=setting.precision, device=given.device, output_dict=True
        )
        plain = [p for p in network.parameters() if p.ndim < 2]
        decayed = [p for p in network.parameters() if p.ndim >= 2]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
        optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6)
        # Its inference transform, which is the cheaper one: random crops would have it do more than we do.
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        data = {"train": get_wds_dataset(args, preprocess, True, tokenizer=tokenizer)}
        scheduler = const_lr(optimizer, args.lr, 0, setting.steps)
        started = time.perf_counter()
        train_one_epoch(network, data, loss, 0, optimizer, None, scheduler, None, args)
        if given.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        mean_loss = float(torch.stack(losses).mean())
        figures = {"seconds": seconds, "samples_per_second": setting.samples / seconds, "loss": mean_loss}
        if setting.steps > _SETTLED:
            then = started + seconds - began[_SETTLED]
            figures["samples_per_second_then"] = (setting.steps - _SETTLED) * setting.batch / then
        return figures

    return run


def peak_flops() -> float:
    """Dense bfloat16 operations a second of the GPU, as its maker states them; of others, as a large GEMM has them."""
    import torch

    from mode.planning.machines import GPUS, device_called

    name = torch.cuda.get_device_name()
    if gpu := GPUS.get(device_called(name)):
        return gpu.peak_flops_per_second
    stated = {"L40": 181e12, "4090": 165e12}
    return next((flops for known, flops in stated.items() if known in name), None) or matmul_flops()


def matmul_flops() -> float:
    """Operations a second that a large matrix product in bfloat16 reaches on the GPU."""
    import torch

    a, b = (torch.randn(8_192, 8_192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for rounds in (3, 20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(rounds):
            a @ b
        torch.cuda.synchronize()
    return 2 * 8_192**3 * 20 / (time.perf_counter() - started)


def _race(
    name: str, step: str, setting: Setting, sides: Mapping[str, Prepare], targets: tuple[Target, ...], notes: str
) -> Race:
    """Pairs to train on: glyphs for the demo's model, pictures for the others, more of them on a GPU."""
    demo = setting.model == "demo"
    return Race(
        name,
        step,
        sides,
        targets,
        make=_make_glyphs if demo else _make_pictures,
        inputs="train-glyphs" if demo else "train-pictures-gpu" if setting.gpu else "train-pictures",
        needs_gpu=setting.gpu,
        sizes=("quick", "full", "large") if demo else ("full", "large"),
        notes=notes,
    )


def _against_theirs(name: str, step: str, setting: Setting, goal: float) -> Race:
    """Against open_clip's loop."""
    targets = [Target(f"at least {goal}x open_clip_train", faster(OURS, THEIRS), goal)]
    if setting.gpu:
        targets += [
            Target("model FLOP utilisation at least 0.45", figure(OURS, "utilisation"), 0.45),
            Target("waits for data less than 5% of the time", figure(OURS, "data_wait"), 0.05, at_most=True),
        ]
    sides = {OURS: partial(ours, setting=setting), THEIRS: partial(theirs, setting=setting)}
    notes = "one pass over the pairs, every image decoded; loading the model is not timed"
    return _race(name, f"train {step}", setting, sides, tuple(targets), notes)


def _compiled(name: str, step: str, setting: Setting) -> Race:
    """What `torch.compile` brings; no speed is asked for."""
    steadily = partial(ours, setting=setting, steady=True)
    sides = {OURS: steadily, COMPILED: partial(steadily, compiled=True)}
    loss = figure(COMPILED, "loss", over=OURS)
    target = Target("the same loss within 1%", lambda outcomes: abs(loss(outcomes) - 1), 0.01, at_most=True)
    race = _race(name, step, setting, sides, (target,), "timed from step 20 on, when all compiling is over")
    return replace(race, sizes=("full", "large"))


_DEMO = Setting("demo", batch=128, steps=40)
_VIT_B_32 = Setting("ViT-B-32", batch=16, steps=2, workers=2)
_VIT_B_32_ON_GPU = Setting("ViT-B-32", batch=1_024, steps=40, precision="bf16", workers=12, gpu=True)
_VIT_B_16_ON_GPU = replace(_VIT_B_32_ON_GPU, model="ViT-B-16", batch=512)
_ON_GPU = "bf16, 12 workers"

RACES = (
    _against_theirs("train-demo", "the demo's model, batch 128, fp32, 0 workers, 40 steps", _DEMO, 1.3),
    _against_theirs("train-vit-b-32", "ViT-B/32 at 224, batch 16, fp32, 2 workers, 2 steps", _VIT_B_32, 1.0),
    _against_theirs(
        "train-vit-b-32-gpu", f"ViT-B/32 at 224 on a GPU, batch 1,024, {_ON_GPU}, 40 steps", _VIT_B_32_ON_GPU, 1.2
    ),
    _against_theirs(
        "train-vit-b-16-gpu", f"ViT-B/16 at 224 on a GPU, batch 512, {_ON_GPU}, 40 steps", _VIT_B_16_ON_GPU, 1.2
    ),
    _compiled(
        "train-compile",
        "the demo's model with and without torch.compile, batch 128, fp32, 0 workers, 100 steps",
        replace(_DEMO, steps=100),
    ),
    _compiled(
        "train-compile-gpu",
        f"ViT-B/32 on a GPU with and without torch.compile, batch 1,024, {_ON_GPU}, 100 steps",
        replace(_VIT_B_32_ON_GPU, steps=100),
    ),
)
