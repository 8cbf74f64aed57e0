"""Checksums that lie with what they are of, so that a bit that has flipped on the disk is noticed.

A folder has a file `SHA256SUMS`, as coreutils write and check it (`sha256sum -c SHA256SUMS`). A file by itself carries
a seal: the SHA-256 of all of it, in which the seal's own 64 digits count as zeros.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from mode.errors import ModeError
from mode.files import sha256_of, sha256_of_folder

MANIFEST = "SHA256SUMS"
#: What to do about damage.
ADVICE = "remove it and run `dvc checkout`, or run its stage again"

#: A seal's digits before they are known.
_BLANK = "0" * 64
#: A seal is looked for in so many last bytes of a file.
_SEARCHED = 1 << 16
#: Bytes that are hashed at a time.
_PIECE = 1 << 22


def write_manifest(folder: Path) -> None:
    """Write `SHA256SUMS` of all files in a folder and below it: the last thing to be written there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")


def check_manifest(folder: Path, names: Collection[str] | None = None) -> bool:
    """Compare the files of a folder with its `SHA256SUMS`; files that it does not name may be there.

    Args:
        folder: any folder.
        names: of the files to look at (relative, `/` between parts), which have to be named there; default all.

    Returns:
        False where there is no `SHA256SUMS`: the folder was written by another program, or by an older version.

    Raises:
        ModeError: a file is damaged or missing, or `SHA256SUMS` itself is damaged.
    """
    listed = _read_manifest(folder)
    if listed is None:
        return False
    for name in listed if names is None else names:
        path = folder / name
        if name not in listed:
            raise ModeError(f"{folder / MANIFEST}: damaged: it does not name {name}", ADVICE)
        if not path.is_file():
            raise ModeError(f"{path}: missing, but {MANIFEST} beside it names it", ADVICE)
        if sha256_of(path) != listed[name]:
            raise ModeError(f"{path}: damaged: not the content that {MANIFEST} names", ADVICE)
    return True


def listed_digest(folder: Path, name: str) -> str | None:
    """SHA-256 of one file as `SHA256SUMS` gives it, None where it does not. Raises `ModeError` if that is damaged."""
    return (_read_manifest(folder) or {}).get(name)


def identity_of(folder: Path) -> str | None:
    """One SHA-256 for a whole folder, at the cost of reading its `SHA256SUMS`; None where there is none."""
    return sha256_of(folder / MANIFEST) if (folder / MANIFEST).is_file() else None


def content_of(folder: Path) -> str:
    """The same, at the cost of reading all of the folder where it has no `SHA256SUMS`."""
    return identity_of(folder) or sha256_of_folder(folder)


@dataclass(frozen=True)
class Seal:
    """A checksum inside the file that it is of.

    Its text has a mark on either side of the digits, so that a single flip never makes it look as if it had never been
    there. It is written blank, within the last 64 KiB, and filled in when the file is complete.

    Attributes:
        kind: what is between `<` and the digits; a file may have seals of several kinds.

    Example:
        >>> path = Path("letter.txt")
        >>> _ = path.write_text(f"Dear Ada, ... {SEAL.blank}")
        >>> SEAL.fill(path)
        >>> SEAL.check(path)
        True
    """

    kind: str

    @property
    def blank(self) -> str:
        """What to write into a file, and `fill` fills in."""
        return f"<{self.kind}:{_BLANK}:{self.kind}>"

    def fill(self, path: Path, start: int = 0) -> None:
        """Fill in the blank seal of a complete file, for its bytes from `start` on.

        Raises `ValueError` where there is none.
        """
        found = self.find(path)
        if found is None:
            raise ValueError(f"{path}: no blank seal to fill in")
        place, _ = found
        digest = _digest(path, start, [place])
        with path.open("r+b") as file:
            file.seek(place)
            file.write(digest.encode())

    def check(self, path: Path, start: int = 0, later: Seal | None = None) -> bool:
        """Compare a file with the seal in it.

        Args:
            path: the file.
            start: as in `fill`.
            later: a seal of the same bytes that was filled in after this one.

        Returns:
            False where it has none: it was written by another program, or by an older version.

        Raises:
            ModeError: it is damaged.
        """
        found = self.find(path)
        if found is None:
            return False
        place, digits = found
        places = [place] if later is None else sorted([place, *(other[:1][0] for other in [later.find(path)] if other)])
        if _digest(path, start, places).encode() != digits:
            raise ModeError(f"{path}: damaged: not the content that its own checksum is of", ADVICE)
        return True

    def digest_of(self, path: Path) -> str:
        """The digits in a file, at the cost of reading its end; of one that has none, the SHA-256 of all of it."""
        found = self.find(path)
        return found[1].decode("ascii", "backslashreplace") if found else sha256_of(path)

    def find(self, path: Path) -> tuple[int, bytes] | None:
        """Place and content of the digits, or None. Raises `ModeError` where only a part of a seal is left."""
        before, after = f"<{self.kind}:".encode(), f":{self.kind}>".encode()
        with path.open("rb") as file:
            start = max(0, file.seek(0, 2) - _SEARCHED)
            file.seek(start)
            tail = file.read()
        seals = re.finditer(re.escape(before) + rb"(.{64})" + re.escape(after), tail, re.DOTALL)
        if (last := max(seals, key=re.Match.start, default=None)) is not None:
            return start + last.start(1), last[1]
        if before in tail or after in tail:
            raise ModeError(f"{path}: damaged: its own checksum is broken", ADVICE)
        return None


#: Of a whole file.
SEAL = Seal("mode:sha256")


def _read_manifest(folder: Path) -> dict[str, str] | None:
    """Name -> digest, None without a manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    listed = {}
    try:
        for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
            digest, separator, name = line[:64], line[64:66], line[66:]
            # What comes from strangers must not have this program read files elsewhere.
            inside = name and not name.startswith("/") and ".." not in name.split("/") and "\0" not in name
            if not re.fullmatch("[0-9a-f]{64}", digest) or separator != "  " or not inside:
                raise ValueError
            listed[name] = digest
    except ValueError:
        raise ModeError(f"{path}: damaged: a line is not `SHA-256  NAME`", ADVICE) from None
    return listed


def _digest(path: Path, start: int, blanks: list[int]) -> str:
    """SHA-256 of a file from `start` on, with 64 zeros at each of these places, which ascend."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        for place in blanks:
            while (left := place - file.tell()) > 0 and (piece := file.read(min(_PIECE, left))):
                digest.update(piece)
            digest.update(_BLANK.encode())
            file.seek(place + len(_BLANK))
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
