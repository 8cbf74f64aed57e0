"""A project: its files and its parameters, and what several stages read of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mode.clip.configuration import read_card
from mode.clip.folder import CARD
from mode.errors import ModeError
from mode.params import ExpertParams, Params, SourceParams, UpdateParams
from mode.paths import Paths
from mode.roles import models_of

if TYPE_CHECKING:
    from mode.data.shards.index import PairIndex

#: The data set that needs no file of one's own.
BUILT_IN = "glyphs"


class Project(Paths):
    """A project folder, its parameters, and the names of all files in it."""

    def __init__(self, root: Path, params: Params) -> None:
        super().__init__(root)
        self.params = params

    def source(self, name: str) -> SourceParams:
        """Parameters of a source; `ModeError` names those there are."""
        if name not in self.params.sources:
            raise ModeError(f"no source is called '{name}'", f"params.yaml has: {', '.join(self.params.sources)}")
        return self.params.sources[name]

    def expert(self, name: str) -> ExpertParams:
        """Parameters of an expert; `ModeError` names those there are."""
        if name not in self.params.experts:
            raise ModeError(f"no expert is called '{name}'", f"params.yaml has: {', '.join(self.params.experts)}")
        return self.params.experts[name]

    def update(self, name: str) -> UpdateParams:
        """Parameters of an update of an expert; `ModeError` names those there are."""
        if name not in self.params.updates:
            there = ", ".join(self.params.updates) or "no update"
            raise ModeError(f"no update is called '{name}'", f"params.yaml has: {there}")
        return self.params.updates[name]

    def load_index(self, source: str) -> PairIndex:
        from mode.data.shards.index import PairIndex

        return PairIndex.load(self.index(source))


class Counted(NamedTuple):
    """What the index of a source has counted.

    Attributes:
        images, pairs: that are good.
        bad: members, rows and captions that are not, by kind; and images that were left out, by filter.
    """

    images: int
    pairs: int
    bad: dict[str, int]


def counted(project: Project, source: str) -> Counted | None:
    """What stands in `report.json` of the index of a source; None where there is none yet.

    Raises:
        ModeError: it is damaged.
    """
    path = project.index(source) / "report.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = Counted(content["images"], content["pairs"], {**content["bad"], **content.get("filtered", {})})
        numbers = [found.images, found.pairs, *found.bad.values()]
        if not (all(type(number) is int for number in numbers) and 0 < found.images <= found.pairs):
            raise ValueError
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModeError(f"{path}: not the report of an index", "index the source again") from None
    return found


def trained_models(project: Project) -> list[str]:
    """Names of the models that are there, in the order of the tables; of each expert, its newest version of these."""

    def is_there(name: str) -> bool:
        return (project.model(name) / CARD).is_file()

    newest = {
        expert: next((name for name in reversed(versions) if is_there(name)), expert)
        for expert, versions in project.params.versions.items()
    }
    return [name for name in models_of(newest) if is_there(name)]


def cards_of(models: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name -> card of the models in a folder. Raises `ModeError` where one is missing or damaged."""
    return {name: read_card(models / name) for name in names}


def task_folders(project: Project) -> list[Path]:
    """The folders of the project's tasks, as the `tasks` stage has listed them. Raises `ModeError` for damage."""
    try:
        listed = json.loads(project.task_list.read_text(encoding="utf-8"))
        if not isinstance(listed, list) or not all(isinstance(where, str) for where in listed):
            raise ValueError
    except ValueError:
        raise ModeError(f"{project.task_list}: damaged: not a list of folders", "dvc repro --force tasks") from None
    return [project.root / where for where in listed]


def sample_captions(index: PairIndex, count: int, random_seed: int) -> list[str]:
    """At most `count` captions, each once, in index order."""
    import numpy as np

    from mode.permutation import permuted

    if len(index) <= count:
        return [caption for block in index.iter_captions() for caption in block]
    rows = permuted(np.arange(count), len(index), random_seed)
    return index.captions(np.sort(rows))


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file aside and move it into place."""
    from mode.files import write_aside

    with write_aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
