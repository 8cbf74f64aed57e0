"""Model folders and configurations of others: what of them may reach open_clip and transformers.

A configuration is data, but open_clip hands parts of it on: `tokenizer_kwargs` to transformers, which runs code that a
folder brings if it is told to; names of towers and tokenizers to libraries that fetch them from a hub. So only what is
known to be harmless passes; everything else is refused by its name.

The names stand here in full: what a later open_clip adds is looked at before it passes, and a configuration is checked
without open_clip, which takes seconds to import.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mode.errors import ModeError, in_one_line

#: Bytes of a JSON file in a model folder; the largest are tokenizers with some hundred thousand words.
_LARGEST_JSON = 64 * 2**20
#: Numbers of a configuration that may be larger than `_LARGEST`: they are counts of rows, not of layers or pixels.
_LARGEST, _LARGEST_OF = 16_384, {"vocab_size": 2**22, "eos_id": 2**22, "pad_id": 2**22}
_LONGEST_TEXT = 200

_ADVICE = "see open_clip's model_configs for examples"
#: Settings of both towers, and of each.
_TOWER = {
    "width", "layers", "mlp_ratio", "ls_init_value", "final_ln_after_pool", "pool_type", "output_tokens", "act_kwargs",
    "norm_kwargs", "block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn",
    "scale_fc",
}  # fmt: skip
_VISION = _TOWER | {
    "head_width", "patch_size", "image_size", "patch_dropout", "attentional_pool", "attn_pooler_queries",
    "attn_pooler_heads", "no_ln_pre", "pos_embed_type", "timm_model_name", "timm_model_pretrained", "timm_pool",
    "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path",
}  # fmt: skip
_TEXT = _TOWER | {
    "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "heads", "embed_cls",
    "pad_id", "eos_id", "no_causal_mask", "proj_bias", "proj_type", "hf_model_name", "hf_model_pretrained",
    "hf_proj_type", "hf_pooler_type",
}  # fmt: skip
_SECTIONS = {
    "vision_cfg": _VISION,
    "text_cfg": _TEXT,
    "multimodal_cfg": _TEXT | {"dim_head", "n_queries", "attn_pooler_heads"},
}
_SINGLE = {"embed_dim", "quick_gelu", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "custom_text"}
#: Settings that stand in a mapping of their own, by its name: those that open_clip's own configurations have.
_NESTED = {
    "tokenizer_kwargs": {"clean", "strip_sep_token"},
    "norm_kwargs": {"eps"},
    "act_kwargs": {"approximate"},
}
#: Files of words and their numbers, which are long, and in which any word may stand as a key.
_WORDS = {"tokenizer.json", "vocab.json"}
_PREPROCESS = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}


def check_configuration(configuration: object, where: str) -> dict[str, Any]:
    """A model's configuration that can do nothing but describe a model.

    Args:
        configuration: `model_cfg` of open_clip, from a model folder, a file or params.yaml.
        where: it stands, in messages.

    Returns:
        The same.

    Raises:
        ModeError: a part is missing, unknown or of another type, a number is out of all proportion, or a name is none
            of those that open_clip's own configurations have.
    """
    found = dict(configuration) if isinstance(configuration, Mapping) else {}
    if missing := [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in found]:
        raise ModeError(f"{where}: the configuration lacks {', '.join(missing)}", _ADVICE)
    for key, value in found.items():
        if key in _SECTIONS:
            _check_keys(value, _SECTIONS[key], f"{where}: {key}")
        elif key not in _SINGLE:
            raise ModeError(f"{where}: unknown key '{key}'", _ADVICE)
        else:
            _check_value(key, value, where)
    _check_names(found, where)
    return found


def check_preprocessing(configuration: object, where: str) -> dict[str, Any]:
    """The `preprocess_cfg` of a model folder, without what open_clip does not know either.

    Raises:
        ModeError: a value is of another type or out of all proportion; a deviation of zero.
    """
    if not isinstance(configuration, Mapping):
        raise ModeError(f"{where}: preprocess_cfg is no mapping", _ADVICE)
    found = {key: value for key, value in configuration.items() if key in _PREPROCESS}
    _check_keys(found, _PREPROCESS, f"{where}: preprocess_cfg")
    for key in ("mean", "std"):
        values = found.get(key, (1.0, 1.0, 1.0))
        if not isinstance(values, list | tuple) or len(values) != 3 or (key == "std" and not all(values)):
            raise ModeError(f"{where}: preprocess_cfg.{key}: {_short(values)}", "give three numbers")
    return dict(configuration)


def check_folder(folder: Path) -> None:
    """Refuse a model, tokenizer or encoder folder that brings code, whether or not anything would run it.

    Raises:
        ModeError: a Python file, or a JSON file that names one (`auto_map`); a JSON file that cannot be read.
    """
    advice = "models here are data alone; remove it if you know that the model works without it"
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".pyc", ".so"):
            raise ModeError(f"{path}: a model folder with code", advice)
        if path.suffix == ".json" and path.is_file() and path.name not in _WORDS and _names_code(read_json(path)):
            raise ModeError(f"{path}: `auto_map` names code to run", advice)


def _names_code(content: object) -> bool:
    return isinstance(content, dict) and "auto_map" in content


def read_json(path: Path) -> Any:
    """Content of a JSON file of somebody else. Raises `ModeError` if it is none, or far too long."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModeError(f"{path}: cannot be read as JSON: {in_one_line(error)}") from None


def _check_keys(values: object, known: set[str], where: str) -> None:
    if not isinstance(values, Mapping):
        raise ModeError(f"{where}: no mapping", _ADVICE)
    for key, value in values.items():
        if key not in known:
            raise ModeError(f"{where}: unknown key '{_short(key)}'", _ADVICE)
        if key in _NESTED and value is not None:
            _check_keys(value, _NESTED[key], f"{where}.{key}")
        else:
            _check_value(key, value, where)


def _check_value(key: str, value: object, where: str) -> None:
    """Nothing, a truth value, a number in proportion, a short text, or a few numbers."""
    numbers = value if isinstance(value, list | tuple) and len(value) <= 8 else [value]
    for number in numbers:
        if number is None or isinstance(number, bool) or (isinstance(number, str) and len(number) <= _LONGEST_TEXT):
            continue
        if not isinstance(number, int | float) or not abs(number) <= _LARGEST_OF.get(key, _LARGEST):
            raise ModeError(f"{where}.{key}: {_short(value)} is not possible", _ADVICE)


def _check_names(found: Mapping[str, Any], where: str) -> None:
    """Towers and tokenizers of other libraries: architectures of timm, and what open_clip's configurations name."""
    timm = found["vision_cfg"].get("timm_model_name")
    if timm is not None and not _is_timm_architecture(timm):
        raise ModeError(f"{where}: vision_cfg.timm_model_name: timm has no architecture '{_short(timm)}'", _ADVICE)
    encoder = found["text_cfg"].get("hf_model_name")
    if encoder is not None and encoder not in _encoders():
        advice = f"open_clip's configurations have {', '.join(sorted(_encoders()))}"
        raise ModeError(f"{where}: text_cfg.hf_model_name: '{_short(encoder)}' is not known to be harmless", advice)


def _is_timm_architecture(name: object) -> bool:
    """Whether timm makes this model itself, and looks for it on no hub and in no folder."""
    import timm

    return isinstance(name, str) and ":" not in name and "/" not in name and bool(timm.is_model(name))


@cache
def _encoders() -> frozenset[str]:
    """Text encoders of Hugging Face that open_clip's own configurations name."""
    import open_clip

    configurations = map(open_clip.get_model_config, open_clip.list_models())
    named = (each["text_cfg"].get("hf_model_name") for each in configurations if each)
    return frozenset(name for name in named if name)


def _short(value: object) -> str:
    """A value of somebody else in a message: not long; `ModeError` makes it one line."""
    text = str(value)
    return text[:60] + ("..." if len(text) > 60 else "")
