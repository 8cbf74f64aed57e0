"""Tables of results: written as a whole, the same bytes for the same rows, and checked when they are read."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mode.errors import ModeError
from mode.experiments.table import SCHEMA, load_table, save_table

ROW = ("x", "a", 0, "dense", "chess", "acc1", 0.5, 128.0, float("nan"), 1.0, "c0ffee")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    table = pd.DataFrame([ROW], columns=SCHEMA.names)
    for name in ("one", "two"):
        save_table(table, tmp_path / "new" / name)
    assert (tmp_path / "new/one").read_bytes() == (tmp_path / "new/two").read_bytes()
    pd.testing.assert_frame_equal(load_table(tmp_path / "new/one"), table)


def test_a_damaged_table_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(ModeError, match="no such file"):
        load_table(path)
    for content in (b"", b"PAR1", b"not a table at all"):
        path.write_bytes(content)
        with pytest.raises(ModeError, match=r"no table of results: [^\n]*$"):
            load_table(path)
    pq.write_table(pa.table({"run": ["a"]}), path)
    with pytest.raises(ModeError, match="not the columns of a table of results: run"):
        load_table(path)
