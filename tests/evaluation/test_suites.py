"""The standard suites: found by their usual names, scored by the right metric, class names filled in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mode.errors import ModeError
from mode.evaluation.suites import SUITES, open_suite
from mode.evaluation.tasks import METRICS

TEN = [str(digit) for digit in range(10)]


def test_the_26_tasks_and_their_metrics() -> None:
    entries = {entry.name: entry.metric for entry in SUITES["clip26"]}
    assert len(entries) == 26
    assert {name for name, metric in entries.items() if metric == "mean_per_class_recall"} == {
        *("fgvc_aircraft", "pets", "caltech101", "flowers")
    }
    assert entries["kinetics700"] == "mean_acc1_acc5"
    assert entries["hateful_memes"] == "roc_auc"
    assert set(entries.values()) <= set(METRICS)


@pytest.mark.parametrize("suite", SUITES)
def test_no_folder_name_means_two_tasks(suite: str) -> None:
    names = [name for entry in SUITES[suite] for name in entry.names]
    assert len(names) == len(set(names))


def test_tasks_that_are_there_and_those_that_are_not(folders: Any) -> None:
    folders.classification("wds_vtab-flowers", [0, 1, 2])
    folders.classification("hub/wds_mnist", [1, 0])
    folders.classification("my own task", [1, 0])
    found = open_suite("clip26", folders.root)
    assert [(task.name, task.metric) for task in found.tasks] == [
        ("wds_vtab-flowers", "mean_per_class_recall"),
        ("wds_mnist", "acc1"),
    ]
    assert len(found.missing) == 24
    assert "imagenet1k" in found.missing


def test_class_names_and_templates_of_clip_benchmark_where_a_folder_has_none(folders: Any) -> None:
    folder = folders.classification("mnist", [9, 0], classes=TEN)
    own = open_suite("clip26", folders.root).tasks[0]
    assert len(own.templates) == 3
    (folder / "classnames.txt").unlink()
    (folder / "zeroshot_classification_templates.txt").unlink()
    [task] = open_suite("clip26", folders.root).tasks
    assert task.classes == tuple(TEN)
    assert task.templates == ('a photo of the number: "{c}".',)


def test_a_task_without_class_names_anywhere_is_an_error(folders: Any) -> None:
    (folders.classification("ucf101", [0, 1]) / "classnames.txt").unlink()
    with pytest.raises(ModeError, match=r"ucf101/classnames\.txt: missing"):
        open_suite("clip26", folders.root)
    # These have some of ImageNet's classes only: its thousand names would be the wrong ones.
    (folders.classification("imagenet-r", [0, 1]) / "classnames.txt").unlink()
    with pytest.raises(ModeError, match=r"imagenet-r/classnames\.txt: missing"):
        open_suite("robustness", folders.root)


def test_retrieval_needs_captions_only(folders: Any) -> None:
    folders.retrieval("wds_flickr30k", 3)
    found = open_suite("retrieval", folders.root)
    assert [task.kind for task in found.tasks] == ["retrieval"]
    assert found.missing == ("mscoco_captions",)


def test_bad_input(folders: Any, tmp_path: Path) -> None:
    with pytest.raises(ModeError, match=r"no suite is called 'clip27' \(there are: clip26, robustness, retrieval\)"):
        open_suite("clip27", tmp_path)
    with pytest.raises(ModeError, match="no such folder"):
        open_suite("clip26", tmp_path / "nowhere")
    folder = folders.classification("mnist", [0, 1])
    with pytest.raises(ModeError, match="no task of robustness is there"):
        open_suite("robustness", folders.root)
    shutil.copytree(folder, folders.root / "wds_mnist")
    with pytest.raises(ModeError, match="are both mnist"):
        open_suite("clip26", folders.root)
