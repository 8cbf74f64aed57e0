"""A CLIP that somebody else has trained: found, fetched, checked, and made into an ordinary model.

It may be a model of a hub (`hf-hub:ORG/NAME`), a folder, or an architecture of open_clip with the weights of one of its
tags or of a file. Whatever it is, nothing of it is run: configurations pass `mode.clip.trust`, and weights are read as
safetensors, or by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import hf_hub_download, metadata_load, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from open_clip.pretrained import download_pretrained_from_hf, download_pretrained_from_url
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from safetensors import SafetensorError

from mode.clip.configuration import checked_folder, image_of, preprocessing_of
from mode.clip.folder import CONFIG, WEIGHTS
from mode.clip.model import (
    Clip,
    check_proportion,
    configuration_of,
    load_model,
    new_network,
    open_clip_errors,
    standard_tokenizer,
    tokenizer_of,
    write_config,
)
from mode.clip.trust import check_preprocessing
from mode.errors import ModeError, in_one_line
from mode.files import sha256_of
from mode.params import WEIGHT_FILES, ImageParams, ModelParams, SeedParams
from mode.roles import SEED

#: Weights of a folder, in the order in which they are preferred: open_clip's names, and what it converts.
_WEIGHTS = (
    WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
#: What is fetched of a hub's repository beside the weights: configuration, tokenizer, and the card with its licence.
_SMALL_FILES = [CONFIG, "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "spiece.model", "README.md"]
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
#: Names of a message, at most.
_LISTED = 8
_POSITIONS = ("positional_embedding", "pos_embed")
_OTHER = "check that seed.name is the architecture of these weights, and the file complete"


@dataclass(frozen=True)
class Origin:
    """Where a pretrained model came from.

    Attributes:
        name: as it was asked for.
        weights: name of the file.
        sha256: of that file, as 64 hexadecimal digits.
        licence: as its source states it, such as `mit`; None where it states none.
    """

    name: str
    weights: str
    sha256: str
    licence: str | None = None


@dataclass(frozen=True)
class _Found:
    """A pretrained model before it is opened; `folder` holds its tokenizer, where it brings one."""

    name: str
    model_cfg: dict[str, Any]
    weights: Path
    folder: Path | None = None
    preprocess_cfg: Mapping[str, Any] | None = None
    licence: str | None = None


def open_seed(seed: SeedParams, root: Path, image: ImageParams | None = None) -> tuple[Clip, Origin]:
    """Find a pretrained model, fetch it if need be, and open it, in float32 on the CPU.

    Args:
        seed: names it.
        root: what relative paths start from.
        image: for weights of a file, whose source says nothing of the images that they were made for: what is given
            here counts, and open_clip's defaults where nothing is. A source that does say must not be contradicted.

    Raises:
        ModeError: there is no such model, or it is neither here nor can be fetched; it brings code; a weight is
            missing, left over, of another shape, or not finite; its tokenizer has ids that it does not know; `image`
            contradicts its own preprocessing.
    """
    found = _find(seed, root)
    refuse_untrainable(found.model_cfg, found.name)
    image = image or ImageParams()
    stated = found.preprocess_cfg if found.preprocess_cfg is not None else _preprocessing_given(image)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder, found.model_cfg, dict(stated))
        with open_clip_errors(found.name):
            try:
                check_proportion(folder, found.weights)
            except SafetensorError as error:
                message = f"{found.weights}: cannot be read as weights: {error}"
                raise ModeError(message, "fetch or copy it again") from None
            network = new_network(folder)
        _load_weights(network, found.weights, found.name)
    preprocess_cfg = merge_preprocess_dict(asdict(PreprocessCfg()), dict(stated))
    size = stated.get("size", network.visual.image_size)
    preprocess_cfg["size"] = size if isinstance(size, int) or len({*size}) > 1 else size[0]
    preprocess_cfg = check_preprocessing(preprocess_cfg, found.name)
    with open_clip_errors(found.name), _offline_errors(found.name, "the tokenizer"):
        if found.folder is not None and found.model_cfg["text_cfg"].get("hf_tokenizer_name"):
            tokenizer = tokenizer_of(found.folder, found.model_cfg)
        else:
            tokenizer = standard_tokenizer(found.model_cfg["text_cfg"])
    clip = Clip(network.eval(), tokenizer, found.model_cfg, preprocess_cfg)
    _refuse_other_tokenizer(clip, found.name)
    image_of(image, preprocessing_of(preprocess_cfg, network.visual.image_size), f"the seed {found.name}")
    return clip, Origin(found.name, found.weights.name, sha256_of(found.weights), found.licence)


def local_files(seed: SeedParams, root: Path) -> list[Path]:
    """What a pretrained seed is made of on this machine, of a folder all files; nothing of a hub's or a tag's.

    Raises:
        ModeError: there is no such folder or file.
    """
    if not seed.is_local:
        return []
    if seed.weights is None:
        folder = root / str(seed.name).removeprefix("local-dir:")
        if not folder.is_dir():
            raise ModeError(f"seed.name: '{seed.name}' is no folder", "give `weights`, or the path of a model folder")
        return sorted(path for path in folder.rglob("*") if path.is_file())
    files = [root / seed.weights, *([root / str(seed.name)] if str(seed.name).endswith(".json") else [])]
    if missing := next((file for file in files if not file.is_file()), None):
        raise ModeError(f"seed: {missing}: no such file", "check the path")
    return files


def given_card(clip: Clip, origin: Origin) -> dict[str, Any]:
    """The card of a pretrained seed: where it came from; nothing of what it cost was spent here."""
    nothing = {"samples_seen": 0, "flops": 0, "seconds": 0.0}
    return {
        "name": SEED.name,
        "role": SEED.name,
        "source": None,
        "cluster": None,
        "parent": None,
        "parent_weights": None,
        "cost": "given",
        "own": nothing,
        "total": nothing,
        "loss": None,
        "doubt": None,
        "parameters": sum(parameter.numel() for parameter in clip.model.parameters()),
        "origin": asdict(origin),
    }


def _preprocessing_given(image: ImageParams) -> dict[str, Any]:
    """What params.yaml says of images, where nothing else does."""
    stated = image.model_dump(include={"mean", "std", "interpolation", "resize_mode", "fill_color"})
    return {name: value for name, value in stated.items() if name in image.model_fields_set}


def open_pretrained(name: str, setting: str) -> Clip:
    """A CLIP that is trained already, in float32 on the CPU.

    Args:
        name: `MODEL:PRETRAINED`, such as `ViT-B-32:laion2b_s34b_b79k`, which open_clip downloads; or a model folder
            (relative to the working directory) with open_clip's configuration, weights and tokenizer.
        setting: what the name was given as, in messages.

    Raises:
        ModeError: there is no such model, tag or folder, or open_clip cannot open it.
    """
    if Path(name).is_dir():
        return load_model(Path(name))
    source, _, tag = name.partition(":")
    known = open_clip.list_pretrained_tags_by_model(source)
    if tag not in known:
        advice = f"{source} has {', '.join(known)}" if known else "see open_clip.list_pretrained()"
        raise ModeError(f"{setting} '{name}': neither a folder nor a MODEL:PRETRAINED that open_clip knows", advice)
    return open_seed(SeedParams.model_validate({"from": "pretrained", "name": source, "weights": tag}), Path())[0]


def check_hub_name(name: str, setting: str) -> None:
    """Refuse what is not `hf-hub:ORG/NAME` with a `ModeError`; `setting` is what it was given as."""
    if not _REPOSITORY.fullmatch(name.removeprefix("hf-hub:")):
        raise ModeError(f"{setting}: '{name}' is no name on a hub", "write hf-hub:ORG/NAME")


def refuse_untrainable(model_cfg: Mapping[str, Any], where: str) -> None:
    """Models that open_clip can build and this project cannot train are refused by name.

    Raises:
        ModeError: CoCa, whose captioning loss is another; NaFlex, which takes images of any shape.
    """
    if "multimodal_cfg" in model_cfg:
        raise ModeError(f"{where}: a CoCa model, which a captioning loss trains", "choose a CLIP or SigLIP model")
    if "naflex" in str(model_cfg["vision_cfg"].get("timm_model_name")).lower():
        raise ModeError(f"{where}: a NaFlex model, which takes images of any shape", "choose one with a fixed size")


def _find(seed: SeedParams, root: Path) -> _Found:
    name = str(seed.name)
    if name.startswith("hf-hub:"):
        return _of_hub(name)
    folder = root / name.removeprefix("local-dir:")
    if name.startswith("local-dir:") or (folder.is_dir() and seed.weights is None):
        return _of_folder(name, folder)
    if seed.weights is None:
        advice = "give `weights`, or the path of a folder with open_clip_config.json"
        raise ModeError(f"seed.name: '{name}' is no folder, and an architecture alone has no weights", advice)
    model_cfg = configuration_of(ModelParams(name=str(root / name) if name.endswith(".json") else name), "seed")
    refuse_untrainable(model_cfg, name)  # before gigabytes are fetched
    if seed.weights.endswith(WEIGHT_FILES):
        file = root / seed.weights
        if not file.is_file():
            raise ModeError(f"seed.weights: {file}: no such file", "check the path")
        return _Found(name, model_cfg, file)
    return _of_tag(name, seed.weights, model_cfg)


def _of_folder(name: str, folder: Path) -> _Found:
    """A folder as open_clip writes it, or as `mode` does."""
    if not (folder / CONFIG).is_file():
        raise ModeError(f"{folder}: not a model folder: it has no {CONFIG}", "check seed.name")
    weights = next((folder / file for file in _WEIGHTS if (folder / file).is_file()), None)
    if weights is None:
        raise ModeError(f"{folder}: no weights there", f"one of {', '.join(_WEIGHTS)} is needed")
    model_cfg, preprocess_cfg = checked_folder(folder)
    return _Found(name, model_cfg, weights, folder, preprocess_cfg)


def _of_hub(name: str) -> _Found:
    check_hub_name(name, "seed.name")
    repository = name.removeprefix("hf-hub:")
    with _offline_errors(name, "the model"):
        folder = Path(snapshot_download(repository, allow_patterns=_SMALL_FILES))
        # Into the same folder; safetensors where there are any: open_clip knows the names.
        download_pretrained_from_hf(repository)
        return replace(_of_folder(name, folder), licence=_licence(folder / "README.md"))


def _of_tag(name: str, tag: str, model_cfg: dict[str, Any]) -> _Found:
    known = open_clip.list_pretrained_tags_by_model(name)
    if tag not in known:
        advice = f"{name} has {', '.join(known)}" if known else "or give a .safetensors or .pt file"
        raise ModeError(f"seed.weights: open_clip has no weights '{tag}' of {name}", advice)
    stated = open_clip.get_pretrained_cfg(name, tag)
    licence = None
    with _offline_errors(f"{name}:{tag}", "the weights"):
        if repository := stated.get("hf_hub"):
            repository, _, file = repository.rpartition("/")
            weights = Path(download_pretrained_from_hf(repository, filename=file or None))
            licence = _licence_of(repository)
        else:
            weights = Path(download_pretrained_from_url(stated["url"]))
    # The activation that the weights were trained with, whatever the architecture's own configuration says.
    if stated.get("quick_gelu"):
        model_cfg = {**model_cfg, "quick_gelu": True}
    preprocess_cfg = merge_preprocess_dict(asdict(PreprocessCfg()), stated)
    del preprocess_cfg["size"]
    return _Found(f"{name}:{tag}", model_cfg, weights, preprocess_cfg=preprocess_cfg, licence=licence)


def _licence_of(repository: str) -> str | None:
    try:
        return _licence(Path(hf_hub_download(repository, "README.md")))
    except (OSError, HfHubHTTPError):  # a card is no condition
        return None


def _licence(card: Path) -> str | None:
    """What the head of a hub's model card says."""
    try:
        licence = (metadata_load(card) or {}).get("license")
    except (OSError, ValueError):
        return None
    return licence[:60] if isinstance(licence, str) else None


def _load_weights(network: open_clip.CLIP, path: Path, name: str) -> None:
    """Fill a network; every weight of it, and every weight of the file, has to find its counterpart."""
    if path.suffix != ".safetensors":
        _refuse_program(path)
    own = {key: value.shape for key, value in network.state_dict().items()}
    try:
        stored = open_clip.factory.load_state_dict(str(path), weights_only=True)
        if not isinstance(stored, dict) or not all(isinstance(value, torch.Tensor) for value in stored.values()):
            raise ValueError("not a mapping of names to tensors")
        # open_clip would stretch position embeddings of another length without a word.
        other = {key: value.shape for key, value in stored.items() if key in own and key.endswith(_POSITIONS)}
        del stored
        if wrong := [key for key, shape in other.items() if shape != own[key]]:
            shapes = f"{wrong[0]} is {[*other[wrong[0]]]}, not {[*own[wrong[0]]]}"
            raise ModeError(f"{path}: weights of another architecture than {name}: {shapes}", _OTHER)
        missing, unexpected = open_clip.load_checkpoint(network, str(path), strict=False) or ([], [])
    except ModeError:
        raise
    except Exception as error:  # zip, pickle, safetensors, shapes: each library has its own
        raise ModeError(f"{path}: cannot be read as weights of {name}: {in_one_line(error)}", _OTHER) from None
    if missing or unexpected:
        parts = {"lacks": list(missing), "has beyond it": list(unexpected)}
        listed = "; ".join(f"{verb} {_list(names)}" for verb, names in parts.items() if names)
        raise ModeError(f"{path}: not the weights of {name}: {listed}", _OTHER)
    broken = [key for key, value in network.state_dict().items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise ModeError(
            f"{path}: numbers that are not finite in {_list(broken)}", "the file is damaged, or its training failed"
        )


def _refuse_program(path: Path) -> None:
    """A TorchScript archive is a program."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                advice = "use open_clip's tag for it (`weights: openai`), or its state_dict"
                raise ModeError(f"{path}: a TorchScript archive, which is a program and not weights", advice)


def _refuse_other_tokenizer(clip: Clip, name: str) -> None:
    """Ids beyond the embedding would end the first training step with an error of an index."""
    inner = getattr(clip.tokenizer, "tokenizer", None)
    ids = len(inner) if inner is not None else getattr(clip.tokenizer, "vocab_size", 0)
    rows = _vocabulary_rows(clip.model)
    if rows is not None and ids > rows:
        message = f"{name}: its tokenizer has {ids:,} ids, but its text tower knows {rows:,}"
        raise ModeError(message, "they do not belong together")


def _vocabulary_rows(network: open_clip.CLIP) -> int | None:
    text = getattr(network, "text", network)
    embedding = getattr(text, "token_embedding", None)
    if embedding is None:  # a tower of transformers
        embedding = text.transformer.get_input_embeddings() if hasattr(text, "transformer") else None
    return None if embedding is None else int(embedding.weight.shape[0])


@contextmanager
def _offline_errors(name: str, what: str) -> Iterator[None]:
    """Say in one line how to get what is neither here nor can be fetched."""
    try:
        yield
    except ModeError:
        raise
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        message = f"{name}: {what} cannot be fetched, and the cache has nothing: {in_one_line(error)}"
        advice = (
            "where there is a network, `mode get-model` makes a folder of it; copy that, and name it `local-dir:FOLDER`"
        )
        raise ModeError(message, advice) from None


def _list(names: list[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
