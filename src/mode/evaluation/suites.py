"""The standard suites: which tasks belong to them, and how each is scored.

`clip26` are the 26 tasks of the CLIP and MoDE papers' tables, `robustness` the shifted versions of ImageNet (those of
MoDE's table 3, and ObjectNet), `retrieval` COCO and Flickr30k. A task is a folder in CLIP_benchmark's layout under one
root, by any of the names under which its exporter and its hub write it (`wds_vtab-flowers`, `vtab/flowers`, `flowers`
...).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import yaml

from mode.errors import ModeError
from mode.evaluation.tasks import Task, open_task


@dataclass(frozen=True)
class Entry:
    """A task of a suite.

    Attributes:
        name: as CLIP_benchmark calls the data set, if it knows it; also the key of its class names and templates there
            and in `classes.yaml`.
        metric: of `mode.evaluation.tasks.METRICS`; MoDE, section 4.1, scores fine-grained tasks by the mean over
            classes, Kinetics by the mean of top-1 and top-5, hateful memes by the area under the ROC curve.
        aliases: other names of its folder.
        classes_of: CLIP_benchmark's data set whose class names it shares, if not its own.
    """

    name: str
    metric: str = "acc1"
    aliases: tuple[str, ...] = ()
    classes_of: str | None = None

    @property
    def names(self) -> set[str]:
        """Folder names that mean this task, in plain form."""
        return {_plain(name) for name in (self.name, *self.aliases)}


#: These use some of ImageNet's classes: names must come with the folder, only templates can be taken from elsewhere.
_SUBSETS = ("imagenet-a", "imagenet-o", "imagenet-r", "objectnet")
_PER_CLASS = "mean_per_class_recall"

SUITES: dict[str, tuple[Entry, ...]] = {
    "clip26": (
        Entry("food101"),
        Entry("cifar10"),
        Entry("cifar100"),
        Entry("cub200", aliases=("cub", "cub200_2011")),
        Entry("sun397"),
        Entry("cars", aliases=("stanford_cars",)),
        Entry("fgvc_aircraft", _PER_CLASS, ("aircraft",)),
        Entry("dtd", aliases=("describable_textures",)),
        Entry("pets", _PER_CLASS, ("oxford_pets", "oxford_iiit_pet")),
        Entry("caltech101", _PER_CLASS),
        Entry("flowers", _PER_CLASS, ("flowers102", "oxford_flowers102")),
        Entry("mnist"),
        Entry("fer2013"),
        Entry("stl10"),
        Entry("eurosat"),
        Entry("resisc45"),
        Entry("gtsrb"),
        Entry("kitti_closest_vehicle_distance", aliases=("kitti",)),
        Entry("country211"),
        Entry("pcam", aliases=("patch_camelyon",)),
        Entry("ucf101", aliases=("ucf101_frames",)),
        Entry("kinetics700", "mean_acc1_acc5", ("k700", "kinetics700_frames")),
        Entry("clevr_count_all", aliases=("clevr", "clevr_counts")),
        Entry("hateful_memes", "roc_auc"),
        Entry("renderedsst2", aliases=("sst2", "rendered_sst2")),
        Entry("imagenet1k", aliases=("imagenet", "ilsvrc2012")),
    ),
    "robustness": (
        Entry("imagenetv2", aliases=("imagenet_v2",), classes_of="imagenet1k"),
        *(Entry(name, classes_of="imagenet1k") for name in ("imagenet_sketch", *_SUBSETS)),
    ),
    "retrieval": (
        Entry("mscoco_captions", "recall", ("coco", "mscoco", "coco_captions")),
        Entry("flickr30k", "recall"),
    ),
}


class Found(NamedTuple):
    """A suite on a disk: the tasks that are there, in the suite's order, and the names of those that are not."""

    tasks: tuple[Task, ...]
    missing: tuple[str, ...]


def open_suite(name: str, root: Path) -> Found:
    """Open the tasks of a suite that lie under `root`.

    A folder's own `classnames.txt` and `zeroshot_classification_templates.txt` come first; where one is missing,
    CLIP_benchmark's are taken, if it is installed and has them, and else those of `classes.yaml` beside this module,
    which has what CLIP_benchmark lacks.

    Args:
        name: of SUITES.
        root: holds the task folders, at most two deep.

    Raises:
        ModeError: no such suite or folder; none of its tasks is there; two folders are the same task; or as
            `open_task`.
    """
    if name not in SUITES:
        raise ModeError(f"no suite is called '{name}'", f"there are: {', '.join(SUITES)}")
    if not root.is_dir():
        raise ModeError(f"{root}: no such folder", "--root names the one with the suite's task folders")
    folders: dict[str, Path] = {}
    names = {plain: entry.name for entry in SUITES[name] for plain in entry.names}
    for marker in sorted([*root.glob("*/test/nshards.txt"), *root.glob("*/*/test/nshards.txt")]):
        folder = marker.parent.parent
        task = names.get(_plain(folder.name))
        if task in folders:
            raise ModeError(f"{folders[task]} and {folder} are both {task}", "move one of them away")
        if task:
            folders[task] = folder
    if not folders:
        wanted = ", ".join(entry.name for entry in SUITES[name][:6])
        raise ModeError(f"{root}: no task of {name} is there", f"it looks for {wanted} ...")
    tasks = [_open(entry, folders[entry.name]) for entry in SUITES[name] if entry.name in folders]
    return Found(tuple(tasks), tuple(entry.name for entry in SUITES[name] if entry.name not in folders))


def _open(entry: Entry, folder: Path) -> Task:
    if entry.metric == "recall":
        return open_task(folder)
    known = entry.classes_of or entry.name
    ours = _of_this_package().get(known, {})
    classes = _from_clip_benchmark("en_classnames.json").get(known) or ours.get("classes", ())
    templates = _from_clip_benchmark("en_zeroshot_classification_templates.json").get(known) or ours.get(
        "templates", ()
    )
    return open_task(folder, entry.metric, () if entry.name in _SUBSETS else classes, templates)


@cache
def _from_clip_benchmark(file: str) -> Mapping[str, Sequence[str]]:
    """One of CLIP_benchmark's tables by data set; empty where it is not installed."""
    try:
        text = resources.files("clip_benchmark").joinpath("datasets", file).read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError):
        return {}
    content: dict[str, list[str]] = json.loads(text)
    return content


@cache
def _of_this_package() -> Mapping[str, Mapping[str, Sequence[str]]]:
    """`classes` and `templates` by task, as `classes.yaml` has them."""
    text = resources.files("mode.evaluation").joinpath("classes.yaml").read_text(encoding="utf-8")
    content: dict[str, dict[str, list[str]]] = yaml.safe_load(text)
    return content


def _plain(name: str) -> str:
    """A folder's name without its collection and punctuation.

    >>> _plain("wds_vtab-flowers"), _plain("imagenet-a"), _plain("ImageNet_A")
    ('flowers', 'imageneta', 'imageneta')
    """
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^(wds[_-])?(vtab[_-])?", "", name.lower()))
