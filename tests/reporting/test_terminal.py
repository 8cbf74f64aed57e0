from __future__ import annotations

import io

import pytest
from rich.console import Console

from mode.data.shards.account import FileReport, IndexReport
from mode.data.shards.scan import Problem
from mode.reporting.terminal import print_comparison, print_index_report, print_predictions
from mode.tracking.runs import Comparison


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=150)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_comparison_of_two_runs(console: Console) -> None:
    comparison = Comparison(
        ("dense", "expert-0"),
        ("a" * 32, "b" * 32),
        {"lr": ("0.1", None)},
        {"zeroshot/mean": (0.5, 0.625), "train/loss": (None, 1.0)},
    )
    print_comparison(comparison, console)
    shown = [line.split() for line in text_of(console).splitlines()]
    assert ["parameter", "dense", "aaaaaaaa", "expert-0", "bbbbbbbb"] in shown
    assert ["lr", "0.1", "–"] in shown
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
