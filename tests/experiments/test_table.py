"""Tables of results: written as a whole, the same bytes for the same rows, and checked when they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mode.errors import ModeError
from mode.experiments.table import SCHEMA, load_table, save_table, tidy, with_start
from mode.results import Results

ROW = ("x", "a", 0, "dense", "chess", "acc1", 0.5, 128.0, 5e9, float("nan"), 1.0, "c0ffee", "cpu")


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


def cost(samples: float, seconds: float | None) -> dict[str, float | None]:
    return {"samples_seen": samples, "flops": 2 * samples, "seconds": seconds}


def test_rows_worked_out_by_hand(tmp_path: Path) -> None:
    facts = {"images": 8, "classes": 2, "templates": 1, "texts": 0, "hash": "0"}
    results = Results.model_validate(
        {
            "zeroshot": {
                "mean": {"seed": 0.1},
                "tasks": {
                    # One that no facts are known of is scored by acc1; `dense` has no figure there.
                    "chess": {"seed": 0.1, "dense": None, "expert-0": 0.2, "expert-1": 0.4, "ensemble": 0.5},
                    "pets": {"full-expert-0": 0.3, "uniform-full": 0.35, "expert-0": 0.6, "uniform": 0.7},
                },
            },
            "retrieval": {"tasks": {"coco": {"dense": {"image_recall@1": 0.25, "text_recall@1": None}}}},
            "routing": {"chess": {"expert-0": 0.75, "expert-1": 0.25}},
            "tasks": {"pets": {"kind": "classification", "metric": "mean_per_class_recall", **facts}},
            "cost": {
                "seed": cost(100.0, 10.0),
                "dense": cost(150.0, None),
                "full-expert-0": cost(130.0, 13.0),
                "expert-0": cost(120.0, 12.0),
                "expert-1": cost(125.0, 13.0),
                "uniform-full": cost(130.0, 13.0),
            },
        }
    )
    variants = Results.model_validate(
        {
            "zeroshot": {"tasks": {"chess": {"top-1": 0.45, "by-range-1": 0.3}}},
            "encoders": {"top-1": 1.0},
            "cost": {"by-range-1": cost(120.0, 12.0)},
        }
    )
    found = tidy(results, variants, experiment="x", run="a", random_seed=7, commit="c0ffee", device="cpu")
    together = (145.0, 290.0, 15.0)  # the seed once: 100 + 20 + 25
    nan = float("nan")
    expected = [
        ("seed", "chess", "acc1", 0.1, 100.0, 200.0, 10.0, 1.0),
        ("expert-0", "chess", "acc1", 0.2, 120.0, 240.0, 12.0, 1.0),
        ("expert-0", "pets", "mean_per_class_recall", 0.6, 120.0, 240.0, 12.0, 1.0),
        ("expert-1", "chess", "acc1", 0.4, 125.0, 250.0, 13.0, 1.0),
        ("ensemble", "chess", "acc1", 0.5, *together, 2.0),
        ("full-expert-0", "pets", "mean_per_class_recall", 0.3, 130.0, 260.0, 13.0, 1.0),
        ("uniform-full", "pets", "mean_per_class_recall", 0.35, 130.0, 260.0, 13.0, 1.0),
        ("uniform", "pets", "mean_per_class_recall", 0.7, *together, 2.0),
        ("dense", "coco", "image_recall@1", 0.25, 150.0, 300.0, nan, 1.0),
        # Of the task that both experts have; the cost of one.
        ("experts, mean", "chess", "acc1", 0.3, 120.0, 240.0, 12.0, 1.0),
        ("top-1", "chess", "acc1", 0.45, *together, 1.0),
        ("by-range-1", "chess", "acc1", 0.3, 120.0, 240.0, 12.0, nan),
    ]
    columns = ["arm", "task", "metric", "value", "samples", "flops", "seconds", "models"]
    key = ["arm", "task", "metric"]
    assert found.columns.tolist() == SCHEMA.names
    pd.testing.assert_frame_equal(
        found[columns].sort_values(key, ignore_index=True),
        pd.DataFrame(expected, columns=columns).sort_values(key, ignore_index=True),
    )
    assert found[["experiment", "run", "random_seed", "commit", "device"]].drop_duplicates().to_numpy().tolist() == [
        ["x", "a", 7, "c0ffee", "cpu"]
    ]
    save_table(found, tmp_path / "x.parquet")
    pd.testing.assert_frame_equal(load_table(tmp_path / "x.parquet"), found)


def rows_of(**costs: float) -> pd.DataFrame:
    """A row per arm, with its samples; as many operations and seconds."""
    rows = [("x", "a", 0, arm, "chess", "acc1", 0.5, cost, cost, cost, 1.0, "", "") for arm, cost in costs.items()]
    return pd.DataFrame(rows, columns=SCHEMA.names)


@pytest.mark.parametrize(("model", "spent"), [("dense", 100.0), ("merged", 150.0)])
def test_what_a_given_model_took_counts_as_well(model: str, spent: float) -> None:
    start, given = rows_of(seed=80.0, dense=100.0, ensemble=150.0), rows_of(seed=0.0, dense=20.0, ensemble=30.0)
    found = with_start(given, start, model)
    assert found[["samples", "flops", "seconds"]].to_numpy().tolist() == [3 * [spent + own] for own in (0, 20, 30)]
    assert found["models"].tolist() == [1, 1, 1]
    assert with_start(given, rows_of(dense=1.0), "merged")["samples"].isna().all()


def test_results_of_dense_models_alone_have_neither_experts_nor_variants() -> None:
    results = Results.model_validate({"zeroshot": {"tasks": {"chess": {"dense": 0.5}}}})
    found = tidy(results, None, experiment="x", run="a", random_seed=0, commit="", device="")
    assert found[["arm", "value", "models", "commit"]].to_numpy().tolist() == [["dense", 0.5, 1.0, ""]]
    assert np.isnan(found[["samples", "flops", "seconds"]]).all(axis=None)
    assert (
        tidy(Results(), None, experiment="x", run="a", random_seed=0, commit="", device="").columns.tolist()
        == SCHEMA.names
    )
