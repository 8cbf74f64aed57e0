"""Peers that need a class of their own, apart from the races since they import torch."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from benchmarks.pictures import tar_members


class Tars(IterableDataset[Any]):
    """Whole batches of the wanted pairs."""

    def __init__(self, tars: list[str], keys: set[str], batch: int, transform: Any) -> None:
        self.tars, self.keys, self.batch, self.transform = tars, keys, batch, transform

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        images: list[Any] = []
        texts: list[str] = []
        for path in self.tars[worker.id :: worker.num_workers] if worker else self.tars:
            for name, content in tar_members(path):
                if name[:-4] not in self.keys:
                    continue
                if name.endswith(".jpg"):
                    images.append(self.transform(Image.open(io.BytesIO(content)).convert("RGB")))
                elif name.endswith(".txt"):
                    texts.append(content.decode())
                if len(texts) == self.batch:
                    yield torch.stack(images), texts
                    images, texts = [], []
        if texts:
            yield torch.stack(images), texts
