"""Where the files of a project lie: the only place that knows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mode.errors import ModeError
from mode.params import ExpertParams, Params, SourceParams

if TYPE_CHECKING:
    from mode.data.shards.index import PairIndex

#: The data set that needs no file of one's own.
BUILT_IN = "glyphs"


@dataclass(frozen=True)
class Project:
    """A project folder, its parameters, and the names of all files in it."""

    root: Path
    params: Params

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.root.resolve())

    @property
    def embedder(self) -> Path:
        return self.root / "data" / "embedder"

    @property
    def tasks(self) -> Path:
        return self.root / "data" / "tasks"

    @property
    def tasks_manifest(self) -> Path:
        return self.root / "data" / "tasks-manifest.json"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def ensemble(self) -> Path:
        return self.models / "ensemble"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def runs(self) -> Path:
        return self.root / "mlruns"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    def shards(self, source: str) -> Path:
        return self.root / "data" / "shards" / source

    def manifest(self, source: str) -> Path:
        return self.shards(source) / "manifest.json"

    def index(self, source: str) -> Path:
        return self.root / "data" / "index" / source

    def vectors(self, source: str) -> Path:
        return self.root / "data" / "vectors" / f"{source}.npy"

    def clusters(self, source: str) -> Path:
        return self.root / "data" / "clusters" / source

    def assignment(self, source: str) -> Path:
        return self.root / "data" / "assignment" / f"{source}.parquet"

    def model(self, name: str) -> Path:
        return self.models / name

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

    def load_index(self, source: str) -> PairIndex:
        from mode.data.shards.index import PairIndex

        return PairIndex.load(self.index(source))


def trained_models(project: Project) -> list[str]:
    """Names of the models that are there, in the order of the tables."""
    names = ["seed", "dense", "dense-long", *project.params.experts]
    return [name for name in names if (project.model(name) / "card.json").is_file()]


def cards_of(models: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {name: json.loads((models / name / "card.json").read_text(encoding="utf-8")) for name in names}


def sample_captions(index: PairIndex, count: int, random_seed: int) -> list[str]:
    """At most `count` captions, each once, in index order."""
    import numpy as np

    if len(index) <= count:
        return [caption for block in index.iter_captions() for caption in block]
    rows = np.random.default_rng(random_seed).choice(len(index), size=count, replace=False)
    return index.captions(np.sort(rows))


def write_json(path: Path, content: object) -> None:
    """Write JSON aside and move it into place."""
    from mode.files import write_aside

    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
