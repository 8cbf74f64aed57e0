"""What a model folder is by the names of its files, without torch and open_clip, which take seconds to import."""

from __future__ import annotations

from pathlib import Path

CONFIG, WEIGHTS, CARD = "open_clip_config.json", "open_clip_model.safetensors", "card.json"
#: What the folder of an adapter has in place of the first two (`mode.clip.adapter`), by the names that peft gives them.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_model(folder: Path) -> bool:
    """Whether a folder looks like a model's: a whole one, or an adapter."""
    return (folder / CONFIG).is_file() or holds_adapter(folder)


def holds_adapter(folder: Path) -> bool:
    """Whether a folder looks like an adapter's."""
    return not (folder / CONFIG).is_file() and (folder / ADAPTER_CONFIG).is_file()


def weights_of(folder: Path) -> Path:
    """The file of a model's own weights: of an adapter its deltas, beside the SHA-256 of its base's weights."""
    return folder / (ADAPTER_WEIGHTS if holds_adapter(folder) else WEIGHTS)


def base_of(folder: Path) -> Path | None:
    """The folder of the model that an adapter is a change of; None of a whole model.

    Raises:
        ModeError: the adapter is damaged.
    """
    if not holds_adapter(folder):
        return None
    from mode.clip.adapter import read_adapter

    return folder.parent / read_adapter(folder)[0].base
