"""A model of a project as a folder by itself, for any other program."""

from __future__ import annotations

from pathlib import Path

from mode.clip.folder import is_model
from mode.clip.model import folded, load_model, save_sealed
from mode.errors import ModeError


def export_model(models: Path, name: str, folder: Path) -> None:
    """Write a model as a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` opens.

    An adapter is folded into the weights of its base; a whole model is written as it is. Its card goes with it.

    Args:
        models: folder of model folders.
        name: of the model.
        folder: where to; new or empty.

    Raises:
        ModeError: no such model, one that cannot be opened, or a folder that holds something.
    """
    names = sorted(path.name for path in models.iterdir() if is_model(path)) if models.is_dir() else []
    if name not in names:
        raise ModeError(f"{models}: no model is called '{name}'", f"there are: {', '.join(names) or 'none yet'}")
    refuse_filled(folder)
    clip = folded(load_model(models / name))
    save_sealed(folder, clip, clip.card)


def refuse_filled(folder: Path) -> None:
    """Raise `ModeError` unless a folder to export to is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModeError(f"{folder}: not empty", "name a new folder")
