"""What a model folder is by the names of its files, without torch and open_clip, which take seconds to import."""

from __future__ import annotations

from pathlib import Path

CONFIG, WEIGHTS, CARD = "open_clip_config.json", "open_clip_model.safetensors", "card.json"
#: What the folder of an adapter has in place of the first (`mode.clip.adapter`).
ADAPTER_CONFIG = "adapter_config.json"


def is_model(folder: Path) -> bool:
    """Whether a folder looks like a model's: a whole one, or an adapter."""
    return (folder / CONFIG).is_file() or holds_adapter(folder)


def holds_adapter(folder: Path) -> bool:
    """Whether a folder looks like an adapter's."""
    return not (folder / CONFIG).is_file() and (folder / ADAPTER_CONFIG).is_file()


def base_of(folder: Path) -> Path | None:
    """The folder of the model that an adapter is a change of; None of a whole model.

    Raises:
        ModeError: the adapter is damaged.
    """
    if not holds_adapter(folder):
        return None
    from mode.clip.adapter import read_adapter

    return folder.parent / read_adapter(folder)[0].base
