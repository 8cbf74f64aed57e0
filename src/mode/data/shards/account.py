"""The account of a source: how many pairs each file has, and what had to be skipped."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from mode.data.shards.scan import DAMAGED_TAR, Problem, Scan
from mode.errors import ModeError

#: Problems that a report keeps to be shown, by default: all of them stand in `quarantine.csv`.
LISTED = 1_000


@dataclass(frozen=True)
class FileReport:
    """One shard or table.

    Attributes:
        path: as the manifest gives it.
        images, pairs: good ones.
        bad: problems by kind; each damage of a tar is one, however many pairs it cost.
        read_bytes, lost_bytes: of a tar's bytes, those that are members or padding, and those that are damage.
        dropped: good images that were left out on purpose.
        filtered: images that were left out by a filter, or because nothing is known to filter them by: their numbers.
    """

    path: str
    images: int
    pairs: int
    bad: dict[str, int]
    read_bytes: int
    lost_bytes: int = 0
    dropped: int = 0
    filtered: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: FileReport) -> FileReport:
        """Both together, of two parts of one file."""
        return FileReport(
            self.path,
            self.images + other.images,
            self.pairs + other.pairs,
            dict(Counter(self.bad) + Counter(other.bad)),
            self.read_bytes + other.read_bytes,
            self.lost_bytes + other.lost_bytes,
            self.dropped + other.dropped,
            dict(sorted((Counter(self.filtered) + Counter(other.filtered)).items())),
        )


@dataclass
class IndexReport:
    """All files of a source. Its memory does not grow with what was skipped.

    Attributes:
        files: in the manifest's order.
        problems: the first `listed` of what was skipped, in the order in which it was met.
        listed: how many of them are kept.
    """

    files: list[FileReport] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    listed: int = LISTED

    def add(self, scan: Scan) -> None:
        """Enter one file, or the next part of a table."""
        bad = dict(Counter(problem.kind for problem in scan.problems))
        pairs, read = sum(map(len, scan.captions)), scan.size - scan.lost_bytes
        filtered = dict(sorted(scan.filtered.items()))
        entry = FileReport(scan.path, len(scan.keys), pairs, bad, read, scan.lost_bytes, scan.dropped, filtered)
        if self.files and self.files[-1].path == scan.path:
            self.files[-1] += entry
        else:
            self.files.append(entry)
        self.problems += scan.problems[: max(self.listed - len(self.problems), 0)]

    @property
    def images(self) -> int:
        """Good images."""
        return sum(file.images for file in self.files)

    @property
    def pairs(self) -> int:
        """Good pairs."""
        return sum(file.pairs for file in self.files)

    @property
    def dropped(self) -> int:
        """Good images that were left out on purpose."""
        return sum(file.dropped for file in self.files)

    @property
    def filtered(self) -> dict[str, int]:
        """Images that were left out, by the filter that they do not meet, sorted."""
        return dict(sorted(sum((Counter(file.filtered) for file in self.files), Counter()).items()))

    @property
    def bad(self) -> int:
        """Problems of any kind."""
        return sum(sum(file.bad.values()) for file in self.files)

    @property
    def counts(self) -> dict[str, int]:
        """Problems by kind; kinds that did not occur are absent."""
        return dict(sum((Counter(file.bad) for file in self.files), Counter()))

    def bad_pairs(self, file: FileReport) -> int:
        """Pairs that a file should have had and has not.

        A problem is one pair, except damage of a tar: nobody knows what it held, so the bytes that are lost count as
        many pairs as that many bytes hold on average in this source, at least one for each damage.
        """
        [bad] = self._bad_pairs([file])
        return bad

    def _bad_pairs(self, files: Sequence[FileReport]) -> list[int]:
        """`bad_pairs` of each, with one look at all files and not one for each: there may be hundreds of thousands."""
        pairs, read = self.pairs, sum(each.read_bytes for each in self.files)
        lost = [round(file.lost_bytes * pairs / read) if read else 0 for file in files]
        return [
            sum(file.bad.values()) + max(pairs_lost - file.bad.get(DAMAGED_TAR, 0), 0)
            for file, pairs_lost in zip(files, lost, strict=True)
        ]

    @property
    def bad_share(self) -> float:
        """Bad pairs of all pairs, 0 to 1; 0 for nothing at all."""
        bad = sum(self._bad_pairs([file for file in self.files if file.bad]))
        return bad / (bad + self.pairs) if bad else 0.0

    def worst(self, count: int = 3) -> list[FileReport]:
        """The files with most bad pairs, worst first; none that are without fault."""
        bad = [file for file in self.files if file.bad]
        ranked = sorted(zip(self._bad_pairs(bad), bad, strict=True), key=itemgetter(0), reverse=True)
        return [file for _, file in ranked[:count]]

    def check(self, max_bad_share: float) -> None:
        """Stop where too much is bad.

        Raises:
            ModeError: naming the worst files; or there is not one good pair.
        """
        if self.bad_share > max_bad_share or not self.pairs:
            left_out = [*sorted(self.counts.items()), *self.filtered.items()]
            kinds = ", ".join(f"{count} {kind}" for kind, count in left_out) or "nothing in it"
            worst = "; ".join(f"{file.path}: {self.bad_pairs(file)} of {self.expected(file)}" for file in self.worst())
            found = f"{self.bad_share:.1%} of the pairs are bad, {max_bad_share:.1%} are allowed" if self.pairs else ""
            raise ModeError(
                f"{found or 'not one good pair'} ({kinds})" + (f"; worst: {worst}" if worst else ""),
                "`mode verify SHARDS` lists them; index.max_bad_share sets the limit",
            )

    def expected(self, file: FileReport) -> int:
        """Good and bad pairs of a file."""
        return file.pairs + self.bad_pairs(file)

    def save(self, folder: Path) -> None:
        """Write `report.json`: the counts. What they count is written by `quarantine` as it comes."""
        content: dict[str, Any] = {
            "images": self.images,
            "pairs": self.pairs,
            "bad": self.counts,
            "dropped": self.dropped,
            "bad_share": round(self.bad_share, 6),
            "files": [asdict(file) for file in self.files],
        }
        if self.filtered:
            content["filtered"] = self.filtered
        for file in content["files"]:
            if not file["filtered"]:
                del file["filtered"]
        (folder / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def quarantine(folder: Path) -> Iterator[Callable[[Iterable[Problem]], None]]:
    """What adds problems to `quarantine.csv` in a folder, a line each."""
    with (folder / "quarantine.csv").open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Problem._fields)
        yield writer.writerows
