"""The run as one self-contained HTML page: no script, font, style or image from anywhere else.

It follows the reader's light or dark setting: styles by custom properties, plots drawn once for each.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from mode.reporting.cluster_map import draw_map
from mode.reporting.plots import Curves, all_plots, series_colour, svg, theme
from mode.reporting.summary import (
    Cluster,
    Row,
    costs_of,
    duration,
    experts_of,
    percent,
    routing,
    rows,
    times,
    verdict,
    zeroshot_tasks,
)
from mode.reporting.tables import columns, task_lines

#: Title, what it shows, by plot; the page's order.
FIGURES = {
    "accuracy": ("Accuracy", "Mean zero-shot accuracy of every model."),
    "cost": (
        "Cost against accuracy",
        "What the training took, from nothing, and what it brought; small points are the experts by themselves.",
    ),
    "routing": (
        "Routing",
        "Weight of each expert for each task, from the words of the task's classes alone; rows add up to 1.",
    ),
    "clusters": ("Clusters", "Pairs assigned to each coarse cluster, and the words that tell it from the others."),
    "gains-dense": ("Ensemble against dense", "Difference in accuracy, task by task."),
    "gains-dense-long": (
        "Ensemble against dense-long",
        "The same against the dense model that saw as many samples as seed and experts together.",
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
}


def render_page(
    metrics: Mapping[str, Any],
    clusters: Sequence[Cluster] = (),
    curves: Curves | None = None,
    title: str = "Mixture of Data Experts",
    light: Mapping[str, str] | None = None,
) -> str:
    """The whole page as HTML.

    Args:
        metrics: content of `metrics.json`; a part that is missing leaves its section out.
        clusters: coarse clusters of all sources.
        curves: training loss by model.
        title: of the page.
        light: SVG text by plot, where the light drawings are there already (`save_plots` writes them).
    """
    pictures = _pictures(metrics, clusters, curves, light)
    sections = [
        _section("comparison", "Comparison", _comparison(metrics)) if rows(metrics) else "",
        _pair(pictures, "accuracy", "cost"),
        _section("clusters", "Clusters", _clusters(clusters)) if clusters else "",
        _section("map", "Map of the fine clusters", _map(clusters)) if draw_map(clusters) else "",
        _figure(pictures, "routing", tall=True),
        _pair(pictures, "gains-dense", "gains-dense-long", folded=len(zeroshot_tasks(metrics)) > 12),
        _section("tasks", "Task by task", _tasks(metrics)) if task_lines(metrics) else "",
        _pair(pictures, "growth", "training"),
        _section("provenance", "Provenance", _provenance(metrics)) if metrics.get("provenance") else "",
    ]
    said = " ".join(f"<p>{escape(sentence)}</p>" for sentence in verdict(metrics))
    return Template(_part("html")).substitute(
        title=escape(title),
        style=_part("css"),
        script=_part("js"),
        verdict=f'<div class="verdict">{said}</div>' if said else "",
        tiles=_tiles(metrics),
        sections="\n".join(section for section in sections if section),
    )


def _part(kind: str) -> str:
    """Frame, style and script lie beside this file."""
    return Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8")


def _tiles(metrics: Mapping[str, Any]) -> str:
    """The few figures to see first."""
    table = {row.model: row for row in rows(metrics)}
    tiles = []
    for model in ("ensemble", "uniform", "dense", "dense-long"):
        row = table.get(model)
        if row is not None and row.zeroshot is not None:
            note = f"{times(row.multiple)} training cost" if row.multiple is not None else "zero-shot"
            tiles.append(
                f'<div class="tile {row.kind}"><span>{escape(model)}</span>'
                f"<b>{percent(row.zeroshot)}<i>%</i></b><small>{note}</small></div>"
            )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _comparison(metrics: Mapping[str, Any]) -> str:
    heads, cells, table = columns(metrics)
    highest = max((row.zeroshot for row in table if row.zeroshot is not None), default=1.0) or 1.0
    lines = []
    for row, line in zip(table, cells, strict=True):
        rest = "".join(_cell(head, text, row, highest) for head, text in zip(heads[1:], line[1:], strict=True))
        lines.append(f'<tr class="{row.kind}"><th scope="row"><i class="dot"></i>{escape(row.model)}</th>{rest}</tr>')
    seed, seconds = costs_of(metrics).get("seed"), costs_of(metrics).get("ensemble")
    notes = [
        "Best figures in bold (the experts' mean is no model).",
        "Cost is that of the whole training, from nothing: an expert's and a dense model's include the seed's;"
        " the ensemble's is the seed's and every expert's part after it.",
        "Multiples are of the dense model's floating-point operations.",
    ]
    if seed and seconds and seed.seconds is not None and seconds.seconds is not None:
        notes.append(f"Of the ensemble's {duration(seconds.seconds)}, {duration(seed.seconds)} were the seed.")
    body = "".join(lines)
    return f'{_table(heads, body, "comparison")}<p class="note">{escape(" ".join(notes))}</p>'


def _cell(head: str, text: str, row: Row, highest: float) -> str:
    winner = text.startswith("*")
    shown = f"<b>{escape(text[1:])}</b>" if winner else escape(text)
    if head.startswith("zero-shot") and row.zeroshot is not None:
        width = 100 * row.zeroshot / highest
        return f'<td class="bar"><span style="--w:{width:.1f}%">{shown}</span></td>'
    return f"<td>{shown}</td>"


def _tasks(metrics: Mapping[str, Any]) -> str:
    models = [row.model for row in rows(metrics) if row.kind != "experts"]
    lines_of = task_lines(metrics)
    weights = routing(metrics)
    experts = experts_of(metrics)
    lines = []
    for name, figures in lines_of:
        highest = max(figures.values(), default=None)
        cells = "".join(
            f"<td><b>{percent(value)}</b></td>"
            if value is not None and value == highest
            else f"<td>{percent(value)}</td>"
            for value in (figures.get(model) for model in models)
        )
        given = weights.get(name) or weights.get(name.partition(",")[0], {})
        if weights:
            cells += f'<td class="share">{_share_bar(given, experts)}</td>'
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    heads = ["task", *models, *(["routing"] if weights else [])]
    note = "Percent; the best of a task in bold. Select a head to sort."
    if weights:
        note += " Routing: one band per expert, in the colours of the clusters above."
    return f'<p class="note">{note}</p>{_table(heads, "".join(lines), "tasks sortable")}'


def _share_bar(weights: Mapping[str, float], experts: Sequence[str]) -> str:
    """Routing weights as one bar of coloured bands; the numbers are in its tooltip."""
    if not weights:
        return "–"
    named = ", ".join(f"{expert} {weights[expert]:.2f}" for expert in experts if expert in weights)
    bands = "".join(
        f'<i style="flex:{weights[expert]:.4f};background:{series_colour(position)}"></i>'
        for position, expert in enumerate(experts)
        if weights.get(expert, 0.0) > 0
    )
    return f'<span class="bands" role="img" aria-label="{escape(named)}" title="{escape(named)}">{bands}</span>'


def _clusters(clusters: Sequence[Cluster]) -> str:
    largest = max((cluster.size for cluster in clusters), default=1) or 1
    total = sum(cluster.size for cluster in clusters) or 1
    cards = []
    for position, cluster in enumerate(clusters):
        words = "".join(f"<li>{escape(word)}</li>" for word in cluster.words) or "<li>(no words)</li>"
        where = f"{cluster.source}, cluster {cluster.number}"
        cards.append(
            f'<article style="--c:{series_colour(position)}"><h3>{escape(cluster.name)}</h3>'
            f"<p>{cluster.size:,} pairs, {cluster.size / total:.0%} <small>{escape(where)}</small></p>"
            f'<div class="size"><i style="width:{100 * cluster.size / largest:.1f}%"></i></div>'
            f'<ul class="words">{words}</ul>{_samples(cluster)}</article>'
        )
    return f'<p class="note">{escape(FIGURES["clusters"][1])}</p><div class="cards">{"".join(cards)}</div>'


def _samples(cluster: Cluster) -> str:
    """Some training images of a cluster."""
    pictures = "".join(
        f'<img src="data:image/{_kind(image)};base64,{base64.b64encode(image).decode()}" alt="" loading="lazy">'
        for image in cluster.images
    )
    named = escape(f"training images of {cluster.name}")
    return f'<div class="samples" role="img" aria-label="{named}">{pictures}</div>' if pictures else ""


def _kind(image: bytes) -> str:
    return "png" if image.startswith(b"\x89PNG") else "jpeg"


def _map(clusters: Sequence[Cluster]) -> str:
    legend = "".join(
        f'<li><i style="background:{series_colour(position)}"></i>{escape(cluster.name)}</li>'
        for position, cluster in enumerate(clusters)
    )
    note = (
        "A point is a fine cluster, its area the captions in it; point at one to read its words."
        " Near is alike (t-SNE of the centres); far says little."
    )
    return f'<p class="note">{note}</p><ul class="legend">{legend}</ul>{draw_map(clusters)}'


def _provenance(metrics: Mapping[str, Any]) -> str:
    return f"<dl>{_entries(metrics['provenance'])}</dl>"


def _entries(content: Mapping[str, Any], prefix: str = "") -> str:
    lines = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            lines.append(_entries(value, f"{prefix}{key}."))
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            lines.append(f"<dt>{escape(prefix + str(key))}</dt><dd>{escape(text)}</dd>")
    return "".join(lines)


def _table(heads: Sequence[str], body: str, kind: str) -> str:
    cells = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    head = f"<thead><tr>{cells}</tr></thead>"
    return f'<div class="scroll" tabindex="0"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def _section(name: str, head: str, content: str) -> str:
    return f'<section id="{name}"><h2>{escape(head)}</h2>{content}</section>'


def _figure(pictures: Mapping[str, str], name: str, tall: bool = False) -> str:
    if name not in pictures:
        return ""
    head, text = FIGURES[name]
    kind = "scroll tall" if tall else "plot"
    return _section(name, head, f'<p class="note">{escape(text)}</p><div class="{kind}">{pictures[name]}</div>')


def _pair(pictures: Mapping[str, str], *names: str, folded: bool = False) -> str:
    """Plots beside each other where there is room; `folded`: opened by the reader, for they are long."""
    there = [_figure(pictures, name) for name in names if name in pictures]
    if not there:
        return ""
    both = f'<div class="pair">{"".join(there)}</div>'
    return (
        f"<details><summary>Where the ensemble wins and loses, task by task</summary>{both}</details>"
        if folded
        else both
    )


def _pictures(
    metrics: Mapping[str, Any], clusters: Sequence[Cluster], curves: Curves | None, light: Mapping[str, str] | None
) -> dict[str, str]:
    """`<picture>` elements by plot, each with a light and a dark drawing."""

    def draw(dark: bool) -> dict[str, str]:
        with theme(dark):
            plots = all_plots(metrics, clusters, curves)
            return {name: svg(plot) for name, plot in plots.items() if name != "clusters"}  # the page has them as text

    day, night = draw(dark=False) if light is None else light, draw(dark=True)
    return {
        name: (
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data_url(night[name])}">'
            f'<img src="{_data_url(day[name])}" alt="{escape(FIGURES[name][0])}: {escape(FIGURES[name][1])}"></picture>'
        )
        for name in night
    }


def _data_url(text: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"
