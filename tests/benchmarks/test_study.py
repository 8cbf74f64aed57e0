"""What the studies share: figures, tables over random seeds, parameters on DVC's command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from benchmarks import seeds
from benchmarks.routing import RULES, choice
from benchmarks.study import figures, markdown, row_of, set_params, spread, spreads
from mode.results import Results


def results_of(accuracy: float) -> Results:
    """Results of a run with two experts, a classification and a retrieval task."""
    models = {"seed": 0.25, "expert-0": accuracy, "expert-1": accuracy + 0.2, "ensemble": 0.5}
    recalls = {model: {"image_recall@1": value / 2, "text_recall@10": value} for model, value in models.items()}
    return Results.model_validate(
        {
            "zeroshot": {"mean": models, "tasks": {"dice": models}},
            "retrieval": {"tasks": {"flickr": recalls}},
            "cost": {model: {"samples_seen": 1_000} for model in models},
            "routing": {"dice": {"expert-0": 0.5, "expert-1": 0.5}},
        }
    )


def test_spread_is_of_the_values_that_are_there() -> None:
    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert spread([1.0, 2.0, float("nan")], digits=2) == "1.50 ± 0.71"
    assert spread([4.25], digits=2) == "4.25"
    assert spread([]) == "–"


def test_figures_are_named_and_many_tasks_left_out() -> None:
    results = results_of(0.1)
    assert figures(results)["expert-1"] == pytest.approx(
        {"zero-shot": 0.3, "dice": 0.3, "flickr image recall@1": 0.15, "flickr text recall@10": 0.3}
    )
    assert "dice" not in figures(results, most_tasks=0)["seed"]
    accuracies = {f"task {number}": number / 10 for number in range(7)}
    assert row_of(accuracies, {"recall": 0.5}) == pytest.approx({"zero-shot": 0.3, "recall": 0.5})
    assert row_of({}, {"recall": 0.5}) == {"recall": 0.5}


def test_tables_keep_the_order_of_rows_and_show_what_is_missing() -> None:
    runs = [{"b": {"one": 0.1, "two": 0.5}, "a": {"one": 0.2}}, {"b": {"one": 0.3, "two": 0.5}, "a": {"one": 0.2}}]
    lines = markdown(spreads(runs, {"two": 2})).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "one", "two"]
    assert cells[2:] == [["b", "20.0 ± 14.1", "50.00 ± 0.00"], ["a", "20.0 ± 0.0", "–"]]


def test_table_of_random_seeds() -> None:
    table = seeds.table([results_of(0.1), results_of(0.3)])
    [experts] = [line for line in table.splitlines() if line.startswith("| experts, mean")]
    assert [cell.strip() for cell in experts.strip("|").split("|")] == [
        *("experts, mean", "30.0 ± 14.1", "30.0 ± 14.1", "15.0 ± 7.1", "30.0 ± 14.1", "1,000")
    ]
    assert "| dense " in table  # a model that was not trained keeps its row


def test_choice_is_the_mean_over_experiments_of_the_mean_over_random_seeds() -> None:
    def run(best: float) -> dict[str, dict[str, float]]:
        rows = {rule: {"held-out tasks": 0.2, "held-out retrieval": 0.1} for rule in RULES}
        return rows | {"share by query": {"held-out tasks": best, "held-out retrieval": 0.1}}

    said = choice([[run(0.1), run(0.5)], [run(0.7)]])
    assert said.splitlines()[0] == "held-out tasks: share by query 50.00; calibrated 20.00"


def test_parameters_go_through_dvc_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("# kept\na: {b: 1, c: x}\ntasks: glyphs\nflag: true\n")
    given = {"a.b": None, "a.c": "/a b/c=d:é", "+a.d": 0.25, "tasks": ["/x/1", "y z"], "flag": False}
    apply_overrides(file, set_params(given)[1::2])
    content = yaml.safe_load(file.read_text())
    assert content == {"a": {"b": None, "c": "/a b/c=d:é", "d": 0.25}, "tasks": ["/x/1", "y z"], "flag": False}
    assert file.read_text().startswith("# kept")
