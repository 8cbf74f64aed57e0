"""Task folders damaged in many ways: a task that opens has the images and labels it had, or it is refused in one line.

`pytest tests/trust --seed 7` tries other damages than the fixed ones.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from mode.data.images import UndecodableImage, decode
from mode.errors import ModeError
from mode.evaluation.tasks import open_task
from tests.trust.test_shards import number_in, picture

CASES = 60
COUNT = 30
TEXTS = (
    "classnames.txt",
    "zeroshot_classification_templates.txt",
    "metric.txt",
    "dataset_type.txt",
    "test/nshards.txt",
)


def write_task(folder: Path) -> None:
    """Image n is of class n."""
    (folder / "test").mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for number in range(shard, COUNT, 2):
                for name, content in ((f"{number}.png", picture(number)), (f"{number}.cls", str(number).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    lines = ("\n".join(f"class {n}" for n in range(COUNT)), "{c}\na {c}", "acc1", "classification", "2")
    for name, text in zip(TEXTS, lines, strict=True):
        (folder / name).write_text(text)


def _change(path: Path, change: Callable[[bytearray, random.Random], None], rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        change(content, rng)
    path.write_bytes(content)


def flip(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def zero(content: bytearray, rng: random.Random) -> None:
    begin = rng.randrange(len(content))
    end = min(begin + int(10 ** rng.uniform(0, 4)), len(content))
    content[begin:end] = bytes(end - begin)


def cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def insert(content: bytearray, rng: random.Random) -> None:
    place = rng.randrange(len(content))
    content[place:place] = rng.choice(
        [b"{c:>700000000}", b"\xff", b"\0", b"\n\n", b"{", b"\x1b[2J", b"9" * 5000, bytes(512)]
    )


def twice(content: bytearray, rng: random.Random) -> None:
    content += bytes(content)


def test_damaged_tasks(tmp_path: Path, seed: int) -> None:
    write_task(tmp_path / "whole")
    folder = tmp_path / "task"
    opened = 0
    for case in range(CASES):
        rng = random.Random(f"tasks {seed} {case}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        for _ in range(rng.choice([1, 1, 2])):
            path = folder / rng.choice([*TEXTS, "test/0.tar", "test/1.tar"])
            if rng.random() < 0.1:
                if path.is_file():
                    path.unlink()
                    rng.choice([os.fspath, os.mkfifo, Path.mkdir])(path)
            elif path.is_file():
                _change(path, rng.choice([flip, zero, cut, insert, twice]), rng)
        try:
            task = open_task(folder)
        except ModeError as error:
            lines = str(error).splitlines()
            assert len(lines) == 1, f"seed {seed}, case {case}: {lines}"
            continue
        opened += 1
        prompts = task.prompts
        assert sum(len(text) for each in prompts for text in each) < 10_000_000
        for image, label in zip(task.images, task.labels.tolist(), strict=False):
            try:
                content = image.read()
                number = number_in(content)
            except UndecodableImage:
                continue  # which the evaluation says
            changed = content != picture(int(image.key)) or label != int(image.key)
            assert number == label or changed, f"seed {seed}, case {case}: {image.key}"
            assert decode(content).size
    assert 0 < opened < CASES
