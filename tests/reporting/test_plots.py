from __future__ import annotations

import csv
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mode.reporting import plots
from mode.reporting.plots import write_plot_data
from mode.reporting.summary import Cluster, comparison, percent, rows
from mode.results import Growth, GrowthCurve, Results

CurvesOf = Mapping[str, list[tuple[float, float]]]
of = Results.model_validate


def axes_of(figure: Figure | None) -> Axes:
    assert figure is not None
    return figure.axes[0]


def texts_of(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_accuracy_bars_are_the_figures(results: Results) -> None:
    axes = axes_of(plots.accuracy(results))
    table = rows(comparison(results))
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.model for row in table]
    assert [bar.get_width() for bar in axes.patches] == [100 * row.zeroshot for row in table]  # type: ignore[attr-defined]
    assert texts_of(axes) == [percent(row.zeroshot) for row in table]


def test_routing_map_holds_the_weights_in_blocks(results: Results, clusters: list[Cluster]) -> None:
    axes = axes_of(plots.routing_map(results, clusters))
    tasks = [label.get_text() for label in axes.get_yticklabels()]
    grid = axes.images[0].get_array()
    assert grid is not None
    assert sorted(tasks) == sorted(results.routing)
    for task, line in zip(tasks, grid, strict=True):
        assert list(line) == pytest.approx([results.routing[task][f"expert-{i}"] for i in range(4)])
    mains = [int(line.argmax()) for line in grid]
    assert mains == sorted(mains)
    assert "playing" in axes.get_xticklabels()[3].get_text()


def test_gains_are_differences_best_first(results: Results) -> None:
    axes = axes_of(plots.gains(results, "dense-long"))
    tasks = results.zeroshot.tasks
    names = [label.get_text() for label in axes.get_yticklabels()]
    widths = [bar.get_width() for bar in axes.patches]  # type: ignore[attr-defined]
    assert widths == [100 * (tasks[name]["ensemble"] - tasks[name]["dense-long"]) for name in names]
    assert widths == sorted(widths, reverse=True)
    lost = sum(width < 0 for width in widths)
    assert 0 < lost < len(tasks)
    assert f"worse on {lost} of {len(tasks)} tasks" in axes.get_xlabel()


def test_cost_has_a_point_per_model_and_a_label_where_there_is_room(results: Results) -> None:
    axes = axes_of(plots.cost(results))
    points = sorted(tuple(collection.get_offsets()[0]) for collection in axes.collections)  # type: ignore[index]
    table = rows(comparison(results))
    expected = sorted((row.multiple, 100 * row.zeroshot) for row in table)
    assert [x for x, _ in points] == pytest.approx([x for x, _ in expected])
    assert [y for _, y in points] == pytest.approx([y for _, y in expected])
    assert sorted(texts_of(axes)) == sorted(row.model for row in table if not row.single)


def test_cluster_sizes_with_words(clusters: list[Cluster]) -> None:
    axes = axes_of(plots.cluster_sizes(clusters))
    assert [bar.get_width() for bar in axes.patches] == [cluster.size for cluster in clusters]  # type: ignore[attr-defined]
    assert ", ".join(clusters[0].words[:6]) in texts_of(axes)


def test_curves_are_thinned(curves: CurvesOf) -> None:
    axes = axes_of(plots.training({**curves, "lonely": [(0.0, 1.0)]}, points=10))
    assert [line.get_label() for line in axes.lines] == list(curves)
    assert all(len(line.get_xydata()) < 20 for line in axes.lines)


def test_more_experts_than_colours_share_one_and_one_line_of_the_legend() -> None:
    curve = [(0.0, 3.0), (10.0, 2.0)]
    names = ["seed", *(f"{kind}-{number}" for kind in ("expert", "full-expert") for number in range(4))]
    axes = axes_of(plots.training(dict.fromkeys(names, curve)))
    assert [line.get_text() for line in axes.get_legend().get_texts()] == ["seed", "4 × expert", "4 × full"]
    assert len(axes.lines) == 9
    axes = axes_of(plots.training(dict.fromkeys(names[:8], curve)))
    assert [line.get_text() for line in axes.get_legend().get_texts()] == names[:8]
    assert len({line.get_color() for line in axes.lines}) == 8


def test_heads_of_many_columns_are_names_alone(clusters: list[Cluster]) -> None:
    def heads(experts: int) -> list[str]:
        weights = {"task": {f"expert-{number}": 1 / experts for number in range(experts)}}
        axes = axes_of(plots.routing_map(of({"routing": weights}), clusters))
        return [label.get_text() for label in axes.get_xticklabels()]

    assert heads(17) == [f"expert-{number}" for number in range(17)]
    assert heads(16)[0] == "\n".join(["expert-0", *clusters[0].words[:3]])


def test_figures_of_the_way_are_drawn_of_each_model_that_has_them() -> None:
    looks = {"loss": {"seed": [(0.0, 3.0), (10.0, 2.0)]}, "accuracy": {"seed": [(0.0, 0.1), (10.0, 0.4)]}}
    drawn = plots.all_plots(Results(), validation=looks)
    assert list(drawn) == ["validation-loss", "validation-accuracy"]
    [line] = axes_of(drawn["validation-loss"]).lines
    assert line.get_xydata().tolist() == [[0, 3], [10, 2]]
    [line] = axes_of(drawn["validation-accuracy"]).lines
    assert line.get_xydata().tolist() == [[0, 10], [10, 40]]  # in percent


def test_nothing_is_drawn_of_nothing() -> None:
    assert plots.all_plots(Results()) == {}
    assert plots.all_plots(of({"zeroshot": {"mean": {"seed": None}}, "routing": {"t": {}}})) == {}


@pytest.mark.parametrize("experts", [1, 20])
def test_any_number_of_experts(experts: int) -> None:
    names = [f"expert-{number}" for number in range(experts)]
    weights = {f"task-{number}": dict.fromkeys(names, 1 / experts) for number in range(100)}
    tasks = {task: {"ensemble": 0.5, "dense": 0.5} for task in weights}
    drawn = plots.all_plots(of({"routing": weights, "zeroshot": {"mean": tasks["task-0"], "tasks": tasks}}))
    assert {"routing", "accuracy", "gains-dense"} <= set(drawn)


def test_saved_plots_open_and_are_the_same_each_time(
    few: Results, clusters: list[Cluster], curves: CurvesOf, tmp_path: Path
) -> None:
    written = plots.save_plots(tmp_path / "one", few, clusters, curves)
    again = plots.save_plots(tmp_path / "two", few, clusters, curves)
    assert {path.suffix for path in written} == {".png", ".svg"}
    for path, other in zip(written, again, strict=True):
        assert path.read_bytes() == other.read_bytes()
        if path.suffix == ".svg":
            assert ET.parse(path).getroot().tag.endswith("svg")
        else:
            with Image.open(path) as image:
                assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_data_of_plots(results: Results, curves: CurvesOf, tmp_path: Path) -> None:
    files = {path.name: list(csv.DictReader(path.open())) for path in write_plot_data(tmp_path, results, curves)}
    accuracy = {line["model"]: float(line["zeroshot"]) for line in files["accuracy.csv"]}
    assert accuracy["ensemble"] == pytest.approx(results.zeroshot.mean["ensemble"], abs=1e-6)
    assert len(files["tasks.csv"]) == 52 * 9
    assert len(files["routing.csv"]) == 52 * 4
    assert [float(line["loss"]) for line in files["training.csv"] if line["model"] == "seed"] == pytest.approx(
        [loss for _, loss in curves["seed"]], rel=1e-5
    )


def test_growth_is_drawn_in_both_orders(results: Results, tmp_path: Path) -> None:
    mean = GrowthCurve(experts=[0, 1, 2], by_task=[0.4, 0.5, 0.6], reversed=[0.4, 0.45, 0.6])
    grown = results.model_copy(update={"growth": Growth(mean=mean)})
    axes = axes_of(plots.growth(grown))
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [
        pytest.approx([40, 50, 60]),
        pytest.approx([40, 45, 60]),
    ]
    assert plots.growth(results) is None
    lines = list(csv.DictReader((next(f for f in write_plot_data(tmp_path, grown) if f.name == "growth.csv")).open()))
    assert lines[1] == {"order": "by_task", "experts": "1", "zeroshot": "0.5"}
    assert len(lines) == 6


def test_data_of_nothing_has_heads(tmp_path: Path) -> None:
    files = {path.name: path.read_text() for path in write_plot_data(tmp_path, Results())}
    assert files["training.csv"] == "model,samples,loss\n"
