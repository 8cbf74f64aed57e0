"""The training loop: one for seed, dense models and experts.

Every random choice (which pair comes next, how an image is shifted, dropout) is a function of the seed and the
position, so that a training continued from a checkpoint goes through the same states, bit by bit on a CPU, as one that
was never interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from mode.clip.encode import takes_short_texts, without_padding
from mode.clip.model import WEIGHTS, Clip, build_model, load_model, write_model_files
from mode.data.loading.loader import Batch, ImageStore, PairStream, augment_batch, make_loader, normalise
from mode.data.shards.index import PairIndex
from mode.errors import ModeError
from mode.files import sha256_of, write_aside
from mode.params import ImageParams, MachineParams, ModelParams, TrainingParams
from mode.progress import Progress
from mode.training.checkpoint import (
    BRANCH_STATE,
    CHECKPOINT,
    RunState,
    load_branch_state,
    load_checkpoint,
    save_branch_state,
    save_checkpoint,
)
from mode.training.distribution import Group, process_group
from mode.training.flops import flops_per_pair
from mode.training.interruption import Interrupted, Interruption
from mode.training.objective import Towers, backward
from mode.training.plan import TrainPlan

#: Steps whose mean loss a card gives.
RECENT_STEPS = 100

Metrics = Callable[[int, dict[str, float]], None]


@dataclass
class TrainResult:
    """A trained model.

    Attributes:
        clip: with its card; in the first of several processes only, the others get the same weights without a card.
        plan: what was trained.
        optimizer: AdamW as training left it.
        checkpoint: the file to remove once the model is in place.
        leads: whether this process is the one that saves.
    """

    clip: Clip
    plan: TrainPlan
    optimizer: AdamW
    checkpoint: Path
    leads: bool

    def save(self, folder: Path) -> None:
        """Write the model folder, with the seed's `branch_state.safetensors`, and drop the checkpoint."""
        if not self.leads:
            return
        with write_aside(folder) as temporary:
            write_model_files(temporary, self.clip, self.clip.card)
            if self.plan.role == "seed":
                save_branch_state(temporary / BRANCH_STATE, self.clip.model, self.optimizer, self.plan.last_step)
        self.checkpoint.unlink(missing_ok=True)


def train(
    plan: TrainPlan,
    index: PairIndex,
    root: Path,
    *,
    model: ModelParams,
    image: ImageParams,
    training: TrainingParams,
    machine: MachineParams,
    random_seed: int,
    checkpoint_dir: Path,
    on_metrics: Metrics | None = None,
    log_every: int = 20,
) -> TrainResult:
    """Train one model, or go on with it where an interrupted run of the same configuration left off.

    Under `torchrun` each process takes its share of every batch, and all contrast with the whole of it.

    Args:
        plan: from `make_plan`.
        index: the pairs.
        root: what relative paths of shards are relative to.
        model: used where there is no parent to take the model from.
        image, training: the recipe.
        machine: where and how fast; it may change between checkpoint and continuation.
        random_seed: of weights, order of samples and augmentation.
        checkpoint_dir: holds `checkpoint.safetensors` while the training is unfinished.
        on_metrics: called with the step and figures: `train/loss` (mean since the last call), `train/lr`,
            `train/grad_norm`, `train/logit_scale`, `train/samples_per_second`, `train/data_wait` (share of the time
            that steps waited for data) and `train/bad_images`.
        log_every: steps between two calls.

    Raises:
        ModeError: the loss became NaN or infinite; a checkpoint or seed of another configuration; a batch that the
            processes cannot share; a device that is not there.
        Interrupted: SIGTERM or SIGINT came; the checkpoint is written.
    """
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    checkpoint = checkpoint_dir / CHECKPOINT

    group = process_group(machine.device)
    with Interruption() as interruption:
        if plan.batch_size % (group.world * training.accumulate):
            raise ModeError(
                f"training.batch_size ({plan.batch_size}) is not a multiple of processes x accumulate"
                f" ({group.world} x {training.accumulate})"
            )

        # The model and its optimiser, as new, as the seed left them, or as the checkpoint has them.
        clip = _first_model(plan, index, model, image, training, random_seed)
        clip.model = _placed(clip.model, group)
        optimizer = _adamw(clip.model, training)
        fingerprint = configuration_hash(plan, index, model, image, training, random_seed)
        state = RunState(step=plan.first_step)
        if checkpoint.is_file():
            state = load_checkpoint(checkpoint, clip.model, optimizer, fingerprint)
        elif plan.parent is not None:
            load_branch_state(plan.parent / BRANCH_STATE, clip.model, optimizer, plan.first_step)
        if not group.agree(state.step, int(fingerprint[:8], 16)):
            raise ModeError(
                f"{plan.name}: the {group.world} processes do not begin with the same data, parameters or checkpoint",
                "all machines have to see the same project folder",
            )
        towers: nn.Module = Towers(clip.model)
        if group.world > 1:
            towers = DistributedDataParallel(towers)
        if training.compile:
            # Texts are cut to the longest of a batch: one program for all lengths instead of one for each.
            towers.compile(dynamic=True)
        loss = ClipLoss(
            local_loss=True, gather_with_grad=True, cache_labels=True, rank=group.rank, world_size=group.world
        )

        # The data, from the position of the next step.
        store = ImageStore(index, root, image, machine.cache_mb, plan.rows)
        batches = make_loader(
            store,
            PairStream(plan.rows, index.image[plan.rows], random_seed),
            start=plan.position(state.step),
            stop=plan.stream_stop,
            batch_size=plan.batch_size,
            workers=machine.workers,
            rank=group.rank,
            world=group.world,
        )
        captions = _Tokens(index, clip, machine.cache_mb)
        dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
        clip.model.train()

        seconds_before, bad_before = state.seconds, state.bad_images
        started = last_checkpoint = last_report = time.monotonic()
        waited, norm = 0.0, torch.zeros(())
        pending: list[Tensor] = []  # losses not yet looked at: a look waits for the GPU
        done = (state.step - plan.first_step) * plan.batch_size
        with _bar(plan, group, done) as bar:
            while state.step < plan.last_step:
                asked = time.monotonic()
                batch = next(batches)
                tokens = captions.of(batch.rows)
                images = _prepared(batch, group, image, random_seed, dtype)
                waited += time.monotonic() - asked

                rate = plan.schedule.rate(state.step)
                for parameters in optimizer.param_groups:
                    parameters["lr"] = rate
                pending.append(
                    backward(
                        towers,
                        loss,
                        images,
                        tokens.to(group.device, non_blocking=True),
                        training.accumulate,
                        autocast=_autocast(training.precision, group),
                        reseed=_reseeding(random_seed, state.step, group),
                    )
                )
                if training.clip_norm is not None:
                    norm = nn.utils.clip_grad_norm_(clip.model.parameters(), training.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():  # as in the CLIP paper, section 2.5
                    clip.model.logit_scale.clamp_(0, math.log(100))

                state.step += 1
                state.seconds = seconds_before + time.monotonic() - started
                state.bad_images = bad_before + store.bad
                bar.update(plan.batch_size)

                due = group.leads and time.monotonic() - last_checkpoint > machine.checkpoint_minutes * 60
                stop, due = group.any(interruption.signal is not None, due)
                report = state.step % log_every == 0 or state.step == plan.last_step
                if stop or due or report:
                    _look_at_losses(pending, state, group, rate, checkpoint)
                if report:
                    now = time.monotonic()
                    figures = {
                        "train/loss": sum(state.losses) / len(state.losses),
                        "train/lr": rate,
                        "train/grad_norm": float(norm),
                        "train/logit_scale": float(clip.model.logit_scale.detach().exp()),
                        "train/samples_per_second": bar.rate,
                        "train/data_wait": waited / max(now - last_report, 1e-9),
                        "train/bad_images": float(state.bad_images),
                    }
                    bar.update(0, loss=figures["train/loss"], wait=f"{figures['train/data_wait']:.0%}")
                    if on_metrics is not None and group.leads:
                        on_metrics(state.step, figures)
                    state.losses, waited, last_report = [], 0.0, now
                if stop or due:
                    if group.leads:
                        _refuse_broken(clip.model, state, rate, checkpoint)
                        save_checkpoint(checkpoint, clip.model, optimizer, state, fingerprint)
                    last_checkpoint = time.monotonic()
                if stop:
                    group.wait()  # for the checkpoint: torchrun stops all when one has ended
                    raise Interrupted(
                        interruption.signal or 15,
                        f"{plan.name}: stopped after step {state.step:,} of {plan.last_step:,};"
                        f" the next run goes on from {checkpoint}",
                    )

        _refuse_broken(clip.model, state, plan.schedule.rate(plan.last_step - 1), checkpoint)
        clip.model.eval()
        clip.card = _card(plan, clip, state, group, fingerprint, training)
        return TrainResult(clip, plan, optimizer, checkpoint, group.leads)


def configuration_hash(
    plan: TrainPlan,
    index: PairIndex,
    model: ModelParams,
    image: ImageParams,
    training: TrainingParams,
    random_seed: int,
) -> str:
    """SHA-256 of all that decides what a training computes: data, plan, model, recipe, seed, parent's weights."""
    digest = hashlib.sha256()
    content = {
        "role": plan.role,
        "steps": [plan.first_step, plan.last_step],
        "stream_start": plan.stream_start,
        "schedule": vars(plan.schedule),
        "model": model.model_dump(),
        "image": image.model_dump(),
        "training": training.model_dump(),
        "random_seed": random_seed,
        "parent": sha256_of(plan.parent / WEIGHTS) if plan.parent is not None else None,
    }
    digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    arrays: list[NDArray[Any]] = [plan.rows, index.image, index.offset, index.length]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _first_model(
    plan: TrainPlan,
    index: PairIndex,
    model: ModelParams,
    image: ImageParams,
    training: TrainingParams,
    random_seed: int,
) -> Clip:
    """The parent's model, or a new one."""
    if plan.parent is not None:
        return load_model(plan.parent, precision=training.precision)
    captions = (caption for block in index.iter_captions(65_536) for caption in block)
    return build_model(model, image, captions, random_seed, training.precision)


def _placed(model: open_clip.CLIP, group: Group) -> open_clip.CLIP:
    """The model on its device, convolutions in the memory layout that is fastest for them."""
    visual = model.visual
    if sum(isinstance(module, nn.Conv2d) for module in visual.modules()) > 1:  # more than a ViT's patch embedding
        visual.to(memory_format=torch.channels_last)
    if group.world > 1 and group.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return model.to(group.device)


def _adamw(model: nn.Module, training: TrainingParams) -> AdamW:
    """AdamW; gains, biases and the logit scale are not decayed, as in open_clip."""
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    return AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": training.weight_decay}],
        lr=training.lr,
        betas=training.betas,
        eps=training.eps,
        fused=True,
    )


def _autocast(precision: str, group: Group) -> Callable[[], AbstractContextManager[object]]:
    if precision == "amp":
        return lambda: torch.autocast(group.device.type, dtype=torch.bfloat16)
    return nullcontext


def _reseeding(random_seed: int, step: int, group: Group) -> Callable[[int], None]:
    """Dropout of one forward pass as a function of seed, step, process and pass: there is no state to save."""

    def reseed(number: int) -> None:
        words = np.random.SeedSequence([random_seed, step, group.rank, number]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]))

    return reseed


class _Tokens:
    """Token ids of rows, each tokenised once where all fit into `cache_mb`."""

    def __init__(self, index: PairIndex, clip: Clip, cache_mb: int) -> None:
        self._index, self._tokenizer = index, clip.tokenizer
        self._cut: Callable[[Tensor], Tensor] = (
            without_padding if takes_short_texts(clip.model) else lambda tokens: tokens
        )
        context = clip.tokenizer([""]).shape[1]
        fits = len(index) * (context * 4 + 1) <= cache_mb * 2**20
        self._ids = np.zeros((len(index) if fits else 0, context), dtype=np.int32)
        self._known = np.zeros(len(self._ids), dtype=bool)

    def of(self, rows: NDArray[np.int64]) -> Tensor:
        """int64 [rows, tokens], cut after the longest text where the model allows it."""
        if not len(self._ids):
            return self._cut(self._tokenizer(self._index.captions(rows)))
        new = np.unique(rows[~self._known[rows]])
        if len(new):
            self._ids[new] = self._tokenizer(self._index.captions(new)).numpy()
            self._known[new] = True
        return self._cut(torch.from_numpy(self._ids[rows]).long())


def _prepared(batch: Batch, group: Group, image: ImageParams, random_seed: int, dtype: torch.dtype) -> Tensor:
    """Augmented, normalised images on the device, [b, 3, S, S]."""
    images = batch.images.to(group.device, non_blocking=True)
    images = augment_batch(images, image, random_seed=random_seed, position=batch.first)
    return normalise(images, image, dtype=dtype)


def _look_at_losses(pending: list[Tensor], state: RunState, group: Group, rate: float, checkpoint: Path) -> None:
    """Move the losses of the last steps into `state`, as means over the processes.

    Raises:
        ModeError: one is NaN or infinite.
    """
    if not pending:
        return
    values = group.mean(torch.stack(pending)).tolist()
    for number, value in enumerate(values):
        if not math.isfinite(value):
            _stop_learning(f"loss is {value}", state.step - len(values) + number, rate, checkpoint)
    pending.clear()
    state.losses += values
    state.recent = (state.recent + values)[-RECENT_STEPS:]


def _refuse_broken(model: nn.Module, state: RunState, rate: float, checkpoint: Path) -> None:
    """Weights that are NaN or infinite must not replace a good checkpoint."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        _stop_learning("weights are not finite", state.step - 1, rate, checkpoint)


def _stop_learning(what: str, step: int, rate: float, checkpoint: Path) -> None:
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint.is_file() else "there was no checkpoint yet"
    raise ModeError(
        f"training failed at step {step:,}: {what} at learning rate {rate:.3g}; {kept}",
        "lower training.lr, lengthen training.warmup or set training.clip_norm",
    )


@dataclass
class _NoBar:
    """What the other processes show."""

    rate: float = 0.0

    def update(self, count: int = 1, **figures: float | str) -> None:
        """Nothing."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def _bar(plan: TrainPlan, group: Group, done: int) -> Progress | _NoBar:
    return Progress(plan.name, total=plan.samples, unit="samples", done=done) if group.leads else _NoBar()


def _card(
    plan: TrainPlan, clip: Clip, state: RunState, group: Group, fingerprint: str, training: TrainingParams
) -> dict[str, Any]:
    """What the model was trained on and what it cost: itself, and with the seed that it branched from."""
    parent = clip.card
    own = {
        "samples_seen": plan.samples,
        "flops": plan.samples * flops_per_pair(clip),
        "seconds": round(state.seconds, 3),
    }
    return {
        "name": plan.name,
        "role": plan.role,
        "source": plan.source,
        "cluster": plan.cluster,
        "parent": parent.get("name") if plan.parent is not None else None,
        "pairs": len(plan.rows),
        "steps": [plan.first_step, plan.last_step],
        "own": own,
        "total": {key: value + parent.get("total", {}).get(key, 0) for key, value in own.items()},
        "loss": sum(state.recent) / len(state.recent),
        "parameters": sum(parameter.numel() for parameter in clip.model.parameters()),
        "bad_images": state.bad_images,
        "provenance": {
            "configuration": fingerprint,
            "batch_size": plan.batch_size,
            "precision": training.precision,
            "processes": group.world,
            "device": torch.cuda.get_device_name(group.device) if group.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "open_clip_torch", "mode-clip")},
        },
    }
