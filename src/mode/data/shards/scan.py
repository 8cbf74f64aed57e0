"""One tar shard to pairs, with an account of everything that is not one.

A pair's members share a key, the member's name without its suffix: an image, and a caption in `key.txt`, in `key.json`
or in both. They may lie in any order (img2dataset writes the image first, MetaCLIP the captions) and need not be
neighbours.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mode.data.images import UndecodableImage, decode
from mode.data.shards.places import AHEAD, ByteFile, open_bytes
from mode.data.shards.tar import DamagedTar, Member, members

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
#: Attribute of a record that a member with this suffix fills.
_KIND_OF_SUFFIX = {"txt": "txt", "json": "json", **{suffix[1:]: "image" for suffix in IMAGE_SUFFIXES}}

#: What can be wrong, and what is then skipped: the rest of the tar, an image, or one caption.
DAMAGED_TAR = "damaged-tar"
IMAGE_WITHOUT_CAPTION = "image-without-caption"
CAPTION_WITHOUT_IMAGE = "caption-without-image"
DUPLICATE_KEY = "duplicate-key"
UNDECODABLE_IMAGE = "undecodable-image"
EMPTY_CAPTION = "empty-caption"

_LARGEST_IMAGE = 2**31 - 1  # bytes; the index stores lengths as int32
_MOST_CAPTIONS = 2**15 - 1  # of one image; the index stores their numbers as int16


class Problem(NamedTuple):
    """Something that is not a pair: `kind` is one of the above, `key` is empty where a whole file is meant."""

    file: str
    key: str
    kind: str
    detail: str


@dataclass
class Scan:
    """Pairs of one shard (or table) in the order of their image bytes; lists run parallel, one entry per image.

    Attributes:
        path: of the shard, as the manifest gives it.
        files: that hold the images: the tar itself, or of a table one for each image.
        keys: of the images.
        captions: of each image, at least one; stripped, runs of white space made one space.
        offsets, lengths: bytes of the image.
        problems: what was skipped.
        lost_bytes: of a damaged tar, those that could not be read.
    """

    path: str
    files: list[str]
    size: int
    keys: list[str] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    lost_bytes: int = 0

    def add(self, key: str, offset: int, length: int, captions: list[str]) -> None:
        """Add one image with its captions, at least one."""
        self.keys.append(key)
        self.captions.append(captions[:_MOST_CAPTIONS])
        self.offsets.append(offset)
        self.lengths.append(length)

    def skip(self, key: str, kind: str, detail: str = "") -> None:
        """Note something that is not a pair."""
        self.problems.append(Problem(self.path, key, kind, detail))


@dataclass(slots=True)
class _Record:
    """What a tar holds under one key."""

    image: Member | None = None
    txt: bytes | None = None
    json: bytes | None = None
    repeats: Counter[str] | None = None  # members that are there again; hardly ever any


def scan_tar(path: str, root: Path, check_images: bool) -> Scan:
    """Find the pairs of a tar in one pass over its headers; image bytes are passed over unless they are checked.

    Args:
        path: of the tar, relative to `root` or absolute; or a URL.
        check_images: decode every image.
    """
    with closing(open_bytes(path, root, AHEAD)) as file:
        scan = Scan(path, [path], file.size)
        for key, record in _collect(file, scan).items():
            _account(file, scan, key, record, check_images)
    return scan


def _collect(file: ByteFile, scan: Scan) -> dict[str, _Record]:
    """Members by key, keys with an image in the order of their images, so that pairs come in order of offset."""
    records: dict[str, _Record] = {}
    try:
        for member in members(file, scan.size):
            key, _, suffix = member.name.rpartition(".")
            kind = _KIND_OF_SUFFIX.get(suffix.lower())
            # A name that begins with a dot is no pair's: macOS adds such ("._0001.jpg").
            if kind is None or key.rpartition("/")[2][:1] in ("", "."):
                continue
            record = records.get(key)
            if record is None:
                record = records[key] = _Record()
            if getattr(record, kind) is not None:
                record.repeats = record.repeats or Counter()
                record.repeats[kind] += 1
            elif kind == "image":
                record.image = member
            else:
                setattr(record, kind, file.read(member.size, member.offset))
    except DamagedTar as damage:
        scan.skip("", DAMAGED_TAR, str(damage))
        scan.lost_bytes = scan.size - damage.offset
    return dict(sorted(records.items(), key=lambda item: item[1].image.offset if item[1].image else scan.size))


def _account(file: ByteFile, scan: Scan, key: str, record: _Record, check_images: bool) -> None:
    if record.repeats is not None:
        for _ in range(max(record.repeats.values())):
            scan.skip(key, DUPLICATE_KEY, "the first is kept")
    captions, fault = _captions_of(record)
    if record.image is None:
        if captions is not None:
            scan.skip(key, CAPTION_WITHOUT_IMAGE)
        return  # a json without a caption is no pair's: img2dataset's statistics, for one
    if captions is None:
        scan.skip(key, IMAGE_WITHOUT_CAPTION, fault)
        return
    for number, caption in enumerate(captions):
        if not caption:
            scan.skip(key, EMPTY_CAPTION, f"number {number} of {len(captions)}" if len(captions) > 1 else "")
    if fault := _image_fault(file, record.image, check_images):
        scan.skip(key, UNDECODABLE_IMAGE, fault)
    elif kept := [caption for caption in captions if caption]:
        scan.add(key, record.image.offset, record.image.size, kept)


def _image_fault(file: ByteFile, image: Member, check_images: bool) -> str:
    if not 0 < image.size <= _LARGEST_IMAGE:
        return f"{image.size} bytes"
    if check_images:
        try:
            decode(file.read(image.size, image.offset))
        except UndecodableImage as error:
            return str(error)
    return ""


def _captions_of(record: _Record) -> tuple[list[str] | None, str]:
    """Captions of an image, `None` where nothing states one, and why.

    A json's `texts` come first, since only they can be several; then the txt, then the json's `caption`.
    """
    content: dict[str, Any] = {}
    fault, stated = "", record.json
    # Parsing is slow, and beside a txt only good for `texts`, which may be written with escapes, or in UTF-16.
    if stated is not None and (record.txt is None or b"texts" in stated or b"\\" in stated or b"\0" in stated):
        content, fault = _parse(stated)
    texts = content.get("texts")
    if isinstance(texts, list) and texts:
        return [clean_caption(text) for text in texts], ""
    if record.txt is not None:
        return [clean_caption(record.txt.decode("utf-8-sig", "replace"))], ""
    if "caption" in content or "texts" in content:
        return [clean_caption(content.get("caption"))], ""
    return None, fault


def _parse(content: bytes) -> tuple[dict[str, Any], str]:
    try:
        parsed = json.loads(content)
    except ValueError as error:
        return {}, f"json cannot be read: {error}"
    if isinstance(parsed, dict):
        return parsed, "json with neither 'caption' nor 'texts'"
    return {}, "json is not an object"


def clean_caption(text: object) -> str:
    """A caption on one line; what is not text (null, a number) is as good as empty."""
    return " ".join(text.split()) if isinstance(text, str) else ""
