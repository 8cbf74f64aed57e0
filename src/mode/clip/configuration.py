"""What a model folder's configuration and card say, without torch and open_clip, which take seconds to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mode.clip.folder import CARD, CONFIG
from mode.clip.trust import check_configuration, check_folder, check_preprocessing, read_json
from mode.errors import ModeError
from mode.params import ImageParams, ModelParams

#: Pixels of a side where open_clip's configuration of an image tower says nothing.
IMAGE_SIZE = 224


def check_architecture(model: ModelParams) -> None:
    """Refuse a name of no model of open_clip's, in milliseconds: its first use may come after hours of embedding.

    Names of files, and of trained weights, are left to `mode.clip.model.configuration_of`.
    """
    name, package = model.name, find_spec("open_clip")
    if name is None or package is None or ":" in name or name.endswith(".json"):
        return
    folders = [Path(each) / "model_configs" for each in package.submodule_search_locations or ()]
    known = {path.stem for folder in folders for path in folder.glob("*.json")}
    if known and name not in known:
        raise unknown_architecture(name)


def unknown_architecture(name: str | None, setting: str = "model") -> ModeError:
    """The error where open_clip has no architecture of that name."""
    advice = "`python -c 'import open_clip; print(open_clip.list_models())'` lists them"
    return ModeError(f"{setting}.name: open_clip knows no model '{name}'", advice)


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its images: open_clip's `PreprocessCfg`, with its defaults."""

    size: int | Sequence[int] = IMAGE_SIZE
    mode: str = "RGB"
    mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073)
    std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0


def checked_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configurations of model and preprocessing of a folder, after `mode.clip.trust` has passed them and the folder."""
    check_folder(folder)
    return read_configurations(folder)


def read_configurations(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configurations of model and preprocessing of a folder, checked by themselves."""
    content = read_json(folder / CONFIG)
    content = content if isinstance(content, dict) else {}
    where = str(folder / CONFIG)
    model_cfg = check_configuration(content.get("model_cfg"), where)
    return model_cfg, check_preprocessing(content.get("preprocess_cfg", {}), where)


def read_card(folder: Path) -> dict[str, Any]:
    """What a model was trained on and what it cost, as its folder says. Raises `ModeError` where that is not said."""
    card = read_json(folder / CARD)
    if not isinstance(card, dict):
        raise ModeError(f"{folder / CARD}: not a card", "remove it, or train the model again")
    return card


def preprocessing_of(preprocess_cfg: Mapping[str, Any], image_size: int | Sequence[int]) -> Preprocessing:
    """What open_clip makes of a folder's `preprocess_cfg`; `image_size` is that of the image tower's configuration."""
    known = {field.name for field in fields(Preprocessing)}
    given = {"size": image_size, **preprocess_cfg}
    return Preprocessing(**{name: value for name, value in given.items() if name in known})


def image_of(image: ImageParams, its: Preprocessing, where: str) -> ImageParams:
    """How training prepares images for a model that knows images already: as it knows them.

    Args:
        image: what params.yaml says; what it leaves open (see `ImageParams.model_fields_set`) is the model's.
        its: the model's own preprocessing.
        where: the model comes from, in messages.

    Returns:
        `image` with the model's size, mean, std, interpolation, resize mode and fill colour.

    Raises:
        ModeError: params.yaml gives another value for one of these; or the model takes images that are not square.
    """
    sides = {its.size} if isinstance(its.size, int) else set(its.size)
    if len(sides) > 1:
        raise ModeError(f"{where}: takes images of {its.size} pixels", "choose a model that takes square ones")
    own = {
        "size": sides.pop(),
        "mean": tuple(its.mean),
        "std": tuple(its.std),
        # Whatever is not bilinear is bicubic, as in open_clip.
        "interpolation": "bilinear" if its.interpolation == "bilinear" else "bicubic",
        "resize_mode": its.resize_mode,
        "fill_color": its.fill_color,
    }
    for name, value in own.items():
        ours = getattr(image, name)
        if name in image.model_fields_set and ours != value:
            message = f"image.{name} is {_shown(ours)}, but {where} was made for {_shown(value)}"
            raise ModeError(message, f"leave image.{name} out, or choose another model")
    return image.model_copy(update=own)


def image_of_folder(folder: Path, image: ImageParams) -> ImageParams:
    """`image_of` for a model folder that is not opened: only its configuration is read.

    Raises:
        ModeError: as `image_of`; or there is no model.
    """
    if not (folder / CONFIG).is_file():
        raise ModeError(f"{folder}: not a model folder: it has no {CONFIG}", "train it first")
    model_cfg, preprocess_cfg = read_configurations(folder)
    size = model_cfg["vision_cfg"].get("image_size", IMAGE_SIZE)
    return image_of(image, preprocessing_of(preprocess_cfg, size), str(folder))


def _shown(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
