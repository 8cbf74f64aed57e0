from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from mode.data.shards.account import FileReport, IndexReport
from mode.data.shards.scan import Problem
from mode.reporting.summary import percent
from mode.reporting.tables import (
    comparison_cells,
    markdown,
    print_comparison,
    print_index_report,
    print_predictions,
    print_results,
    print_variants,
    variant_cells,
)
from mode.results import Cost, Results, ZeroShot
from mode.roles import EXPERT
from mode.tracking.runs import Comparison


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=150)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def few_tasks(results: Results, count: int) -> Results:
    tasks = dict(list(results.zeroshot.tasks.items())[:count])
    return results.model_copy(update={"zeroshot": ZeroShot(mean=results.zeroshot.mean, tasks=tasks)})


def test_every_model_is_there_with_its_own_figures(results: Results, console: Console) -> None:
    print_results(results, console)
    lines = text_of(console).splitlines()
    for model, accuracy in results.zeroshot.mean.items():
        line = next(line for line in lines if line.split()[:1] == [model])
        assert line.split()[1].lstrip("*") == percent(accuracy)
        recall = results.retrieval.tasks["flickr8k"][model]["image_recall@10"]
        assert line.split()[2].lstrip("*") == percent(recall)
    assert any(EXPERT.mean in line for line in lines)


def test_the_best_is_marked_whoever_it_is(results: Results) -> None:
    cells = comparison_cells(results)["zero-shot %"]
    winner = max(results.zeroshot.mean, key=lambda model: results.zeroshot.mean[model])
    assert list(cells.index[cells.str.startswith("*")]) == [winner] == ["dense-long"]


def test_columns_without_a_figure_are_left_out() -> None:
    cells = comparison_cells(Results.model_validate({"zeroshot": {"mean": {"seed": 0.25}}}))
    assert cells.to_dict("index") == {"seed": {"zero-shot %": "*25.0"}}


def test_few_tasks_are_shown_one_by_one(results: Results, console: Console) -> None:
    print_results(few_tasks(results, 3), console)
    shown = text_of(console)
    for task, figures in few_tasks(results, 3).zeroshot.tasks.items():
        line = next(line for line in shown.splitlines() if line.split()[:1] == [task])
        assert percent(figures["ensemble"]) in line
        weights = results.routing[task]
        main = max(weights, key=lambda expert: weights[expert])
        assert f"{main} {weights[main]:.2f}" in line


def test_many_tasks_are_left_to_the_page(results: Results, console: Console) -> None:
    print_results(results, console)
    assert "armenian" not in text_of(console)


def test_no_results(console: Console) -> None:
    print_results(Results(), console)
    assert text_of(console) == "no results yet\n"


def test_names_with_brackets_are_no_markup(console: Console) -> None:
    accuracy = {"[red]odd[/red]": 0.5, "dense": 0.25}
    found = {"zeroshot": {"mean": accuracy, "tasks": {"[bold]t[/bold]": accuracy}}}
    print_results(Results.model_validate(found), console)
    assert "[red]odd[/red]" in text_of(console)
    assert "[bold]t[/bold]" in text_of(console)


def test_markdown_is_a_table(results: Results) -> None:
    lines = markdown(results).splitlines()
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert len(widths) == 1
    assert lines[1].startswith("| --- | ---:")
    mean = results.zeroshot.mean
    assert next(line for line in lines if line.startswith("| dense-long")).split(" | ")[1] == (
        f"**{percent(mean['dense-long'])}**"
    )


def test_comparison_of_two_runs(console: Console) -> None:
    comparison = Comparison(
        ("dense", "expert-0"),
        ("a" * 32, "b" * 32),
        {"lr": ("0.1", "0.2"), "model.name": ("RN50", None), "model.tokenizer": ("words", None), "pairs": (None, "7")},
        {"zeroshot/mean": (0.5, 0.625), "train/loss": (None, 1.0)},
    )
    print_comparison(comparison, console)
    shown = [line.split() for line in text_of(console).splitlines()]
    assert ["parameter", "dense", "aaaaaaaa", "expert-0", "bbbbbbbb"] in shown
    assert ["lr", "0.1", "0.2"] in shown
    assert ["only", "dense", "aaaaaaaa", "has:", "model", "(2)"] in shown
    assert ["only", "expert-0", "bbbbbbbb", "has:", "pairs"] in shown
    assert ["zeroshot/mean", "0.5", "0.625", "+0.125"] in shown
    assert ["train/loss", "–", "1"] in shown


def test_comparison_of_equal_parameters(console: Console) -> None:
    print_comparison(Comparison(("a", "b"), ("1" * 32, "2" * 32), {}, {}), console)
    assert text_of(console) == "no parameter differs\n"


def test_account_of_shards(console: Console) -> None:
    problems = [Problem("0.tar", f"key{number}", "empty-caption", "blank") for number in range(3)]
    report = IndexReport([FileReport("0.tar", 1_200, 1_300, {"empty-caption": 3}, 10_000)], problems)
    print_index_report(report, 2, console)
    shown = text_of(console)
    assert "1,200 images, 1,300 pairs, 3 problems" in shown
    assert shown.count(": empty-caption: blank") == 2
    assert "... and 1 more" in shown


def test_predictions_are_the_most_probable_classes(console: Console) -> None:
    probabilities = [[0.05, 0.9, 0.05], [0.6, 0.1, 0.3]]
    print_predictions(["a.png", "[b].png"], ["cat", "dog", "owl"], probabilities, {"e-0": 1.0, "e-1": 0.0}, console)
    shown = [line.split() for line in text_of(console).splitlines()]
    assert shown[1] == ["a.png", "dog", "90.0", "cat", "5.0", "owl", "5.0"]
    assert shown[2] == ["[b].png", "cat", "60.0", "owl", "30.0", "dog", "10.0"]
    assert shown[3] == ["weights:", "e-0", "1.00"]


class TestVariants:
    @pytest.fixture
    def variants(self, results: Results) -> Results:
        whole = results.costs["ensemble"]
        return Results(
            zeroshot=ZeroShot(mean={"top-1": 0.6, "best-by-label": 0.63}),
            encoders={"top-1": 1.0, "best-by-label": 1.0, "by-range-1": 1.5},
            cost={"top-1": whole, "by-range-1": Cost()},
        )

    def test_a_row_each_below_what_they_are_compared_with(self, variants: Results, results: Results) -> None:
        cells = variant_cells(variants, results)
        compared = ["dense", "dense-long", "uniform", "ensemble"]
        assert list(cells.index) == [*compared, "top-1", "best-by-label", "by-range-1"]
        assert (
            cells.loc[compared, "zero-shot %"].tolist()
            == comparison_cells(results).loc[compared, "zero-shot %"].str.lstrip("*").tolist()
        )
        assert cells["encoders per image"].tolist() == ["1", "1", "4", "4", "1", "1", "1.5"]
        assert cells.loc["top-1", "cost"] == cells.loc["ensemble", "cost"]
        assert cells.loc["by-range-1"].tolist()[0] == cells.loc["by-range-1", "cost"] == "–"

    def test_the_oracle_is_called_one(self, variants: Results, results: Results, console: Console) -> None:
        print_variants(variants, results, console)
        assert "best-by-label (an oracle: the test labels choose)" in text_of(console)

    def test_without_arms_it_says_how_to_have_some(self, results: Results, console: Console) -> None:
        print_variants(Results(provenance={"arms": []}), results, console)
        assert "variants.arms" in text_of(console)
