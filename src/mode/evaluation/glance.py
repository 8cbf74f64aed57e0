"""How good a model is on a few tasks, with nothing beside it: to be looked at while it trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mode.clip.encode import encode_prompts
from mode.clip.model import Clip
from mode.evaluation.features import encode_tasks
from mode.evaluation.mixtures import figures_of_all
from mode.evaluation.scores import primary
from mode.evaluation.tasks import Task


def accuracies(clip: Clip, tasks: Sequence[Task], *, batch_size: int, workers: int) -> dict[str, float]:
    """The figure of each task that grows with the experts: that of `mode.evaluation.scores.primary`, 0..1.

    Args:
        clip: in evaluation mode, in float32, on any device.
        tasks: of different names.
        batch_size: images or texts in one forward pass.
        workers: threads that decode.

    Raises:
        ModeError: an image cannot be decoded, or the model gives NaN.
    """
    device, name = str(next(clip.model.parameters()).device), "in training"
    figures = {}
    for task, images in encode_tasks(
        tasks, {name: clip}, batch_size=batch_size, workers=workers, device=device, silent=True
    ):
        texts = {name: encode_prompts(clip, task.prompts, batch_size=batch_size, device=device, name=name)}
        with torch.inference_mode():
            figures[task.name] = primary(task, figures_of_all(task, images, texts, {})[name])
    return figures
