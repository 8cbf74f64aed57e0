"""Shards and tables damaged in many ways: what is found is right, what is good is found, what is lost is said.

Every image has a colour that says its number, as do its key and its caption. `pytest tests/trust --seed 7` tries other
damages than the fixed ones.
"""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from mode.data.images import decode
from mode.data.shards.index import PairIndex, build_index, verify
from mode.data.shards.manifest import build_manifest
from mode.data.shards.places import LocalFile
from mode.data.shards.reading import ImageFiles
from mode.data.shards.tar import BLOCK, Tar
from mode.errors import ModeError
from mode.params import IndexParams, SourceParams

CASES = 60


@cache
def picture(number: int) -> bytes:
    """A solid colour that says the number below 512, in a format and size that vary with it."""
    colour = (number % 8 * 32 + 16, number // 8 % 8 * 32 + 16, number // 64 * 32 + 16)
    buffer = io.BytesIO()
    extent = (8 + number % 5 * 9, 8 + number % 3 * 12)
    Image.new("RGB", extent, colour).save(buffer, "JPEG" if number % 3 else "PNG")
    return buffer.getvalue()


def number_in(content: bytes) -> int:
    """The number that `picture` drew."""
    red, green, blue = (round((value - 16) / 32) for value in decode(content).convert("RGB").getpixel((4, 4)))
    return red + 8 * green + 64 * blue


@dataclass
class Shard:
    """A tar as it is damaged: its bytes, and what each of the original ones has come to.

    Attributes:
        parts: begin and end of each member (header and content) that is still whole, with its number.
        numbers: of all pairs that were ever in it.
        hurt: numbers of pairs of which a member was damaged.
    """

    content: bytes
    parts: list[tuple[int, int, int]]
    numbers: set[int]
    hurt: set[int] = field(default_factory=set)

    def replace(self, begin: int, end: int, new: bytes) -> None:
        """Put other bytes in the place of some."""
        kept, shift = [], len(new) - (end - begin)
        for first, last, number in self.parts:
            if last <= begin:
                kept.append((first, last, number))
            elif first >= end and not (first < begin):
                kept.append((first + shift, last + shift, number))
            else:
                self.hurt.add(number)
        self.parts = kept
        self.content = self.content[:begin] + new + self.content[end:]


def make(numbers: list[int], tar_format: int, long_names: bool) -> Shard:
    buffer = io.BytesIO()
    parts = []
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for number in numbers:
            key = f"{'a' * 120 + '/' if long_names else ''}é{number:04d}"
            suffix = "jpg" if number % 3 else "png"
            members = [(f"{key}.{suffix}", picture(number)), (f"{key}.txt", f"n {number}".encode())]
            for name, content in members if number % 2 else reversed(members):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                begin = buffer.tell()
                tar.addfile(member, io.BytesIO(content))
                parts.append((begin, begin + buffer.tell() - begin - (-len(content) % BLOCK), number))
    return Shard(buffer.getvalue(), parts, set(numbers))


Damage = Callable[[Shard, random.Random], None]


def _span(shard: Shard, rng: random.Random) -> tuple[int, int]:
    begin = rng.randrange(len(shard.content))
    return begin, min(begin + int(10 ** rng.uniform(0, 4.3)), len(shard.content))


def flip(shard: Shard, rng: random.Random) -> None:
    place = rng.randrange(len(shard.content))
    shard.replace(place, place + 1, bytes([shard.content[place] ^ 1 << rng.randrange(8)]))


def zero(shard: Shard, rng: random.Random) -> None:
    begin, end = _span(shard, rng)
    shard.replace(begin, end, bytes(end - begin))


def zero_blocks(shard: Shard, rng: random.Random) -> None:
    begin, end = (place // BLOCK * BLOCK for place in _span(shard, rng))
    shard.replace(begin, end, bytes(end - begin))


def zero_half(shard: Shard, rng: random.Random) -> None:
    half = rng.randrange(2) * len(shard.content) // 2
    shard.replace(half, half + len(shard.content) // 2, bytes(len(shard.content) // 2))


def overwrite(shard: Shard, rng: random.Random) -> None:
    begin, end = _span(shard, rng)
    shard.replace(begin, end, rng.randbytes(end - begin))


def insert(shard: Shard, rng: random.Random) -> None:
    begin, end = _span(shard, rng)
    shard.replace(begin, begin, rng.randbytes(end - begin))


def delete(shard: Shard, rng: random.Random) -> None:
    begin, end = _span(shard, rng)
    shard.replace(begin, end, b"")


def cut(shard: Shard, rng: random.Random) -> None:
    shard.replace(rng.randrange(len(shard.content)), len(shard.content), b"")


def append(shard: Shard, rng: random.Random) -> None:
    new = rng.choice([rng.randbytes, bytes])(rng.choice([1, 100, 512, 5120, 12_345]))
    shard.replace(len(shard.content), len(shard.content), new)


DAMAGES: list[Damage] = [flip, zero, zero_blocks, zero_half, overwrite, insert, delete, cut, append]


def damaged(rng: random.Random) -> Shard:
    """One to three tars, damaged and written one after the other, and perhaps damaged again."""
    shards = []
    first = 0
    tar_format = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    long_names = tar_format != tarfile.USTAR_FORMAT and rng.random() < 0.3
    for _ in range(rng.choice([1, 1, 2, 3])):
        count = rng.randrange(8, 40)
        shards.append(make(list(range(first, first + count)), tar_format, long_names))
        first += count
        if rng.random() < 0.3:
            rng.choice(DAMAGES)(shards[-1], rng)
    whole = Shard(b"", [], set())
    for shard in shards:
        whole.parts += [(a + len(whole.content), b + len(whole.content), number) for a, b, number in shard.parts]
        whole.content += shard.content
        whole.numbers |= shard.numbers
        whole.hurt |= shard.hurt
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        rng.choice(DAMAGES)(whole, rng)
    return whole


def test_damaged_tars(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "0.tar"
    for case in range(CASES):
        rng = random.Random(f"tars {seed} {case}")
        shard = damaged(rng)
        path.write_bytes(shard.content)
        try:
            _check(path, shard)
        except (AssertionError, ModeError) as error:
            raise AssertionError(f"seed {seed}, case {case}: {error}") from error


def _check(path: Path, shard: Shard) -> None:
    report = verify([path.name], path.parent)
    [file] = report.files
    assert file.read_bytes + file.lost_bytes == len(shard.content)
    _every_byte(path, shard.content)
    found: set[int] = set()
    if report.pairs:
        params = IndexParams(max_bad_share=0 if not report.bad else 1)
        manifest = build_manifest(SourceParams(shards=path.name), path.parent)
        build_index(manifest, path.parent, path.parent / "index", params, workers=1)
        index = PairIndex.load(path.parent / "index")
        images = ImageFiles(index, path.parent)
        for row, key in enumerate(index.keys(range(len(index)))):
            number = int(key[-4:])
            if number not in shard.hurt:
                pair = (number_in(images.read(row)), index.caption(row))
                assert pair == (number, f"n {number}"), f"the pair of key {number} is {pair}"
            found.add(number)
    good = shard.numbers - shard.hurt
    assert found >= good, f"{sorted(good - found)} are lost, though nothing happened to them"
    lost = shard.numbers - found
    if len(shard.content) - len(shard.content.rstrip(b"\0")) <= 2 * tarfile.RECORDSIZE:
        lost = {number for number in lost if number < max(found, default=0)}  # the last could be padding
    assert report.bad or not lost, f"{sorted(lost)} are lost without a word"


def _every_byte(path: Path, content: bytes) -> None:
    """What is no member and no damage is padding, or the header of another member."""
    file = LocalFile(path)
    tar = Tar(file, file.size)
    rest = bytearray(content)
    for begin, size in [(each.offset - BLOCK, each.size + BLOCK) for each in tar]:
        rest[begin : begin + -(-size // BLOCK) * BLOCK] = bytes(-(-size // BLOCK) * BLOCK)
    for damage in tar.damage:
        rest[damage.offset : damage.offset + damage.size] = bytes(damage.size)
    place = 0
    while left := rest[place:].lstrip(b"\0"):
        place = len(rest) - len(left)
        assert b"ustar" in rest[max(place - 2 * BLOCK, 0) : place + 2 * BLOCK], f"byte {place} is nobody's"
        place += 2 * BLOCK


def test_a_clean_shard_is_clean(tmp_path: Path) -> None:
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        shard = make(list(range(60)), tar_format, tar_format != tarfile.USTAR_FORMAT)
        (tmp_path / "0.tar").write_bytes(shard.content * 2)
        report = verify(["0.tar"], tmp_path)
        assert (report.pairs, report.bad) == (120, 0)


# Tables.


def _quote(line: bytes, rng: random.Random) -> bytes:
    place = rng.choice([line.find(b",") + 1, rng.randrange(len(line))])
    return line[:place] + b'"' + line[place:]


def _spoil(line: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(line))
    return line[:place] + rng.choice([b"\xff", b"\0", b",", b"\x1b[2J", b"\xf0\x9f"]) + line[place + 1 :]


def _swap(line: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"/dev/zero", b"pipe.png", b".", b"x" * 5000, b"", b"\0"]) + b",words"


def _grow(line: bytes, rng: random.Random) -> bytes:
    return line + b"x" * rng.choice([100, 100_001, 140_000])


def test_damaged_tables(tmp_path: Path, seed: int) -> None:
    """A bad row costs itself alone, wherever its quotation mark would end."""
    os.mkfifo(tmp_path / "pipe.png")
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    for case in range(CASES // 2):
        rng = random.Random(f"tables {seed} {case}")
        rows = []
        for number in range(40):
            text = rng.choice([f"n {number}", f'"n {number}"', f'"the ""line""\nn {number}"', f'"of a, b: n {number}"'])
            rows.append(f"{number}.png,{text}".encode())
        hurt = set(rng.sample(range(40), rng.choice([0, 1, 3, 10])))
        for number in hurt:
            rows[number] = rng.choice([_quote, _spoil, _swap, _grow])(rows[number], rng)
        (tmp_path / "pairs.csv").write_bytes(b"image,caption\n" + b"\n".join(rows) + b"\n" * rng.randrange(2))
        found = _pairs_of(tmp_path, "pairs.csv")
        for number in {*range(40)} - hurt:
            said = [text for path, text in found if path == f"{number}.png"]
            assert any(text.endswith(f"n {number}") for text in said), f"seed {seed}, case {case}: {number}: {said}"
        wrong = [(path, text) for path, text in found if not text.endswith(f"n {path[:-4]}")]
        allowed = {f"{number}.png" for number in hurt}
        assert {path for path, _ in wrong} <= allowed, f"seed {seed}, case {case}: {wrong}"


def _pairs_of(root: Path, table: str) -> list[tuple[str, str]]:
    """Pairs of a table; that what verify finds is what the index finds."""
    report = verify([table], root)
    manifest = build_manifest(SourceParams(shards=table), root)
    assert build_index(manifest, root, root / "index", IndexParams(max_bad_share=1), workers=1) == report
    index = PairIndex.load(root / "index")
    return [(index.path(index.file[row]), index.caption(row)) for row in range(len(index))]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_damaged_parquet(tmp_path: Path, seed: int, compression: str) -> None:
    """An account, or one line; never another error."""
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    table = pa.table({"image": [f"{n}.png" for n in range(40)], "caption": [f"n {n}" for n in range(40)]})
    parquet.write_table(table, tmp_path / "whole.parquet", compression=compression)
    whole = (tmp_path / "whole.parquet").read_bytes()
    for case in range(CASES // 2):
        rng = random.Random(f"parquet {seed} {case}")
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            begin = rng.randrange(len(content))
            content[begin : begin + rng.choice([0, 1, 9])] = rng.randbytes(rng.choice([1, 1, 9]))
        (tmp_path / "pairs.parquet").write_bytes(content)
        with suppress(ModeError):
            verify(["pairs.parquet"], tmp_path)


# What takes memory or time.

BOMBS = """
import resource, sys, time
from pathlib import Path
from mode.data.shards.index import verify
from mode.errors import ModeError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    begun = time.process_time()
    try:
        said = verify([path], Path(sys.argv[1])).counts
    except ModeError as error:
        said = str(error)
    print(path, said, f"{time.process_time() - begun:.2f} s", file=sys.stderr)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_take_less_than_a_gigabyte(tmp_path: Path) -> None:
    """Each small on the disk; all of them read by one process, whose memory is measured."""
    buffer = io.BytesIO()
    Image.new("RGB", (7_000, 7_000)).save(buffer, "WEBP", lossless=True, quality=0, method=0)
    thin = io.BytesIO()
    Image.new("L", (1, 60_000)).save(thin, "PNG")
    images = {"webp": buffer.getvalue(), "thin": thin.getvalue()}
    for name, content in images.items():
        write_tar(tmp_path / f"{name}.tar", [("a.webp", content), ("a.txt", b"words")])
    write_tar(tmp_path / "caption.tar", [("a.png", picture(1)), ("a.txt", b"x" * 100_000_000)])
    write_tar(tmp_path / "json.tar", [("a.png", picture(1)), ("a.json", b'{"texts": [' + b"[" * 16_000_000)])
    member = tarfile.TarInfo("long")
    member.type, content = tarfile.XHDTYPE, b"5 a=\n" * 2_000_000
    member.size = len(content)
    (tmp_path / "pax.tar").write_bytes(member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(20_000))
    rows = pa.array([0] * 100_000, pa.int32())
    texts = {"image": ["a.png"], "caption": ["x" * 24_000]}
    columns = {name: pa.DictionaryArray.from_arrays(rows, pa.array(text)) for name, text in texts.items()}
    parquet.write_table(pa.table(columns), tmp_path / "rows.parquet", compression="zstd", store_schema=False)
    plain: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    longest = {"image": ["a.png"], "caption": ["x" * 250_000_000]}
    parquet.write_table(pa.table(longest), tmp_path / "lie.parquet", **plain)
    belittle(tmp_path / "lie.parquet")
    repeated = pa.table({"image": ["a.png"] * 40_000, "caption": ["x" * 24_000] * 40_000})
    parquet.write_table(repeated, tmp_path / "delta.parquet", column_encoding={"caption": "DELTA_BYTE_ARRAY"}, **plain)
    assert max(path.stat().st_size for path in tmp_path.glob("*.parquet")) < 100_000
    names = sorted(path.name for path in tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, str(tmp_path), *names], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) < 1024, done.stderr


def belittle(path: Path) -> None:
    """Have the footer of a parquet file of one row group say that it unpacks to 1,000 bytes."""
    group, content = parquet.read_metadata(path).row_group(0), path.read_bytes()
    for size in (group.column(1).total_uncompressed_size, group.total_byte_size):
        assert content.count(_number(size)) == 1
        content = content.replace(_number(size), _number(1_000, len(_number(size))))
    path.write_bytes(content)
    assert parquet.read_metadata(path).row_group(0).column(1).total_uncompressed_size == 1_000


def _number(value: int, length: int = 0) -> bytes:
    """As the footer has it: seven bits a byte, the lowest first, all but the last byte marked."""
    parts = [value * 2 >> shift & 127 for shift in range(0, 70, 7)]
    used = max(length, *(place + 1 for place, part in enumerate(parts) if part))
    return bytes([*(part | 128 for part in parts[: used - 1]), parts[used - 1]])


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
