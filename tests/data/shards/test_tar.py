from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mode.data.shards.tar import DamagedTar, Member, Tar, _plain_file, members

names = st.lists(
    st.text("abcé日/._-", min_size=1, max_size=180).filter(lambda name: name.strip("/") == name),
    max_size=5,
)


def read(path: Path, content: bytes) -> list[Member]:
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return list(members(descriptor, len(content)))
    finally:
        os.close(descriptor)


@given(names=names, sizes=st.lists(st.sampled_from([0, 1, 511, 512, 513, 2000]), min_size=5, max_size=5),
       tar_format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))  # fmt: skip
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_as_tarfile_reads_it(
    tmp_path: Path, tar_bytes: Callable[..., bytes], names: list[str], sizes: list[int], tar_format: int
) -> None:
    content = tar_bytes([(name, os.urandom(size)) for name, size in zip(names, sizes, strict=False)], tar_format)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    assert read(tmp_path / "a.tar", content) == expected


@given(
    name=st.text("abé/._-", min_size=1, max_size=120),
    size=st.sampled_from([0, 1, 8**11 - 1, 8**11, 2**40]),
    kind=st.sampled_from([b"0", b"\0", b"5", b"L", b"7"]),
    tar_format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT]),
    flips=st.lists(st.tuples(st.integers(0, 511), st.integers(1, 255)), max_size=2),
)
@settings(max_examples=300)
def test_what_the_quick_way_takes_is_what_tarfile_reads(
    name: str, size: int, kind: bytes, tar_format: int, flips: list[tuple[int, int]]
) -> None:
    """It may leave any header to tarfile, but must not take one otherwise, nor one that tarfile refuses."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    try:
        block = bytearray(member.tobuf(tar_format, "utf-8")[-512:])
    except ValueError:  # too long or too large for the format
        return
    for place, mask in flips:
        block[place] ^= mask
    quick = _plain_file(bytes(block))
    if quick is not None:
        header = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "surrogateescape")
        assert quick == (header.name, header.size)
        assert header.isreg()
    elif not flips and kind == b"0" and size < 8**11 and len(name.encode()) <= 100:
        raise AssertionError("an ordinary header was not taken")


@pytest.mark.parametrize("more", [0, 1, 3])
def test_a_file_with_holes_is_passed_over_with_all_of_its_headers(
    tmp_path: Path, tar_bytes: Callable[..., bytes], more: int
) -> None:
    """As `tar --sparse` writes it: beyond four holes, further headers without a checksum say where they are."""
    member = tarfile.TarInfo("holes")
    member.type, member.size = tarfile.GNUTYPE_SPARSE, 1_000
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[482] = more > 0
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    further = [b"00000001000\0" * 42 + bytes([number < more - 1]) + bytes(7) for number in range(more)]
    content = bytes(header) + b"".join(further) + b"x" * 1_000 + bytes(24) + tar_bytes([("last", b"end")])
    assert [each.name for each in read(tmp_path / "a.tar", content)] == ["last"]
    for end in range(512, len(content) - 10_240, 512):
        with pytest.raises(DamagedTar, match="cut off"):
            read(tmp_path / "a.tar", content[:end])


def test_folders_and_links_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_bytes(b"x" * 700)
    (tmp_path / "in" / "hard").hardlink_to(tmp_path / "in" / "file")
    (tmp_path / "in" / "soft").symlink_to("file")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("", "file", "hard", "soft"):
            tar.add(tmp_path / "in" / name, f"in/{name}", recursive=False)
        last = tarfile.TarInfo("last")
        last.size = 3
        tar.addfile(last, io.BytesIO(b"end"))
    found = read(tmp_path / "a.tar", buffer.getvalue())
    assert [member.name for member in found] == ["in/file", "last"]
    assert buffer.getvalue()[found[1].offset :][:3] == b"end"


def test_damage_is_an_error_after_what_was_whole(tmp_path: Path, tar_bytes: Callable[..., bytes]) -> None:
    content = tar_bytes([("a", b"1" * 600), ("b", b"2" * 600)])  # a: 0 to 1536, b: 1536 to 3072
    broken = bytearray(content)
    broken[1536 + 5] ^= 0xFF
    cases = {
        bytes(broken): ("bad checksum at byte 1536", 1536, ["a"]),
        content[: 1536 + 512 + 100]: ("cut off inside 'b'", 1536, ["a"]),
        content[: 1536 + 100]: ("truncated header at byte 1536", 1536, ["a"]),
        content[:3072]: ("no end-of-archive marker", 3072, ["a", "b"]),
        b"": ("empty header at byte 0", 0, []),
        b"\x01" * 600: ("at byte 0", 0, []),
        gzip.compress(content): ("compressed with gzip", 0, []),
    }
    for damaged, (message, offset, whole) in cases.items():
        (tmp_path / "a.tar").write_bytes(damaged)
        descriptor = os.open(tmp_path / "a.tar", os.O_RDONLY)
        found: list[str] = []
        with pytest.raises(DamagedTar, match=message) as caught:
            found.extend(member.name for member in members(descriptor, len(damaged)))
        os.close(descriptor)
        assert caught.value.offset == offset
        assert found == whole


class Counted:
    """A tar in memory that counts how often it is read."""

    def __init__(self, content: bytes) -> None:
        self._content, self.size, self.reads = content, len(content), 0

    def read(self, length: int, offset: int) -> bytes:
        self.reads += 1
        return self._content[offset : offset + length]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("end", [bytes(1024), b"no header".ljust(512), b""], ids=["zeros", "damage", "nothing"])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_names_without_a_member_are_read_once(tar_bytes: Callable[..., bytes], kind: bytes, end: bytes) -> None:
    """Read again from each of them on, a hundred thousand, which are 100 MB, would take more than a day."""
    name = tarfile.TarInfo("name")
    name.type, content = kind, b"11 path=ab\n" if kind == tarfile.XHDTYPE else b"ab\0"
    name.size = len(content)
    block = name.tobuf(tarfile.USTAR_FORMAT) + content.ljust(512, b"\0")
    tar = Counted(300 * block + end + tar_bytes([("a.txt", b"words")]))
    reader = Tar(tar, tar.size)
    found = [member.name for member in reader]
    assert found == (["a.txt"] if end else ["ab"])
    assert sum(damage.size for damage in reader.damage) == (300 * 1024 + len(end) if end else 0)
    assert tar.reads < 2_000


def test_a_member_has_no_megabytes_of_attributes(tar_bytes: Callable[..., bytes]) -> None:
    """However many extended headers they are in."""
    attributes = tarfile.TarInfo("attributes")
    attributes.type, content = tarfile.XHDTYPE, b"8 k=123\n" * 10_000
    attributes.size = len(content)
    block = attributes.tobuf(tarfile.USTAR_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")
    whole = tar_bytes([("a.txt", b"words")])
    few, many = Counted(3 * block + whole), Counted(40 * block + whole)
    assert [member.name for member in Tar(few, few.size)] == ["a.txt"]
    reader = Tar(many, many.size)
    assert [member.name for member in reader] == ["a.txt"]
    assert [str(damage) for damage in reader.damage][:1] == [
        f"{13 * len(block)} bytes of names or attributes at byte 0"
    ]


@pytest.mark.parametrize("size", ["-512", "many"])
def test_senseless_sizes(tmp_path: Path, size: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a")
        member.pax_headers = {"size": size}
        tar.addfile(member)
    with pytest.raises(DamagedTar, match="bad size at byte 1024"):
        read(tmp_path / "a.tar", buffer.getvalue())


@given(cut=st.integers(0, 6000), flips=st.lists(st.tuples(st.integers(0, 5999), st.integers(1, 255)), max_size=4))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_survived(
    tmp_path: Path, tar_bytes: Callable[..., bytes], cut: int, flips: list[tuple[int, int]]
) -> None:
    content = bytearray(tar_bytes([("é" * 80, b"1" * 600), ("b", b"2")], tarfile.PAX_FORMAT)[:cut])
    for place, mask in flips:
        if place < len(content):
            content[place] ^= mask
    try:
        found = read(tmp_path / "a.tar", bytes(content))
    except DamagedTar as damage:
        end = damage.offset
        found = []
    else:
        end = 0
    assert 0 <= end <= len(content)
    assert all(0 <= member.offset <= member.offset + member.size <= len(content) for member in found)
