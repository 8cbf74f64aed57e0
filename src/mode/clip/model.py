"""A CLIP: made from parameters, written as a folder that plain open_clip opens, and read back.

A model folder holds `open_clip_config.json` (model and preprocessing), `open_clip_model.safetensors`, the files of a
Hugging Face tokenizer where the model has one, and `card.json`: what it was trained on and what it cost. The folder of
a model that is an adapter (`mode.clip.adapter`) has its deltas in place of all but the card.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mode.checksums import check_manifest, listed_digest, write_manifest
from mode.clip.configuration import checked_folder, read_card, unknown_architecture
from mode.clip.folder import CARD, CONFIG, WEIGHTS, holds_adapter
from mode.clip.tokenizer import fit_words
from mode.clip.trust import check_configuration, read_json
from mode.errors import ModeError, in_one_line
from mode.files import sha256_of, write_aside
from mode.params import AdapterParams, ImageParams, ModelParams

if TYPE_CHECKING:
    from mode.clip.adapter import Adapter  # peft takes a second to import: only where there is an adapter

#: Numbers of a model that any machine has room for: about 64 MB.
_SMALL = 2**24

Tokenize = Callable[[list[str]], Tensor]


@dataclass
class Clip:
    """A model with all that is needed to feed it.

    Attributes:
        model: open_clip's `CLIP` (or `CustomTextCLIP`); `encode_image`, `encode_text`, `logit_scale`.
        tokenizer: texts -> token ids, int64 [texts, context].
        model_cfg: open_clip's configuration of the model.
        preprocess_cfg: open_clip's configuration of the image transform (size, mean, std, ...).
        card: what the model was trained on and what it cost; empty for a new model.
        adapter: of which model it is an adapter, and where; None: it is a whole model.
    """

    model: open_clip.CLIP
    tokenizer: Tokenize
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    card: dict[str, Any] = field(default_factory=dict)
    adapter: Adapter | None = None

    @property
    def dimensions(self) -> int:
        """Length of an image's or a text's vector."""
        return int(self.model_cfg["embed_dim"])


def build_model(
    model: ModelParams, image: ImageParams, captions: Iterable[str] | None, random_seed: int, precision: str = "fp32"
) -> Clip:
    """Make a new model with random weights.

    Args:
        model: the name of an architecture that open_clip knows, a configuration file, or a configuration.
        image: its size replaces that of the configuration.
        captions: what the vocabulary of `tokenizer: words` is learnt from; else unused.
        random_seed: of the random weights.
        precision: `fp32`, `amp` (weights as `fp32`) or `bf16` (weights in bfloat16, norms in float32).

    Raises:
        ModeError: the name is unknown or one of trained weights, or open_clip cannot build the configuration.
    """
    model_cfg = configuration_of(model)
    model_cfg["vision_cfg"]["image_size"] = image.size
    preprocess_cfg = {
        "size": image.size,
        "mode": "RGB",
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": image.interpolation,
        "resize_mode": image.resize_mode,
        "fill_color": image.fill_color,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model.tokenizer == "words":
            if captions is None:
                raise ModeError("model.tokenizer: `words` needs captions to learn its vocabulary from")
            words = fit_words(captions, model.vocabulary)
            words.save_pretrained(str(folder))
            model_cfg["text_cfg"]["vocab_size"] = len(words)
            # Any name makes open_clip look for tokenizer files, and it then looks in the model's own folder.
            model_cfg["text_cfg"]["hf_tokenizer_name"] = "words"
        write_config(folder, model_cfg, preprocess_cfg)
        with torch.random.fork_rng(devices=[]), open_clip_errors(f"model {model.name or 'config'}"):
            torch.manual_seed(random_seed)
            network = new_network(folder, precision=precision)
            if model.tokenizer == "words":
                tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
            else:
                tokenizer = standard_tokenizer(model_cfg["text_cfg"])
    return Clip(network, tokenizer, model_cfg, preprocess_cfg)


def new_network(folder: Path, **settings: Any) -> open_clip.CLIP:
    """The network that a folder's configuration describes, with random weights; `settings` as of `create_model`."""
    return open_clip.create_model(
        f"local-dir:{folder}", load_weights=False, pretrained_text=False, output_dict=True, **settings
    )


def save_model(folder: Path, clip: Clip, card: dict[str, Any]) -> None:
    """Write a model folder, aside first and then moved into place."""
    with write_aside(folder) as temporary:
        write_model_files(temporary, clip, card)


def save_sealed(folder: Path, clip: Clip, card: dict[str, Any]) -> None:
    """As `save_model`, with checksums of all files."""
    with write_aside(folder) as temporary:
        write_model_files(temporary, clip, card)
        write_manifest(temporary)


def write_model_files(folder: Path, clip: Clip, card: dict[str, Any]) -> None:
    """Write the files of a model into `folder`, which is made if it is not there; of an adapter only its own."""
    write_configuration(folder, clip)
    if clip.adapter is None:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in clip.model.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def write_configuration(folder: Path, clip: Clip) -> None:
    """Write all files of a model but weights and card into `folder`, which is made if it is not there.

    Of an adapter they are all files but the card: its deltas say which layers it adapts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if clip.adapter is not None:
        from mode.clip.adapter import write_adapter

        write_adapter(folder, clip.model, clip.adapter)
        return
    write_config(folder, clip.model_cfg, clip.preprocess_cfg)
    if hasattr(clip.tokenizer, "save_pretrained"):
        clip.tokenizer.save_pretrained(str(folder))


def load_model(folder: Path, device: str | torch.device = "cpu", precision: str = "fp32") -> Clip:
    """Read a model folder; the same model as `open_clip.create_model_and_transforms("local-dir:FOLDER")`.

    Args:
        folder: written by `save_model`, or any folder that open_clip opens (the card is then empty); or an adapter's.
        device: where the weights go.
        precision: as in `build_model`.

    Raises:
        ModeError: the folder, its configuration or its weights are missing or damaged; an adapter of another base than
            the one beside it.
    """
    return load_models({"": folder}, device, precision)[""]


def load_models(
    folders: Mapping[str, Path], device: str | torch.device = "cpu", precision: str = "fp32"
) -> dict[str, Clip]:
    """Read several models, name -> folder; adapters of one base, and that base itself, have its weights in common.

    Else as `load_model`.
    """
    whole: dict[Path, Clip] = {}

    def load(folder: Path) -> Clip:
        place = folder.absolute()
        if place not in whole:
            whole[place] = _load_whole(folder, device, precision)
        return whole[place]

    return {
        name: _load_adapter(folder, load) if holds_adapter(folder) else load(folder) for name, folder in folders.items()
    }


def _load_adapter(folder: Path, load: Callable[[Path], Clip]) -> Clip:
    """An adapter in a network of its own that shares the base's parameters; `load` opens the base."""
    from mode.clip.adapter import fill, read_adapter
    from mode.clip.lora import share

    adapter, tensors = read_adapter(folder)
    base = load(_base_beside(folder, adapter))
    network = fill(folder, share(base.model), adapter, tensors)
    return replace(base, model=network, card=_card_of(folder), adapter=adapter)


def _base_beside(folder: Path, adapter: Adapter) -> Path:
    """The folder of an adapter's base. Raises `ModeError` if it is not there, or has other weights."""
    beside = folder.absolute().parent / adapter.base
    if not (beside / WEIGHTS).is_file():
        raise ModeError(f"{folder}: an adapter of {beside}, which is no model folder", "fetch or train that one first")
    found = listed_digest(beside, WEIGHTS) or sha256_of(beside / WEIGHTS)
    if found != adapter.base_weights:
        its, there = adapter.base_weights[:12], found[:12]
        raise ModeError(
            f"{folder}: an adapter of another base than {beside}: of weights {its}..., but there are {there}...",
            "train it again",
        )
    return beside


def adapted(clip: Clip, params: AdapterParams, base: str, base_weights: str, random_seed: int) -> Clip:
    """A whole model as the beginning of an adapter of itself: deltas of zero, in float32, and all else frozen.

    Args:
        clip: its network is changed in place; layers whose weights take no gradient are locked, and have no delta.
        params: rank, alpha, and which layers.
        base: name of the folder it is from.
        base_weights: SHA-256 of the weights there.
        random_seed: of the first deltas.

    Raises:
        ModeError: there is no such layer, or it is smaller than the rank.
    """
    from mode.clip.adapter import Adapter
    from mode.clip.lora import Lora, adaptable_layers, add_deltas, choose_layers

    locked = {name.rpartition(".")[0] for name, each in clip.model.named_parameters() if not each.requires_grad}
    found = adaptable_layers(clip.model, clip.tokenizer([""]))
    free = {name: room for name, room in found.items() if name not in locked}
    layers = choose_layers(free, params.rank, params.targets)
    lora = Lora(params.rank, params.scale, tuple(sorted(layers)))
    network = add_deltas(clip.model, lora, random_seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # in bfloat16 small steps would be lost
    return replace(clip, model=network, adapter=Adapter(lora, base, base_weights))


def adapted_further(clip: Clip, params: AdapterParams, folder: Path) -> Clip:
    """The adapter in `folder` as it is, to be trained on: its deltas in float32, and all else frozen.

    Args:
        clip: its base, as of `adapted`.
        params: as of `adapted`. Rank, alpha and layers are the adapter's, and no training changes them: with another
            rank its matrices would be others, with another alpha the same matrices would be another model.
        folder: of the adapter.

    Raises:
        ModeError: `params` describe another adapter; or the folder is damaged, or its base is not the one beside it.
    """
    from mode.clip.adapter import fill_deltas, read_adapter

    adapter, tensors = read_adapter(folder)
    _base_beside(folder, adapter)
    again = adapted(clip, params, adapter.base, adapter.base_weights, random_seed=0)  # of deltas that are replaced
    assert again.adapter is not None
    if other := again.adapter.lora.unlike(adapter.lora):
        raise ModeError(f"{folder}: an adapter {other}", "it is trained on as it is: set training.adapter as it was")
    fill_deltas(folder, again.model, adapter, tensors)
    return replace(again, card=_card_of(folder))


def folded(clip: Clip) -> Clip:
    """A model by itself: an adapter's deltas added to the weights of its base. A whole one is given back as it is."""
    if clip.adapter is None:
        return clip
    from mode.clip.lora import fold

    return replace(clip, model=fold(clip.model), adapter=None)


def _load_whole(folder: Path, device: str | torch.device, precision: str) -> Clip:
    for needed in (CONFIG, WEIGHTS):
        if not (folder / needed).is_file():
            raise ModeError(f"{folder}: not a model folder: it has no {needed}", "train it first, or check the path")
    check_manifest(folder, (CONFIG, WEIGHTS))
    model_cfg, preprocess_cfg = checked_folder(folder)
    card = _card_of(folder)
    with open_clip_errors(str(folder)):
        check_proportion(folder, folder / WEIGHTS)
        network = open_clip.create_model(
            f"local-dir:{folder}", device=device, precision=precision, pretrained_text=False, output_dict=True
        )
        return Clip(network, tokenizer_of(folder, model_cfg), model_cfg, preprocess_cfg, card)


def _card_of(folder: Path) -> dict[str, Any]:
    """A model's card; a folder that another program wrote has none."""
    return read_card(folder) if (folder / CARD).is_file() else {}


def tokenizer_of(folder: Path, model_cfg: dict[str, Any]) -> Tokenize:
    """The tokenizer of a model folder whose configuration this is."""
    tokenizer: Tokenize = open_clip.get_tokenizer(f"local-dir:{folder}", **_no_code(model_cfg["text_cfg"]))
    return tokenizer


def _no_code(text_cfg: dict[str, Any]) -> dict[str, bool]:
    """What keeps a tokenizer of Hugging Face from running code that comes with it; CLIP's own has no such setting."""
    return {"trust_remote_code": False} if text_cfg.get("hf_tokenizer_name") else {}


def check_proportion(folder: Path, weights: Path) -> None:
    """Refuse a small file when the configuration in `folder` would take all memory before it turns out not to fit."""
    with torch.device("meta"):
        network = new_network(folder, device="meta")
    described = sum(tensor.numel() for tensor in chain(network.parameters(), network.buffers()))
    if weights.suffix == ".safetensors":
        with safe_open(weights, "pt") as file:
            stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)
    else:
        stored = weights.stat().st_size // 2  # in half precision, and uncompressed as torch writes them
    if described > 2 * stored + _SMALL:
        raise ModeError(
            f"{weights.parent}: {CONFIG} describes a model of {described:,} numbers, but {weights.name} holds"
            f" {stored:,}",
            "they do not belong together",
        )


def configuration_of(model: ModelParams, setting: str = "model") -> dict[str, Any]:
    """A copy of open_clip's configuration of the model; `setting` is the section that names it, in messages."""
    found: dict[str, Any] | None
    if model.name is not None and re.match(r"\w[\w.-]+:", model.name):  # one letter is a drive's
        raise ModeError(
            f"{setting}.name: '{model.name}' names trained weights",
            "give an architecture alone, such as ViT-B-32, or a configuration file; for weights see `mode params seed`",
        )
    if model.config is not None:
        found = copy.deepcopy(model.config)
    elif model.name is not None and model.name.endswith(".json"):
        found = read_json(Path(model.name))
        found = found.get("model_cfg", found) if isinstance(found, dict) else found
    else:
        found = open_clip.get_model_config(model.name)
        if found is None:
            raise unknown_architecture(model.name, setting)
    return check_configuration(found, setting)


def standard_tokenizer(text_cfg: dict[str, Any]) -> Any:
    """What open_clip pairs with a text tower: CLIP's own byte-pair encoding, or the Hugging Face one that it names."""
    settings = {"context_length": text_cfg.get("context_length", 77), **(text_cfg.get("tokenizer_kwargs") or {})}
    settings |= _no_code(text_cfg)
    if name := text_cfg.get("hf_tokenizer_name"):
        return HFTokenizer(name, tokenizer_mode=text_cfg.get("tokenizer_mode"), **settings)
    tokenizer = SimpleTokenizer(**settings)
    given, ids = text_cfg.get("vocab_size"), tokenizer.vocab_size
    if given is not None and given < ids:
        message = f"model: text_cfg.vocab_size is {given}, but CLIP's tokenizer has {ids} ids"
        raise ModeError(message, "leave vocab_size out, or set model.tokenizer: words")
    return tokenizer


def write_config(folder: Path, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any]) -> None:
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def open_clip_errors(where: str) -> Iterator[None]:
    """Turn what open_clip raises on a bad configuration or file into one clear line, and silence its notices."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        yield
    except ModeError:
        raise
    except Exception as error:
        raise ModeError(f"{where}: open_clip cannot open it: {in_one_line(error)}") from error
    finally:
        logging.getLogger().setLevel(level)
