"""What a trace without numbers says, against what autograd really keeps and what can be worked out by hand."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from mode.clip.device import Precision, autocast
from mode.clip.model import new_network, open_clip_errors, write_config
from mode.planning.footprint import Line, footprint_of
from mode.training.learner import Towers

SIZE, CONTEXT, WIDTH = 32, 8, 32
TEXT = {"context_length": CONTEXT, "vocab_size": 50, "width": WIDTH, "heads": 2, "layers": 3}
TOWERS: dict[str, dict[str, Any]] = {
    "resnet": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "patch_size": None},
    "vit": {"image_size": SIZE, "layers": 4, "width": 64, "head_width": 32, "patch_size": 8},
}


def network(tower: str, precision: Precision, device: str) -> nn.Module:
    cfg = {"embed_dim": 16, "vision_cfg": TOWERS[tower], "text_cfg": TEXT}
    with tempfile.TemporaryDirectory() as folder, open_clip_errors(tower), torch.device(device):
        write_config(Path(folder), cfg, {"size": SIZE})
        return new_network(Path(folder), device=device, precision=precision)


def kept(tower: str, precision: Precision, pairs: int) -> int:
    """Bytes of all storages that autograd saves in a real pass on the CPU, weights left out: by address."""
    model = network(tower, precision, "cpu").train()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    images, tokens = torch.zeros(pairs, 3, SIZE, SIZE, dtype=dtype), torch.zeros(pairs, CONTEXT, dtype=torch.int64)
    with saved_tensors_hooks(save, lambda tensor: tensor), autocast(torch.device("cpu"), precision):
        _features = Towers(model)(images, tokens)
    return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


def traced(tower: str, precision: Precision, checkpointing: bool = False) -> Line:
    found = footprint_of(network(tower, precision, "meta"), SIZE, CONTEXT, precision, checkpointing)
    assert found is not None
    return found.activations


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_what_autograd_keeps_of_any_batch(tower: str, precision: Precision) -> None:
    line = traced(tower, precision)
    for pairs in (3, 16):
        assert line.of(pairs) == pytest.approx(kept(tower, precision, pairs), rel=0.02)


def test_autocast_on_a_gpu_keeps_the_inputs_of_norms_in_float32() -> None:
    line, small, large = traced("vit", "amp"), kept("vit", "amp", 3), kept("vit", "amp", 16)
    # Two bytes more of each number that goes into one of the image tower's nine norms; texts are in float32 anyway.
    assert line.each - (large - small) / 13 == pytest.approx(9 * 2 * 17 * 64, rel=0.15)
    # Copies of the weights in bfloat16 do not grow with the batch; those of embeddings and norms are not needed.
    matrices = sum(each.numel() for name, each in network("vit", "amp", "meta").named_parameters() if "weight" in name)
    assert 0.5 * 2 * matrices < line.fixed < 1.1 * 2 * matrices


def test_bfloat16_keeps_no_more_than_autocast_and_that_less_than_float32() -> None:
    bf16, amp, fp32 = (traced("vit", precision).each for precision in ("bf16", "amp", "fp32"))
    assert bf16 <= amp < fp32


def test_checkpointing_keeps_what_goes_into_blocks_and_has_one_of_them_again() -> None:
    """By hand, of one pair in float32: 17 tokens of 64 numbers in four image blocks, 8 of 32 in three text blocks."""
    whole, again = traced("vit", "fp32").each, traced("vit", "fp32", checkpointing=True).each
    goes_in = 4 * (4 * 17 * 64 + 3 * 8 * 32)
    # Of an image block (MLP 4 x as wide): input, norm, q, k, v, result and its projection's input, second norm's, its
    # result, and the MLP's two of 256.
    block = 4 * 17 * (64 * 8 + 2 * 256)
    assert goes_in + 0.8 * block < again < goes_in + 1.5 * block + 4 * 3 * SIZE**2 + 4 * 17 * 64 * 4
    assert again < 0.6 * whole


def test_a_resnet_has_nothing_to_compute_again_but_its_texts() -> None:
    text_blocks = 4 * 3 * CONTEXT * (8 * WIDTH + 2 * 4 * WIDTH)
    whole, again = traced("resnet", "fp32").each, traced("resnet", "fp32", checkpointing=True).each
    assert whole - 1.5 * text_blocks < again < whole


def test_inference_holds_little_of_what_a_training_keeps() -> None:
    found = footprint_of(network("vit", "fp32", "meta"), SIZE, CONTEXT, "fp32", False)
    assert found is not None
    # At least the widest moment: the MLP's input and result, 17 tokens of 64 and of 256 numbers in float32.
    assert 4 * 17 * (64 + 256) < found.image.each < 0.2 * found.activations.each
    assert 4 * CONTEXT * (WIDTH + 4 * WIDTH) <= found.text.each < found.image.each


def test_the_network_stays_as_it_is() -> None:
    model = network("vit", "fp32", "meta").eval()
    before = {name: tensor.device.type for name, tensor in model.state_dict().items()}
    footprint_of(model, SIZE, CONTEXT, "fp32", True)
    assert {name: tensor.device.type for name, tensor in model.state_dict().items()} == before
    assert not model.training


def test_a_tower_that_looks_at_numbers_is_not_known() -> None:
    class Curious(nn.Module):
        visual = None

        def encode_image(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1) if float(images.sum()) > 0 else images.flatten(1)[:, :16]

    assert footprint_of(Curious(), SIZE, CONTEXT, "fp32", False) is None  # type: ignore[arg-type]


def test_a_line_is_of_any_number() -> None:
    assert Line(fixed=10.0, each=2.0).of(5) == 20.0
