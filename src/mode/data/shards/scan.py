"""One tar shard to pairs, with an account of everything that is not one.

A pair's members share a key, the member's name without its suffix: an image, and a caption in `key.txt`, in `key.json`
or in both. They may lie in any order (img2dataset writes the image first, MetaCLIP the captions) and need not be
neighbours.
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from mode.data.images import UndecodableImage, decode, is_complete
from mode.data.shards.filters import UNKNOWN, Filters, faults_in_sidecar, sidecar_of
from mode.data.shards.identity import check_of, sample_of, unchanged
from mode.data.shards.places import AHEAD, ByteFile, Description, LocalFile, is_url, open_bytes
from mode.data.shards.tar import Member, Tar
from mode.errors import printable

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
LONG_CAPTION = "long-caption"
TOO_MANY_CAPTIONS = "too-many-captions"

#: Bytes of an encoded image; the largest one that `decode` takes has no more even if nothing is compressed.
LARGEST_IMAGE = 2**28
#: Captions of one image; the index stores their numbers as int16.
MOST_CAPTIONS = 2**15 - 1
#: Characters of a caption: a hundred times what a text encoder reads of it, and too few to fill the memory.
LONGEST_CAPTION = 100_000
#: Characters of a key, which the index has once for each caption: far more than a dataset needs. A tar may state a
#: megabyte, and with as many captions as an image may have that would be 32 GB.
LONGEST_KEY = 1_000
#: Captions of one image that are noted one by one if they cannot be used: 15 MB of json can state five million of them.
_MOST_NOTED = 100
#: Bytes of a txt or json: as many captions as an image may have, of 500 bytes each. A larger one is not read.
_LARGEST_TEXT = 2**24
_SURROGATE = re.compile("[\ud800-\udfff]").search


class Problem(NamedTuple):
    """Something that is not a pair: `kind` is one of the above, `key` is empty where a whole file is meant."""

    file: str
    key: str
    kind: str
    detail: str


@dataclass
class Scan:
    """Pairs of one shard, or of a part of a table, in the order of their image bytes; lists run parallel, one entry per
    image.

    Attributes:
        path: of the shard, as the manifest gives it.
        files: that hold the images: the tar itself, or of a table one for each image.
        size: bytes that were read; of a table all are those of its first part.
        found: what the shard was before and after it was read.
        keys: of the images.
        captions: of each image, at least one; stripped, runs of white space made one space.
        probabilities: of each image, how probable it is that a sample takes each caption, up to a common factor; empty
            where all are alike.
        offsets, lengths: bytes of the image.
        checks: of each image, what tells it from another one (`identity.check_of`).
        problems: what was skipped.
        lost_bytes: of a damaged tar, those that could not be read.
        sample: what tells the shard from another one (`identity.sample_of`), 0 of a table or an object.
        dropped: images that were left out although nothing is wrong with them.
        filtered: the same, by the filter that they do not meet.
        fields: columns of filters that the json of an image has.
    """

    path: str
    files: list[str]
    size: int
    found: Description | None = None
    keys: list[str] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    probabilities: list[list[float]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    checks: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    lost_bytes: int = 0
    sample: int = 0
    dropped: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    fields: set[str] = field(default_factory=set)

    def add(
        self, key: str, offset: int, length: int, captions: list[str], check: int, probabilities: Sequence[float] = ()
    ) -> None:
        """Add one image with its captions, at least one; the first `MOST_CAPTIONS` are kept."""
        if len(captions) > MOST_CAPTIONS:
            self.skip_too_many(key, len(captions))
        self.keys.append(key)
        self.captions.append(captions[:MOST_CAPTIONS])
        if probabilities:
            self.probabilities.append([*probabilities[:MOST_CAPTIONS]])
        self.offsets.append(offset)
        self.lengths.append(length)
        self.checks.append(check)

    def drop(self, unwanted: Collection[tuple[str, str]]) -> None:
        """Leave out the images of these (file, key), and count them in `dropped`."""
        in_one = self.files == [self.path]
        files = self.files * len(self.keys) if in_one else self.files
        kept = [number for number, place in enumerate(zip(files, self.keys, strict=True)) if place not in unwanted]
        if len(kept) == len(self.keys):
            return
        self.dropped += len(self.keys) - len(kept)
        not_everywhere = [*([] if in_one else ["files"]), *(["probabilities"] if self.probabilities else [])]
        for name in ("keys", "captions", "offsets", "lengths", "checks", *not_everywhere):
            values = getattr(self, name)
            setattr(self, name, [values[number] for number in kept])

    def good_captions(self, key: str, captions: list[str]) -> list[str]:
        """Those that can be used, the others noted; of very many in one line those behind the first ones."""
        good = [caption for caption in captions if _is_usable(caption)]
        bad = len(captions) - len(good)
        wrong = ((number, caption) for number, caption in enumerate(captions) if not _is_usable(caption)) if bad else ()
        for number, caption in islice(wrong, _MOST_NOTED):
            place = f"number {number} of {len(captions)}" if len(captions) > 1 else ""
            if caption:
                self.skip(key, LONG_CAPTION, f"{len(caption):,} characters {place}".rstrip())
            else:
                self.skip(key, EMPTY_CAPTION, place)
        if bad > _MOST_NOTED:
            self.skip(key, EMPTY_CAPTION, f"{bad - _MOST_NOTED:,} more that are empty or too long")
        return good

    def skip_too_many(self, key: str, count: int) -> None:
        """Note that an image has so many captions."""
        self.skip(key, TOO_MANY_CAPTIONS, f"{count}; the first {MOST_CAPTIONS} are kept")

    def skip(self, key: str, kind: str, detail: str = "") -> None:
        """Note something that is not a pair; its words come from the data and go to terminals and tables."""
        self.problems.append(Problem(printable(self.path), printable(key), kind, printable(detail)))


def _is_usable(caption: str) -> bool:
    return 0 < len(caption) <= LONGEST_CAPTION


@dataclass(frozen=True)
class Wanted:
    """What of a source is to be indexed.

    Attributes:
        captions: where captions stand, `txt` or a key of the json, with the probability that a sample takes one from
            there; None: where they usually stand.
        filters: that an image has to meet.
        beside_tars: whether their values stand in a parquet beside each tar, and not in the json of each image.
    """

    captions: Mapping[str, float] | None = None
    filters: Filters = field(default_factory=Filters)
    beside_tars: bool = False


ALL = Wanted()


@dataclass(slots=True)
class _Record:
    """What a tar holds under one key."""

    image: Member | None = None
    header: int = 0  # checksum of the block before the image
    txt: bytes | None = None
    json: bytes | None = None
    repeats: Counter[str] | None = None  # members that are there again; hardly ever any
    long: str = ""  # a text that is too large to be read
    cut: bool = False  # whether a member ran into damage


def scan_tar(path: str, root: Path, check_images: bool, wanted: Wanted = ALL) -> Scan:
    """Find the pairs of a tar in one pass over its headers; image bytes are passed over unless they are checked.

    Archives that follow one another in the file have keys of their own: no pair is made of members of two.

    Args:
        path: of the tar, relative to `root` or absolute; or a URL.
        check_images: decode every image.
        wanted: which images and captions to keep.

    Raises:
        ModeError: the tar changes meanwhile; the parquet beside it cannot be read, or has not the columns that filters
            name.
    """
    with unchanged(path, root) as found, closing(open_bytes(path, root, AHEAD, found.size)) as file:
        scan = Scan(path, [path], file.size, found)
        records = _collect(file, scan)
        sieve = _Sieve(scan, root, wanted, records)
        for key, record in records:
            if record.image is None or not sieve.leaves_out(key, record):
                _account(file, scan, key, record, check_images, wanted.captions)
        if not is_url(path):  # an object has an ETag
            scan.sample = sample_of(file)
    return scan


def _collect(file: ByteFile, scan: Scan) -> list[tuple[str, _Record]]:
    """Members by key, keys with an image in the order of their images, so that pairs come in order of offset."""
    tar = Tar(file.fileno() if isinstance(file, LocalFile) else file, scan.size)  # saves a call for each header
    records: dict[str, _Record] = {}
    archives, number = [records], 0
    for member in tar:
        if tar.archive != number:
            number = tar.archive
            archives.append(records := {})
        key, _, suffix = member.name.rpartition(".")
        kind = _KIND_OF_SUFFIX.get(suffix.lower())
        # A name that begins with a dot is no pair's: macOS adds such ("._0001.jpg").
        if kind is None or key.rpartition("/")[2][:1] in ("", "."):
            continue
        if len(key) > LONGEST_KEY:
            alone = IMAGE_WITHOUT_CAPTION if kind == "image" else CAPTION_WITHOUT_IMAGE
            scan.skip(key[:LONGEST_KEY], alone, f"a name of {len(member.name):,} characters")
            continue
        record = records.get(key)
        if record is None:
            record = records[key] = _Record()
        if getattr(record, kind) is not None:
            record.repeats = record.repeats or Counter()
            record.repeats[kind] += 1
        elif kind == "image":
            record.image, record.header = member, crc32(tar.header)
        elif member.size > _LARGEST_TEXT:
            record.long = f"{member.size:,} bytes of {kind}"
        else:
            setattr(record, kind, file.read(member.size, member.offset))
    for member in [*tar.cut, *filter(lambda each: _is_cut(file, each), tar.doubtful)]:
        for records in archives:
            if record := records.get(member.name.rpartition(".")[0]):
                record.cut = True
    for damage in tar.damage:
        scan.skip("", DAMAGED_TAR, f"{damage}, {damage.size:,} bytes" if damage.size else str(damage))
        scan.lost_bytes += damage.size
    found = [each for records in archives for each in records.items()]
    return sorted(found, key=lambda item: item[1].image.offset if item[1].image else scan.size)


def _is_cut(file: ByteFile, member: Member) -> bool:
    """Whether the member before damage does not end as a file of its kind does."""
    content = file.read(min(member.size, LARGEST_IMAGE), member.offset)
    if member.name.lower().endswith(IMAGE_SUFFIXES):
        return not is_complete(content)
    try:
        return "\0" in content.decode("utf-8")
    except UnicodeDecodeError:
        return True


class _Sieve:
    """The filters of a source, with what the parquet beside a tar says of the images in it, if it is there to say."""

    def __init__(self, scan: Scan, root: Path, wanted: Wanted, records: Iterable[tuple[str, _Record]]) -> None:
        self._scan, self._filters = scan, wanted.filters
        self._faults: dict[str, str] | None = None
        if wanted.beside_tars:
            keys = {_row_key(key) for key, record in records if record.image}
            self._faults = faults_in_sidecar(sidecar_of(scan.path), root, wanted.filters, keys)

    def leaves_out(self, key: str, record: _Record) -> bool:
        """Whether an image does not meet a filter; counts it."""
        if not self._filters:
            return False
        if self._faults is not None:
            fault = self._faults.get(_row_key(key), UNKNOWN)
        else:
            values, _ = _parse(record.json) if record.json is not None else ({}, "")
            self._scan.fields.update(column for column in self._filters.columns if column in values)
            fault = self._filters.fault(values)
        if fault:
            self._scan.filtered[fault] += 1
        return bool(fault)


def _row_key(key: str) -> str:
    """The key of an image in the parquet beside its tar, which knows nothing of how `tar` was called."""
    return key.removeprefix("./")


def _account(
    file: ByteFile,
    scan: Scan,
    key: str,
    record: _Record,
    check_images: bool,
    places: Mapping[str, float] | None,
) -> None:
    """Enter what a tar has under one key; `places` as `Wanted.captions`."""
    if record.repeats is not None:
        for _ in range(max(record.repeats.values())):
            scan.skip(key, DUPLICATE_KEY, "the first is kept")
    by_place: dict[str, list[str]] = {}
    if places is None:
        captions, fault = _captions_of(record)
    else:
        by_place, fault = _captions_from(record, places)
        captions = [*chain.from_iterable(by_place.values())] or None
    if record.cut:
        scan.skip(key, UNDECODABLE_IMAGE if record.image else CAPTION_WITHOUT_IMAGE, "cut off, damage follows")
        return
    if record.long:
        scan.skip(key, LONG_CAPTION, record.long)
        if captions is None:
            return
    if record.image is None:
        if captions is not None:
            scan.skip(key, CAPTION_WITHOUT_IMAGE)
        return  # a json without a caption is no pair's: img2dataset's statistics, for one
    if captions is None:
        scan.skip(key, IMAGE_WITHOUT_CAPTION, fault)
        return
    kept = scan.good_captions(key, captions)
    image = record.image
    content = file.read(image.size, image.offset) if check_images and image.size <= LARGEST_IMAGE else None
    if fault := image_fault(image.size, content):
        scan.skip(key, UNDECODABLE_IMAGE, fault)
    elif kept:
        check = check_of(content, record.header)
        scan.add(key, image.offset, image.size, kept, check, _probabilities(by_place, places or {}))


def image_fault(size: int, content: bytes | None) -> str:
    """What is wrong with an image of `size` bytes, "" if nothing; `content` None is not looked into."""
    if not 0 < size <= LARGEST_IMAGE:
        return f"{size:,} bytes"
    if content is not None:
        try:
            decode(content)
        except UndecodableImage as error:
            return str(error)
    return ""


def _text_of(content: bytes) -> str:
    """A txt in UTF-8, or in UTF-16 if it begins with that one's mark; what is neither becomes U+FFFD."""
    return content.decode("utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig", "replace")


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
        return [clean_caption(_text_of(record.txt))], ""
    if "caption" in content or "texts" in content:
        return [clean_caption(content.get("caption"))], ""
    return None, fault


def _captions_from(record: _Record, places: Iterable[str]) -> tuple[dict[str, list[str]], str]:
    """Captions of an image by the place that states them: `txt`, or a key of the json with a text or a list of texts.

    Places that are missing or null are left out; if that is all of them, the second value says why.
    """
    content, fault = _parse(record.json) if record.json is not None else ({}, "")
    found: dict[str, list[str]] = {}
    for place in places:
        stated: Any = content.get(place)
        if place == "txt":
            stated = None if record.txt is None else _text_of(record.txt)
        if stated not in (None, []):
            found[place] = [clean_caption(text) for text in (stated if isinstance(stated, list) else [stated])]
    return found, fault if fault and not content else f"none in {', '.join(places)}"


def _probabilities(captions: Mapping[str, Sequence[str]], places: Mapping[str, float]) -> list[float]:
    """Of each caption that can be used: that of its place, shared with the others from there."""
    usable = {place: sum(map(_is_usable, each)) for place, each in captions.items()}
    return [places[place] / count for place, count in usable.items() for _ in range(count)]


def _parse(content: bytes) -> tuple[dict[str, Any], str]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        return {}, f"json cannot be read: {error}"
    if isinstance(parsed, dict):
        return parsed, "json with neither 'caption' nor 'texts'"
    return {}, "json is not an object"


def clean_caption(text: object) -> str:
    """A caption on one line; what is not text (null, a number) is as good as empty.

    Half a surrogate pair, which json and bytes that are not UTF-8 can state, becomes U+FFFD: no file can hold it.
    """
    if not isinstance(text, str):
        return ""
    cleaned = " ".join(text.split())
    if cleaned.isascii():
        return cleaned
    return cleaned.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _SURROGATE(cleaned) else cleaned
