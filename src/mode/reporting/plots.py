"""Plots of a run, each a function from figures to a matplotlib figure, and the data files behind them.

Colours are Okabe and Ito's, which people with any colour vision tell apart; what a colour says, a label says too. Each
plot is drawn for a light or a dark page, with a transparent background.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mode.reporting.summary import Cluster, baselines, comparison, percent, quantity, rows, zeroshot_tasks
from mode.results import Results, natural
from mode.roles import DENSE, ENSEMBLE, SEED, role_of

#: Training loss of each model: (samples seen, loss).
Curves = Mapping[str, Sequence[tuple[float, float]]]

#: Figures of each model while it trained: `loss` and `accuracy` (the mean over the tasks, 0..1) -> model -> curve.
Validation = Mapping[str, Curves]

#: For things of which there are several: experts, clusters. Told apart by order and label, should they recur.
SERIES = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#b8a92b")
#: More rows or columns than this and a heat map carries no numbers; columns then have no words at their heads either.
NUMBERED_ROWS, NUMBERED_COLUMNS = 80, 16
#: Inches; at the 500 to 600 pixels that half a page gives, text of 10 points stays readable.
WIDTH = 5.8
#: Words that name a cluster in a plot.
WORDS = 6


@contextmanager
def theme(dark: bool) -> Iterator[None]:
    """Fonts and colours for a light or a dark page."""
    ink, faint = ("#e6e8eb", "#3a4049") if dark else ("#1f2430", "#d9dce1")
    settings = {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
        "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
        "font.size": 10,
        "svg.hashsalt": "mode",  # the same figures give the same bytes
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "text.color", "xtick.color", "ytick.color"), ink),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), faint),
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
    with mpl.rc_context(settings):
        yield


def accuracy(results: Results) -> Figure | None:
    """Mean zero-shot accuracy of every model, as bars in the table's order; `None` without accuracies."""
    table = comparison(results).dropna(subset="zeroshot")
    if table.empty:
        return None
    figure, axes = new_axes(WIDTH, 0.9 + 0.34 * len(table))
    values = 100 * table["zeroshot"]
    bars = axes.barh(range(len(table)), values, height=0.72, color=[role.colour for role in table["role"]])
    for row, bar in zip(rows(table), bars, strict=True):
        if row.single:
            bar.set_alpha(0.55)
    axes.bar_label(bars, table["zeroshot"].map(percent), padding=4)
    axes.set_yticks(range(len(table)), table.index)
    axes.invert_yaxis()
    axes.set_xlim(0, min(100.0, max(values) * 1.12 + 1))
    _label_values(axes, "mean zero-shot accuracy, %")
    return figure


def cost(results: Results) -> Figure | None:
    """Mean accuracy against training cost, a point per model; `None` without both."""
    table = rows(comparison(results).dropna(subset="zeroshot"))
    multiples = not any(math.isnan(row.multiple) for row in table)
    costs = [(row, row.multiple if multiples else row.samples_seen) for row in table]
    points = [(row, x) for row, x in costs if not math.isnan(x)]
    if not points:
        return None
    figure, axes = new_axes(WIDTH, 4.0)
    means = {row.role for row, _ in points if row.mean}
    labelled: list[tuple[float, float, str]] = []
    for row, x in points:
        y = 100 * row.zeroshot
        faint = row.single and row.role in means
        axes.scatter(x, y, s=28 if faint else 90, color=row.role.colour, alpha=0.5 if faint else 1.0, zorder=3)
        if not faint:
            labelled.append((x, y, row.model))
    axes.margins(x=0.18, y=0.14)
    label_axes(axes, "training cost, multiples of the dense model's" if multiples else "training samples seen")
    label_points(axes, labelled)
    return figure


def routing_map(results: Results, clusters: Sequence[Cluster] = ()) -> Figure | None:
    """Routing weight by task and expert, tasks grouped by the expert they go to most; `None` without routing."""
    weights = pd.DataFrame([*results.routing.values()], [*results.routing], dtype=float).fillna(0.0)
    experts = sorted(weights.columns, key=natural)
    if not experts:
        return None
    # By their main expert, then by how clearly it is theirs.
    main = pd.DataFrame({"expert": weights[experts].to_numpy().argmax(axis=1), "share": -weights.max(axis=1)})
    tasks = list(main.sort_values(["expert", "share"]).index)
    grid = weights.loc[tasks, experts].to_numpy()
    words = {cluster.expert: cluster.words for cluster in clusters}
    crowded = len(experts) > NUMBERED_COLUMNS
    heads = experts if crowded else ["\n".join([expert, *words.get(expert, [])[:3]]) for expert in experts]
    longest = max(len(task) for task in tasks)
    column = 0.26 if crowded else 1.15
    figure, axes = new_axes(1.2 + 0.075 * longest + column * len(experts), 1.5 + 0.235 * len(tasks))
    # From nearly the page's own colour to a strong blue, even in lightness.
    dark = sum(to_rgb(mpl.rcParams["text.color"])) > 1.5
    ends = ("#1b2430", "#2f6da8", "#9fd0ff") if dark else ("#f3f6fa", "#6baed6", "#08406f")
    ramp = LinearSegmentedColormap.from_list("weight", ends)
    image = axes.imshow(grid, aspect="auto", cmap=ramp, vmin=0, vmax=1)
    axes.set_xticks(range(len(experts)), heads, linespacing=1.25, rotation=90 if crowded else 0)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.tick_params(axis="y", labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_xticks([column + 0.5 for column in range(len(experts) - 1)], minor=True)
    axes.tick_params(which="minor", length=0)
    if len(tasks) <= NUMBERED_ROWS and not crowded:
        for y, line in enumerate(grid):
            for x, weight in enumerate(line):
                tone = _contrast(to_rgb(ramp(weight)))
                axes.text(x, y, f"{weight:.2f}", ha="center", va="center", fontsize=8.5, color=tone)
    else:
        figure.colorbar(image, ax=axes, label="routing weight", fraction=0.04)
    return figure


def cluster_sizes(clusters: Sequence[Cluster]) -> Figure | None:
    """Pairs in each coarse cluster, with the words that tell it from the others; `None` without clusters."""
    if not clusters:
        return None
    figure, axes = new_axes(WIDTH, 0.8 + 0.62 * len(clusters))
    sizes = [cluster.size for cluster in clusters]
    axes.barh(range(len(clusters)), sizes, height=0.34, color=[series_colour(i) for i in range(len(clusters))])
    total = sum(sizes) or 1
    for y, cluster in enumerate(clusters):
        axes.text(0, y - 0.24, ", ".join(cluster.words[:WORDS]) or "(no words)", va="bottom", fontsize=9)
        axes.text(cluster.size, y, f"  {cluster.size:,} ({cluster.size / total:.0%})", va="center", fontsize=9)
    axes.set_yticks(range(len(clusters)), [cluster.name for cluster in clusters])
    axes.set_ylim(len(clusters) - 0.6, -0.75)
    axes.set_xlim(0, max(max(sizes), 1) * 1.28)
    axes.xaxis.set_major_formatter(lambda value, _: quantity(value) if value else "0")
    _label_values(axes, "pairs")
    return figure


def gains(results: Results, against: str = DENSE.name, model: str = ENSEMBLE.name) -> Figure | None:
    """Accuracy of one model minus another's, task by task, best first; `None` if no task has both."""
    figures = zeroshot_tasks(results).reindex(columns=[model, against])
    points = (100 * (figures[model] - figures[against])).dropna().sort_index()
    points = points.sort_values(ascending=False, kind="stable")
    if points.empty:
        return None
    figure, axes = new_axes(WIDTH, 0.9 + 0.205 * len(points))
    colours = [role_of(model if value > 0 else against).colour for value in points]
    axes.barh(range(len(points)), points, height=0.7, color=colours)
    axes.axvline(0, color=mpl.rcParams["text.color"], linewidth=0.8)
    axes.set_yticks(range(len(points)), points.index)
    axes.tick_params(axis="y", labelsize=8.5)
    axes.set_ylim(len(points) - 0.3, -0.7)
    won, lost = (points > 0).sum(), (points < 0).sum()
    _label_values(axes, f"{model} over {against}, points\nbetter on {won}, worse on {lost} of {len(points)} tasks")
    return figure


def growth(results: Results) -> Figure | None:
    """Mean accuracy after 0, 1, ... n experts, trained in the order of the tasks' weights and in its reverse."""
    mean = results.growth.mean
    if not mean.experts:
        return None
    figure, axes = new_axes(WIDTH, 4.0)
    for figures, label, colour, style in (
        (mean.by_task, "largest weight first", ENSEMBLE.colour, "-"),
        (mean.reversed, "smallest first", SEED.colour, "--"),
    ):
        values = [math.nan if value is None else 100 * value for value in figures]
        axes.plot(mean.experts, values, label=label, color=colour, linestyle=style, marker="o")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_axes(axes, "experts trained; the seed stands in for the others")
    axes.legend(fontsize=9)
    return figure


def training(curves: Curves, points: int = 400, label: str = "training loss", marker: str = "") -> Figure | None:
    """Training loss over samples, a line per model, at most `points` points each; `None` without curves.

    `label` and `marker` are for other figures that are drawn alike.
    """
    drawn = {name: curve for name, curve in curves.items() if len(curve) > 1}
    if not drawn:
        return None
    several = sorted((name for name in drawn if role_of(name).many), key=natural)
    told_apart = are_told_apart(len(several))
    figure, axes = new_axes(WIDTH, 4.0)
    for name, curve in drawn.items():
        role = role_of(name)
        alike = [other for other in several if role_of(other) == role] if not told_apart else []
        axes.plot(
            *zip(*curve[:: max(1, len(curve) // points)], strict=True),
            label=name if name not in alike else f"{len(alike)} × {role.name}" if name == alike[0] else "",
            color=series_colour(several.index(name) if told_apart else 0) if role.many else role.colour,
            linewidth=1.2 if role.many else 1.8,
            linestyle=(0, (4, 1.5)) if role.many else ":" if role.length == "total" else "-",
            marker=marker,
            markersize=3,
        )
    label_axes(axes, "samples seen", label)
    axes.xaxis.set_major_formatter(lambda value, _: quantity(value) if value else "0")
    axes.legend(ncols=2, fontsize=9)
    return figure


def all_plots(
    results: Results,
    clusters: Sequence[Cluster] = (),
    curves: Curves | None = None,
    validation: Validation | None = None,
) -> dict[str, Figure]:
    """Every plot for which there are figures, by file name without its ending."""
    seen = validation or {}
    shares = {name: [(samples, 100 * share) for samples, share in c] for name, c in seen.get("accuracy", {}).items()}
    drawn = {
        "accuracy": accuracy(results),
        "cost": cost(results),
        "routing": routing_map(results, clusters),
        "clusters": cluster_sizes(clusters),
        **{f"gains-{role.name}": gains(results, role.name) for role in baselines()},
        "growth": growth(results),
        "training": training(curves or {}),
        "validation-loss": training(seen.get("loss", {}), label="loss on held-out pairs", marker="o"),
        "validation-accuracy": training(shares, label="mean zero-shot accuracy, %", marker="o"),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def save_plots(
    folder: Path,
    results: Results,
    clusters: Sequence[Cluster] = (),
    curves: Curves | None = None,
    validation: Validation | None = None,
) -> list[Path]:
    """Write every plot as PNG (150 dpi, white) and SVG; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with theme(dark=False):
        for name, figure in all_plots(results, clusters, curves, validation).items():
            written += [folder / f"{name}.png", folder / f"{name}.svg"]
            written[-1].write_text(svg(figure), encoding="utf-8")
            figure.savefig(written[-2], dpi=150, facecolor="white")
    return written


def write_plot_data(folder: Path, results: Results, curves: Curves | None = None) -> list[Path]:
    """Write the figures behind the plots as csv, one observation per line; all of them, be they empty.

    Files:
        accuracy.csv: model, zeroshot (0..1), cost (multiple of the dense model's), in the table's order.
        tasks.csv: task, model, zeroshot (0..1).
        routing.csv: task, expert, weight.
        training.csv: model, samples, loss.
        growth.csv: order (by_task, reversed), experts (how many are trained), zeroshot (mean, 0..1).
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = comparison(results).dropna(subset="zeroshot").rename(columns={"multiple": "cost"})
    mean = results.growth.mean
    growth = pd.DataFrame({"experts": mean.experts, "by_task": mean.by_task, "reversed": mean.reversed})
    content = {
        "accuracy.csv": table.reset_index(names="model")[["model", "zeroshot", "cost"]],
        "tasks.csv": _long(results.zeroshot.tasks, ("task", "model", "zeroshot")),
        "routing.csv": _long(results.routing, ("task", "expert", "weight")),
        "training.csv": pd.DataFrame(
            [(model, *point) for model, curve in (curves or {}).items() for point in curve],
            columns=["model", "samples", "loss"],
        ),
        "growth.csv": growth.melt("experts", var_name="order", value_name="zeroshot")[["order", "experts", "zeroshot"]],
    }
    for name, lines in content.items():
        # Six significant digits: enough, and equal results stay equal text.
        lines.to_csv(folder / name, index=False, float_format="%.6g", lineterminator="\n")
    return [folder / name for name in content]


def svg(figure: Figure, background: str = "none") -> str:
    """A figure as SVG text, without date, so that equal figures are equal files."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", facecolor=background, metadata={"Date": None})
    return buffer.getvalue()


def series_colour(position: int) -> str:
    """Colour of the n-th expert or cluster."""
    return SERIES[position % len(SERIES)]


def are_told_apart(count: int) -> bool:
    """Whether so many experts or clusters have a colour each."""
    return count <= len(SERIES)


def _long(table: Mapping[str, Mapping[str, float | None]], heads: Iterable[str]) -> pd.DataFrame:
    """A line per figure that there is."""
    lines = [(row, column, value) for row, figures in table.items() for column, value in figures.items()]
    return pd.DataFrame(lines, columns=[*heads]).dropna()


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches, without pyplot's global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def label_axes(axes: Axes, x: str, y: str = "mean zero-shot accuracy, %") -> None:
    """What the axes show, and a grid."""
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.7)


def _label_values(axes: Axes, x: str) -> None:
    """What bars show; a grid along the values, no ticks along the names."""
    axes.set_xlabel(x)
    axes.grid(axis="x", alpha=0.7)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _contrast(colour: tuple[float, float, float]) -> str:
    """Black or white, whichever is readable on `colour` (relative luminance of ITU-R BT.709)."""
    red, green, blue = colour
    return "#101418" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5 else "#ffffff"


def label_points(axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """Labels right of their points, or left where that would write over another point's label."""
    span_x = axes.get_xlim()[1] - axes.get_xlim()[0]
    span_y = axes.get_ylim()[1] - axes.get_ylim()[0]
    taken: list[tuple[float, float]] = []
    for x, y, text in sorted(points, key=lambda point: -point[1]):
        width = 0.028 * len(text) * span_x
        clash = [(a, b) for a, b in taken if abs(b - y) < 0.055 * span_y and x < a + width and a < x + width]
        place = (-9, 0, "right") if clash else (9, 0, "left")
        axes.annotate(text, (x, y), place[:2], textcoords="offset points", ha=place[2], va="center", zorder=4)
        taken.append((x, y))
