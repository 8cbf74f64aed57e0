"""What a training stage shows of its model while it trains, and keeps of it. No stage reads it, but to draw it.

A figure of this kind is a by-product, as the seconds in a model's card are: no weight depends on it, and no figure of
an evaluation. So dvc.yaml does not name the tasks that a training is looked at with: one task more would train all
models again.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from mode.errors import ModeError
from mode.evaluation.tasks import Task, open_task
from mode.stages.project import BUILT_IN, Project
from mode.training.beside import Beside, HeldOut, KeptModels, for_inference
from mode.training.plan import Training

if TYPE_CHECKING:
    from mode.clip.model import Clip

#: More tasks than this, and the progress line shows their mean.
_TASKS_IN_LINE = 3


def beside_training(
    project: Project,
    training: Training,
    noted: Path,
    log: Callable[[int, Mapping[str, float]], None],
    leads: bool,
) -> list[Beside]:
    """What params.yaml asks for beside a training.

    Args:
        project: of the training.
        training: what is trained.
        noted: file of the figures of a training that is not finished.
        log: called with samples seen and new figures.
        leads: whether this process does it all; others only know when.

    Raises:
        ModeError: a task that is not there.
    """
    recipe = training.recipe
    beside: list[Beside] = []
    if recipe.validation.every is not None:
        figures = _figures(project, training) if leads else (lambda _: {})
        beside.append(Validation(training, noted, figures, log))
    if recipe.keep_checkpoints.every is not None:
        beside.append(KeptModels(training, recipe.keep_checkpoints, project.kept(training.plan.name)))
    return beside


class Validation:
    """Figures of a model while it trains, each looked at once, however often the training is interrupted.

    Args:
        training: what is trained, and how often it is looked at.
        noted: a file with a line of JSON for each look, which this adds to.
        figures: of a model in evaluation mode: `validate/loss`, `validate/zeroshot/TASK`.
        log: called with samples seen and new figures.
    """

    def __init__(
        self,
        training: Training,
        noted: Path,
        figures: Callable[[Clip], dict[str, float]],
        log: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        self._training, self._noted, self._figures, self._log = training, noted, figures, log

    def due(self, step: int) -> bool:
        plan, every = self._training.plan, self._training.recipe.validation.every
        return every is not None and (step % every == 0 or step in (plan.first_step, plan.last_step))

    def done(self, step: int) -> bool:
        return step * self._training.plan.batch_size in self._looks()

    def do(self, step: int, clip: Clip) -> dict[str, float]:
        with for_inference(clip) as model:
            found = self._figures(model)
        samples = step * self._training.plan.batch_size
        before = self._noted.read_text(encoding="utf-8") if self._noted.is_file() else "\n"
        with self._noted.open("a", encoding="utf-8") as file:  # after half a line, which a kill left, comes a new one
            file.write(("" if before.endswith("\n") else "\n") + json.dumps({"samples": samples, **found}) + "\n")
        self._log(samples, found)
        return _in_line(found)

    def table(self) -> str:
        """All looks as csv: samples, loss (if any), and a column for each task."""
        looks = self._looks()
        heads = list(dict.fromkeys(name for found in looks.values() for name in found))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["samples", *(name.removeprefix("validate/") for name in heads)])
        for samples, found in sorted(looks.items()):
            writer.writerow([samples, *(f"{found[name]:.6f}" if name in found else "" for name in heads)])
        return text.getvalue()

    def _looks(self) -> dict[int, dict[str, float]]:
        """Samples seen -> figures."""
        looks = {}
        for line in self._noted.read_text(encoding="utf-8").splitlines() if self._noted.is_file() else []:
            try:
                found = json.loads(line)
                looks[int(found.pop("samples"))] = found
            except (ValueError, KeyError, AttributeError):  # half a line
                continue
        return looks


def _figures(project: Project, training: Training) -> Callable[[Clip], dict[str, float]]:
    """What looks at a model; data that it needs is read here, once."""
    from mode.data.loading.selection import held_out_pairs
    from mode.evaluation.glance import accuracies

    recipe, machine = training.recipe, project.params.machine
    tasks = [_open(project, name) for name in recipe.validation.tasks]
    held_out = None
    if recipe.validation.held_out:
        count, random_seed = recipe.validation.held_out, training.random_seed
        pairs = held_out_pairs(training.plan.pairs, training.index.image, count, random_seed)
        held_out = HeldOut(training, pairs, project.root) if len(pairs) else None
        if not held_out:
            none = "image of its held-out pairs can be decoded" if len(pairs) else "pair of it is held out"
            print(f"{training.plan.name}: no {none}, so there will be no validate/loss", flush=True)

    def look(clip: Clip) -> dict[str, float]:
        batch, workers = machine.inference_batch, machine.decode_threads
        found = {"validate/loss": held_out.loss(clip, batch)} if held_out else {}
        if tasks:
            scores = accuracies(clip, tasks, batch_size=batch, workers=workers)
            found |= {f"validate/zeroshot/{task}": value for task, value in scores.items()}
        return {name: value for name, value in found.items() if not math.isnan(value)}

    return look


def _open(project: Project, name: str) -> Task:
    """A task of the project by its name, or a task folder."""
    given = project.params.evaluation.tasks
    folders = [project.tasks / name] if given == BUILT_IN else [project.root / each for each in given]
    for folder in (*(each for each in folders if each.name == name), project.root / name):
        if folder.is_dir():
            return open_task(folder)
    raise ModeError(
        f"training.validate.tasks: no task is called '{name}', nor is it a folder",
        "`dvc repro tasks` makes the built-in ones" if given == BUILT_IN else "see evaluation.tasks",
    )


def _in_line(found: Mapping[str, float]) -> dict[str, float]:
    """What the progress line shows of a look."""
    scores = {name.rpartition("/")[2]: value for name, value in found.items() if name != "validate/loss"}
    if len(scores) > _TASKS_IN_LINE:
        scores = {"zero-shot": fmean(scores.values())}
    return ({"held-out loss": found["validate/loss"]} if "validate/loss" in found else {}) | scores
