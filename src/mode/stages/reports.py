"""Plots, the page, the model card, and what goes to MLflow."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mode.errors import ModeError
from mode.paths import CURVE, VALIDATION
from mode.roles import ENSEMBLE
from mode.stages.project import Project, cards_of, counted, trained_models, write_text

if TYPE_CHECKING:
    from mode.clustering.drift import Drift
    from mode.reporting.summary import Cluster
    from mode.results import Results

#: Training images of each cluster on the page.
SAMPLE_IMAGES = 12


def report(project: Project) -> None:
    """Plots and the page; in MLflow each model's figures, the plots as artifacts, and the ensemble as a model."""
    from mode.data.leakage import Leakage
    from mode.reporting.card import model_card
    from mode.reporting.page import render_page
    from mode.reporting.plots import save_plots, write_plot_data
    from mode.reporting.summary import doubts
    from mode.results import Results

    results = Results.load(project.metrics)
    results.provenance |= _lock_hash(project)
    clusters, curves, validation = _reported_clusters(project), _curves(project), _validation(project)
    drawn = [
        path for path in save_plots(project.figures, results, clusters, curves, validation) if path.suffix == ".svg"
    ]
    light = {path.stem: path.read_text(encoding="utf-8") for path in drawn}
    write_plot_data(project.plots, results, curves)
    drifted = drifts(project)
    leakage, dropped = Leakage.load(project.leakage), project.params.index.drop_leaked
    doubtful = doubts(cards_of(project.models, trained_models(project)))
    html = render_page(
        results,
        clusters,
        curves,
        light=light,
        leakage=leakage,
        dropped=dropped,
        doubts=doubtful,
        validation=validation,
        drifts=drifted,
    )
    write_text(project.page, html)
    parameters = project.params.model_dump(include={"seed", "model", "training", "embedding", "clustering", "routing"})
    roots = dict.fromkeys(cluster.source for cluster in clusters)
    sources = [each for root in roots for each in (root, *project.params.continuations_of(root))]
    facts = {source: _facts(project, source) for source in sources}
    write_text(project.model_card, model_card(results, clusters, facts, parameters))
    _record(project, results, [project.figures, project.page, project.model_card], drifted)
    print(f"wrote {project.page.relative_to(project.root)}")


def drifts(project: Project) -> list[Drift]:
    """How each arrival that is assigned differs from the source that it continues; nothing where nothing arrived.

    Raises:
        ModeError: an assignment is damaged, or that of the source that is continued is missing.
    """
    from mode.clustering.assignment import Assignment
    from mode.clustering.drift import Counts, drift

    params, found = project.params, []
    for root in params.sources:
        there = [each for each in params.continuations_of(root) if project.assignment(each).is_file()]
        if not there:
            continue
        old, *new = (
            Counts.of(Assignment.blocks(project.assignment(source)), params.coarse_of(root))
            for source in (root, *there)
        )
        found += [drift(source, counts, root, old) for source, counts in zip(there, new, strict=True)]
    return found


def _facts(project: Project, source: str) -> dict[str, Any]:
    """What the model card says of a source."""
    report = counted(project, source)
    if report is None:
        raise ModeError(f"{project.index(source)}: not an index", "`dvc repro index` makes those of all sources")
    shards = project.source(source).shards
    if isinstance(shards, dict):
        shards = ", ".join(f"{each} ({factor:g} times)" for each, factor in shards.items())
    return {"shards": shards, **report._asdict()}


def _lock_hash(project: Project) -> dict[str, str]:
    """What DVC recorded of everything up to the ensemble, as one hash: equal hashes are equal inputs and results."""
    import yaml

    path = project.dvc_lock
    stages = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("stages", {}) if path.is_file() else {}
    upstream = {name: stage for name, stage in stages.items() if name not in ("evaluate", "report")}
    if not upstream:
        return {}
    return {"dvc_lock_sha256": hashlib.sha256(json.dumps(upstream, sort_keys=True).encode()).hexdigest()}


def _record(project: Project, results: Results, artifacts: list[Path], drifted: list[Drift]) -> None:
    """Tell MLflow how good every model is, and register the ensemble."""
    from mode.clip.folder import base_of
    from mode.ensemble.router import Router
    from mode.tracking.runs import Tracker

    tracker = Tracker(project.runs)
    trained = trained_models(project)
    runs = tracker.log_results(
        results,
        {name: card.get("mlflow_run") for name, card in cards_of(project.models, trained).items()},
        params=project.params.model_dump(include={"routing", "clustering", "embedding", "random_seed"}),
        artifacts=artifacts,
        more={f"drift/{each.source}/far_share": each.far_share for each in drifted},
    )
    needed = set(Router.load(project.ensemble).members(trained).values())
    needed |= {base.name for name in needed if (base := base_of(project.model(name)))}
    folders = {name: project.model(name) for name in sorted(needed)}
    tracker.register_ensemble(project.ensemble, folders, run_id=runs.get(ENSEMBLE.name))


def _reported_clusters(project: Project) -> list[Cluster]:
    """The coarse clusters of all sources that have an expert, with the map of their fine ones and sample images."""
    import numpy as np

    from mode.clustering.assignment import Assignment
    from mode.clustering.hierarchy import Clusters
    from mode.data.images import to_png
    from mode.ensemble.router import Router
    from mode.reporting.cluster_map import places
    from mode.reporting.summary import Cluster, FineCluster

    kept = Router.load(project.ensemble).images
    experts = {(params.source, params.cluster): name for name, params in project.params.members.items()}
    sources = dict.fromkeys(source for source, _ in experts)
    loaded = {source: Clusters.load(project.clusters(source)) for source in sources}
    # One map for all sources: they are embedded alike.
    centres = np.concatenate([clusters.fine_centres for clusters in loaded.values()])
    where = iter(places(centres, project.params.random_seed))
    reported = []
    for source, clusters in loaded.items():
        sizes = np.zeros(len(clusters.coarse_words), np.int64)
        for each in (source, *project.params.continuations_of(source)):
            for coarse in Assignment.coarse_blocks(project.assignment(each)):
                sizes += np.bincount(coarse, minlength=len(sizes))
        fine: list[list[FineCluster]] = [[] for _ in clusters.coarse_words]
        for owner, size, words in zip(clusters.coarse_of_fine, clusters.fine_sizes, clusters.fine_words, strict=True):
            x, y = next(where)
            fine[owner].append(FineCluster(float(x), float(y), int(size), list(words)))
        for number, words in enumerate(clusters.coarse_words):
            expert = experts.get((source, number))
            images = [to_png(pixels) for pixels in kept.get(expert or "", [])[:SAMPLE_IMAGES]]
            reported.append(Cluster(source, number, int(sizes[number]), list(words), expert, fine[number], images))
    return reported


def _curves(project: Project) -> dict[str, list[tuple[float, float]]]:
    """Training loss of every model that is there: name -> (samples, loss)."""
    curves = {}
    for name in trained_models(project):
        path = project.model(name) / CURVE
        lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []
        curves[name] = [(float(samples), float(loss)) for samples, _, loss in (line.partition(",") for line in lines)]
    return curves


def _validation(project: Project) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Figures of models while they trained: `loss` and `accuracy` (mean of the tasks) -> name -> (samples, figure)."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {"loss": {}, "accuracy": {}}
    for name in trained_models(project):
        path = project.model(name) / VALIDATION
        looks = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []
        for look in looks:
            samples = float(look["samples"])
            scores = [float(value) for head, value in look.items() if head.startswith("zeroshot/") and value]
            if look.get("loss"):
                found["loss"].setdefault(name, []).append((samples, float(look["loss"])))
            if scores:
                found["accuracy"].setdefault(name, []).append((samples, fmean(scores)))
    return found
