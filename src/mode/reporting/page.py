"""The run as one self-contained HTML page: no script, font, style or image from anywhere else.

It follows the reader's light or dark setting: styles by custom properties, plots drawn once for each. What it looks
like is in `templates/page.html`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan

from mode import roles
from mode.clustering.drift import Drift
from mode.data.leakage import Leakage
from mode.reporting.cluster_map import draw_map
from mode.reporting.plots import Curves, Validation, all_plots, series_colour, svg, theme
from mode.reporting.rendering import data_url, render
from mode.reporting.summary import Cluster, Row, baselines, comparison, rows, task_figures, verdict
from mode.reporting.tables import comparison_cells, drift_rows
from mode.results import Results
from mode.roles import ENSEMBLE, SEED

#: Title, what it shows, by plot; one against each baseline comes to them.
FIGURES = {
    "accuracy": ("Accuracy", "Mean zero-shot accuracy of every model."),
    "cost": (
        "Cost against accuracy",
        "What the training took, and what it brought; small points are the experts by themselves.",
    ),
    "routing": (
        "Routing",
        "Weight of each expert for each task, from the words of the task's classes alone; rows add up to 1.",
    ),
    "growth": (
        "Expert by expert",
        "Accuracy of the ensemble when only its first experts are trained, each task's own most important ones first,"
        " and the other way round.",
    ),
    "training": (
        "Training",
        "Loss over samples. An expert's own cluster is more alike, so losses compare within a kind.",
    ),
    "validation-loss": (
        "Held-out pairs",
        "Loss, while training, on pairs that no model is trained on: an expert's are those of its own cluster.",
    ),
    "validation-accuracy": (
        "Tasks while training",
        "Zero-shot accuracy on the tasks of training.validate; they were looked at only, and chose nothing.",
    ),
}


def render_page(
    results: Results,
    clusters: Sequence[Cluster] = (),
    curves: Curves | None = None,
    title: str = "Mixture of Data Experts",
    light: Mapping[str, str] | None = None,
    leakage: Leakage | None = None,
    dropped: bool = False,
    doubts: Sequence[str] = (),
    validation: Validation | None = None,
    drifts: Sequence[Drift] = (),
) -> str:
    """The whole page as HTML.

    Args:
        results: a part that is missing leaves its section out.
        clusters: coarse clusters of all sources.
        curves: training loss by model.
        title: of the page.
        light: SVG text by plot, where the light drawings are there already (`save_plots` writes them).
        leakage: test images that were found among the training images.
        dropped: whether the training was done without those.
        doubts: sentences on what may have gone wrong without an error.
        validation: figures of the models while they trained.
        drifts: how what arrived differs from what its source was clustered by.
    """
    table, cells = rows(comparison(results)), comparison_cells(results)
    tasks = task_figures(results)
    costs = results.costs
    seconds = [costs[role.name].seconds for role in (ENSEMBLE, SEED) if role.name in costs]
    return render(
        "page.html",
        title=title,
        verdict=[*verdict(results), *doubts],
        tiles=_tiles(table),
        heads=["model", *cells.columns],
        comparison=[(row, cells.loc[row.model].items()) for row in table],
        highest=max((row.zeroshot for row in table if not isnan(row.zeroshot)), default=1.0),
        seconds=None if None in seconds or len(seconds) < 2 else seconds,
        clusters=clusters,
        map=draw_map(clusters),
        pictures=_pictures(results, clusters, curves, light, validation),
        gains=[f"gains-{role.name}" for role in baselines()],
        folded=len(results.zeroshot.tasks) > 12,
        models=list(tasks.columns),
        tasks=[
            (label, figures.tolist(), best, _bands(results, task))
            for (task, label), figures, best in zip(tasks.index, tasks.to_numpy(), tasks.max(axis=1), strict=True)
        ],
        routed=bool(results.routing),
        leakage=leakage,
        dropped=dropped,
        drifts=drifts,
        drift_rows=drift_rows(drifts),
        provenance=results.provenance,
    )


def _tiles(table: Sequence[Row]) -> list[Row]:
    """The few figures to see first: the ensembles, and what they are held against."""
    ensembles = [role for role in reversed(roles.ROLES) if not role.trained]
    models = [role.name for role in (*ensembles, *baselines())]
    there = {row.model: row for row in table if not isnan(row.zeroshot)}
    return [there[model] for model in models if model in there]


def _bands(results: Results, task: str) -> list[tuple[str, float, str]]:
    """(expert, weight, colour) of a task, for one bar of coloured bands."""
    weights = results.routing.get(task, {})
    return [
        (expert, weight, series_colour(position))
        for position, expert in enumerate(results.experts)
        if (weight := weights.get(expert)) is not None
    ]


def _pictures(
    results: Results,
    clusters: Sequence[Cluster],
    curves: Curves | None,
    light: Mapping[str, str] | None,
    validation: Validation | None,
) -> dict[str, tuple[str, str, str, str]]:
    """Title, text, and the addresses of a light and a dark drawing, by plot."""

    def draw(dark: bool) -> dict[str, str]:
        with theme(dark):
            plots = all_plots(results, clusters, curves, validation)
            return {name: svg(plot) for name, plot in plots.items() if name != "clusters"}  # the page has them as text

    day, night = draw(dark=False) if light is None else light, draw(dark=True)
    titles = FIGURES | {
        f"gains-{role.name}": (f"Ensemble against {role.name}", f"Difference in accuracy, task by task. {role.note}")
        for role in baselines()
    }
    return {name: (*titles[name], data_url(day[name]), data_url(night[name])) for name in night}
