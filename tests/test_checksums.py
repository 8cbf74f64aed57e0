"""Checksums: every flipped bit is noticed, and other programs can check them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode.checksums import MANIFEST, SEAL, Seal, check_manifest, identity_of, listed_digest, write_manifest
from mode.errors import ModeError
from mode.files import sha256_of
from tests.bits import flipped


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    (made / "embedder").mkdir(parents=True)
    for name in ("weights", "card with spaces.json", "embedder/words"):
        (made / name).write_text(f"content of {name}")
    write_manifest(made)
    return made


def test_a_folder_as_it_was_written_and_with_more_in_it(folder: Path) -> None:
    assert check_manifest(folder)
    (folder / "notes").write_text("of one's own")
    assert check_manifest(folder)
    assert check_manifest(folder, ["weights"])
    assert listed_digest(folder, "weights") == sha256_of(folder / "weights")
    assert listed_digest(folder, "notes") is None
    assert identity_of(folder) == sha256_of(folder / MANIFEST)


def test_a_folder_without_a_manifest_is_not_damaged(tmp_path: Path) -> None:
    assert not check_manifest(tmp_path)
    assert identity_of(tmp_path) is None


def test_coreutils_check_it_too(folder: Path) -> None:
    checked = subprocess.run(["sha256sum", "--check", "--strict", MANIFEST], cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "embedder/words: OK" in checked.stdout


def test_every_bit_of_a_folder_counts(folder: Path) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for bit in range(0, 8 * len(whole), 3):
            path.write_bytes(flipped(whole, bit))
            with pytest.raises(ModeError, match=r"damaged|missing"):
                check_manifest(folder)
        path.write_bytes(whole)
    assert check_manifest(folder)


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(ModeError, match=r"SHA256SUMS: damaged: it does not name other"):
        check_manifest(folder, ["other"])
    (folder / "weights").unlink()
    with pytest.raises(ModeError, match=r"model/weights: missing"):
        check_manifest(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside", ""])
def test_a_manifest_never_leads_out_of_its_folder(folder: Path, name: str) -> None:
    (folder / MANIFEST).write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(ModeError, match="damaged: a line is not"):
        check_manifest(folder)


def test_devices_and_pipes_are_not_read(folder: Path) -> None:
    (folder / "weights").unlink()
    (folder / "weights").symlink_to("/dev/zero")
    with pytest.raises(ModeError, match="missing"):
        check_manifest(folder)


@given(st.binary(max_size=200), st.binary(max_size=100), st.integers(min_value=0), st.booleans())
def test_every_bit_of_a_sealed_file_counts(
    tmp_path_factory: pytest.TempPathFactory, before: bytes, after: bytes, place: int, long: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "sealed"
    path.write_bytes(before * (1000 if long else 1) + SEAL.blank.encode() + after)
    assert not Seal("other").check(path)
    SEAL.fill(path)
    assert SEAL.check(path)
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, place % (8 * len(whole))))
    with pytest.raises(ModeError, match="damaged"):
        SEAL.check(path)


def test_a_file_without_a_seal_is_not_damaged(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("0" * 64)
    assert not SEAL.check(tmp_path / "old")
    with pytest.raises(ValueError, match="no blank seal"):
        SEAL.fill(tmp_path / "old")
