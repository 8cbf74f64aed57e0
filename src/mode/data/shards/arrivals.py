"""Which shards are of which source, where several share a place: `arrivals.json`, which `mode arrivals` writes.

A source has all shards that lie where it looks, until some arrive that are to be a source of their own. From then on
both have a list of names. It stands in a file of its own, and not in `params.yaml`: DVC would take a change of the
source's section for a reason to cluster it anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mode.data.shards.manifest import Manifest, Shard
from mode.errors import ModeError
from mode.files import write_aside
from mode.params import SourceParams

#: What to do about a damaged list.
_ADVICE = "`git checkout arrivals.json`: without it nobody knows which shards came when"


@dataclass(frozen=True)
class Arrivals:
    """The lists of names, by source.

    Attributes:
        names: SOURCE -> paths or URLs of its shards, as its manifest has them. A source that is not in here has all
            shards that lie where it looks.
    """

    names: Mapping[str, Sequence[str]]

    @classmethod
    def load(cls, path: Path) -> Arrivals:
        """Read what `save` wrote; a file that is not there is one without lists.

        Raises:
            ModeError: it is damaged, or a shard is named twice.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls({})
        except ValueError:
            raise ModeError(f"{path}: damaged: not JSON", _ADVICE) from None
        if not isinstance(content, dict) or not all(_are_names(names) for names in content.values()):
            raise ModeError(f"{path}: damaged: lists of shards by source are wanted", _ADVICE)
        owner: dict[str, str] = {}
        for source, names in content.items():
            for name in names:
                if name in owner:
                    raise ModeError(f"{path}: {name}: twice, of {owner[name]} and of {source}", _ADVICE)
                owner[name] = source
        return cls(content)

    def save(self, path: Path) -> None:
        """Write as JSON, one name a line, so that a difference of two versions can be read."""
        with write_aside(path) as aside:
            aside.write_text(json.dumps(self.names, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def of(self, source: str, sources: Mapping[str, SourceParams]) -> Sequence[str] | None:
        """Names of the shards of a source; None: all that lie where it looks.

        Raises:
            ModeError: it has no list, though another source, which continues it or which it continues, looks at the
                same place: both would have the same shards.
        """
        if source in self.names:
            return self.names[source]
        own = sources[source]
        for other, each in sources.items():
            related = each.continues == source or other == own.continues
            if related and each.shards == own.shards:
                raise ModeError(f"arrivals.json: no shards of '{source}', which looks where '{other}' does", _ADVICE)
        return None

    def without(self, sources: Sequence[str]) -> Arrivals:
        """The same without the lists of some sources."""
        return Arrivals({source: names for source, names in self.names.items() if source not in sources})


def _are_names(names: object) -> bool:
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) and name for name in names)


def compare(now: Manifest, known: Mapping[str, Manifest]) -> list[Shard]:
    """The shards that have come since manifests were written.

    Args:
        now: what lies there.
        known: the manifests of a source and of those that continue it.

    Raises:
        ModeError: a shard that is known has changed, or has gone.
    """
    there = {shard.path: replace(shard, factor=None) for shard in (*now.shards, *now.sidecars)}
    listed = {shard.path for manifest in known.values() for shard in manifest.shards}
    for source, manifest in known.items():
        for shard in (*manifest.shards, *manifest.sidecars):
            found = there.get(shard.path)
            if found is None:
                raise ModeError(
                    f"{shard.path}: gone, but a shard of '{source}'", "put it back: what arrives comes beside"
                )
            if found != replace(shard, factor=None):
                raise ModeError(
                    f"{shard.path}: has changed since '{source}' was indexed",
                    "put the old one back; or `dvc repro` makes everything of that source anew",
                )
    return [shard for shard in now.shards if shard.path not in listed]
