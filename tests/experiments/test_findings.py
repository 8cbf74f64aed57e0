"""Tables of results: what is read of them, and what is refused at the door."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from mode.errors import ModeError
from mode.experiments.definition import Of
from mode.experiments.findings import figures_of_runs, read_findings
from mode.experiments.table import SCHEMA
from mode.paths import Paths
from tests.experiments.conftest import COMMIT, lines_of, save


@pytest.fixture
def frame() -> pd.DataFrame:
    return lines_of("retrieval", ["m"], [0, 1], recall=True)


def refused(path: Path) -> str:
    with pytest.raises(ModeError) as error:
        read_findings(path)
    assert "\n" not in str(error.value)
    assert str(path.parent) in str(error.value)
    return str(error.value)


def test_figures_of_a_row_by_metric(tmp_path: Path, frame: pd.DataFrame) -> None:
    table = read_findings(save(tmp_path, frame))
    row = Of("m", "ensemble")
    assert table.figures(row, "zero-shot").to_dict("list") == {
        "cards": [pytest.approx(0.51), pytest.approx(0.5111)],
        "chess": [pytest.approx(0.53), pytest.approx(0.5311)],
    }
    assert table.figures(row, "chess").to_dict("index") == {
        0: {"chess": pytest.approx(0.53)},
        1: {"chess": pytest.approx(0.5311)},
    }
    assert table.figures(row, "cards, chess").equals(table.figures(row, "zero-shot"))
    recall = table.figures(row, "flickr image_recall@1")
    assert recall.index.tolist() == [0, 1]
    assert recall["flickr"].tolist() == [pytest.approx(0.26), pytest.approx(0.26055)]
    assert table.figures(row, "chess acc1").equals(table.figures(row, "chess"))
    for absent in ("flickr", "chess roc_auc", "flickr recall@7", "chess, dice"):
        assert table.figures(row, absent).empty
    assert table.figures(Of("m", "uniform"), "zero-shot").empty


def test_costs_and_commits(tmp_path: Path, frame: pd.DataFrame) -> None:
    frame.loc[(frame["arm"] == "dense") & (frame["random_seed"] == 1), "samples"] = 2_000.0
    frame.loc[(frame["arm"] == "dense") & (frame["random_seed"] == 1), "seconds"] = math.nan
    table = read_findings(save(tmp_path, frame))
    assert table.cost(Of("m", "dense"), "samples") == 1_500
    assert math.isnan(table.cost(Of("m", "dense"), "seconds"))
    assert math.isnan(table.cost(Of("m", "uniform"), "models"))
    assert table.commits == [COMMIT]
    assert table.record.command == "mode experiment retrieval"


def test_two_figures_of_one_task_have_to_be_told_apart(tmp_path: Path, frame: pd.DataFrame) -> None:
    table = read_findings(save(tmp_path, pd.concat([frame, frame[frame["task"] == "chess"].assign(metric="roc_auc")])))
    with pytest.raises(ModeError, match="'zero-shot' is not one figure: task 'chess' has several"):
        table.figures(Of("m", "dense"), "zero-shot")
    assert table.figures(Of("m", "dense"), "chess roc_auc").shape == (2, 1)


def test_an_undefined_value_is_fine(tmp_path: Path, frame: pd.DataFrame) -> None:
    frame.loc[0, "value"] = math.nan
    table = read_findings(save(tmp_path, frame))
    assert table.figures(Of("m", "dense"), "chess")["chess"].isna().tolist() == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": 1.5}, "value 1.5 is not within 0..1"),
        ({"value": -0.1}, "value -0.1 is not within 0..1"),
        ({"value": math.inf}, "value inf is not within 0..1"),
        ({"samples": -1.0}, "column 'samples' has a negative or infinite value"),
        ({"models": math.inf}, "column 'models' has a negative or infinite value"),
        ({"metric": "acc1", "task": "chess"}, "is there twice: m, 0, dense, chess, acc1"),
    ],
)
def test_values_that_cannot_be_are_refused(
    tmp_path: Path, frame: pd.DataFrame, change: dict[str, Any], message: str
) -> None:
    assert message in refused(save(tmp_path, frame.assign(**change)))


def test_a_table_of_another_experiment_is_refused(tmp_path: Path, frame: pd.DataFrame) -> None:
    frame.loc[3, "experiment"] = "evil\nname"
    assert r"is of another experiment, 'evil\nname'" in refused(save(tmp_path, frame))


def test_an_empty_table_is_refused(tmp_path: Path, frame: pd.DataFrame) -> None:
    assert "has no lines" in refused(save(tmp_path, frame.iloc[:0]))


def test_columns_have_to_be_there_with_their_types(tmp_path: Path, frame: pd.DataFrame) -> None:
    place = SCHEMA.get_field_index("commit")
    assert "not the columns of a table" in refused(save(tmp_path, frame.drop(columns="commit"), SCHEMA.remove(place)))
    number = SCHEMA.set(SCHEMA.get_field_index("random_seed"), pa.field("random_seed", pa.float64()))
    assert "not the columns of a table" in refused(save(tmp_path, frame, number))
    frame["arm"] = frame["arm"].where(frame["arm"] != "dense", None)
    assert "column 'arm' has lines without a value" in refused(save(tmp_path, frame))


def test_damage_is_one_line(tmp_path: Path, frame: pd.DataFrame) -> None:
    path = save(tmp_path, frame)
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-20], whole[: len(whole) // 2], b"\x80\x04K\x01.", b"x" * 500):
        path.write_bytes(damaged)
        refused(path)
    path.unlink()
    assert "no such file" in refused(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged, or no JSON"),
        ("[" * 100_000, "damaged, or no JSON"),
        ("[]", "valid dictionary"),
        ('{"command": 1, "runs": {}, "seconds": 0}', "command: Input should be a valid string"),
        ('{"command": ""}', "runs: Field required"),
    ],
)
def test_a_record_that_is_none_is_one_line(tmp_path: Path, frame: pd.DataFrame, text: str, message: str) -> None:
    path = save(tmp_path, frame)
    path.with_suffix(".json").write_text(text)
    assert message in refused(path)


def test_a_record_has_to_be_there(project: Paths) -> None:
    path = project.experiment_results / "length.parquet"
    record = path.with_suffix(".json")
    assert json.loads(record.read_text())["command"] == read_findings(path).record.command
    record.unlink()
    assert "length.json: no such file" in refused(path)


def test_figures_of_runs_are_found_by_identity(tmp_path: Path, frame: pd.DataFrame) -> None:
    assert figures_of_runs(tmp_path / "none", "retrieval") == {}
    path = save(tmp_path, frame)
    assert figures_of_runs(tmp_path, "retrieval") == {}  # of a version that kept none
    record = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(
        json.dumps(record | {"identities": {"m": {"1": "c0ffee"}, "gone": {"0": "a"}}})
    )
    known = figures_of_runs(tmp_path, "retrieval")
    assert [*known] == ["c0ffee"]
    assert known["c0ffee"].equals(frame[frame["random_seed"] == 1])
    path.with_suffix(".json").write_text(json.dumps(record | {"identities": {"m": ["c0ffee"]}}))
    assert "identities.m" in refused(path)


def test_of_a_run_in_two_tables_an_experiment_has_its_own(tmp_path: Path, frame: pd.DataFrame) -> None:
    values = {"retrieval": 0.25, "table4": 0.5}
    for name, value in values.items():
        path = save(tmp_path, frame.assign(experiment=name, value=value))
        record = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps(record | {"identities": {"m": {"0": "c0ffee"}}}))
    for name, value in values.items():
        assert set(figures_of_runs(tmp_path, name)["c0ffee"]["value"]) == {value}
