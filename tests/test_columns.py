from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode import columns as room
from mode.columns import Column, Texts, blocks_of, open_columns, spans, write_columns
from mode.errors import ModeError
from tests.bits import flipped

SCHEMA = pa.schema([("number", pa.int64()), ("small", pa.int16()), ("share", pa.float32()), ("text", pa.string())])
WORDS = ["", "a", "grün", "日本語 " * 30, "\x00", "two\nlines"]


def table(rows: int, seed: int = 0) -> pa.Table:
    random = np.random.default_rng(seed)
    return pa.table(
        [
            random.integers(-(2**60), 2**60, rows),
            random.integers(-9, 9, rows).astype(np.int16),
            random.random(rows, np.float32),
            pa.array([WORDS[number] for number in random.integers(0, len(WORDS), rows)], pa.string()),
        ],
        schema=SCHEMA,
    )


@pytest.fixture
def whole(tmp_path: Path) -> pa.Table:
    """Rows that lie in some thousand places, in `tmp_path`, written in parts of any size."""
    made = table(30_000)
    with write_columns(tmp_path / "table", SCHEMA) as writer:
        for start, stop in ((0, 1), (1, 1), (1, 20_000), (20_000, 30_000)):
            writer.write(made.slice(start, stop - start))
    return made


def test_what_is_written_is_read_however_it_is_asked_for(whole: pa.Table, tmp_path: Path) -> None:
    columns = open_columns(tmp_path / "table", SCHEMA)
    random = np.random.default_rng(1)
    far, near = random.integers(0, 30_000, 9_000), np.arange(100, 300)
    for name in ("number", "small", "share"):
        column, expected = columns[name], whole[name].to_numpy()
        assert isinstance(column, Column)
        assert (len(column), column.dtype) == (30_000, expected.dtype)
        for rows in (far, near, near[::-1], slice(None), slice(5, 2), slice(-3, None), slice(0, 50, 7), [], [7]):
            found = column[rows]
            assert found.dtype == expected.dtype
            assert np.array_equal(found, expected[rows if isinstance(rows, slice) else np.asarray(rows, int)])
        assert (column[0], column[-1], column[29_999]) == (expected[0], expected[-1], expected[-1])
        assert np.array_equal(np.asarray(column), expected)
        assert np.array_equal(np.concatenate([*blocks_of(column, 7_001)]), expected)
        assert np.array_equal(spans(column, far % 29_999), spans(expected, far % 29_999))
        assert np.array_equal(np.concatenate([*blocks_of(column, 99)]), np.concatenate([*blocks_of(expected, 99)]))
        assert np.array_equal(np.load(tmp_path / "table" / f"{name}.npy", allow_pickle=False), expected)
    texts, words = columns["text"], whole["text"].to_pylist()
    assert isinstance(texts, Texts)
    assert len(texts) == 30_000
    for rows in (far, near):
        assert texts.take(rows) == [words[row] for row in rows]
    assert (texts.take([]), texts[3], [*texts.blocks(4_001)]) == (
        [],
        words[3],
        [words[start : start + 4_001] for start in range(0, 30_000, 4_001)],
    )


@given(parts=st.lists(st.integers(0, 9), max_size=6))
def test_parts_make_no_difference(tmp_path_factory: pytest.TempPathFactory, parts: list[int]) -> None:
    made, folder = table(sum(parts)), tmp_path_factory.mktemp("columns")
    for name, sizes in (("whole", [sum(parts)]), ("parts", parts)):
        with write_columns(folder / name, SCHEMA) as writer:
            start = 0
            for size in sizes:
                writer.write(made.slice(start, size))
                start += size
    for file in (folder / "whole").iterdir():
        assert (folder / "parts" / file.name).read_bytes() == file.read_bytes()
    assert len(open_columns(folder / "parts", SCHEMA)["text"]) == sum(parts)


@pytest.mark.parametrize("rows", [[-1], [30_000], [5, 2**40], -30_001, 30_000])
def test_rows_that_are_not_there(whole: pa.Table, tmp_path: Path, rows: list[int] | int) -> None:
    column = open_columns(tmp_path / "table", SCHEMA)["number"]
    with pytest.raises(IndexError):
        column[rows]  # type: ignore[index]


def test_numbers_that_are_no_rows(whole: pa.Table, tmp_path: Path) -> None:
    column = open_columns(tmp_path / "table", SCHEMA)["number"]
    for rows in (np.ones(30_000, bool), np.array([0.0])):
        with pytest.raises(IndexError, match="rows of type"):
            column[rows]  # type: ignore[index]


@pytest.mark.parametrize("name", ["number.npy", "text.utf8", "text.offsets.npy"])
def test_a_file_that_is_shorter_longer_or_gone_is_refused_at_the_door(
    whole: pa.Table, tmp_path: Path, name: str
) -> None:
    file = tmp_path / "table" / name
    content = file.read_bytes()
    for wrong in (content[:-1], content + b"x", b"", content[:50]):
        file.write_bytes(wrong)
        with pytest.raises(ModeError, match=r"damaged") as raised:
            open_columns(tmp_path / "table", SCHEMA)
        assert "\n" not in str(raised.value)
    file.unlink()
    with pytest.raises(ModeError, match=r"no such file"):
        open_columns(tmp_path / "table", SCHEMA)


def test_columns_of_another_type_shape_or_length(whole: pa.Table, tmp_path: Path) -> None:
    for wrong in (np.zeros(30_000, np.int32), np.zeros((30_000, 1), np.int64), np.zeros(29_999, np.int64)):
        np.save(tmp_path / "table/number.npy", wrong)
        with pytest.raises(ModeError, match=r"number\.npy: damaged|unequal length"):
            open_columns(tmp_path / "table", SCHEMA)
    np.save(tmp_path / "table/number.npy", np.array([{}] * 30_000), allow_pickle=True)
    with pytest.raises(ModeError, match=r"number\.npy: damaged"):
        open_columns(tmp_path / "table", SCHEMA)


def test_a_file_that_is_cut_while_it_is_open(whole: pa.Table, tmp_path: Path) -> None:
    opened = open_columns(tmp_path / "table", SCHEMA)
    for name in ("number.npy", "text.utf8"):
        with (tmp_path / "table" / name).open("r+b") as file:
            file.truncate(1_000)
    number, text = opened["number"], opened["text"]
    assert isinstance(number, Column)
    assert isinstance(text, Texts)
    for read in (lambda: number[25_000], lambda: number[[0, 25_000]], lambda: text[29_000], lambda: [*text.blocks()]):
        with pytest.raises(ModeError, match="damaged"):
            read()


@pytest.mark.parametrize("offset", [-5, 2**62, -(2**62), 1 << 25])
def test_offsets_out_of_bounds_are_noticed_where_they_are_used(whole: pa.Table, tmp_path: Path, offset: int) -> None:
    offsets = np.load(tmp_path / "table/text.offsets.npy")
    offsets[100] = offset
    np.save(tmp_path / "table/text.offsets.npy", offsets)
    texts = open_columns(tmp_path / "table", SCHEMA)["text"]
    assert isinstance(texts, Texts)
    assert texts[98] == whole["text"][98].as_py()
    for read in (lambda: texts[99], lambda: texts[100], lambda: texts.take([5, 100]), lambda: [*texts.blocks(1_000)]):
        with pytest.raises(ModeError, match="damaged: an offset is of no text"):
            read()


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    with write_columns(tmp_path / "table", SCHEMA) as writer:
        writer.write(table(0))
    for content, message in ((b"abc\xff", "UTF8"), (b"ab\xc3\xa4", "UTF8")):
        (tmp_path / "table/text.utf8").write_bytes(content)
        np.save(tmp_path / "table/text.offsets.npy", np.array([0, 3, 4]))
        texts = Texts(tmp_path / "table/text")
        with pytest.raises(ModeError, match=f"damaged.*{message}"):
            texts.take([0, 1])
        with pytest.raises(ModeError, match=f"damaged.*{message}"):
            [*texts.blocks()]


def test_any_flipped_bit_gives_a_wrong_value_or_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never another error, and never an end of the process."""
    monkeypatch.setattr(room, "_DENSE", 64)
    with write_columns(tmp_path / "table", SCHEMA) as writer:
        writer.write(table(40))
    random = np.random.default_rng(0)
    for file in sorted((tmp_path / "table").iterdir()):
        content = file.read_bytes()
        for bit in random.integers(0, 8 * len(content), 150).tolist():
            file.write_bytes(flipped(content, bit))
            try:
                for column in open_columns(tmp_path / "table", SCHEMA).values():
                    rows = random.permutation(40)
                    assert len(column.take(rows) if isinstance(column, Texts) else column[rows]) == 40
            except ModeError as error:
                assert "\n" not in str(error)  # noqa: PT017
        file.write_bytes(content)
