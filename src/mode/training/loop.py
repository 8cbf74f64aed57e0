"""The training loop: one for seed, dense models and experts.

Every random choice (which pair comes next, how an image is shifted, dropout) is a function of the random seed and the
position, so that a training resumed from a checkpoint goes through the same states, bit by bit on a CPU, as one that
was never interrupted.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from mode.checksums import write_manifest
from mode.clip.model import Clip, write_configuration, write_model_files
from mode.data.loading.loader import NotWaitedFor
from mode.errors import ModeError
from mode.files import write_aside
from mode.params import MachineParams
from mode.paths import CHECKPOINT
from mode.processes import Signals, noting_signals
from mode.progress import Progress
from mode.roles import TRAINED
from mode.training.batches import Batches, Images, told_of_dead_workers
from mode.training.beside import Beside
from mode.training.card import make_card
from mode.training.checkpoint import (
    BRANCH_STATE,
    CONFIGURATION,
    RunState,
    load_branch_state,
    load_checkpoint,
    save_branch_state,
    save_checkpoint,
)
from mode.training.distribution import Group, process_group
from mode.training.learner import Learner, adamw, first_model
from mode.training.plan import Training, TrainPlan
from mode.training.remote import RemoteCheckpoints

log = logging.getLogger(__name__)

#: Share of the time to stop in that checkpoint and last copy may take; the rest is for MLflow's farewell and the end.
_STOPPING = 0.75
#: Steps whose mean loss a card gives.
RECENT_STEPS = 100
#: Share of captions that fill the context above which a training says so.
_MANY_FULL = 0.2

Metrics = Callable[[int, dict[str, float]], None]


class Interrupted(Exception):
    """A training was asked to stop by `number`, SIGTERM or SIGINT, and has left a checkpoint of the steps that it made.

    Attributes:
        exit_code: 143 or 130, as a shell reports a command ended by that signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@dataclass
class TrainResult:
    """A trained model with its card, and AdamW as training left it; of several processes the one that `leads` saves."""

    clip: Clip
    plan: TrainPlan
    optimizer: AdamW
    leads: bool

    def save(self, folder: Path, beside: Mapping[str, str] | None = None) -> None:
        """Write the model folder, with AdamW's moments if other roles branch off from it.

        Args:
            folder: of the model; replaced as a whole.
            beside: more files for it, name -> text.
        """
        if not self.leads:
            return
        with write_aside(folder) as temporary:
            write_model_files(temporary, self.clip, self.clip.card)
            for name, text in (beside or {}).items():
                (temporary / name).write_text(text, encoding="utf-8")
            if any(role.parent == self.plan.role.name for role in TRAINED):
                save_branch_state(temporary / BRANCH_STATE, self.clip.model, self.optimizer, self.plan.last_step)
            write_manifest(temporary)


def train(
    training: Training,
    root: Path,
    machine: MachineParams,
    checkpoint_dir: Path,
    on_metrics: Metrics | None = None,
    log_every: int = 20,
    beside: Sequence[Beside] = (),
    copies: RemoteCheckpoints | None = None,
    images: Images = Images(),  # noqa: B008 (it cannot be changed)
    keep_last: bool = False,
) -> TrainResult:
    """Train one model, or resume it where an interrupted run of the same configuration left off.

    Under `torchrun` each process takes its share of every batch, and every pair is contrasted with the whole batch.

    Args:
        training: what to train.
        root: what relative paths of shards are relative to.
        machine: where and how fast; it may change between checkpoint and continuation.
        checkpoint_dir: holds `checkpoint.safetensors` of a training that was interrupted; the caller's to remove.
        on_metrics: called with the step and figures: `train/loss` (mean since the last call), `train/lr`,
            `train/grad_norm`, `train/logit_scale`, `train/samples_per_second`, `train/data_wait` (share of the time
            that steps waited for data), `train/bad_images`, and `train/full_captions` (share of the captions that fill
            the model's context, if it can be told).
        log_every: steps between two calls.
        beside: what else is done with the model at some steps, before the checkpoint of the step. Its time is no part
            of the training's. If it fails with `ModeError`, the log says so.
        copies: copies of the checkpoints somewhere else; of the process that leads.
        images: where images come from; with `training.read: sequential` it has to have a spool.
        keep_last: write a checkpoint after the last step as well, so that whatever ends the process before its model is
            saved loses no step.

    Raises:
        ModeError: the loss became NaN or infinite; a checkpoint or seed of another configuration; a batch that the
            processes cannot share; a device that is not there; a process that reads images was killed.
            Where there is no next batch, a checkpoint of the steps so far is written first.
        Interrupted: SIGTERM or SIGINT came, and the checkpoint is written. Before the first of the steps, and after the
            last one, signals are the caller's: a process may end at once, and loses nothing that a checkpoint has.
    """
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    plan, checkpoint = training.plan, checkpoint_dir / CHECKPOINT
    group = process_group(machine.device)
    _refuse_uneven_batches(plan.batch_size, training.recipe.accumulate, group)
    clip, optimizer, state = _begin(training, machine, group, checkpoint)
    if group.leads_machine:
        images.clear()  # before the others come to it: what is there is of a process that was killed
    if not group.agree(state.step, int(training.fingerprint[:8], 16)):
        raise ModeError(
            f"{plan.name}: the {group.world} processes do not begin with the same data, parameters or checkpoint",
            "all machines have to see the same project folder",
        )
    learner = Learner(training, clip.model, optimizer, group)

    # Data from the position of the next step on.
    signals = Signals()
    batches = Batches(training, clip, state.step, root, machine, group, images, lambda: signals)

    def stopped() -> Interrupted:
        done = f"{plan.name}: stopped after step {state.step:,} of {plan.last_step:,}"
        goes_on = f"the next run goes on from {checkpoint if checkpoint.is_file() else 'there'}"
        return Interrupted(signals[0] if signals else signal.SIGTERM, f"{done}; {goes_on}")

    def send_last_copy() -> None:
        if copies is not None and group.leads and checkpoint.is_file():
            until = min(signals.first, time.monotonic()) + machine.stop_seconds * _STOPPING
            copies.finish(checkpoint_dir, state.step, until)

    def leave() -> NoReturn:
        send_last_copy()
        group.any(False)  # waits for the checkpoint: torchrun stops all when one has ended
        raise stopped()

    monitor = _Monitor(training, learner, batches, state, group, checkpoint)
    with monitor.bar or nullcontext():
        monitor.do_beside(beside, clip)  # at the first step, and what the end of an interrupted run left out
        with noting_signals(signals), closing(batches), told_of_dead_workers():
            while state.step < plan.last_step:
                given = _next_of(batches)
                lost, told = group.any(isinstance(given, Exception), bool(signals))
                if lost:
                    batches.close()  # makes room for a checkpoint
                    monitor.keep(clip)
                    if told:
                        send_last_copy()
                    group.any(False)
                    if told:
                        raise stopped()
                    fault = f"{plan.name}: another of its {group.world} processes cannot go on"
                    raise given if isinstance(given, ModeError) else ModeError(fault, "see its output")
                assert not isinstance(given, Exception)
                pixels, tokens = given
                monitor.count(learner.step(state.step, pixels, tokens))

                due = monitor.since_checkpoint > machine.checkpoint_minutes * 60
                stop, due = group.any(bool(signals), group.leads and due)
                report = state.step % log_every == 0 or state.step == plan.last_step
                if stop or due or report:
                    monitor.look_at_losses()
                if report:
                    monitor.report(on_metrics)
                if not stop:
                    monitor.do_beside(beside, clip)
                if stop or due:
                    monitor.save_checkpoint(clip)
                if stop:
                    leave()
                if due and copies is not None and group.leads:
                    copies.offer(checkpoint_dir, state.step)
            monitor.refuse_broken_weights()
            if keep_last:
                monitor.keep(clip)
                [told] = group.any(bool(signals))
                if told:
                    leave()

    clip.model.eval()
    clip.model.set_grad_checkpointing(False)
    clip.card = make_card(training, clip, state, group)
    return TrainResult(clip, plan, optimizer, group.leads)


def _refuse_uneven_batches(batch_size: int, accumulate: int, group: Group) -> None:
    """Raise `ModeError` unless every process, in every pass of a step, has as many samples as any other."""
    if batch_size % (group.world * accumulate):
        raise ModeError(
            f"training.batch_size ({batch_size}) is not a multiple of processes x accumulate"
            f" ({group.world} x {accumulate})",
            "set one of the three so that it is",
        )


def _begin(training: Training, machine: MachineParams, group: Group, checkpoint: Path) -> tuple[Clip, AdamW, RunState]:
    """Model, optimiser and state: as new, as the seed left them, or as the checkpoint has them."""
    clip = first_model(training, group)
    optimizer = adamw(clip.model, training.recipe)
    clip.model.set_grad_checkpointing(machine.grad_checkpointing)
    return clip, optimizer, _first_state(training, clip.model, optimizer, checkpoint)


def _next_of(batches: Batches) -> tuple[Tensor, Tensor] | ModeError | NotWaitedFor:
    """The next batch, or why there is none: other processes have to hear of it before they wait for this one."""
    try:
        return batches.next()
    except (ModeError, NotWaitedFor) as reason:
        return reason


def _first_state(training: Training, model: nn.Module, optimizer: AdamW, checkpoint: Path) -> RunState:
    """Where to begin: at the checkpoint, where the parent stopped, or at 0; fills model and optimiser."""
    plan = training.plan
    if checkpoint.is_file():
        state = load_checkpoint(checkpoint, model, optimizer, training.fingerprint)
        if not plan.first_step <= state.step <= plan.last_step:
            raise ModeError(
                f"{checkpoint}: at step {state.step:,}, but {plan.name} goes from {plan.first_step:,} to"
                f" {plan.last_step:,}",
                "remove it to start again",
            )
        return state
    if plan.parent is not None and plan.role.parent is not None and plan.first_step and training.adapter is None:
        # A pretrained seed and an expert have no moments to go on with, and an adapter's parameters are new.
        load_branch_state(plan.parent / BRANCH_STATE, model, optimizer, plan.first_step)
    return RunState(step=plan.first_step)


class _Monitor:
    """Keeps count of a training, looks at its losses now and then, reports them, and writes checkpoints.

    `state` is kept up to date. Of several processes, one shows and writes; the losses of all are averaged.
    """

    def __init__(
        self, training: Training, learner: Learner, batches: Batches, state: RunState, group: Group, checkpoint: Path
    ) -> None:
        plan = training.plan
        self._training, self._learner, self._batches = training, learner, batches
        self._state, self._group, self._checkpoint = state, group, checkpoint
        self._seconds_before, self._bad_before, self._kept_step = state.seconds, state.bad_images, state.step
        self._started = self._last_report = self._last_checkpoint = time.monotonic()
        self._told_of_full_captions = False
        self._pending: list[Tensor] = []  # losses not yet looked at: to look is to wait for the GPU
        done = (state.step - plan.first_step) * plan.batch_size
        self.bar = Progress(plan.name, total=plan.samples, unit="samples", done=done) if group.leads else None

    @property
    def since_checkpoint(self) -> float:
        """Seconds since the last checkpoint, or since the beginning."""
        return time.monotonic() - self._last_checkpoint

    def count(self, loss: Tensor) -> None:
        """One step more, with its loss."""
        self._pending.append(loss)
        self._state.step += 1
        self._state.seconds = self._seconds_before + (time.monotonic() - self._started) * self._group.world
        self._state.bad_images = self._bad_before + self._batches.bad
        if self.bar:
            self.bar.update(self._training.plan.batch_size)

    def look_at_losses(self) -> None:
        """Move the losses of the last steps into the state, as means over the processes; all have to come.

        Raises:
            ModeError: one is NaN or infinite.
        """
        if not self._pending:
            return
        state = self._state
        values = self._group.mean(torch.stack(self._pending)).tolist()
        for step, value in enumerate(values, start=state.step - len(values)):
            if not math.isfinite(value):
                self._fail(f"loss is {value}", step)
        self._pending.clear()
        state.losses += values
        state.recent = (state.recent + values)[-RECENT_STEPS:]

    def report(self, on_metrics: Metrics | None) -> None:
        """Show the figures since the last report."""
        state, now = self._state, time.monotonic()
        if self.bar:
            figures = {
                "train/loss": sum(state.losses) / len(state.losses),
                "train/lr": self._learner.rate,
                "train/grad_norm": float(self._learner.grad_norm),
                "train/logit_scale": float(self._learner.model.logit_scale.detach().exp()),
                "train/samples_per_second": self.bar.rate,
                "train/data_wait": self._batches.waited / max(now - self._last_report, 1e-9),
                "train/bad_images": float(state.bad_images),
            }
            if self._batches.captions:
                figures["train/full_captions"] = self._batches.full / self._batches.captions
                self._tell_of_full_captions(figures["train/full_captions"])
            self.bar.update(0, loss=figures["train/loss"], wait=f"{figures['train/data_wait']:.0%}")
            if on_metrics is not None:
                on_metrics(state.step, figures)
        state.losses, self._last_report = [], now
        self._batches.waited, self._batches.captions, self._batches.full = 0.0, 0, 0

    def _tell_of_full_captions(self, share: float) -> None:
        """Once, if there are many: their ends may be what tells one image from another."""
        if share > _MANY_FULL and not self._told_of_full_captions:
            self._told_of_full_captions = True
            log.warning(
                "%s: %.0f%% of the captions fill the %d tokens that the model reads; what comes after is not seen "
                "(`captions` of a source takes others, `context_length` in model.config reads more)",
                *(self._training.plan.name, 100 * share, self._learner.model.context_length),
            )

    def do_beside(self, beside: Sequence[Beside], clip: Clip) -> None:
        """Do what is due beside the training at this step; the process that leads does it, the others wait."""
        step = self._state.step
        due = [each for each in beside if each.due(step)]
        if not due:
            return
        self.look_at_losses()  # a GPU has made the steps so far when their losses are there
        began = time.monotonic()
        if self.bar:
            for each in due:
                try:
                    figures = {} if each.done(step) else each.do(step, clip)
                except ModeError as error:
                    log.warning("%s, step %d: %s", self._training.plan.name, step, error)
                else:
                    self.bar.update(0, **figures)
        self._group.any(False)
        seconds = time.monotonic() - began
        self._started, self._last_report = self._started + seconds, self._last_report + seconds
        if self.bar:
            self.bar.leave_out(seconds)

    def save_checkpoint(self, clip: Clip) -> None:
        """Write the checkpoint, from the process that leads, and beside it what model it is of.

        Raises:
            ModeError: weights are NaN or infinite, or the file cannot be written.
        """
        if self._group.leads:
            self.refuse_broken_weights()
            learner, fingerprint = self._learner, self._training.fingerprint
            configuration = self._checkpoint.parent / CONFIGURATION
            if not configuration.is_dir():
                with write_aside(configuration) as temporary:
                    write_configuration(temporary, clip)
            save_checkpoint(self._checkpoint, learner.model, learner.optimizer, self._state, fingerprint)
        self._last_checkpoint, self._kept_step = time.monotonic(), self._state.step

    def keep(self, clip: Clip) -> None:
        """A checkpoint of the steps since the last one, if there are any; all processes have to come."""
        if self._state.step != self._kept_step:
            self.look_at_losses()
            self.save_checkpoint(clip)

    def refuse_broken_weights(self) -> None:
        """Weights that are NaN or infinite must replace neither a good checkpoint nor a model."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._learner.model.parameters()):
            self._fail("weights are not finite", self._state.step - 1)

    def _fail(self, what: str, step: int) -> None:
        checkpoint, rate = self._checkpoint, self._learner.rate
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint.is_file() else "there was no checkpoint yet"
        raise ModeError(
            f"training failed at step {step:,}: {what} at learning rate {rate:.3g}; {kept}",
            "lower training.lr, lengthen training.warmup or set training.clip_norm",
        )
