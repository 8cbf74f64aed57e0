"""What is done beside a training leaves no trace in the model, is done once, and costs the training nothing."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional as F

from mode.clip.model import Clip, build_model, load_model
from mode.data.loading.selection import Pairs
from mode.data.shards.index import PairIndex
from mode.errors import ModeError
from mode.params import ImageParams, KeepParams, MachineParams, ModelParams, TrainingParams
from mode.roles import DENSE
from mode.training import loop
from mode.training.beside import Beside, HeldOut, KeptModels, for_inference
from mode.training.loop import Interrupted, TrainResult, train
from mode.training.plan import Training, make_plan
from tests.adapters import write_adapter, write_base

IMAGE = ImageParams(size=32, flip=True, shift=2)
RECIPE: dict[str, Any] = {"epoch_samples": 24, "epochs": 6, "seed_epochs": 4, "batch_size": 12, "lr": 2e-3, "warmup": 2}


class Looks:
    """Looks at the model and remembers when; what is remembered outlives an interruption."""

    def __init__(self, act: Callable[[int, Clip], None] = lambda *_: None) -> None:
        self.steps: list[int] = []
        self._act = act

    def due(self, step: int) -> bool:
        return step % 4 == 0

    def done(self, step: int) -> bool:
        return step in self.steps

    def do(self, step: int, clip: Clip) -> dict[str, float]:
        self.steps.append(step)
        with for_inference(clip) as model:
            model.model.encode_image(torch.randn(5, 3, 32, 32))  # would move batch norm's statistics
            torch.rand(3)
            self._act(step, model)
        return {"looked": float(step)}


class Bench:
    def __init__(self, project: Path, index: PairIndex, model: ModelParams, folder: Path) -> None:
        self.project, self.index, self.model, self.folder = project, index, model, folder

    def training(self, **settings: Any) -> Training:
        recipe = TrainingParams(**{**RECIPE, **settings})
        plan = make_plan(DENSE, Pairs.of(np.arange(len(self.index)), self.index.image), recipe, self.index.images)
        return Training(plan, self.index, self.model, IMAGE, recipe, random_seed=3)

    def train(
        self, *beside: Beside, name: str = "plain", on_step: Callable[[int], None] = lambda _: None, **settings: Any
    ) -> TrainResult:
        return train(
            self.training(**settings),
            self.project,
            MachineParams(device="cpu", checkpoint_minutes=100.0),
            self.folder / name,
            on_metrics=lambda step, _: on_step(step),
            log_every=1,
            beside=beside,
        )


@pytest.fixture
def bench(project: Path, index: PairIndex, resnet: ModelParams, tmp_path: Path) -> Bench:
    return Bench(project, index, resnet, tmp_path)


def assert_equal(ours: TrainResult, theirs: TrainResult) -> None:
    mine, others = ours.clip.model.state_dict(), theirs.clip.model.state_dict()
    assert [name for name in mine if not torch.equal(mine[name], others[name])] == []
    assert ours.clip.card["loss"] == theirs.clip.card["loss"]


def test_a_training_that_is_looked_at_is_the_same_bit_by_bit(bench: Bench) -> None:
    looks = Looks()
    assert_equal(bench.train(looks, name="seen"), bench.train())
    assert looks.steps == [0, 4, 8, 12]


@pytest.mark.parametrize("step", [3, 4, 11, 12])
def test_interrupted_anywhere_each_look_is_made_once(bench: Bench, step: int) -> None:
    """The figures of a step are reported after the look for signals, so that one step more is made."""
    looks = Looks()

    def interrupt(at: int) -> None:
        if at == step - 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        bench.train(looks, name="seen", on_step=interrupt)
    assert looks.steps == [at for at in (0, 4, 8, 12) if at < step]
    resumed = bench.train(looks, name="seen")
    assert looks.steps == [0, 4, 8, 12]
    assert_equal(resumed, bench.train())


def test_a_look_that_fails_is_told_and_stops_nothing(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    def fail(step: int, _: Clip) -> None:
        if step == 8:
            raise ModeError("a task has gone")

    with caplog.at_level(logging.WARNING):
        assert_equal(bench.train(Looks(fail), name="seen"), bench.train())
    told = [record.getMessage() for record in caplog.records]
    assert [line for line in told if "of the captions fill" not in line] == ["dense, step 8: a task has gone"]


def test_its_time_is_not_the_trainings(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])

    def take_long(_: int, __: Clip) -> None:
        clock[0] += 1000.0

    def take_a_second(_: int) -> None:
        clock[0] += 1.0

    card = bench.train(Looks(take_long), name="seen", on_step=take_a_second).clip.card
    assert card["own"]["seconds"] == 11.0  # the last of twelve comes after the last step


def test_modes_and_random_state_come_back_also_after_an_error(resnet: ModelParams) -> None:
    clip = build_model(resnet, IMAGE, ["a red thing"], random_seed=0)
    clip.model.train()
    clip.model.visual.layer1.eval()  # as a part that is not trained
    modes = {name: module.training for name, module in clip.model.named_modules()}
    before = torch.get_rng_state()

    def look() -> None:
        with for_inference(clip) as seen:
            assert seen is clip
            assert not any(module.training for module in clip.model.modules())
            torch.rand(5)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        look()
    assert {name: module.training for name, module in clip.model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_is_looked_at_in_float32(vit: ModelParams) -> None:
    clip = build_model(vit, IMAGE, ["a red thing"], random_seed=0, precision="bf16")
    with for_inference(clip) as seen:
        assert {parameter.dtype for parameter in seen.model.parameters()} == {torch.float32}
        assert seen.model.encode_image(torch.zeros(1, 3, 32, 32)).dtype == torch.float32
    assert clip.model.visual.conv1.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("count", "batches"), [(30, [12, 12]), (24, [12, 12]), (7, [7])])
def test_held_out_loss_is_the_contrastive_loss_of_whole_batches(bench: Bench, count: int, batches: list[int]) -> None:
    """Against cross-entropy of rows and columns, written out."""
    training, rows = bench.training(), np.arange(count)[::-1].copy()
    clip = build_model(bench.model, IMAGE, ["a red thing"], random_seed=0)
    clip.model.eval()
    found = HeldOut(training, rows, bench.project)
    assert len(found) == count
    preprocess = open_clip.image_transform(32, is_train=False, mean=IMAGE.mean, std=IMAGE.std)
    losses, start = [], 0
    for size in batches:
        some = rows[start : start + size]
        start += size
        images = torch.stack([preprocess(picture(bench, row)) for row in some])
        with torch.no_grad():
            ours = F.normalize(clip.model.encode_image(images), dim=-1)
            theirs = F.normalize(clip.model.encode_text(clip.tokenizer(bench.index.captions(some))), dim=-1)
            scores = clip.model.logit_scale.exp() * ours @ theirs.T
            own = torch.arange(size)
            losses.append(float(F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2)
    assert found.loss(clip, batch_size=5) == pytest.approx(np.mean(losses), rel=1e-3)


def picture(bench: Bench, row: int) -> Any:
    from io import BytesIO

    from PIL import Image

    index = bench.index
    with (bench.project / index.path(index.file[row])).open("rb") as file:
        file.seek(int(index.offset[row]))
        return Image.open(BytesIO(file.read(int(index.length[row])))).convert("RGB")


def test_kept_models_open_as_finished_ones(bench: Bench) -> None:
    kept = KeptModels(bench.training(), KeepParams(every=5), bench.folder / "kept")
    copies = {}

    def copy(step: int, clip: Clip) -> None:
        copies[step] = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}

    looks = Looks(copy)
    looks.due = lambda step: step in (5, 10)  # type: ignore[method-assign]
    assert_equal(bench.train(kept, looks, name="seen"), bench.train())
    assert sorted(folder.name for folder in (bench.folder / "kept").iterdir()) == ["10", "5"]
    for step, weights in copies.items():
        folder = bench.folder / "kept" / str(step)
        theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        ours = load_model(folder)
        assert ours.card["unfinished"] == {"step": step, "of": 12}
        for name, tensor in weights.items():
            assert torch.equal(ours.model.state_dict()[name], tensor)
            assert torch.equal(theirs.state_dict()[name], tensor)


def test_so_many_are_kept_and_none_of_another_configuration(bench: Bench) -> None:
    kept = KeptModels(bench.training(), KeepParams(every=2, last=2), bench.folder / "kept")
    bench.train(kept, name="seen")
    assert sorted(folder.name for folder in (bench.folder / "kept").iterdir()) == ["10", "12"]
    assert (kept.done(10), kept.done(8)) == (True, False)
    other = KeptModels(bench.training(lr=1e-3), KeepParams(every=8), bench.folder / "kept")
    assert not other.done(10)
    bench.train(other, name="other", lr=1e-3)
    assert [folder.name for folder in (bench.folder / "kept").iterdir()] == ["8"]


def test_a_kept_model_of_an_adapter_is_whole(bench: Bench) -> None:
    """Its base does not lie beside it."""
    seed = write_base(bench.folder / "seed", bench.model)
    clip = write_adapter(bench.folder / "expert", seed)
    KeptModels(bench.training(), KeepParams(every=4), bench.folder / "kept").do(4, clip)
    kept = load_model(bench.folder / "kept/4")
    assert kept.adapter is None
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = clip.model.encode_image(images), kept.model.eval().encode_image(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
