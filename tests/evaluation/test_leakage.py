"""Copies of test images among the training images are found, and nothing else."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mode.data.leakage import Leak, Leakage, TaskLeakage
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import build_manifest
from mode.data.shards.reading import ImageFiles
from mode.errors import ModeError
from mode.evaluation.leakage import find_leakage
from mode.evaluation.tasks import Task, open_task
from mode.files import add_to_tar
from mode.params import IndexParams, SourceParams


def scene(number: int, size: int = 64) -> Image.Image:
    """A picture of soft blobs, another one for each number."""
    noise = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    blurred = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(size / 12))
    pixels = np.asarray(blurred, np.float32)
    return Image.fromarray(((pixels - pixels.min()) / np.ptp(pixels) * 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "png", **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def a_task(folder: Path, images: list[Image.Image]) -> Task:
    (folder / "test").mkdir(parents=True)
    (folder / "test/nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("blob\nline\n")
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n")
    with tarfile.open(folder / "test/0.tar", "w") as tar:
        for number, image in enumerate(images):
            add_to_tar(tar, f"t{number}.png", encoded(image))
            add_to_tar(tar, f"t{number}.cls", b"0")
    return open_task(folder)


def an_index(root: Path, name: str, images: dict[str, bytes]) -> Path:
    (root / name).mkdir()
    with tarfile.open(root / name / "0.tar", "w") as tar:
        for key, content in images.items():
            add_to_tar(tar, f"{key}.jpg", content)
            add_to_tar(tar, f"{key}.txt", b"a blob")
            add_to_tar(tar, f"{key}.json", b'{"caption": "another caption of the same blob"}')
    manifest = build_manifest(SourceParams(shards=name), root)
    build_index(manifest, root, root / f"{name}-index", IndexParams(check_images=False, max_bad_share=1.0))
    return root / f"{name}-index"


def test_copies_in_another_size_format_or_brightness_are_found_and_nothing_else(tmp_path: Path) -> None:
    task = a_task(tmp_path / "blobs", [scene(number) for number in range(8)])
    plain = a_task(tmp_path / "plain", [Image.new("RGB", (64, 64), (200, 200, 200))])
    images = {
        "jpeg": encoded(scene(0), "jpeg", quality=50),
        "small": encoded(scene(1).resize((32, 32), Image.Resampling.BICUBIC)),
        "grey": encoded(scene(2).convert("L"), "jpeg"),
        "dark": encoded(scene(3).point([int(0.7 * value) for value in range(256)] * 3)),
        "same": encoded(scene(3)),
        **{f"other-{number}": encoded(scene(number)) for number in range(100, 130)},
        "black": encoded(Image.new("RGB", (64, 64))),
        "light": encoded(Image.new("RGB", (64, 64), (201, 200, 200))),
        "broken": b"no image",
    }
    sources = {"base": an_index(tmp_path, "base", images), "more": an_index(tmp_path, "more", {"m": encoded(scene(7))})}
    found = find_leakage(sources, tmp_path, [task, plain], workers=1)
    where = {(leak.source, leak.key): (leak.task, leak.image) for leak in found.leaks}
    assert where == {
        ("base", "jpeg"): ("blobs", "t0"),
        ("base", "small"): ("blobs", "t1"),
        ("base", "grey"): ("blobs", "t2"),
        ("base", "dark"): ("blobs", "t3"),
        ("base", "same"): ("blobs", "t3"),
        ("base", "light"): ("plain", "t0"),
        ("more", "m"): ("blobs", "t7"),
    }
    assert found.images == {"base": len(images), "more": 1}
    assert {name: (len(of.leaked), of.images) for name, of in found.tasks.items()} == {"blobs": (5, 8), "plain": (1, 1)}
    assert {leak.file for leak in found.leaks} == {"base/0.tar", "more/0.tar"}


def test_any_number_of_processes_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = a_task(tmp_path / "blobs", [scene(number) for number in range(3)])
    sources = {"base": an_index(tmp_path, "base", {f"k{number}": encoded(scene(number)) for number in range(1, 9)})}
    alone = find_leakage(sources, tmp_path, [task], workers=1)
    monkeypatch.setattr("mode.evaluation.leakage._BLOCK", 3)
    assert find_leakage(sources, tmp_path, [task], workers=2) == alone
    assert [leak.key for leak in alone.leaks] == ["k1", "k2"]


def test_the_index_leaves_out_what_was_found(tmp_path: Path) -> None:
    task = a_task(tmp_path / "blobs", [scene(number) for number in range(2)])
    folder = an_index(tmp_path, "base", {f"k{number}": encoded(scene(number)) for number in range(5)})
    found = find_leakage({"base": folder}, tmp_path, [task], workers=1)
    manifest = build_manifest(SourceParams(shards="base"), tmp_path)
    report = build_index(manifest, tmp_path, folder, IndexParams(), unwanted=found.keys("base"))
    assert (report.images, report.dropped, report.bad) == (3, 2, 0)
    index = PairIndex.load(folder)
    assert index.keys(np.arange(len(index))) == ["k2", "k3", "k4"]
    files = ImageFiles(index, tmp_path)
    assert [files.read(row) for row in range(3)] == [encoded(scene(number)) for number in (2, 3, 4)]
    assert find_leakage({"base": folder}, tmp_path, [task], workers=1).leaks == []


def test_images_of_a_table_are_left_out_too(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encoded(scene(number)))
    lines = ["image,caption", *(f"{number}.png,a blob" for number in range(4))]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    manifest = build_manifest(SourceParams(shards="pairs.csv"), tmp_path)
    build_index(manifest, tmp_path, tmp_path / "index", IndexParams())
    task = a_task(tmp_path / "blobs", [scene(1)])
    found = find_leakage({"base": tmp_path / "index"}, tmp_path, [task], workers=1)
    report = build_index(manifest, tmp_path, tmp_path / "index", IndexParams(), unwanted=found.keys("base"))
    assert (report.images, report.dropped) == (3, 1)
    assert PairIndex.load(tmp_path / "index").files == ["0.png", "2.png", "3.png"]


def test_what_was_found_survives_the_file(tmp_path: Path) -> None:
    leak = Leak(source="base", file="a.tar", key="k", task="t", image="i", distance=2)
    found = Leakage(distance=4, images={"base": 3}, leaks=[leak])
    found.save(tmp_path / "leakage.json")
    assert Leakage.load(tmp_path / "leakage.json") == found
    assert found.keys("base") == {("a.tar", "k")}
    assert found.keys("other") == frozenset()


def test_a_search_after_images_were_left_out_keeps_them_in_the_list() -> None:
    first, second = (Leak(source="base", file="a.tar", key=key, task="t", image=key, distance=2) for key in "ab")
    before = Leakage(distance=4, tasks={"t": TaskLeakage(images=9, leaked=["a"])}, leaks=[first])
    now = Leakage(distance=4, tasks={"t": TaskLeakage(images=9, leaked=["b"])}, leaks=[second])
    both = now.with_dropped(before)
    assert both.keys("base") == {("a.tar", "a"), ("a.tar", "b")}
    assert both.tasks["t"].leaked == ["a", "b"]


@pytest.mark.parametrize("content", ["", "[1]", '{"leaks": [{"file": 3}]}', "[" * 10_000])
def test_what_is_no_such_file_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "leakage.json").write_text(content)
    with pytest.raises(ModeError, match="`mode leakage` writes it anew") as refused:
        Leakage.load(tmp_path / "leakage.json")
    assert "\n" not in str(refused.value)
    with pytest.raises(ModeError, match="missing"):
        Leakage.load(tmp_path / "none.json")
