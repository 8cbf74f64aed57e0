"""What a plan needs to know of a model, worked out on the `meta` device: no weights are made, nothing is fetched."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mode.clip.configuration import IMAGE_SIZE, read_configurations
from mode.clip.device import Precision
from mode.clip.folder import CONFIG
from mode.clip.model import Clip, adapted, configuration_of, new_network, open_clip_errors, write_config
from mode.params import AdapterParams, ModelParams
from mode.planning.footprint import Footprint, footprint_of
from mode.training.card import flops_per_pair

#: Tokens of a text where a configuration does not say (open_clip's own default).
_CONTEXT = 77
#: Operations of a pair below which a model's time is that of starting many small operations: the demo's 0.04 GFLOP
#: reach 5,100 samples/s on an H100 (docs/performance.md), a six-hundredth of what its peak and share say.
_LARGE = 5e9


@dataclass(frozen=True)
class ModelShape:
    """A CLIP's size and operations.

    Attributes:
        name: of the architecture.
        flops_per_pair: in training, forward and backward, see `mode.training.card.flops_per_pair`.
        flops_per_image, flops_per_text: of one tower, forward.
        parameters: of both towers.
        state_bytes: of its weights, in the precision that they are trained in.
        learnt, learnt_bytes: parameters that a training changes, and their bytes: all of them, or those of an adapter,
            which are also what its folder has.
        embed_dim: length of a vector.
        image_size: pixels a side.
        footprint: on a GPU; None: it was not asked for, or cannot be traced.
        adapter: the shape of an adapter of it; None: it was not asked for.
    """

    name: str
    flops_per_pair: float
    flops_per_image: float
    flops_per_text: float
    parameters: int
    state_bytes: int
    learnt: int
    learnt_bytes: int
    embed_dim: int
    image_size: int
    footprint: Footprint | None = None
    adapter: ModelShape | None = None

    @property
    def is_large(self) -> bool:
        """Whether its operations are large ones, whose time their count tells."""
        return self.flops_per_pair >= _LARGE


def shape_of(
    model: ModelParams,
    image_size: int | None = None,
    words: float | None = None,
    precision: Precision = "fp32",
    checkpointing: bool | None = None,
    adapter: AdapterParams | None = None,
) -> ModelShape:
    """The shape of a model of params.yaml.

    Args:
        model: an architecture of open_clip, a configuration file, or a configuration.
        image_size: pixels a side, in place of the configuration's.
        words: of the captions, of which the tokenizer `words` keeps `model.vocabulary`; default as many as that.
        precision: as in `training.precision`.
        checkpointing: as `machine.grad_checkpointing`, for the footprint on a GPU; None: without, which saves seconds.
        adapter: the shape of such an adapter of the model is asked for, too.

    Raises:
        ModeError: no such architecture, open_clip cannot build it, or it has no room for the adapter.
    """
    model_cfg = configuration_of(model)
    if image_size is not None:
        model_cfg["vision_cfg"]["image_size"] = image_size
    if model.tokenizer == "words":
        model_cfg["text_cfg"]["vocab_size"] = round(min(model.vocabulary, words or model.vocabulary))
    return _shape(model.name or "config", model_cfg, precision, checkpointing, adapter)


def shape_of_folder(
    folder: Path,
    precision: Precision = "fp32",
    checkpointing: bool | None = None,
    adapter: AdapterParams | None = None,
) -> ModelShape:
    """The shape of a model folder, else as `shape_of`. Raises `ModeError` where its configuration is none."""
    model_cfg, _ = read_configurations(folder)
    return _shape(folder.name, model_cfg, precision, checkpointing, adapter)


def is_folder_of_model(folder: Path) -> bool:
    """Whether a folder has a model's configuration."""
    return (folder / CONFIG).is_file()


def image_size_of(model: ModelParams) -> int:
    """Pixels a side that an architecture is made for. Raises `ModeError` where open_clip knows no such model."""
    return _image_size(configuration_of(model))


def _shape(
    name: str,
    model_cfg: dict[str, Any],
    precision: Precision,
    checkpointing: bool | None,
    adapter: AdapterParams | None,
) -> ModelShape:
    context = int(model_cfg["text_cfg"].get("context_length", _CONTEXT))
    size = _image_size(model_cfg)

    def blank(texts: list[str]) -> Tensor:
        return torch.zeros(len(texts), context, dtype=torch.int64)

    with tempfile.TemporaryDirectory() as temporary, open_clip_errors(f"model {name}"), torch.device("meta"):
        folder = Path(temporary)
        write_config(folder, model_cfg, {"size": size})
        network = new_network(folder, device="meta", precision=precision)
        clip = Clip(network, blank, model_cfg, {"size": size})
    shape = _shape_of_clip(name, clip, context, precision, checkpointing)
    if adapter is None:
        return shape
    with open_clip_errors(f"model {name}"), torch.device("meta"):
        clip = adapted(clip, adapter, base="", base_weights="", random_seed=0)  # changes the network
    return replace(shape, adapter=_shape_of_clip(name, clip, context, precision, checkpointing))


def _shape_of_clip(name: str, clip: Clip, context: int, precision: Precision, checkpointing: bool | None) -> ModelShape:
    network, size = clip.model, int(clip.preprocess_cfg["size"])
    with open_clip_errors(f"model {name}"), torch.device("meta"):
        image, text = _tower_flops(network, size, context)
        state = list(network.state_dict().values())
        learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
        shape = ModelShape(
            name=name,
            flops_per_pair=float(flops_per_pair(clip)),
            flops_per_image=image,
            flops_per_text=text,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            state_bytes=_bytes_of(state),
            learnt=sum(parameter.numel() for parameter in learnt),
            learnt_bytes=_bytes_of(state if clip.adapter is None else learnt),
            embed_dim=clip.dimensions,
            image_size=size,
        )
    if checkpointing is None:
        return shape
    return replace(shape, footprint=footprint_of(network, size, context, precision, checkpointing))


def _image_size(model_cfg: Mapping[str, Any]) -> int:
    size = model_cfg["vision_cfg"].get("image_size", IMAGE_SIZE)
    return int(size[0] if isinstance(size, list | tuple) else size)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tower_flops(network: open_clip.CLIP, size: int, context: int) -> tuple[float, float]:
    """Operations of one image and of one text, forward."""
    dtype = next(parameter.dtype for parameter in network.visual.parameters() if parameter.ndim > 1)
    network.eval()
    counted = []
    with torch.inference_mode():
        for tower, given in (
            (network.encode_image, torch.zeros(1, 3, size, size, dtype=dtype, device="meta")),
            (network.encode_text, torch.zeros(1, context, dtype=torch.int64, device="meta")),
        ):
            with FlopCounterMode(display=False) as counter:
                tower(given)
            counted.append(float(counter.get_total_flops()))
    return counted[0], counted[1]
