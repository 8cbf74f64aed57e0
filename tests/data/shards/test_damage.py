"""Every byte of a tar is a member's, padding, or damage; and what lies beside damage is kept."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

from mode.data.shards.index import PairIndex, verify
from mode.data.shards.tar import DamagedTar, Tar, members

Make = Callable[..., list[tuple[str, bytes]]]
TarBytes = Callable[..., bytes]


class Bytes:
    """Bytes that are read as a file."""

    def __init__(self, content: bytes) -> None:
        self.content, self.size = content, len(content)

    def read(self, length: int, offset: int) -> bytes:
        return self.content[offset : offset + length]

    def close(self) -> None:
        pass


def read(content: bytes) -> tuple[list[str], list[tuple[int, int]], Tar]:
    """Names, (offset, size) of each damage, and the reader."""
    tar = Tar(Bytes(content), len(content))
    names = [member.name for member in tar]
    return names, [(damage.offset, damage.size) for damage in tar.damage], tar


def files(count: int, size: int = 700) -> list[tuple[str, bytes]]:
    """Each takes 512 + 1,024 bytes."""
    return [(f"{number}", bytes([number + 1]) * size) for number in range(count)]


NAMES = [f"{number}" for number in range(30)]


def test_tars_one_after_the_other_are_read_one_after_the_other(tar_bytes: TarBytes) -> None:
    content = tar_bytes(files(30))
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    for first in (content, content[:end] + bytes(1024)):  # padded to a record, and not
        tar = Tar(Bytes(first + content), len(first + content))
        assert [(tar.archive, member.name) for member in tar] == [(n, name) for n in (0, 1) for name in NAMES]
        assert not tar.damage


def test_padding_is_no_damage(tar_bytes: TarBytes) -> None:
    content = tar_bytes(files(3)).rstrip(b"\0")
    content += bytes(-len(content) % 512)
    for blocks in (1, 2, 3, 20, 40):
        assert read(content + bytes(512 * blocks))[:2] == (NAMES[:3], [])
    for record in (32, 128, 2048):
        assert read(content + bytes(-len(content) % (512 * record)))[:2] == (NAMES[:3], [])
    assert read(bytes(10_240))[:2] == ([], [])


def test_a_zeroed_half_is_damage(tar_bytes: TarBytes) -> None:
    content = tar_bytes(files(60))
    half = 33 * 1536 + 600  # inside the content of 33
    names, damage, _ = read(content[:half] + bytes(len(content) - half))
    assert names == [f"{number}" for number in range(34)]
    assert damage == [(34 * 1536, len(content) - 34 * 1536)]
    names, damage, _ = read(bytes(half) + content[half:])
    assert names == [f"{number}" for number in range(34, 60)]
    assert damage == [(0, 34 * 1536)]
    assert read(bytes(50_000))[1] == [(0, 50_000)]


@pytest.mark.parametrize("begin", [4 * 1536, 4 * 1536 + 100, 4 * 1536 + 1000])
@pytest.mark.parametrize("end", [9 * 1536, 9 * 1536 + 100, 9 * 1536 + 1000])
@pytest.mark.parametrize("filling", [b"\0", b"\x07"])
def test_a_hole_costs_what_lies_in_it(tar_bytes: TarBytes, begin: int, end: int, filling: bytes) -> None:
    content = tar_bytes(files(30))
    names, damage, tar = read(content[:begin] + filling * (end - begin) + content[end:])
    before = NAMES[: -(-begin // 1536) if begin % 1536 >= 512 else begin // 1536]
    assert names == [*before, *NAMES[-(-end // 1536) :]]
    assert sum(size for _, size in damage) == (-(-end // 1536) - len(before)) * 1536
    assert tar.archive == 0


@pytest.mark.parametrize("shift", [-512, -1, 1, 512, 5000])
def test_reading_goes_on_where_bytes_are_lost_or_added(tar_bytes: TarBytes, shift: int) -> None:
    content = tar_bytes(files(30))
    place = 4 * 1536 + 512 + 600  # inside the content of 4
    changed = content[: place + min(shift, 0)] + b"\7" * max(shift, 0) + content[place:]
    names, damage, tar = read(changed)
    assert [name for name in names if name not in {member.name for member in tar.cut}] == [
        name for name in NAMES if name != "4" or shift in (-1, 1, 512, 5000)
    ]
    assert [member.name for member in [*tar.cut, *tar.doubtful]] == ["4"]
    assert len(damage) == 1


def test_a_cut_tar_before_another_one(tar_bytes: TarBytes) -> None:
    first, second = tar_bytes(files(30)), tar_bytes([(f"b{number}", b"x" * 700) for number in range(30)])
    names, damage, tar = read(first[: 10 * 1536 + 512 + 5] + second)
    cut = {member.name for member in tar.cut}
    assert [name for name in names if name not in cut] == NAMES[:10] + [f"b{number}" for number in range(30)]
    assert len(damage) == 1


def test_what_looks_like_a_header_inside_a_member_is_none(tar_bytes: TarBytes) -> None:
    inner = tar_bytes(files(3))
    assert read(tar_bytes([("a.tar", inner), ("b", b"x" * 700)]))[:2] == (["a.tar", "b"], [])


def test_a_name_that_may_be_shortened_is_not_taken(tar_bytes: TarBytes) -> None:
    """Its own header is whole, the one with the whole name before it is not."""
    for tar_format, name in ((tarfile.GNU_FORMAT, "n" * 150), (tarfile.PAX_FORMAT, "é")):
        content = bytearray(tar_bytes([(f"{name}.jpg", b"1"), ("b.jpg", b"2")], tar_format))
        content[100] ^= 1
        assert read(bytes(content))[:2] == (["b.jpg"], [(0, 2048)])


def test_extended_headers_are_capped(tar_bytes: TarBytes) -> None:
    def with_pax(content: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
        member = tarfile.TarInfo("././@PaxHeader")
        member.type, member.size = kind, len(content)
        return member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512) + tar_bytes(files(2))

    assert read(with_pax(b"5 a=\n" * 100_000))[:2] == (["0", "1"], [])
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        names, damage, _ = read(with_pax(b"5 a=\n" * 400_000, kind))
        assert names == ["0", "1"]
        assert damage == [(0, 512 + 2_000_384)]


def test_what_does_not_take_damage_stops_at_the_first(tar_bytes: TarBytes) -> None:
    content = bytearray(tar_bytes(files(30)))
    content[5 * 1536] ^= 1
    found = []
    with pytest.raises(DamagedTar, match="bad checksum at byte 7680"):
        found.extend(member.name for member in members(Bytes(bytes(content)), len(content)))
    assert found == NAMES[:5]


def test_pairs_beside_damage_are_kept_and_the_bytes_are_counted(
    index_of: Callable[..., PairIndex], pair: Make, tar_bytes: TarBytes, tmp_path: Path
) -> None:
    content = bytearray(tar_bytes([*chain.from_iterable(pair(f"{n}", n) for n in range(9))]))
    header = content.index(b"4.txt")
    content[header + 3] ^= 1
    index = index_of({"0.tar": bytes(content)})
    assert index.captions(range(len(index))) == [f"caption of {n}" for n in range(9) if n != 4]
    report = verify(["shards/0.tar"], tmp_path)
    assert report.counts == {"damaged-tar": 1, "image-without-caption": 1}
    assert [(file.lost_bytes, file.read_bytes) for file in report.files] == [(1024, len(content) - 1024)]
    assert report.problems[0].detail == f"bad checksum at byte {header}, 1,024 bytes"


def test_tars_with_the_same_keys_do_not_mix(
    index_of: Callable[..., PairIndex], pair: Make, encode: Callable[..., bytes], tar_bytes: TarBytes
) -> None:
    """The second has a caption for a key whose image the first has alone."""
    first = tar_bytes([("a.jpg", encode(1)), *pair("b", 2, "the first")])
    second = tar_bytes([("a.txt", b"of another image"), *pair("b", 3, "the second")])
    index = index_of({"0.tar": first + second})
    assert index.captions(range(len(index))) == ["the first", "the second"]


def test_an_image_that_ran_into_damage_is_no_pair(
    index_of: Callable[..., PairIndex], pair: Make, encode: Callable[..., bytes], tar_bytes: TarBytes
) -> None:
    """512 of its bytes are missing; it decodes all the same, to another picture than it was."""
    content = tar_bytes([*pair("a", 1), ("b.txt", b"b"), ("b.jpg", encode(2, (90, 80))), *pair("c", 3)])
    place = content.index(b"b.jpg") + 1024
    index = index_of({"0.tar": content[:place] + content[place + 512 :]}, check_images=False)
    assert index.captions(range(len(index))) == ["caption of a", "caption of c"]


def test_an_image_beside_a_bad_header_is_a_pair(
    index_of: Callable[..., PairIndex], pair: Make, texts: Make, tar_bytes: TarBytes
) -> None:
    content = bytearray(tar_bytes([*texts("a", ["x"]), *pair("b", 2), *pair("c", 3)]))
    content[content.index(b"b.jpg") + 3] ^= 1
    index = index_of({"0.tar": bytes(content)}, check_images=False)
    assert index.captions(range(len(index))) == ["x", "caption of c"]


def test_a_member_of_a_size_that_cannot_be() -> None:
    member = tarfile.TarInfo("a.jpg")
    member.size = 2**40
    buffer = io.BytesIO(member.tobuf(tarfile.GNU_FORMAT) + bytes(10_000))
    assert read(buffer.getvalue())[:2] == ([], [(0, 10_512)])
