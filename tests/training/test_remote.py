"""Copies of checkpoints at a URL: real file systems of fsspec, one of which fails as servers do."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mode.data.shards import places
from mode.errors import ModeError
from mode.training.remote import RemoteCheckpoints

FINGERPRINT = "0123456789abcdef" * 4


class Failing(MemoryFileSystem):  # type: ignore[misc]
    """A store that answers so many requests with an error first."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures = 0

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        if Failing.failures:
            Failing.failures -= 1
            raise OSError("503 Slow Down")
        super().makedirs(path, exist_ok)


@pytest.fixture(autouse=True)
def _stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fsspec.register_implementation("failing", Failing, clobber=True)
    monkeypatch.setattr(places, "PAUSES", (0.0, 0.0))
    yield
    Failing.store.clear()
    Failing.failures = 0


def copies_at(url: str, minutes: float = 0.0, keep: int = 2) -> RemoteCheckpoints:
    return RemoteCheckpoints(url, "expert-0", FINGERPRINT, minutes, keep)


def written(folder: Path, content: bytes) -> Path:
    """A folder as a training leaves it, with this checkpoint."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / ".writing.1.tmp").mkdir(exist_ok=True)
    (folder / ".writing.1.tmp" / "half").write_bytes(b"half")
    (folder / "checkpoint.safetensors").write_bytes(content)
    (folder / "curve.csv").write_text("12,3.5\n")
    (folder / "model" / "open_clip_config.json").write_text("{}")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_a_copy_comes_back_whole(tmp_path: Path, store: Path) -> None:
    here = written(tmp_path / "here", b"weights")
    copies_at(f"file://{store}/").finish(here, 7)
    there = tmp_path / "there"
    assert copies_at(f"file://{store}").fetch(there) == 7
    expected = {"checkpoint.safetensors": b"weights", "curve.csv": b"12,3.5\n", "model/open_clip_config.json": b"{}"}
    assert files_of(there) == expected
    note = json.loads((store / "expert-0" / FINGERPRINT[:12] / "step-7.json").read_text())
    copy = (store / "expert-0" / FINGERPRINT[:12] / "step-7.tar").read_bytes()
    assert note == {"sha256": sha256(copy).hexdigest(), "bytes": len(copy)}


def test_where_there_is_none_a_training_begins(tmp_path: Path, store: Path) -> None:
    assert copies_at(f"file://{store}").fetch(tmp_path / "there") is None
    assert not (tmp_path / "there").exists()


def test_so_many_stay_as_are_to_be_kept(tmp_path: Path, store: Path) -> None:
    here, copies = written(tmp_path / "here", b""), copies_at(f"file://{store}", keep=2)
    for step in (9, 10, 100, 101):  # by number, not by name
        copies.finish(written(here, b"%d" % step), step)
    left = sorted(path.name for path in (store / "expert-0" / FINGERPRINT[:12]).iterdir())
    assert left == ["step-100.json", "step-100.tar", "step-101.json", "step-101.tar"]
    copies.fetch(tmp_path / "there")
    assert (tmp_path / "there" / "checkpoint.safetensors").read_bytes() == b"101"


def test_the_newest_copy_is_that_of_the_last_step_whatever_clocks_say(tmp_path: Path, store: Path) -> None:
    """Of machines that are hours apart: the later a step, the earlier the time of its files."""
    folder = store / "expert-0" / FINGERPRINT[:12]

    def set_times() -> None:
        for path in folder.iterdir():
            hours = int(path.stem.partition("-")[2])
            os.utime(path, (2_000_000_000 - 3_600 * hours,) * 2)

    copies = copies_at(f"file://{store}", keep=2)
    for step in (3, 8, 20):
        copies.finish(written(tmp_path / "here", b"%d" % step), step)
        set_times()
    assert sorted(path.name for path in folder.glob("*.tar")) == ["step-20.tar", "step-8.tar"]
    assert copies_at(f"file://{store}").fetch(tmp_path / "there") == 20


def test_a_copy_is_made_when_it_is_time(tmp_path: Path, store: Path) -> None:
    here = written(tmp_path / "here", b"weights")
    rarely, always = copies_at(f"file://{store}/a", minutes=1000), copies_at(f"file://{store}/b")
    rarely.offer(here, 5)
    always.offer(here, 5)
    for copies in (rarely, always):
        copies.clear()  # waits for what is under way
    assert not (store / "a").exists()
    assert (store / "b" / "expert-0").is_dir()


def test_what_a_copy_that_was_cut_short_has_left_goes_with_a_later_one(tmp_path: Path, store: Path) -> None:
    here, folder = written(tmp_path / "here", b"weights"), store / "expert-0" / FINGERPRINT[:12]
    folder.mkdir(parents=True)
    for step in (3, 8):  # of this training, and of one that has come further
        (folder / f"step-{step}.tar").write_bytes(b"half")
    copies_at(f"file://{store}", keep=2).finish(here, 5)
    assert sorted(path.name for path in folder.iterdir()) == ["step-5.json", "step-5.tar", "step-8.tar"]


def test_a_last_copy_is_waited_for_so_long(tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pipe in its place waits for one who reads; the copy before stands."""
    here, copies, folder = written(tmp_path / "here", b"5"), copies_at(f"file://{store}"), store / "expert-0"
    copies.finish(here, 5)
    pipe = folder / FINGERPRINT[:12] / "step-6.tar"
    os.mkfifo(pipe)
    copies.finish(written(here, b"6"), 6, until=time.monotonic())
    assert "expert-0: no time was left to copy step 6" in caplog.text
    assert copies_at(f"file://{store}").fetch(tmp_path / "there") == 5
    pipe.read_bytes()  # so that the thread ends


def test_what_goes_on_is_copied_at_the_first_checkpoint(tmp_path: Path, store: Path) -> None:
    here, copies = written(tmp_path / "here", b"weights"), copies_at(f"file://{store}", minutes=1000, keep=5)
    copies.catch_up()
    copies.offer(here, 5)
    copies.finish(here, 6)  # waits for both
    copies.offer(here, 7)
    copies.finish(here, 8)
    steps = {path.stem for path in (store / "expert-0" / FINGERPRINT[:12]).iterdir()}
    assert steps == {"step-5", "step-6", "step-8"}


def test_what_is_replaced_meanwhile_is_copied_as_it_was(tmp_path: Path, store: Path) -> None:
    here, copies = written(tmp_path / "here", b"old"), copies_at(f"file://{store}")
    copies.offer(here, 5)
    (tmp_path / "new").write_bytes(b"newer and longer")
    (tmp_path / "new").rename(here / "checkpoint.safetensors")
    copies.finish(here, 6)
    for step, content in ((5, b"old"), (6, b"newer and longer")):
        with tarfile.open(store / "expert-0" / FINGERPRINT[:12] / f"step-{step}.tar") as tar:
            member = tar.extractfile("checkpoint.safetensors")
            assert member is not None
            assert member.read() == content


def damage(copy: Path, how: str) -> None:
    note = copy.with_suffix(".json")
    match how:
        case "cut short":
            copy.write_bytes(copy.read_bytes()[:-512])
        case "a bit flipped":
            content = bytearray(copy.read_bytes())
            content[600] ^= 1
            copy.write_bytes(content)
        case "without its note":
            note.unlink()
        case "gone":
            copy.unlink()
        case "a note that is none":
            note.write_text("[1, 2")
        case "a note of something else":
            note.write_text('{"step": 7}')
        case _:
            kinds = {"a link": tarfile.SYMTYPE, "a device": tarfile.CHRTYPE}
            names = {"outside": "../outside", "at the root": str(copy.parent.parent / "outside")}
            member = tarfile.TarInfo(names.get(how, "checkpoint.safetensors"))
            member.type, member.linkname = kinds.get(how, tarfile.REGTYPE), "/etc/passwd"
            made = io.BytesIO()
            with tarfile.open(fileobj=made, mode="w") as tar:
                for _ in range(2 if how == "twice" else 1):
                    tar.addfile(member)
            copy.write_bytes(made.getvalue())
            digest = sha256(made.getvalue()).hexdigest()
            note.write_text(json.dumps({"sha256": digest, "bytes": len(made.getvalue())}))


DAMAGES = ["cut short", "a bit flipped", "gone", "a note that is none", "a note of something else", "a link",
           "a device", "outside", "at the root", "twice"]  # fmt: skip


@pytest.mark.parametrize("how", [*DAMAGES, "without its note"])
def test_a_damaged_copy_is_passed_over(tmp_path: Path, store: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    here, copies = written(tmp_path / "here", b"5"), copies_at(f"file://{store}")
    copies.finish(here, 5)
    copies.finish(written(here, b"6"), 6)
    damage(store / "expert-0" / FINGERPRINT[:12] / "step-6.tar", how)
    there = tmp_path / "there"
    with caplog.at_level(logging.WARNING):
        assert copies.fetch(there) == 5
    assert files_of(there)["checkpoint.safetensors"] == b"5"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (how != "without its note")
    assert not [*tmp_path.rglob("outside")]


@pytest.mark.parametrize("how", DAMAGES)
def test_copies_that_are_all_damaged_are_no_reason_to_begin_anew(tmp_path: Path, store: Path, how: str) -> None:
    copies = copies_at(f"file://{store}")
    copies.finish(written(tmp_path / "here", b"5"), 5)
    damage(store / "expert-0" / FINGERPRINT[:12] / "step-5.tar", how)
    with pytest.raises(ModeError, match=r"1 copies of checkpoints, none whole \(remove them to start again\)"):
        copies.fetch(tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_store_that_fails_costs_a_warning_and_is_asked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here, copies = written(tmp_path / "here", b"weights"), copies_at("failing://store")
    Failing.failures = 3  # all attempts of the first copy
    with caplog.at_level(logging.WARNING):
        copies.finish(here, 5)
    assert "step 5 was not copied: failing://store/expert-0/0123456789ab: 503 Slow Down" in caplog.text
    copies.finish(here, 6)
    assert copies.fetch(tmp_path / "there") == 6


@pytest.mark.parametrize("url", ["nosuch://store", "s3-but-not-really://x"])
def test_an_address_that_nobody_knows_is_refused_at_the_start(tmp_path: Path, url: str) -> None:
    with pytest.raises(ModeError, match="install what fsspec needs for it"):
        copies_at(url).fetch(tmp_path)


def test_a_finished_training_leaves_the_copies_of_others(tmp_path: Path, store: Path) -> None:
    here = written(tmp_path / "here", b"weights")
    mine, other = copies_at(f"file://{store}"), RemoteCheckpoints(f"file://{store}", "expert-0", "f" * 64, 0.0, 2)
    for copies in (mine, other):
        copies.finish(here, 5)
    mine.clear()
    mine.clear()  # nothing there: nothing to say
    assert [path.name for path in (store / "expert-0").iterdir()] == ["f" * 12]
