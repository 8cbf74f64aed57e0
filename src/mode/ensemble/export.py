"""The experts of an ensemble as one model folder, for any other program."""

from __future__ import annotations

from pathlib import Path

from mode.clip.export import refuse_filled
from mode.clip.folder import CARD
from mode.clip.model import load_models, save_sealed
from mode.ensemble.merge import MERGE_BATCH, merge_on_kept
from mode.ensemble.router import Router
from mode.ensemble.rules import uniform_weights
from mode.errors import ModeError
from mode.roles import ENSEMBLE

#: What `mode export-model` calls it.
MERGED = "merged"


def export_merged(models: Path, folder: Path) -> None:
    """Write one model whose parameters are the plain mean of all experts' (paper, Table 18, before the fine-tuning).

    Args:
        models: folder of model folders, with the ensemble's.
        folder: where to; new or empty.

    Raises:
        ModeError: no ensemble, an expert that is not trained yet, or a folder that holds something.
    """
    refuse_filled(folder)
    router = Router.load(models / ENSEMBLE.name)
    if missing := [expert for expert in router.experts if not (models / expert / CARD).is_file()]:
        raise ModeError(f"{models}: {missing[0]} is not trained yet", "train it first")
    clips = load_models({expert: models / expert for expert in router.experts}, "cpu")
    for clip in clips.values():
        clip.model.eval()
    weights = uniform_weights(router.experts)
    clip = merge_on_kept(clips, weights, router.images, weights, MERGE_BATCH)
    save_sealed(folder, clip, {"merged": list(router.experts)})
