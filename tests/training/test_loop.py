from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from mode.checksums import write_manifest
from mode.clip.folder import WEIGHTS
from mode.clip.lora import base_state, delta_layers, delta_of, own_tensors
from mode.clip.model import load_model, load_models
from mode.data.loading.selection import Pairs
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import build_manifest
from mode.ensemble.merge import merge_models
from mode.errors import ModeError
from mode.files import sha256_of
from mode.integrity import check_parents
from mode.params import (
    AdapterParams,
    ExpertParams,
    ImageParams,
    IndexParams,
    MachineParams,
    ModelParams,
    SourceParams,
    TrainingParams,
    UpdateParams,
)
from mode.roles import TRAINED
from mode.training.checkpoint import open_checkpoint
from mode.training.learner import Towers
from mode.training.loop import Interrupted, TrainResult, train
from mode.training.plan import Training, make_plan
from mode.training.remote import RemoteCheckpoints

IMAGE = ImageParams(size=32, flip=True, shift=2)
SETTINGS: dict[str, Any] = {
    "epoch_samples": 24,
    "epochs": 6,
    "seed_epochs": 4,
    "batch_size": 12,
    "lr": 2e-3,
    "warmup": 2,
}
TWELVE = Pairs.of(np.arange(12), np.arange(12))
MACHINE: dict[str, Any] = {"device": "cpu", "checkpoint_minutes": 100.0}


class Bench:
    """Trains on the little project; every training logs each step's loss."""

    def __init__(self, project: Path, index: PairIndex, model: ModelParams, folder: Path) -> None:
        self.project, self.index, self.model, self.folder = project, index, model, folder

    def train(
        self,
        role: str,
        rows: np.ndarray | None = None,
        on_step: Callable[[int], None] = lambda _: None,
        plan: dict[str, Any] | None = None,
        checkpoints: str = "checkpoints",
        copies: RemoteCheckpoints | None = None,
        **settings: Any,
    ) -> tuple[TrainResult, dict[int, float]]:
        elsewhere = {key: settings.pop(key) for key in list(settings) if key not in TrainingParams.model_fields}
        machine = MachineParams(**{**MACHINE, **elsewhere})
        recipe = TrainingParams(**{**SETTINGS, **settings})
        rows = np.arange(len(self.index)) if rows is None else rows
        made = make_plan(
            next(each for each in TRAINED if each.name == role),
            Pairs.of(rows, self.index.image),
            recipe,
            self.index.images,
            **(plan or {}),
        )
        losses: dict[int, float] = {}

        def on_metrics(step: int, figures: dict[str, float]) -> None:
            losses[step] = figures["train/loss"]
            on_step(step)

        result = train(
            Training(made, self.index, self.model, IMAGE, recipe, random_seed=3),
            self.project,
            machine=machine,
            checkpoint_dir=self.folder / checkpoints,
            on_metrics=on_metrics,
            log_every=1,
            copies=copies,
        )
        return result, losses


@pytest.fixture
def bench(project: Path, index: PairIndex, resnet: ModelParams, tmp_path: Path) -> Bench:
    return Bench(project, index, resnet, tmp_path)


def weights(result: TrainResult) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in result.clip.model.state_dict().items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []


def test_it_learns(bench: Bench) -> None:
    """Sixty images of four plain colours: the loss falls well below that of guessing among twelve."""
    result, losses = bench.train("dense", epochs=40, seed_epochs=30)
    assert len(losses) == 80
    assert losses[80] < 0.75 * np.log(12)
    assert result.clip.card["loss"] == pytest.approx(np.mean(list(losses.values())))


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_seed_then_dense_is_one_dense_training(bench: Bench, schedule: str) -> None:
    straight, all_losses = bench.train("dense", schedule=schedule)
    seed, first_losses = bench.train("seed", schedule=schedule)
    seed.save(bench.folder / "seed")
    dense, last_losses = bench.train("dense", plan={"parent": bench.folder / "seed"}, schedule=schedule)
    assert first_losses | last_losses == all_losses
    assert list(last_losses) == [9, 10, 11, 12]
    assert_equal(weights(dense), weights(straight))


def test_an_expert_goes_on_from_weights_and_moments_of_the_seed(bench: Bench) -> None:
    seed, _ = bench.train("seed")
    seed.save(bench.folder / "seed")
    (bench.folder / "bare").mkdir()
    for file in (bench.folder / "seed").iterdir():
        (bench.folder / "bare" / file.name).write_bytes(file.read_bytes())
    rows = np.arange(0, 60, 3)
    given = {"parent": bench.folder / "seed", "expert": ExpertParams(cluster=1)}
    expert, losses = bench.train("expert", rows, plan=given)
    assert list(losses) == [9, 10, 11, 12]
    card = expert.clip.card
    assert (card["role"], card["cluster"], card["parent"], card["pairs"]) == ("expert", 1, "seed", 20)
    assert card["own"]["samples_seen"] == 48
    assert card["total"]["samples_seen"] == 96 + 48
    assert card["total"]["flops"] == 3 * card["own"]["flops"] > 0
    # Its first step already has the seed's moments: AdamW's step counter goes on.
    parameter = next(iter(expert.optimizer.state.values()))
    assert parameter["step"].item() == 12
    (bench.folder / "bare" / "branch_state.safetensors").unlink()
    with pytest.raises(ModeError, match="not one that others can branch from"):
        bench.train("expert", rows, plan={**given, "parent": bench.folder / "bare"})


def test_a_seed_of_another_length_is_refused(bench: Bench) -> None:
    seed, _ = bench.train("seed")
    seed.save(bench.folder / "seed")
    with pytest.raises(ModeError, match="trained for 8 steps, but this training branches off at 10"):
        bench.train("dense", plan={"parent": bench.folder / "seed"}, seed_epochs=5)


def test_a_trained_folder_predicts_the_same_in_plain_open_clip(bench: Bench) -> None:
    seed, _ = bench.train("seed")
    folder = bench.folder / "seed"
    seed.save(folder)
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red thing", "a blue thing"])
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        ours = load_model(folder).model.eval()
        assert torch.equal(theirs.encode_image(images), ours.encode_image(images))
        assert torch.equal(theirs.encode_text(tokens), ours.encode_text(tokens))
        torch.testing.assert_close(theirs.encode_image(images), seed.clip.model.encode_image(images))
    assert json.loads((folder / "card.json").read_text())["steps"] == [0, 8]
    assert not (bench.folder / "checkpoints" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_resumed_is_uninterrupted(bench: Bench, number: signal.Signals) -> None:
    whole, whole_losses = bench.train("dense")

    def interrupt(step: int) -> None:
        if step == 5:
            signal.raise_signal(number)

    with pytest.raises(Interrupted) as stopped:
        bench.train("dense", on_step=interrupt, checkpoints="broken")
    assert stopped.value.exit_code == 128 + number
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert handlers == (signal.SIG_DFL, signal.default_int_handler)
    resumed, after = bench.train("dense", checkpoints="broken")
    # The figures of a step are reported after the look for signals, so that step 6 was still made.
    assert after == {step: loss for step, loss in whole_losses.items() if step > 6}
    assert_equal(weights(resumed), weights(whole))


def test_a_training_goes_on_from_a_copy_as_if_it_had_never_stopped(bench: Bench, tmp_path: Path) -> None:
    whole, _ = bench.train("dense")
    copies = RemoteCheckpoints(f"file://{tmp_path}/store", "dense", "0" * 64, minutes=1000, keep=1)

    def interrupt(step: int) -> None:
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        bench.train("dense", on_step=interrupt, checkpoints="first machine", copies=copies)
    assert copies.fetch(bench.folder / "second machine") == 6
    resumed, losses = bench.train("dense", checkpoints="second machine")
    assert min(losses) == 7
    assert_equal(weights(resumed), weights(whole))


def test_killed_and_resumed_is_uninterrupted(bench: Bench) -> None:
    """A real process, killed for good between two checkpoints."""
    whole, _ = bench.train("dense", epochs=10, seed_epochs=8)
    script = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from pathlib import Path
import torch
torch.set_num_threads(1)
from mode.data.shards.index import PairIndex
from mode.params import ModelParams
from test_loop import Bench
bench = Bench(Path({str(bench.project)!r}), PairIndex.load(Path({str(bench.project / "index")!r})),
              ModelParams.model_validate_json({bench.model.model_dump_json()!r}), Path({str(bench.folder)!r}))
bench.train("dense", epochs=10, seed_epochs=8, checkpoints="killed", checkpoint_minutes=1e-9,
            on_step=lambda step: print(step, flush=True))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 6:
            process.kill()
            break
    assert process.wait(60) == -signal.SIGKILL
    resumed, losses = bench.train("dense", epochs=10, seed_epochs=8, checkpoints="killed")
    assert 6 <= min(losses) <= 20  # it did not start again
    assert_equal(weights(resumed), weights(whole))


def test_a_loader_process_that_is_killed_is_one_line_and_the_checkpoint_stands(bench: Bench) -> None:
    longer: dict[str, Any] = {"epochs": 10, "seed_epochs": 8}
    whole, _ = bench.train("dense", **longer)

    def kill(step: int) -> None:
        if step == 6:
            for child in psutil.Process().children():
                child.kill()

    with pytest.raises(ModeError, match=r"^a process that reads images has died: DataLoader worker [^\n]*$"):
        bench.train("dense", on_step=kill, checkpoints="killed", checkpoint_minutes=1e-9, workers=2, **longer)
    resumed, losses = bench.train("dense", checkpoints="killed", workers=2, **longer)
    assert 6 <= min(losses) <= 20  # it did not start again
    assert_equal(weights(resumed), weights(whole))


def test_another_configuration_does_not_take_the_checkpoint(bench: Bench) -> None:
    def interrupt(step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        bench.train("dense", on_step=interrupt)
    for other in ({"lr": 1e-3}, {"batch_size": 6}, {"weight_decay": 0.0}):
        with pytest.raises(ModeError, match="made under another configuration"):
            bench.train("dense", **other)
    with pytest.raises(ModeError, match="made under another configuration"):
        bench.train("dense", rows=np.arange(30))
    # Where and how fast it runs is not part of it.
    result, _ = bench.train("dense", cache_mb=0, checkpoint_minutes=3.0)
    assert result.clip.card["own"]["samples_seen"] == 144


def test_a_damaged_checkpoint_is_refused(bench: Bench) -> None:
    (bench.folder / "checkpoints").mkdir()
    (bench.folder / "checkpoints" / "checkpoint.safetensors").write_bytes(b"cut short")
    with pytest.raises(ModeError, match="cannot be read"):
        bench.train("dense")


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(bench: Bench) -> None:
    with pytest.raises(ModeError, match=r"training failed at step \d+: .* at learning rate .*; the last good") as error:
        bench.train("dense", lr=1e30, clip_norm=None, warmup=8, checkpoint_minutes=1e-9)
    assert str(bench.folder / "checkpoints" / "checkpoint.safetensors") in str(error.value)


@dataclass
class ForwardPasses:
    """What forward passes were seen to do.

    Attributes:
        pairs: in each forward pass of both towers.
        computed_in: dtypes that the image tower's convolutions gave.
    """

    pairs: list[int] = field(default_factory=list)
    computed_in: set[torch.dtype] = field(default_factory=set)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.is_meta:  # counting FLOPs
            return
        if isinstance(module, Towers):
            self.pairs.append(len(inputs[0]))
        elif isinstance(module, nn.Conv2d):
            self.computed_in.add(output.dtype)


def observed(bench: Bench, name: str, **settings: Any) -> tuple[TrainResult, list[float], ForwardPasses]:
    """A training of the dense model under observation of its forward passes."""
    seen = ForwardPasses()
    hook = register_module_forward_hook(seen)
    try:
        result, losses = bench.train("dense", checkpoints=name, **settings)
    finally:
        hook.remove()
    return result, list(losses.values()), seen


@pytest.mark.parametrize(
    ("precision", "kept_in", "computed_in"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("amp", torch.float32, torch.bfloat16),
    ],
)
def test_precision_is_that_of_weights_and_activations(
    bench: Bench, vit: ModelParams, precision: str, kept_in: torch.dtype, computed_in: torch.dtype
) -> None:
    bench.model = vit
    _, exact, _ = observed(bench, "exact")
    result, losses, seen = observed(bench, precision, precision=precision)
    assert seen.computed_in == {computed_in}
    result.save(bench.folder / "model")
    stored = load_file(bench.folder / "model" / "open_clip_model.safetensors")
    assert stored["visual.conv1.weight"].dtype == stored["transformer.resblocks.0.mlp.c_fc.weight"].dtype == kept_in
    # What rounding changes grows from step to step.
    assert losses[:9] == pytest.approx(exact[:9], rel=0.05)
    assert (losses == exact) == (precision == "fp32")


def test_accumulation_takes_smaller_forward_passes_to_the_same_weights(bench: Bench, vit: ModelParams) -> None:
    """With a ViT: batch norm sees one pass at a time."""
    bench.model = vit
    whole, expected, one_pass = observed(bench, "whole")
    parts, losses, three_passes = observed(bench, "parts", accumulate=3)
    assert one_pass.pairs == [12] * 12
    assert three_passes.pairs == [4] * (3 * 2) * 12  # each once without and once with gradients
    assert losses == pytest.approx(expected, rel=1e-5)
    theirs = weights(whole)
    for name, tensor in weights(parts).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


def test_the_gradient_is_clipped_to_the_norm_that_is_asked_for(bench: Bench) -> None:
    """A gradient clipped to far below AdamW's eps moves hardly anything."""
    free, losses, _ = observed(bench, "free", clip_norm=None)
    loose, same_losses, _ = observed(bench, "loose", clip_norm=1e6)
    assert losses == same_losses
    assert_equal(weights(free), weights(loose))
    tight, _, _ = observed(bench, "tight", clip_norm=1e-9)
    first, moved = np.log(1 / 0.07), weights(free)["logit_scale"].item()
    assert abs(weights(tight)["logit_scale"].item() - first) < 0.01 * abs(moved - first)


def test_adamw_has_the_numbers_of_the_recipe(bench: Bench) -> None:
    result, _ = bench.train("dense", betas=(0.8, 0.95), eps=1e-5)
    last = result.plan.schedule.rate(result.plan.last_step - 1)
    assert last < SETTINGS["lr"]
    for group in result.optimizer.param_groups:
        assert (*group["betas"], group["eps"], group["lr"]) == (0.8, 0.95, 1e-5, last)


def test_weight_decay_shrinks_matrices_alone(bench: Bench) -> None:
    """A gradient of nothing (see above) leaves only the decay: what has one dimension is not decayed."""
    kept, _ = bench.train("dense", clip_norm=1e-12, weight_decay=0.0, checkpoints="kept")
    decayed, _ = bench.train("dense", clip_norm=1e-12, weight_decay=1.0, checkpoints="decayed")
    smaller = dict(decayed.clip.model.named_parameters())
    for name, parameter in kept.clip.model.named_parameters():
        if parameter.ndim < 2:
            torch.testing.assert_close(smaller[name], parameter, rtol=0, atol=1e-6)
        else:  # twelve steps at 0.002, warm-up and fall included
            assert 0.97 < (smaller[name].norm() / parameter.norm()).item() < 0.99, name


def test_threads_are_those_of_the_machine(bench: Bench) -> None:
    try:
        result, _ = bench.train("seed", threads=2, epochs=2, seed_epochs=1, warmup=0)
        assert result.clip.card["provenance"]["threads"] == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_similarities_are_never_scaled_by_more_than_100(bench: Bench, vit: ModelParams) -> None:
    assert vit.config is not None
    bench.model = ModelParams(config={**vit.config, "init_logit_scale": 6.0}, tokenizer="words")
    result, _ = bench.train("seed")
    assert 90 < result.clip.model.logit_scale.exp().item() < 100.001  # and not e^6


def test_images_unlike_the_parents_are_refused(bench: Bench) -> None:
    seed, _ = bench.train("seed")
    seed.save(bench.folder / "seed")
    file = bench.folder / "seed" / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    file.write_text(json.dumps(config))
    write_manifest(bench.folder / "seed")
    with pytest.raises(ModeError, match=r"image.mean is \[0.48145466, .*\], but .*seed was made for \[0.5, 0.5, 0.5\]"):
        bench.train("dense", plan={"parent": bench.folder / "seed"})


def test_what_cannot_run_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModeError, match="'cuda:77' is not usable here"):
        bench.train("dense", device="cuda:77")
    monkeypatch.setenv("WORLD_SIZE", "nonsense")
    with pytest.raises(ModeError, match="WORLD_SIZE"):
        bench.train("dense")


def test_an_image_that_cannot_be_read_is_replaced_and_counted(project: Path, bench: Bench, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(project, root)
    index = bench.index
    with (root / index.path(0)).open("r+b") as shard:
        shard.seek(int(index.offset[4]))
        shard.write(bytes(int(index.length[4])))
    manifest = build_manifest(SourceParams(shards="shards"), root)
    build_index(manifest, root, tmp_path / "index", IndexParams(check_images=False))  # does not look into it
    bench.project, bench.index = root, PairIndex.load(tmp_path / "index")
    result, _ = bench.train("dense", epochs=10, seed_epochs=8)
    assert result.clip.card["bad_images"] == 4  # 240 samples are four passes over 60 images


def adapter_of(bench: Bench, **settings: Any) -> tuple[TrainResult, dict[int, float]]:
    """An expert as an adapter of the bench's seed, which is trained where it is not there yet."""
    folder = bench.folder / "seed"
    adapter = AdapterParams(**{"rank": 4, "lr": 1e-2, **settings.pop("adapter", {})})
    if not folder.is_dir():
        bench.train("seed", adapter=adapter)[0].save(folder)
        (folder / "branch_state.safetensors").unlink()  # an adapter's parameters are new: no moments are for them
    given = {"parent": folder, "expert": ExpertParams(cluster=1)}
    return bench.train("expert", np.arange(0, 60, 3), plan=given, adapter=adapter, **settings)


def test_an_expert_as_an_adapter_leaves_the_seed_as_it_is(bench: Bench) -> None:
    expert, losses = adapter_of(bench)
    assert list(losses) == [9, 10, 11, 12]
    seed, tensors = load_model(bench.folder / "seed"), base_state(expert.clip.model)
    learnt = {name for name, tensor in seed.model.state_dict().items() if not torch.equal(tensor, tensors[name])}
    assert learnt == {"logit_scale"}  # no statistics of batch norm either
    assert all(delta_of(layer).any() for layer in delta_layers(expert.clip.model).values())
    expert.save(bench.folder / "expert-1", {"curve.csv": "samples,loss\n"})
    names = ["SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "card.json", "curve.csv"]
    assert sorted(path.name for path in (bench.folder / "expert-1").iterdir()) == names
    card = json.loads((bench.folder / "expert-1/card.json").read_text())
    assert card["parent_weights"] == sha256_of(bench.folder / "seed" / WEIGHTS) == expert.clip.adapter.base_weights
    assert card["adapter"]["parameters"] == sum(p.numel() for p in expert.clip.model.parameters() if p.requires_grad)
    assert card["own"]["flops"] > 0
    opened, images = load_model(bench.folder / "expert-1"), torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = opened.model.eval().encode_image(images), expert.clip.model.eval().encode_image(images)
    torch.testing.assert_close(ours, theirs)


def test_only_experts_are_adapters(bench: Bench) -> None:
    adapter = AdapterParams(rank=4, lr=0.5)
    seed, losses = bench.train("seed", adapter=adapter)
    plain, same = bench.train("seed", checkpoints="plain")
    assert losses == same
    assert_equal(weights(seed), weights(plain))
    seed.save(bench.folder / "seed")
    dense, _ = bench.train("dense", plan={"parent": bench.folder / "seed"}, adapter=adapter)
    assert dense.clip.adapter is None
    assert "adapter" not in dense.clip.card
    assert dense.plan.schedule.lr == SETTINGS["lr"]


def test_the_rate_of_an_adapter_is_the_experts_then_its_own_then_the_recipes(bench: Bench) -> None:
    recipe = TrainingParams(**SETTINGS, adapter=AdapterParams(lr=0.5))
    role = next(each for each in TRAINED if each.name == "expert")
    for expert, lr in ((ExpertParams(cluster=0), 0.5), (ExpertParams(cluster=0, lr=0.25), 0.25)):
        plan = make_plan(role, TWELVE, recipe, 60, expert=expert, parent=bench.folder)
        assert plan.schedule.lr == lr
    without = TrainingParams(**SETTINGS, adapter=AdapterParams())
    plan = make_plan(
        role,
        TWELVE,
        without,
        60,
        expert=ExpertParams(cluster=0),
        parent=bench.folder,
    )
    assert plan.schedule.lr == SETTINGS["lr"]


def test_an_adapter_that_is_interrupted_and_resumed_is_uninterrupted(bench: Bench) -> None:
    whole, losses = adapter_of(bench, epochs=8)

    def interrupt(step: int) -> None:
        if step == 10:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        adapter_of(bench, epochs=8, on_step=interrupt, checkpoints="broken")
    stored = load_file(bench.folder / "broken/checkpoint.safetensors")
    frozen = {name for name, parameter in whole.clip.model.named_parameters() if not parameter.requires_grad}
    assert stored.keys().isdisjoint(f"model.{name}" for name in frozen)
    resumed, after = adapter_of(bench, epochs=8, checkpoints="broken")
    assert after == {step: loss for step, loss in losses.items() if step > 11}
    assert_equal(weights(resumed), weights(whole))


def test_an_adapter_in_bfloat16_learns_in_float32(bench: Bench, vit: ModelParams) -> None:
    bench.model = vit
    expert, _ = adapter_of(bench, precision="bf16")
    state = expert.clip.model.state_dict()
    assert {tensor.dtype for name, tensor in state.items() if ".lora_" in name} == {torch.float32}
    assert state["visual.conv1.base_layer.weight"].dtype == torch.bfloat16


def test_an_adapter_that_the_model_has_no_room_for_writes_nothing(bench: Bench) -> None:
    adapter_of(bench, checkpoints="first")
    for settings, message in (
        ({"rank": 4096}, "rank: 4096 exceeds every layer"),
        ({"targets": ["*.attn", "*.nothing"]}, r"targets: '\*\.nothing' fits no layer"),
    ):
        with pytest.raises(ModeError, match=message):
            adapter_of(bench, adapter=settings)
    assert not (bench.folder / "checkpoints").exists()


def test_an_adapter_warms_up_from_the_branch_on_a_schedule_of_its_own(bench: Bench) -> None:
    """Whatever the seed's warm-up was: eight steps of the seed, then three up and five down to 0."""
    adapter = AdapterParams(lr=0.6)
    for schedule in ("wsd", "cosine"):
        recipe = TrainingParams(**{**SETTINGS, "epochs": 8, "warmup": 3, "schedule": schedule}, adapter=adapter)
        role = next(each for each in TRAINED if each.name == "expert")
        plan = make_plan(
            role,
            TWELVE,
            recipe,
            60,
            expert=ExpertParams(cluster=0),
            parent=bench.folder,
        )
        found = [plan.schedule.rate(step) for step in range(plan.first_step, plan.last_step + 1)]
        assert (plan.first_step, len(found)) == (8, 9)
        down = [1 - n / 5 if schedule == "wsd" else 0.5 * (1 + np.cos(np.pi * n / 5)) for n in range(6)]
        assert found == pytest.approx([0.2, 0.4, 0.6, *(0.6 * each for each in down)])
    longer = TrainingParams(**{**SETTINGS, "epochs": 8, "warmup": 8}, adapter=adapter)
    with pytest.raises(ModeError, match=r"warmup \(8 steps\) is not shorter than expert \(8\)"):
        make_plan(
            role,
            TWELVE,
            longer,
            60,
            expert=ExpertParams(cluster=0),
            parent=bench.folder,
        )


def test_locked_layers_are_not_adapted(bench: Bench, vit: ModelParams) -> None:
    bench.model = vit
    expert, _ = adapter_of(bench, unlocked_image_groups=0)
    assert expert.clip.adapter is not None
    assert expert.clip.adapter.lora.layers == tuple(
        f"transformer.resblocks.0.{name}" for name in ("attn", "mlp.c_fc", "mlp.c_proj")
    )


def test_the_checkpoint_of_an_adapter_can_be_opened(bench: Bench) -> None:
    adapter_of(bench, checkpoints="first")

    def interrupt(step: int) -> None:
        if step == 9:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        adapter_of(bench, on_step=interrupt)
    path = bench.folder / "checkpoints/checkpoint.safetensors"
    stored = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
    clip, step = open_checkpoint(path, bench.folder)
    assert step == 10
    state = clip.model.state_dict()
    own = [name for name in stored if ".lora_" in name or name == "logit_scale"]
    assert own
    assert all(torch.equal(state[name], stored[name]) for name in own if not name.startswith("optimizer."))
    with pytest.raises(ModeError, match=r"checkpoints/model: an adapter of .*/elsewhere/seed, which is no model"):
        open_checkpoint(path, bench.folder / "elsewhere")


DELTAS = "adapter_model.safetensors"


def saved_adapter_of(bench: Bench, **settings: Any) -> Path:
    """The folder of `adapter_of`, which ends at step 12."""
    adapter_of(bench, checkpoints="expert", **settings)[0].save(bench.folder / "expert-1")
    return bench.folder / "expert-1"


def update_of(
    bench: Bench, parent: str = "expert-1", begins: int = 12, share: float = 1.0, **settings: Any
) -> tuple[TrainResult, dict[int, float]]:
    """An update of `saved_adapter_of`, on other pairs; `own` is what params.yaml says of the update itself."""
    own = {"continues": parent, "source": "base-2", "cluster": 1, "replays": "base", **settings.pop("own", {})}
    given = {"parent": bench.folder / parent, "begins": begins, "share": share, "expert": UpdateParams(**own)}
    given["key"] = settings.pop("key", "v2")
    asked = settings.pop("adapter", {})
    adapter = None if asked is None else AdapterParams(**{"rank": 4, "lr": 1e-2, **asked})
    return bench.train("update", np.arange(1, 60, 3), plan=given, adapter=adapter, **settings)


def test_an_update_moves_all_of_an_adapter_and_nothing_of_its_base(bench: Bench) -> None:
    """By hand: AdamW's first step, from no moments, without decay, is the learning rate along the gradient's sign."""
    folder = saved_adapter_of(bench)
    seed = {path.name: path.read_bytes() for path in (bench.folder / "seed").iterdir()}
    before = {name: tensor.clone() for name, tensor in own_tensors(load_model(folder).model).items()}
    update, losses = update_of(bench, share=1e-9, eps=1e-15, weight_decay=0.0, clip_norm=None)
    assert list(losses) == [13]
    after = own_tensors(update.clip.model)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        moved = (tensor - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-2) * (moved > 0), rtol=1e-3, atol=0.0)
        assert moved.any(), name
    kept = base_state(load_model(bench.folder / "seed").model)
    ours = base_state(update.clip.model)
    assert [name for name in kept if not torch.equal(ours[name], kept[name])] == ["logit_scale"]  # an adapter's own
    assert {path.name: path.read_bytes() for path in (bench.folder / "seed").iterdir()} == seed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_begins_with_the_very_deltas(
    bench: Bench, resnet: ModelParams, vit: ModelParams, precision: str
) -> None:
    """At a rate that no number feels, whatever precision the base is held in, the file is the same, byte by byte."""
    bench.model = vit if precision == "bf16" else resnet
    folder = saved_adapter_of(bench, precision=precision)
    update, losses = update_of(bench, precision=precision, own={"lr": 1e-60})
    update.save(bench.folder / "v2")
    assert list(losses) == [13, 14, 15, 16]
    for name in (DELTAS, "adapter_config.json"):
        assert (bench.folder / "v2" / name).read_bytes() == (folder / name).read_bytes()


def test_an_update_of_an_adapter_that_is_interrupted_and_resumed_is_uninterrupted(bench: Bench) -> None:
    saved_adapter_of(bench)
    whole, losses = update_of(bench, own={"epochs": 4})
    whole.save(bench.folder / "whole")

    def interrupt(step: int) -> None:
        if step == 15:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        update_of(bench, own={"epochs": 4}, on_step=interrupt, checkpoints="broken")
    stopped, step = open_checkpoint(bench.folder / "broken/checkpoint.safetensors", bench.folder)
    assert (step, stopped.adapter) == (16, whole.clip.adapter)
    resumed, after = update_of(bench, own={"epochs": 4}, checkpoints="broken")
    assert after == {step: loss for step, loss in losses.items() if step > 16}
    resumed.save(bench.folder / "resumed")
    assert (bench.folder / "resumed" / DELTAS).read_bytes() == (bench.folder / "whole" / DELTAS).read_bytes()


def test_updates_follow_one_another_as_adapters_of_one_base(bench: Bench) -> None:
    names, ends = ["expert-1", "v2", "v3"], 12
    saved_adapter_of(bench)
    for before, name in pairwise(names):
        update, losses = update_of(bench, before, begins=ends, key=name, checkpoints=name)
        ends = max(losses)
        update.save(bench.folder / name)
    cards = {name: json.loads((bench.folder / name / "card.json").read_text()) for name in ["seed", *names]}
    assert [cards[name]["total"]["samples_seen"] for name in cards] == [96, 144, 192, 240]
    assert [cards[name]["adapter"]["base"] for name in names] == ["seed"] * 3
    assert cards["v2"]["source"] == "base-2"
    assert cards["v3"]["parent_weights"] == sha256_of(bench.folder / "v2" / DELTAS)
    check_parents(bench.folder, ["v3"])
    clips = load_models({name: bench.folder / name for name in names})
    assert len({clip.adapter for clip in clips.values()}) == 1
    merged = merge_models(clips, dict.fromkeys(names, 1 / 3), [], "ties", density=0.5)
    assert merged.adapter is None

    shutil.rmtree(bench.folder / "v2")
    shutil.copytree(bench.folder / "expert-1", bench.folder / "v2")
    with pytest.raises(ModeError, match="v3: branched from another v2 than"):
        check_parents(bench.folder, ["v3"])
    for name in ("expert-1", "v2"):  # which the last one does without
        shutil.rmtree(bench.folder / name)
    assert load_model(bench.folder / "v3").adapter == clips["v3"].adapter


def test_an_adapter_is_trained_on_as_it_is_or_not_at_all(bench: Bench) -> None:
    folder = saved_adapter_of(bench)
    asked: tuple[tuple[dict[str, Any] | None, str], ...] = (
        ({"rank": 2}, "expert-1: an adapter of rank 4, but training.adapter asks for 2"),
        ({"alpha": 1.5}, "expert-1: an adapter of alpha 8, but training.adapter asks for 1.5"),
        ({"targets": ["*.attn"]}, r"expert-1: an adapter of transformer\S+c_fc, which training.adapter leaves out"),
        ({"targets": ["*.nothing"]}, r"targets: '\*\.nothing' fits no layer"),
        (None, "expert-1: an adapter, but training.adapter is null"),
    )
    for settings, message in asked:
        with pytest.raises(ModeError, match=message) as caught:
            update_of(bench, adapter=settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModeError, match=r"seed: a whole model, but training\.adapter is set"):
        update_of(bench, "seed")
    with pytest.raises(ModeError, match=r"expert-1: an adapter of transformer\S+, which training.adapter leaves out"):
        update_of(bench, unlocked_text_groups=0)  # what is locked has no delta

    content = bytearray((folder / DELTAS).read_bytes())
    content[-1] ^= 1
    (folder / DELTAS).write_bytes(content)
    with pytest.raises(ModeError, match=r"adapter_model\.safetensors: damaged"):
        update_of(bench)
    content[-1] ^= 1
    (folder / DELTAS).write_bytes(content)
    bench.train("seed", lr=1e-3, checkpoints="other")[0].save(bench.folder / "seed")
    with pytest.raises(ModeError, match="expert-1: an adapter of another base than"):
        update_of(bench)
    assert not (bench.folder / "checkpoints").exists()
