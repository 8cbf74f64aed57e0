"""A training that writes down which pairs each step sees, is looked at, and ends itself at a step; also by torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from mode.data.loading.loader import make_loader
from mode.params import load_params
from mode.roles import SEED
from mode.stages.beside import Validation, beside_training
from mode.stages.project import Project
from mode.stages.training import training_of
from mode.training import batches
from mode.training.distribution import ending_together
from mode.training.loop import Interrupted, train


def train_recorded(root: Path, notes: Path, workers: int, last: int, number: int) -> None:
    """Train the seed of a project, or go on with it.

    Args:
        root: of the project.
        notes: where each process appends a line to `RANK.jsonl` for each of its batches: sample position after the
            batch, and rows.
        workers: processes that read.
        last: batches, after which the process sends itself the signal `number`, unless the training ends before.
        number: of the signal.
    """
    project, rank = Project(root, load_params(root / "params.yaml")), os.environ.get("RANK", "0")
    notes.mkdir(exist_ok=True)

    def recorded(*arguments: object, **settings: object) -> object:
        for count, batch in enumerate(make_loader(*arguments, **settings), start=1):  # type: ignore[arg-type]
            with (notes / f"{rank}.jsonl").open("a") as file:
                file.write(json.dumps([batch.position, batch.rows.tolist()]) + "\n")
            if count == last:
                os.kill(os.getpid(), number)
            yield batch

    batches.make_loader = recorded  # type: ignore[assignment]
    training = training_of(project, SEED)
    noted = root / "checkpoints/validation.jsonl"
    noted.parent.mkdir(exist_ok=True)
    [look] = beside_training(project, training, noted, lambda *_: None, rank == "0")
    assert isinstance(look, Validation)
    machine = project.params.machine.model_copy(update={"workers": workers, "device": "cpu"})
    with ending_together():
        try:
            result = train(training, root, machine, root / "checkpoints", beside=[look])
            result.save(root / "models/seed", {"validation.csv": look.table()})
        except Interrupted as interrupted:
            sys.exit(interrupted.exit_code)


def seen(notes: Path, processes: int = 1) -> list[int]:
    """Rows in the order of the training, of all processes; of a step that was done again, as it was done last.

    Whenever a step was done, it saw the same.
    """
    steps: list[dict[int, list[int]]] = []
    for rank in range(processes):
        mine: dict[int, list[int]] = {}
        for line in (notes / f"{rank}.jsonl").read_text().splitlines():
            position, rows = json.loads(line)
            assert mine.setdefault(position, rows) == rows
        steps.append(mine)
    assert all(mine.keys() == steps[0].keys() for mine in steps)
    return [row for position in sorted(steps[0]) for mine in steps for row in mine[position]]


def each_once_an_epoch(rows: list[int], images: np.ndarray) -> bool:
    """Whether every pass over the images has each of them exactly once; the last pass may be a part of one."""
    count = int(images.max()) + 1
    order = images[np.array(rows)]
    passes = [order[start : start + count] for start in range(0, len(order), count)]
    return all(len(np.unique(each)) == len(each) for each in passes) and len(passes[0]) == count


if __name__ == "__main__":
    root, notes, workers, last, number = sys.argv[1:]
    train_recorded(Path(root), Path(notes), int(workers), int(last), int(number))
