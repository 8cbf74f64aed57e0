"""What a training looks at in every step: augmented images and the token ids of their captions."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mode.clip.encode import takes_short_texts, without_padding
from mode.clip.model import Clip
from mode.data.images import normalise
from mode.data.loading.loader import ImageStore, PairStream, Shares, augment_batch, make_loader, samples_ahead
from mode.data.loading.spool import REQUESTS, Spool, check_room, room_for
from mode.data.shards.index import PairIndex
from mode.data.shards.reading import ImageFiles, Places
from mode.errors import ModeError, in_one_line
from mode.params import MachineParams
from mode.training.distribution import Group
from mode.training.plan import Training


@dataclass(frozen=True)
class Images:
    """Where a training on this machine has its images from; it decides no pixel of them.

    Attributes:
        pack: of the training's images; None: they come from where the index says.
        spool: folder of `training.read: sequential`, which this training alone uses on this machine.
    """

    pack: Places | None = None
    spool: Path | None = None

    def clear(self) -> None:
        """Remove what is in the spool."""
        if self.spool is not None:
            shutil.rmtree(self.spool, ignore_errors=True)


class Batches:
    """The share that one process has of every batch, on its device, from `step` to the end of the training.

    `clip` gives the tokenizer; relative paths of shards begin at `root`; `gives_up` is asked while data is waited for.

    Attributes:
        waited: seconds in which nothing was computed for want of images or token ids, until someone sets it back. What
            follows is not in it: to copy a batch to a GPU is to wait until that has computed what came before.
        captions: how many of them it gave, until someone sets it back; 0 for a model that does not say where a text
            ends (`takes_short_texts`).
        full: those of them that fill the model's context, whose rest, if there is any, it does not see.

    Raises:
        ModeError: a file of images is missing or another one; the spool takes more room than it may.
    """

    def __init__(
        self, training: Training, clip: Clip, step: int, root: Path, machine: MachineParams, group: Group,
        images: Images = Images(), gives_up: Callable[[], object] = lambda: False,
    ) -> None:  # fmt: skip
        plan, index = training.plan, training.index
        self.waited, self.captions, self.full = 0.0, 0, 0
        self._training, self._device, self._images, self._group = training, group.device, images, group
        self._dtype = torch.bfloat16 if training.recipe.precision == "bf16" else torch.float32
        self._tokens = _Tokens(index, clip, machine.cache_mb)
        files, stream = ImageFiles(images.pack or index, root), stream_of(training)
        shares = shares_of(training, step, stream, group)
        self._spool = self._spool_of(files, stream, shares, machine)
        self._store = ImageStore(
            index,
            root,
            training.image,
            machine.cache_mb,
            plan.pairs.rows,
            reader=self._spool or files,
            device=group.device,
        )
        if self._spool and self._store.cached and group.world == 1:
            # After the first whole pass from here all are in memory.
            passes = -(-plan.position(step) // stream.images_per_pass) + 1
            self._spool.until = min(plan.stream_stop, passes * stream.images_per_pass)
        spool = self._spool if group.leads_machine else None
        self._loader = make_loader(self._store, stream, shares, workers=machine.workers, spool=spool, gives_up=gives_up)

    def close(self) -> None:
        """Stop reading ahead, and remove what is left of it."""
        self._loader.close()
        if self._spool is not None:
            self._spool.close()
            if self._group.leads_machine:
                self._images.clear()

    def _spool_of(self, files: ImageFiles, stream: PairStream, shares: Shares, machine: MachineParams) -> Spool | None:
        plan, recipe, folder = self._training.plan, self._training.recipe, self._images.spool
        if recipe.read == "random":
            return None
        if folder is None:
            raise ValueError("training.read: sequential needs the folder of a spool")
        if self._group.leads_machine:
            need = room_for(plan.pairs, files, stream, samples_ahead(plan.batch_size, machine.workers))
            check_room(need, machine.spool_mb, folder, recipe.shuffle_images)
        readers = max(machine.workers, 1) * self._group.local_world
        return Spool(folder, files, stream, shares, REQUESTS // readers)

    @property
    def bad(self) -> int:
        """Samples so far whose image could not be decoded and was replaced."""
        return self._store.bad

    def next(self) -> tuple[Tensor, Tensor]:
        """Images, normalised, [b, 3, S, S], and token ids, int64 [b, at most context], of the next step.

        Raises:
            NotWaitedFor: they are not there, and `gives_up` says that they are not to be waited for.
            ModeError: as `make_loader` says.
        """
        asked, image, random_seed = time.monotonic(), self._training.image, self._training.random_seed
        batch = next(self._loader)
        tokens, full = self._tokens.of(batch.rows)
        self.waited += time.monotonic() - asked
        if full is not None:
            self.captions, self.full = self.captions + len(tokens), self.full + full
        pixels = batch.images.to(self._device, non_blocking=True)
        pixels = augment_batch(pixels, image, random_seed=random_seed, positions=batch.positions)
        images = normalise(pixels, image.mean, image.std).to(self._dtype)
        return images, tokens.to(self._device, non_blocking=True)


@contextmanager
def told_of_dead_workers() -> Iterator[None]:
    """A worker process of the loader that is killed ends the block in one line.

    torch finds out by a signal, and so raises its error wherever the program is just then, in the middle of a step too:
    what is in memory is no state to go on from, the last checkpoint is.

    Raises:
        ModeError: a worker was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = in_one_line(error).partition(". ")[0]
        raise ModeError(
            f"a process that reads images has died: {reason}",
            "the next run goes on from the last checkpoint; fewer machine.workers take less memory",
        ) from None


def stream_of(training: Training) -> PairStream:
    """The order in which a training sees its pairs."""
    index, recipe = training.index, training.recipe
    shuffled = recipe.shuffle_images if recipe.read == "sequential" else None
    return PairStream(training.plan.pairs, index.image, training.random_seed, index.probability, shuffled)


def shares_of(training: Training, step: int, stream: PairStream, group: Group) -> Shares:
    """Who takes which samples from a step on."""
    plan, chunks = training.plan, stream.chunks_at if training.recipe.read == "sequential" else None
    return Shares(plan.position(step), plan.stream_stop, plan.batch_size, group.rank, group.machines, chunks)


class _Tokens:
    """Token ids of captions by row, each caption tokenised once where all fit into `cache_mb`."""

    def __init__(self, index: PairIndex, clip: Clip, cache_mb: int) -> None:
        self._index, self._tokenizer, self._cuts = index, clip.tokenizer, takes_short_texts(clip.model)
        self.context = clip.tokenizer([""]).shape[1]
        fits = len(index) * (self.context * 4 + 1) <= cache_mb * 2**20
        self._ids = np.zeros((len(index) if fits else 0, self.context), dtype=np.int32)
        self._known = np.zeros(len(self._ids), dtype=bool)

    def of(self, rows: NDArray[np.int64]) -> tuple[Tensor, int | None]:
        """int64 [rows, tokens], cut after the longest, and how many fill the context; or uncut, and None: not known."""
        if len(self._ids):
            new = np.unique(rows[~self._known[rows]])
            if len(new):
                self._ids[new] = self._tokenizer(self._index.captions(new)).numpy()
                self._known[new] = True
            tokens = torch.from_numpy(self._ids[rows]).long()
        else:
            tokens = self._tokenizer(self._index.captions(rows))
        if not self._cuts:
            return tokens, None
        short = without_padding(tokens)
        full = int((short.argmax(dim=1) == self.context - 1).sum()) if short.shape[1] == self.context else 0
        return short, full
