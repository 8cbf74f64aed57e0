"""The reader of task folders: what it reads, and one clear line for everything it refuses."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mode.errors import ModeError
from mode.evaluation.tasks import open_task, open_tasks

LABELS = [0, 3, 5, 1, 2, 4, 0]


def add(tar: Path, members: list[tuple[str, bytes]]) -> None:
    """Write a tar anew."""
    with tarfile.open(tar, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "png")
    return stream.getvalue()


def test_classification(folders: Any) -> None:
    task = open_task(folders.classification("colours", LABELS))
    assert (task.name, task.kind, task.metric) == ("colours", "classification", "acc1")
    assert task.classes == ("red", "green", "blue", "dark grey", "white", "yellow")
    assert task.labels.tolist() == LABELS
    assert task.labels.dtype == np.int64
    assert task.prompts[3] == ["a photo of dark grey", "dark grey", "the colour dark grey on paper"]
    for image in task.images:
        assert Image.open(io.BytesIO(image.read())).size == (40, 36)


def test_shards_follow_one_another_in_their_numbers_order(folders: Any) -> None:
    """With 11 shards, shard 10 comes after shard 9, not after shard 1."""
    task = open_task(folders.classification("colours", [number % 6 for number in range(23)], shards=11))
    assert [image.key for image in task.images] == [f"s{n:05d}" for shard in range(11) for n in range(shard, 23, 11)]
    assert task.labels.tolist() == [int(image.key[1:]) % 6 for image in task.images]


def test_retrieval(folders: Any) -> None:
    task = open_task(folders.retrieval("captions", 9))
    assert (task.kind, task.metric, len(task.images)) == ("retrieval", "recall", 9)
    assert sorted(set(task.owners.tolist())) == list(range(9))
    assert len(task.texts) == len(task.owners) > 9
    assert task.prompts == [[text] for text in task.texts]


def test_keys_are_split_at_the_first_dot_and_folders_belong_to_them(folders: Any) -> None:
    """As webdataset does it; other members of a key are passed over."""
    folder = folders.classification("colours", [0])
    add(
        folder / "test" / "0.tar",
        [("a/1.PNG", png()), ("a/1.cls", b"2\n"), ("a/1.meta.json", b"{}"), ("b/1.png", png()), ("b/1.cls", b" 4"),
         ("readme", b"?")],
    )  # fmt: skip
    task = open_task(folder)
    assert [image.key for image in task.images] == ["a/1", "b/1"]
    assert task.labels.tolist() == [2, 4]


@pytest.mark.parametrize("metric", ["acc1", "mean_per_class_recall", "mean_acc1_acc5"])
def test_the_metric_comes_from_the_file_and_the_argument_goes_before_it(folders: Any, metric: str) -> None:
    folder = folders.classification("colours", LABELS)
    assert open_task(folder, metric).metric == metric
    (folder / "metric.txt").write_text(f"{metric}\n")
    assert open_task(folder).metric == metric
    assert open_task(folder, "acc1").metric == "acc1"
    assert open_tasks([folder], {"colours": "acc1"})[0].metric == "acc1"


class TestFingerprint:
    def test_is_of_the_content_not_of_the_place(self, folders: Any) -> None:
        one, two = (folders.classification(name, LABELS) for name in ("one", "two"))
        assert open_task(one).fingerprint == open_task(two).fingerprint

    @pytest.mark.parametrize(
        "change",
        [
            {"labels": LABELS[:-1]},
            {"templates": ["a photo of {c}"]},
            {"classes": ["red", "green", "blue", "gray", "white", "yellow"]},
        ],
    )
    def test_notices(self, folders: Any, change: dict[str, Any]) -> None:
        plain = open_task(folders.classification("plain", LABELS))
        changed = open_task(folders.classification("changed", change.pop("labels", LABELS), **change))
        assert plain.fingerprint != changed.fingerprint

    def test_notices_metric_and_captions(self, folders: Any) -> None:
        folder = folders.classification("plain", LABELS)
        assert open_task(folder).fingerprint != open_task(folder, "mean_per_class_recall").fingerprint
        one, two = folders.retrieval("r1", 5, seed=1), folders.retrieval("r2", 5, seed=2)
        assert open_task(one).fingerprint != open_task(two).fingerprint


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, content: str | bytes) -> Callable[[Path], None]:
    encoded = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(encoded) and None


def _cut(folder: Path) -> None:
    tar = folder / "test" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:1500])


def _pipe(name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return replace


def _hole(folder: Path) -> None:
    """A header zeroed: that used to be the end."""
    tar = folder / "test" / "0.tar"
    content = tar.read_bytes()
    place = content.index(b"s00002.cls")
    tar.write_bytes(content[:place] + bytes(512) + content[place + 512 :])


def _members(*members: tuple[str, bytes]) -> Callable[[Path], None]:
    return lambda folder: add(folder / "test" / "0.tar", list(members))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("classnames.txt"), r"classnames.txt: missing: the task has no class names"),
        (_write("classnames.txt", ""), r"classnames.txt: empty: the task has no class names"),
        (_write("classnames.txt", "red\n"), r"'red' is the only class, so that .*needs two classes or more"),
        (_write("classnames.txt", "red\n\nblue\n"), r"classnames.txt: line 2 is blank"),
        (_write("classnames.txt", b"caf\xe9\n"), r"classnames.txt: not UTF-8"),
        (_write("classnames.txt", "red\ngreen\n"), r"label [345] is out of range .*2 classes"),
        (_remove("zeroshot_classification_templates.txt"), r"templates.txt: missing: the task has no prompt templates"),
        (_write("zeroshot_classification_templates.txt", "a {c}\na photo\n"), r"line 2: 'a photo' is no template"),
        (_write("zeroshot_classification_templates.txt", "a {c} {d}"), r"line 1: .* is no template"),
        (_write("zeroshot_classification_templates.txt", "{c.x}"), r"line 1: .* is no template"),
        (_write("zeroshot_classification_templates.txt", "{c:>700000000}"), r"line 1: '{c:>700000000}' is no template"),
        (_write("zeroshot_classification_templates.txt", "{c!r} {c}"), r"line 1: .* is no template"),
        (_write("zeroshot_classification_templates.txt", "{{c}}"), r"line 1: .* is no template"),
        (_write("classnames.txt", b"a" * (2**24 + 1)), r"classnames.txt: not a file of at most 16 MiB"),
        (_pipe("classnames.txt"), r"classnames.txt: not a file"),
        (_write("test/nshards.txt", "1" * 5000), r"nshards.txt: '1{40}' is not a number"),
        (_members(("a.png", b"?"), ("a.cls", b"1" * 5000)), r"a.cls: b'1{20}' is not a label"),
        (_members(("a\x1b[2J\n.png", b"?")), r"image a\\x1b\[2J\\n has no"),
        (_hole, r"0.tar: damaged tar: "),
        (_write("dataset_type.txt", "multilabel"), r"dataset_type.txt: 'multilabel' \(it may be"),
        (_write("metric.txt", "f1"), r"metric.txt: unknown metric 'f1' \(it may be acc1"),
        (_write("metric.txt", "roc_auc"), r"roc_auc needs two classes"),
        (_remove("test/nshards.txt"), r"nshards.txt: missing"),
        (_write("test/nshards.txt", "one"), r"nshards.txt: 'one' is not a number"),
        (_write("test/nshards.txt", "2"), r"1.tar: missing, but test/nshards.txt counts it \(fetch it again\)"),
        (_write("test/nshards.txt", "0"), r"the task has no image"),
        (_members(), r"the task has no image"),
        (_members(("a.png", b"?")), r"0.tar: image a has no a.cls"),
        (_members(("a.cls", b"0")), r"0.tar: a.cls has no image"),
        (_members(("a.png", b"?"), ("a.cls", b"dog")), r"a.cls: b'dog' is not a label"),
        (_members(("a.png", b"?"), ("a.cls", b"-1")), r"label -1 is out of range"),
        (_members(("a.png", b"?"), ("a.cls", b"0"), ("a.png", b"?")), r"a.png is there twice"),
        (_cut, r"0.tar: damaged tar: "),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_classification_task(folders: Any, damage: Callable[[Path], None], message: str) -> None:
    folder = folders.classification("colours", LABELS)
    damage(folder)
    with pytest.raises(ModeError, match=message) as error:
        open_task(folder)
    assert "\n" not in str(error.value)
    assert "colours" in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_members(("a.png", b"?"), ("a.txt", b" \n \n")), r"a.txt has no caption"),
        (_members(("a.png", b"?"), ("a.txt", b"")), r"a.txt has no caption"),
        (_members(("a.png", b"?"), ("a.txt", b"\xff")), r"a.txt is not UTF-8"),
        (_members(("a.png", b"?"), ("a.cls", b"0")), r"image a has no a.txt"),
    ],
)
def test_what_is_wrong_with_a_retrieval_task(folders: Any, damage: Callable[[Path], None], message: str) -> None:
    folder = folders.retrieval("captions", 2)
    damage(folder)
    with pytest.raises(ModeError, match=message):
        open_task(folder)


def test_which_folders(folders: Any, tmp_path: Path) -> None:
    with pytest.raises(ModeError, match=r"no such task folder \(check the path\)"):
        open_task(tmp_path / "nowhere")
    with pytest.raises(ModeError, match="no task to evaluate"):
        open_tasks([])
    one, two = folders.classification("a/colours", LABELS), folders.classification("b/colours", LABELS)
    with pytest.raises(ModeError, match="two tasks are called 'colours'"):
        open_tasks([one, two])
