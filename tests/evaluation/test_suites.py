"""The standard suites: found by their usual names, scored by the right metric, class names filled in."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from mode.errors import ModeError
from mode.evaluation.suites import SUITES, open_suite
from mode.evaluation.tasks import METRICS

TEN = [str(digit) for digit in range(10)]

#: Classes and templates of the tasks that this package knows by itself.
KNOWN = {"cub200": (200, 1), "ucf101": (101, 48), "kinetics700": (700, 28), "hateful_memes": (2, 1)}


@pytest.fixture(scope="module")
def ours() -> dict[str, dict[str, list[str]]]:
    """`classes.yaml`, found as an installed package finds it."""
    content = yaml.safe_load(resources.files("mode.evaluation").joinpath("classes.yaml").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


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
    (folders.classification("sun397", [0, 1]) / "classnames.txt").unlink()
    with pytest.raises(ModeError, match=r"sun397/classnames\.txt: missing"):
        open_suite("clip26", folders.root)


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-o", "imagenet-r", "objectnet"])
def test_some_of_imagenets_classes_are_named_by_the_folder_alone(folders: Any, name: str) -> None:
    """Its thousand names would be the wrong ones; its templates are right."""
    folder = folders.classification(f"wds_{name}", [0, 1])
    (folder / "zeroshot_classification_templates.txt").unlink()
    [task] = open_suite("robustness", folders.root).tasks
    assert (task.metric, len(task.classes), len(task.templates)) == ("acc1", 6, 80)
    (folder / "classnames.txt").unlink()
    with pytest.raises(ModeError, match=rf"wds_{name}/classnames\.txt: missing"):
        open_suite("robustness", folders.root)


def test_robustness_has_the_papers_five() -> None:
    names = {entry.name for entry in SUITES["robustness"]}
    assert names == {"imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-o", "imagenet-r", "objectnet"}


class TestKnownClasses:
    def test_as_many_as_the_data_sets_have(self, ours: dict[str, dict[str, list[str]]]) -> None:
        assert {name: (len(each["classes"]), len(each["templates"])) for name, each in ours.items()} == KNOWN
        for each in ours.values():
            assert all(isinstance(text, str) for text in [*each["classes"], *each["templates"]])
            assert len(set(each["classes"])) == len(each["classes"])
            assert len(set(each["templates"])) == len(each["templates"])

    def test_in_the_order_of_the_labels(self, ours: dict[str, dict[str, list[str]]]) -> None:
        birds = ours["cub200"]["classes"]
        numbers = (1, 45, 100, 141, 200)  # as CUB's own folders are numbered
        assert [birds[number - 1] for number in numbers] == [
            *("Black footed Albatross", "Northern Fulmar", "Brown Pelican", "Artic Tern", "Common Yellowthroat")
        ]
        folders = [name.replace(" ", "") for name in ours["ucf101"]["classes"]]
        assert folders == sorted(folders)
        assert folders.index("HammerThrow") == folders.index("Hammering") - 1
        assert ours["kinetics700"]["classes"] == sorted(ours["kinetics700"]["classes"])
        assert ours["hateful_memes"]["classes"] == ["meme", "hatespeech meme"]

    def test_they_are_what_clip_benchmark_lacks(self, ours: dict[str, dict[str, list[str]]]) -> None:
        theirs = resources.files("clip_benchmark").joinpath("datasets")
        for file in ("en_classnames.json", "en_zeroshot_classification_templates.json"):
            assert not ours.keys() & json.loads(theirs.joinpath(file).read_text(encoding="utf-8")).keys()

    @pytest.mark.parametrize(("name", "counts"), KNOWN.items())
    def test_a_folder_without_any_gets_them(self, folders: Any, name: str, counts: tuple[int, int]) -> None:
        folder = folders.classification(name, [1, 0, 1])
        (folder / "classnames.txt").unlink()
        (folder / "zeroshot_classification_templates.txt").unlink()
        [task] = open_suite("clip26", folders.root).tasks
        assert (len(task.classes), len(task.templates)) == counts
        assert all("{" not in prompt for prompts in task.prompts for prompt in prompts)

    def test_a_folders_own_come_first(self, folders: Any) -> None:
        folder = folders.classification("cub_200_2011", [1, 0])
        (folder / "zeroshot_classification_templates.txt").unlink()
        [task] = open_suite("clip26", folders.root).tasks
        assert task.classes[:2] == ("red", "green")
        assert task.prompts[0] == ["a photo of a red, a type of bird."]


def test_retrieval_needs_captions_only(folders: Any) -> None:
    folders.retrieval("wds_flickr30k", 3)
    found = open_suite("retrieval", folders.root)
    assert [task.kind for task in found.tasks] == ["retrieval"]
    assert found.missing == ("mscoco_captions",)


def test_bad_input(folders: Any, tmp_path: Path) -> None:
    with pytest.raises(ModeError, match=r"no suite is called 'clip27' \(there are: clip26, robustness, retrieval\)"):
        open_suite("clip27", tmp_path)
    with pytest.raises(ModeError, match=r"no such folder \(--root names"):
        open_suite("clip26", tmp_path / "nowhere")
    folder = folders.classification("mnist", [0, 1])
    with pytest.raises(ModeError, match="no task of robustness is there"):
        open_suite("robustness", folders.root)
    shutil.copytree(folder, folders.root / "wds_mnist")
    with pytest.raises(ModeError, match="are both mnist"):
        open_suite("clip26", folders.root)
