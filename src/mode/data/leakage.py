"""Training images that are test images too: `leakage.json`, which `mode leakage` writes, and what the index does.

A figure on test images that the model was trained on says nothing. The file lists the training images that look like
one of a task; with `index.drop_leaked` the index leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ValidationError

from mode.errors import ModeError, first_fault
from mode.files import write_aside


class Leak(BaseModel):
    """A training image that looks like a test image.

    Attributes:
        source, file, key: of the training image, as the index names them.
        task, image: the test image.
        distance: bits of 64 in which their hashes differ.
    """

    source: str
    file: str
    key: str
    task: str
    image: str
    distance: int


class TaskLeakage(BaseModel):
    """How many `images` a task has, and which of them are among the training images."""

    images: int
    leaked: list[str] = []


class Leakage(BaseModel):
    """What a search has found; empty as long as there was none.

    Attributes:
        distance: at most so many bits differ; `None`: nobody has looked.
        images: SOURCE -> images that were looked at.
        tasks: TASK -> how much of it leaked.
        leaks: for each training image concerned the test image that it is most like.
    """

    distance: int | None = None
    images: Mapping[str, int] = {}
    tasks: Mapping[str, TaskLeakage] = {}
    leaks: list[Leak] = []

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises `ModeError` where that is missing or something else."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ModeError(f"{path}: missing", "`echo '{}' > leakage.json` says that nobody has looked") from None
        except ValidationError as error:
            raise ModeError(f"{path}: {first_fault(error)}", "`mode leakage` writes it anew") from None

    def save(self, path: Path) -> None:
        """Write as JSON."""
        with write_aside(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def keys(self, source: str) -> frozenset[tuple[str, str]]:
        """(file, key) of a source's images that have leaked."""
        return frozenset((leak.file, leak.key) for leak in self.leaks if leak.source == source)

    def with_dropped(self, before: Leakage) -> Leakage:
        """What this search and one `before` found, whose images the index may have left out since."""
        here = {(leak.source, leak.file, leak.key) for leak in self.leaks}
        kept = [leak for leak in before.leaks if (leak.source, leak.file, leak.key) not in here]
        tasks = {
            name: TaskLeakage(
                images=task.images,
                leaked=sorted({*task.leaked, *(before.tasks[name].leaked if name in before.tasks else ())}),
            )
            for name, task in self.tasks.items()
        }
        return self.model_copy(update={"leaks": [*self.leaks, *kept], "tasks": tasks})
