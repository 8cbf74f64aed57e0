"""Reader of evaluation tasks: folders in CLIP_benchmark's webdataset layout.

    TASK/
        test/nshards.txt                          how many tars there are
        test/0.tar, test/1.tar, ...               KEY.jpg|jpeg|png|webp with KEY.cls (a label) or KEY.txt (captions)
        classnames.txt                            one a line, the label is the line's number from 0
        zeroshot_classification_templates.txt     one a line, {c} is the class name
        dataset_type.txt                          `classification` (default) or `retrieval`
        metric.txt                                optional, not CLIP_benchmark's: one of METRICS

A task must be whole: a benchmark with images left out is another benchmark, so anything damaged or missing is an error
here and never skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mode.data.shards.scan import LARGEST_IMAGE
from mode.data.shards.tar import DamagedTar, members
from mode.errors import ModeError
from mode.results import TaskFacts

#: What the one figure of a classification task may be; `mean_acc1_acc5` is (top-1 + top-5) / 2.
METRICS = ("acc1", "mean_per_class_recall", "mean_acc1_acc5", "roc_auc")

#: Bytes of a text file, or of the captions of one image.
_LARGEST_TEXT = 2**24

#: In CLIP_benchmark's order of preference, where a key has several.
_IMAGES = ("webp", "png", "jpg", "jpeg")


class ImageBytes(NamedTuple):
    """Where an encoded image lies: `size` bytes of `tar` from `offset` on; `key` names it in messages."""

    tar: Path
    key: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The encoded bytes."""
        with self.tar.open("rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)


@dataclass(frozen=True, eq=False)
class Task:
    """One evaluation task.

    Attributes:
        name: the folder's.
        kind: `classification` or `retrieval`.
        images: in the order of the tars.
        metric: of METRICS; of a retrieval task always `recall`.
        classes: names, in the order of the labels; empty for retrieval.
        templates: each with {c}; empty for retrieval.
        labels: int64 [images]; empty for retrieval.
        texts: all captions, those of one image next to each other; empty for classification.
        owners: int64 [texts]: the image that a text belongs to; never falls.
    """

    name: str
    kind: Literal["classification", "retrieval"]
    images: tuple[ImageBytes, ...]
    metric: str
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    labels: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    texts: tuple[str, ...] = ()
    owners: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @cached_property
    def prompts(self) -> list[list[str]]:
        """The task's metadata: per class its name in every template; for retrieval each text by itself."""
        if self.kind == "retrieval":
            return [[text] for text in self.texts]
        return [[template.replace("{c}", name) for template in self.templates] for name in self.classes]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what makes two figures comparable: metric, templates, classes, texts and the number of images."""
        content = [self.kind, self.metric, self.templates, self.classes, self.texts, len(self.images)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def summary(self) -> TaskFacts:
        """What the results say about the task itself."""
        return TaskFacts(
            kind=self.kind,
            metric=self.metric,
            images=len(self.images),
            classes=len(self.classes),
            templates=len(self.templates),
            texts=len(self.texts),
            hash=self.fingerprint,
        )


def open_task(
    folder: Path, metric: str | None = None, classes: Sequence[str] = (), templates: Sequence[str] = ()
) -> Task:
    """Read a task folder; images stay where they are.

    Args:
        folder: in CLIP_benchmark's layout, see this module.
        metric: one of METRICS, in place of `metric.txt`; default `acc1`.
        classes, templates: for a folder that has no file of them.

    Raises:
        ModeError: the folder, a tar, class names, templates, a label or captions are missing or wrong, or the task has
            no image.
    """
    if not folder.is_dir():
        raise ModeError(f"{folder}: no such task folder", "check the path")
    kind = (_optional_text(folder / "dataset_type.txt") or "classification").strip().lower()
    if kind == "classification":
        return _classification(folder, metric, classes, templates)
    if kind == "retrieval":
        return _retrieval(folder)
    raise ModeError(f"{folder}/dataset_type.txt: '{kind}'", "it may be classification or retrieval")


def open_tasks(folders: Sequence[Path], metrics: Mapping[str, str] | None = None) -> list[Task]:
    """Read several task folders, whose names must differ; `metrics` may name the metric of some by task name.

    Raises:
        ModeError: as `open_task`, or no task is given, or two folders have the same name.
    """
    if not folders:
        raise ModeError("there is no task to evaluate on", "give at least one task folder")
    tasks = [open_task(folder, (metrics or {}).get(folder.resolve().name)) for folder in folders]
    [(name, count)] = Counter(task.name for task in tasks).most_common(1)
    if count > 1:
        raise ModeError(f"two tasks are called '{name}'", "rename one of the folders: results go by name")
    return tasks


def _classification(
    folder: Path, metric: str | None, known_classes: Sequence[str], known_templates: Sequence[str]
) -> Task:
    classes = _lines(folder / "classnames.txt", "class names", known_classes)
    if len(classes) == 1:
        fault = f"{folder}: '{classes[0]}' is the only class, so that every model is right about every image"
        raise ModeError(fault, "classnames.txt needs two classes or more")
    templates = _lines(folder / "zeroshot_classification_templates.txt", "prompt templates", known_templates)
    for number, template in enumerate(templates, 1):
        _check_template(template, f"{folder}/zeroshot_classification_templates.txt line {number}")
    metric = metric or (_optional_text(folder / "metric.txt") or "acc1").strip()
    if metric not in METRICS:
        raise ModeError(f"{folder}/metric.txt: unknown metric '{metric}'", f"it may be {', '.join(METRICS)}")
    images, contents = _samples(folder, "cls")
    labels = [_label(content, image, len(classes)) for content, image in zip(contents, images, strict=True)]
    here = f"here are {len(classes)}"
    if metric == "roc_auc" and (len(classes) != 2 or len(set(labels)) != 2):
        raise ModeError(f"{folder}: metric roc_auc needs two classes with images of both, {here} classes")
    if metric == "mean_acc1_acc5" and len(classes) < 5:
        raise ModeError(f"{folder}: metric mean_acc1_acc5 needs at least 5 classes, {here}")
    name = folder.resolve().name
    return Task(name, "classification", images, metric, classes, templates, np.array(labels, np.int64))


def _retrieval(folder: Path) -> Task:
    images, contents = _samples(folder, "txt")
    texts: list[str] = []
    owners: list[int] = []
    for number, (image, content) in enumerate(zip(images, contents, strict=True)):
        try:
            captions = content.decode("utf-8").splitlines()
        except UnicodeDecodeError:
            raise ModeError(
                f"{image.tar}: {image.key}.txt is not UTF-8", "write the tar again with captions in UTF-8"
            ) from None
        if not any(caption.strip() for caption in captions):
            raise ModeError(f"{image.tar}: {image.key}.txt has no caption", "it needs one caption a line")
        texts += captions
        owners += [number] * len(captions)
    name = folder.resolve().name
    return Task(name, "retrieval", images, "recall", texts=tuple(texts), owners=np.array(owners, np.int64))


def _samples(folder: Path, extension: str) -> tuple[tuple[ImageBytes, ...], list[bytes]]:
    """Images of all tars, and beside each the content of its `extension` member."""
    images: list[ImageBytes] = []
    contents: list[bytes] = []
    for number in range(_number_of_shards(folder)):
        tar = folder / "test" / f"{number}.tar"
        if not tar.is_file():
            raise ModeError(f"{tar}: missing, but test/nshards.txt counts it", "fetch it again")
        with tar.open("rb") as file:
            for key, parts in _by_key(tar, file.fileno()).items():
                image = next((parts[kind] for kind in _IMAGES if kind in parts), None)
                if image is None and extension in parts:
                    raise ModeError(f"{tar}: {key}.{extension} has no image", f"images may be {', '.join(_IMAGES)}")
                if image is None:
                    continue
                if extension not in parts:
                    raise ModeError(f"{tar}: image {key} has no {key}.{extension}")
                offset, size = parts[extension]
                if size > _LARGEST_TEXT or image[1] > LARGEST_IMAGE:
                    raise ModeError(f"{tar}: {key}: an image of {image[1]:,} bytes with {size:,} bytes of {extension}")
                images.append(ImageBytes(tar, key, *image))
                contents.append(os.pread(file.fileno(), size, offset))
    if not images:
        raise ModeError(f"{folder}: the task has no image", "fetch it again")
    return tuple(images), contents


def _number_of_shards(folder: Path) -> int:
    path = folder / "test" / "nshards.txt"
    text = _optional_text(path)
    if text is None:
        raise ModeError(f"{path}: missing", "is this a task folder in CLIP_benchmark's webdataset layout?")
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()):
        raise ModeError(
            f"{path}: '{text.strip()[:40]}' is not a number of tars", "it needs how many test/N.tar there are"
        )
    return int(text)


def _by_key(tar: Path, descriptor: int) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> extension -> (offset, size); as in webdataset, the extension begins at the first dot of a file's name."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        for member in members(descriptor, os.fstat(descriptor).st_size):
            directory, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if not stem or not extension:
                continue
            key, extension = f"{directory}{slash}{stem}", extension.lower()
            if extension in samples.setdefault(key, {}):
                raise ModeError(f"{tar}: {key}.{extension} is there twice")
            samples[key][extension] = (member.offset, member.size)
    except DamagedTar as damage:
        raise ModeError(f"{tar}: damaged tar: {damage}", "fetch it again") from None
    return samples


def _label(content: bytes, image: ImageBytes, classes: int) -> int:
    where = f"{image.tar}: {image.key}.cls"
    try:
        label = int(content)
    except ValueError:
        raise ModeError(f"{where}: {content[:20]!r} is not a label", "it needs a class number from 0") from None
    if not 0 <= label < classes:
        raise ModeError(f"{where}: label {label} is out of range", f"classnames.txt has {classes} classes, from 0")
    return label


def _lines(path: Path, what: str, otherwise: Sequence[str]) -> tuple[str, ...]:
    text = _optional_text(path)
    if text is None and otherwise:
        return tuple(otherwise)
    lines = tuple(line.strip() for line in (text or "").splitlines())
    if not lines:
        raise ModeError(f"{path}: {'missing' if text is None else 'empty'}: the task has no {what}", "one a line")
    if "" in lines:
        line = lines.index("") + 1
        raise ModeError(f"{path}: line {line} is blank", "labels and CLIP_benchmark count it: remove it")
    return lines


def _check_template(template: str, where: str) -> None:
    """Nothing of Python's format language but the plain field: `{c:>700000000}` would fill the memory."""
    rest = template.replace("{c}", "")
    if rest == template or "{" in rest or "}" in rest:
        advice = "it needs {c} where the class name goes, and no other {}"
        raise ModeError(f"{where}: '{template[:200]}' is no template", advice)


def _optional_text(path: Path) -> str | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_TEXT:
        raise ModeError(f"{path}: not a file of at most {_LARGEST_TEXT // 2**20} MiB")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ModeError(f"{path}: not UTF-8", "save it as UTF-8") from None
