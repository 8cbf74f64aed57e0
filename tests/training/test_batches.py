"""What a training sees of several sets of shards, captions with probabilities, and images whose colours change."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mode.clip.model import build_model
from mode.data.loading.selection import Pairs
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import build_manifest
from mode.errors import ModeError
from mode.params import ImageParams, IndexParams, MachineParams, ModelParams, SourceParams, TrainingParams
from mode.paths import CHECKPOINT
from mode.roles import SEED
from mode.training import batches as batches_module
from mode.training.batches import Batches, Images, stream_of
from mode.training.distribution import process_group
from mode.training.loop import Interrupted, Metrics, TrainResult, train
from mode.training.plan import Training, make_plan

CAPTIONS = {"caption": 0.25, "synthetic": 0.75}
#: Twelve images of the web and four of one's own.
SETS = {"web": 0.5, "own": 2.0}
RECIPE = TrainingParams(epochs=3, seed_epochs=2, epoch_samples=28, batch_size=7, warmup=0, lr=1e-3)
IMAGE = ImageParams(
    size=32, crop_scale=0.5, crop_ratio=(0.5, 2.0), color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_prob=0.8,
    gray_scale_prob=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    random = np.random.default_rng(0)
    for name, count in {"web": 12, "own": 4}.items():
        (root / name).mkdir()
        with tarfile.open(root / name / "0.tar", "w") as tar:
            for number in range(count):
                file = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (40, 36, 3), np.uint8)).save(file, "PNG")
                texts = {"caption": f"{name} {number}", "synthetic": [f"a {name} thing", f"number {number}"]}
                for suffix, content in (("png", file.getvalue()), ("json", json.dumps(texts).encode())):
                    member = tarfile.TarInfo(f"{number:03}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return root


def training(root: Path, model: ModelParams, image: ImageParams = IMAGE, **source: Any) -> Training:
    manifest = build_manifest(SourceParams(**{"shards": SETS, "captions": CAPTIONS, **source}), root)
    build_index(manifest, root, root / "index", IndexParams(), workers=1)
    index = PairIndex.load(root / "index")
    assert index.factor is not None
    pairs = Pairs.of(np.arange(len(index)), index.image, index.factor[index.file[:]])
    plan = make_plan(SEED, pairs, RECIPE, index.images)
    return Training(plan, index, model, image, RECIPE, random_seed=3)


def test_the_stream_has_the_factors_and_probabilities_of_the_source(root: Path, vit: ModelParams) -> None:
    made = training(root, vit)
    stream = stream_of(made)
    assert stream.images_per_pass == 12 // 2 + 4 * 2
    rows = stream.rows_at(0, 400 * 14)
    images = Counter(made.index.image[rows].tolist())
    assert [images[number] for number in range(16)] == [200] * 12 + [800] * 4
    # Of each image three captions: one of the text, two of the list, which share 0.75.
    shares = np.bincount(rows % 3, minlength=3) / len(rows)
    assert np.abs(shares - [0.25, 0.375, 0.375]).max() < 0.03


def test_all_of_it_is_in_the_fingerprint(root: Path, vit: ModelParams) -> None:
    given: list[dict[str, Any]] = [
        {},
        {"shards": {"web": 0.5, "own": 3.0}},
        {"captions": {"caption": 0.5, "synthetic": 0.5}},
        {"image": IMAGE.model_copy(update={"gray_scale_prob": 0.3})},
        {"image": IMAGE.model_copy(update={"crop_ratio": (0.6, 2.0)})},
    ]
    made = [training(root, vit, **each).fingerprint for each in given]
    assert len(set(made)) == len(made)
    assert training(root, vit).fingerprint == made[0]


def test_what_is_waited_for_is_images_and_words_alone(
    root: Path, vit: ModelParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that images move by 3 seconds, words by 2, and what follows, copies to a GPU among it, by 100."""
    made, clock = training(root, vit), SimpleNamespace(now=0.0)

    def taking(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def slowed(*given: Any, **named: Any) -> Any:
            clock.now += seconds
            return work(*given, **named)

        return slowed

    monkeypatch.setattr(batches_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(batches_module, "augment_batch", taking(100, batches_module.augment_batch))
    monkeypatch.setattr(batches_module, "normalise", taking(100, batches_module.normalise))
    clip = build_model(vit, IMAGE, ["words"], random_seed=0)
    batches = Batches(made, clip, 0, root, MachineParams(device="cpu"), process_group("cpu"))
    monkeypatch.setattr(batches, "_tokens", SimpleNamespace(of=taking(2, batches._tokens.of)))
    loader = batches._loader
    monkeypatch.setattr(batches, "_loader", iter(taking(3, lambda: next(loader)), None))
    for _ in range(2):
        batches.next()
    assert batches.waited == 10
    loader.close()


@pytest.mark.parametrize(("context", "share"), [(4, 1.0), (5, None), (6, 0.0)])
def test_captions_that_fill_the_context_are_told_of_once(
    root: Path, vit: ModelParams, tmp_path: Path, caplog: pytest.LogCaptureFixture, context: int, share: float | None
) -> None:
    """With `<sos>` and `<eos>`, "web 1" and "number 1" have four tokens, "a web thing" has five."""
    assert vit.config is not None
    text = vit.config["text_cfg"] | {"context_length": context}
    made = training(root, vit.model_copy(update={"config": vit.config | {"text_cfg": text}}))
    seen: list[float] = []

    def look(_: int, figures: dict[str, float]) -> None:
        seen.append(figures["train/full_captions"])

    train(made, root, MachineParams(device="cpu"), tmp_path / "checkpoints", look, log_every=1)
    told = [record.message for record in caplog.records if "of the captions fill" in record.message]
    if share is None:  # which of an image's captions a sample takes is drawn
        assert 0 < sum(seen) / len(seen) < 0.6
    else:
        assert set(seen) == {share}
    assert len(told) == (context < 6)
    assert all(f"fill the {context} tokens" in message for message in told)


def test_captions_are_not_counted_where_a_model_does_not_say_where_they_end(
    root: Path, vit: ModelParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "takes_short_texts", lambda _: False)
    seen: list[dict[str, float]] = []
    train(
        training(root, vit), root, MachineParams(device="cpu"), tmp_path / "checkpoints",
        lambda _, figures: seen.append(figures), log_every=1,
    )  # fmt: skip
    assert seen
    assert not any("train/full_captions" in figures for figures in seen)


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_and_resumed_is_uninterrupted(root: Path, vit: ModelParams, tmp_path: Path, workers: int) -> None:
    made = training(root, vit)

    def run(folder: str, stop_after: int | None = None, workers: int = 0) -> TrainResult:
        def look(step: int, _: dict[str, float]) -> None:
            if step == stop_after:
                signal.raise_signal(signal.SIGTERM)

        machine = MachineParams(device="cpu", threads=1, workers=workers)
        return train(made, root, machine, tmp_path / folder, look, log_every=1)

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("broken", stop_after=3)
    resumed = run("broken", workers=workers)
    theirs = whole.clip.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in resumed.clip.model.state_dict().items())
    # And the colours were changed: without, other weights come out.
    made = replace(made, image=ImageParams(size=32, crop_scale=0.5, crop_ratio=(0.5, 2.0)))
    other = run("plain").clip.model.state_dict()
    assert not all(torch.equal(tensor, theirs[name]) for name, tensor in other.items())


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_in_long_ranges_goes_on_exactly_where_it_was(
    root: Path, vit: ModelParams, tmp_path: Path, workers: int
) -> None:
    """Interrupted within a window, and after a kill that has left what it had fetched; nothing is left in the end."""
    recipe = RECIPE.model_copy(update={"read": "sequential", "shuffle_images": 4})
    made = replace(training(root, vit), recipe=recipe)

    def run(folder: str, stop_after: int | None = None, workers: int = 0) -> TrainResult:
        def look(step: int, _: dict[str, float]) -> None:
            assert any((tmp_path / folder / "spool").iterdir())
            if step == stop_after:
                signal.raise_signal(signal.SIGTERM)

        machine = MachineParams(device="cpu", threads=1, workers=workers, cache_mb=0)
        images = Images(spool=tmp_path / folder / "spool")
        result = train(made, root, machine, tmp_path / folder / "checkpoint", look, log_every=1, images=images)
        assert not images.spool or not images.spool.exists()
        return result

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("broken", stop_after=3)
    (tmp_path / "broken/spool").mkdir(exist_ok=True)
    for name in ("0-0-0", "0-1-1.part", "0-2-2"):
        (tmp_path / "broken/spool" / name).write_bytes(b"of a process that was killed")
    resumed = run("broken", workers=workers)
    theirs = whole.clip.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in resumed.clip.model.state_dict().items())
    made = replace(made, recipe=recipe.model_copy(update={"shuffle_images": 2}))
    other = run("less mixed").clip.model.state_dict()
    assert not all(torch.equal(tensor, theirs[name]) for name, tensor in other.items())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_under_the_spool_is_one_line_and_costs_no_step(
    root: Path, vit: ModelParams, tmp_path: Path, disk: Path
) -> None:
    """Others fill it after every step; the checkpoint, on another one, is of the last step that was made."""
    made = replace(training(root, vit), recipe=RECIPE.model_copy(update={"read": "sequential", "shuffle_images": 4}))
    steps: list[int] = []

    def run(folder: str, look: Metrics) -> dict[str, torch.Tensor]:
        machine, images = MachineParams(device="cpu", threads=1, cache_mb=0), Images(spool=disk / "spool")
        return train(made, root, machine, tmp_path / folder, look, log_every=1, images=images).clip.model.state_dict()

    def others_fill(step: int, _: dict[str, float]) -> None:
        steps.append(step)
        with (disk / f"ballast-{step}").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4_096)):
                pass

    whole = run("whole", lambda *_: None)
    with pytest.raises(ModeError, match=rf"{disk}/spool/.*: cannot be written: No space left on device") as told:
        run("full", others_fill)
    assert "\n" not in str(told.value)
    assert not (disk / "spool").exists()
    with safe_open(tmp_path / "full" / CHECKPOINT, "numpy") as file:
        assert json.loads(json.loads(file.metadata()["record"])["state"])["step"] == steps[-1]
    for ballast in disk.glob("ballast*"):
        ballast.unlink()
    resumed = run("full", lambda *_: None)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_a_training_that_does_not_fit_into_its_spool_is_one_line(root: Path, vit: ModelParams, tmp_path: Path) -> None:
    made = replace(training(root, vit), recipe=RECIPE.model_copy(update={"read": "sequential"}))
    # So many workers read ahead through thousands of windows.
    machine, images = MachineParams(device="cpu", workers=2_000, spool_mb=1), Images(spool=tmp_path / "spool")
    with pytest.raises(ModeError, match=r"keeps up to [\d,]+ MiB of images in .*spool, but machine.spool_mb is 1"):
        train(made, root, machine, tmp_path / "checkpoint", images=images)
    assert not (tmp_path / "spool").exists()
