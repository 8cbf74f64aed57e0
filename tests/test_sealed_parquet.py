"""Parquet files: reading notices damage, and checking notices all of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mode.checksums import SEAL
from mode.errors import ModeError
from mode.sealed_parquet import facts_of, iter_sealed, read_sealed, rows_of, write_sealed
from tests.bits import flipped

TABLE = pa.table(
    {
        "number": pa.array(np.arange(3000), pa.int64()),
        "distance": pa.array(np.random.default_rng(0).random(3000), pa.float32()),
        "caption": [f"a {['red', 'blue'][n % 2]} thing, number {n}" for n in range(3000)],
    }
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "table.parquet"
    with write_sealed(path, TABLE.schema, {"origin": "here"}, compression="zstd") as writer:
        writer.write_table(TABLE, row_group_size=1000)
    return path


def test_read_back_by_us_and_by_others(file: Path) -> None:
    assert read_sealed(file, TABLE.column_names).equals(TABLE)
    assert parquet.read_table(file).equals(TABLE)
    assert facts_of(file)["origin"] == "here"
    assert pa.Table.from_batches(iter_sealed(file, ["caption"], 700)).equals(TABLE.select(["caption"]))
    assert SEAL.check(file)


def test_the_same_bytes_each_time(file: Path, tmp_path: Path) -> None:
    with write_sealed(tmp_path / "again.parquet", TABLE.schema, {"origin": "here"}, compression="zstd") as writer:
        writer.write_table(TABLE, row_group_size=1000)
    assert (tmp_path / "again.parquet").read_bytes() == file.read_bytes()


def test_a_flipped_bit_is_one_line_or_changes_nothing_that_is_read(file: Path) -> None:
    """And the check of the whole file always finds it."""
    whole, random = file.read_bytes(), np.random.default_rng(0)
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    anywhere, in_footer = random.integers(0, 8 * len(whole), 150), random.integers(0, 8 * footer, 150)
    said = []
    for bit in [*anywhere, *(8 * (len(whole) - footer) + in_footer)]:
        file.write_bytes(flipped(whole, bit))
        try:
            assert read_sealed(file, ["number", "distance"]).equals(TABLE.select(["number", "distance"]))
        except ModeError as error:
            said.append(str(error))
        with pytest.raises(ModeError, match="damaged"):
            SEAL.check(file)
    assert len(said) > 150
    assert all(line.startswith(str(file)) and "\n" not in line for line in said)


def test_a_file_of_an_older_version_is_read(tmp_path: Path) -> None:
    parquet.write_table(TABLE, tmp_path / "old.parquet")
    assert read_sealed(tmp_path / "old.parquet", ["number"])["number"].equals(TABLE["number"])
    assert not SEAL.check(tmp_path / "old.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table", b"PAR1\xff\xff\xff\xffPAR1", bytes(100)])
def test_what_is_no_parquet_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "wrong.parquet").write_bytes(content)
    whole, part = lambda path: read_sealed(path, ["number"]), lambda path: [*iter_sealed(path, ["number"], 1)]
    for read in (whole, part, facts_of, rows_of):
        with pytest.raises(ModeError, match="no Parquet file"):
            read(tmp_path / "wrong.parquet")
    with pytest.raises(ModeError, match="no such file"):
        read_sealed(tmp_path / "nowhere.parquet", ["number"])
    with pytest.raises(ModeError, match="no Parquet file"):
        read_sealed(Path(__file__), ["number"])
