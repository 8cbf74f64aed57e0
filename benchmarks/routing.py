"""Compare routing rules on finished projects. Nothing is trained.

    python benchmarks/routing.py PROJECT... [--out reports/routing.json]

A project is a folder in which `dvc repro` has finished with `training.held_out` above 0 (params.yaml): that many images
were kept out of every training. Projects with the same tasks are seeds of one experiment: a row is a mean ± standard
deviation over them.

Three kinds of figures are printed for every rule, all in percent:

- on the test tasks: zero-shot accuracy, recall@1 and recall@10;
- `held-out tasks`: accuracy on small tasks made of held-out training pairs, with no test image, label or class name: a
  random held-out caption and the 15 nearest to it (by the caption embedder), each with its image: whose is which?
- `held-out retrieval`: mean of recall@1 both ways among all held-out pairs.

The rule by which the default is chosen looks at the last two alone, see docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from mode.clip.encode import encode_prompts, encode_texts
from mode.clip.model import Clip, load_model
from mode.clip.preprocess import Preprocess
from mode.data.loading.selection import held_out_images
from mode.data.loading.store import ImageStore
from mode.data.shards.index import PairIndex
from mode.ensemble.router import Router, class_vectors
from mode.ensemble.rules import (
    Nearest,
    calibrate_temperature,
    class_distances,
    paper_weights,
    partial_captions,
    published_weights,
)
from mode.evaluation import metrics
from mode.evaluation.features import encode_tasks
from mode.evaluation.tasks import open_tasks
from mode.params import Params, load_params

#: Held-out tasks: how many, and captions in each.
TASKS, CHOICES = 400, 16
#: Models that are no experts, and stand in the table for comparison.
OTHERS = ("seed", "dense", "dense-long")
BATCH = 256

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Problem:
    """Images, texts, and what every model says of them.

    Attributes:
        scores: model -> cosines float32 [images, texts].
        vectors: of the texts (or classes), by the caption embedder, [texts, d]; zero where it knows no word.
        nearest: distances of the texts to the experts.
        owners: [texts], the image that a text belongs to, for retrieval; or
        labels: [images], the text (class) that is right.
    """

    scores: Mapping[str, Array]
    vectors: Array
    nearest: Nearest
    owners: NDArray[np.int64] | None = None
    labels: NDArray[np.int64] | None = None

    @property
    def known(self) -> NDArray[np.bool_]:
        """Texts that the embedder knows a word of."""
        return np.asarray(self.vectors.any(axis=1))


@dataclass(frozen=True)
class Project:
    """A finished project: its tasks as problems, and its held-out pairs."""

    name: str
    router: Router
    tests: dict[str, Problem]
    held_out: Problem
    neighbourhoods: list[Problem]
    partial: tuple[Nearest, NDArray[np.int64]]
    scales: dict[str, float]
    own_scales: dict[str, float]
    pair_temperature: float


Weights = Callable[[Project, Problem], Array]


@dataclass(frozen=True)
class Rule:
    """How experts' scores become the ensemble's.

    Attributes:
        weights: -> [experts], for the task as a whole, or [texts, experts].
        scores: `cosine`; `z`: standardised per query over the candidates; `scaled`: times a factor per expert that
            makes its softmax most likely on held-out pairs; `mixed`: the softmax of that: probabilities are averaged;
            `own`: likewise, with the factor that the expert learnt in training.
        by_query: weights of each query's own: a text's; for an image those of the texts that it seems to show, p(expert
            | image) = sum over texts of p(text | image) p(expert | text), the former as the task as a whole has it.
    """

    weights: Weights
    scores: str = "cosine"
    by_query: bool = False


def posterior(problem: Problem, temperature: float) -> Array:
    """p(expert | text), [texts, experts]; uniform where the embedder knows no word."""
    found: Array = softmax(-(problem.nearest.distances**2) / temperature, axis=1)
    found[~problem.known] = 1 / found.shape[1]
    return found


def whole(weigh: Callable[[Project, Problem], Array]) -> Weights:
    """The mean of a rule's weights over the texts that say anything."""

    def weights(project: Project, problem: Problem) -> Array:
        rows = weigh(project, problem)[problem.known]
        return rows.mean(axis=0) if len(rows) else np.full(rows.shape[1], 1 / rows.shape[1])

    return weights


def calibrated(project: Project, problem: Problem) -> Array:
    """Per text, with the temperature of the project's router: from training captions with half their words."""
    return posterior(problem, temperature_of(project))


def temperature_of(project: Project) -> float:
    """As `Router.fit` sets it, from captions of all pairs."""
    assert project.router.temperature is not None, "the project's routing.kind must be calibrated"
    return project.router.temperature


def by_held_out_captions(project: Project, problem: Problem) -> Array:
    """Per text, with the temperature from held-out captions alone."""
    nearest, assigned = project.partial
    return posterior(problem, calibrate_temperature(nearest.distances, assigned))


def by_pairs(project: Project, problem: Problem) -> Array:
    """Per text, with the temperature that makes held-out pairs most likely."""
    return posterior(problem, project.pair_temperature)


def share(_: Project, problem: Problem) -> Array:
    """Per text, all weight on the nearest expert: the mean is the share of the texts that are nearest to it."""
    return posterior(problem, 1e-9)


def half(project: Project, problem: Problem) -> Array:
    """Between the two."""
    return (calibrated(project, problem) + share(project, problem)) / 2


def squared(project: Project, problem: Problem) -> Array:
    """The task's calibrated weights, squared: sharper."""
    weights = np.square(whole(calibrated)(project, problem))
    return np.asarray(weights / weights.sum())


def top(project: Project, problem: Problem) -> Array:
    """The expert with the largest calibrated weight, alone."""
    weights = whole(calibrated)(project, problem)
    return np.asarray(np.arange(len(weights)) == weights.argmax(), dtype=float)


def uniform(_: Project, problem: Problem) -> Array:
    """The control."""
    experts = len(problem.nearest.experts)
    return np.full(experts, 1 / experts)


def published(divisor: float) -> Weights:
    """The published code's."""

    def weights(_: Project, problem: Problem) -> Array:
        nearest = Nearest(problem.nearest.experts, problem.nearest.distances[problem.known])
        return np.array(list(published_weights(nearest, divisor).values()))

    return weights


def paper(bandwidth: float) -> Weights:
    """The paper's text."""

    def weights(project: Project, problem: Problem) -> Array:
        found = paper_weights(problem.vectors[problem.known], project.router.conditions, bandwidth)
        return np.array(list(found.values()))

    return weights


RULES: dict[str, Rule] = {
    "uniform": Rule(uniform),
    "published, divisor 8": Rule(published(8)),
    "published, divisor 1": Rule(published(1)),
    "paper, bandwidth 1": Rule(paper(1)),
    "paper, bandwidth 0.1": Rule(paper(0.1)),
    "calibrated": Rule(whole(calibrated)),
    "calibrated, temperature from held-out captions": Rule(whole(by_held_out_captions)),
    "calibrated, temperature from held-out pairs": Rule(whole(by_pairs)),
    "share of texts": Rule(whole(share)),
    "calibrated and share, half each": Rule(whole(half)),
    "calibrated, squared": Rule(squared),
    "calibrated, best expert only": Rule(top),
    "uniform, standardised scores": Rule(uniform, "z"),
    "calibrated, standardised scores": Rule(whole(calibrated), "z"),
    "share, standardised scores": Rule(whole(share), "z"),
    "calibrated, scores calibrated on pairs": Rule(whole(calibrated), "scaled"),
    "calibrated, mean of calibrated probabilities": Rule(whole(calibrated), "mixed"),
    "calibrated, mean of the experts' probabilities": Rule(whole(calibrated), "own"),
    "calibrated per text": Rule(calibrated),
    "calibrated per text, standardised scores": Rule(calibrated, "z"),
    "calibrated per text, scores calibrated on pairs": Rule(calibrated, "scaled"),
    "calibrated per text, mean of calibrated probabilities": Rule(calibrated, "mixed"),
    "calibrated by query": Rule(calibrated, by_query=True),
    "calibrated by query, standardised scores": Rule(calibrated, "z", by_query=True),
    "calibrated by query, mean of calibrated probabilities": Rule(calibrated, "mixed", by_query=True),
    "calibrated by query, mean of the experts' probabilities": Rule(calibrated, "own", by_query=True),
    "share by query": Rule(share, by_query=True),
    "nearest expert per text": Rule(share),
    "nearest expert per text, standardised scores": Rule(share, "z"),
}


def total(rule: Rule, project: Project, problem: Problem, by_text: bool = False) -> Array:
    """The ensemble's scores.

    Args:
        by_text: a text is the query: rows are texts, columns images. Else rows are images, columns texts.
    """
    weights = rule.weights(project, problem)
    if rule.by_query and not by_text:
        factor = statistics.fmean(project.own_scales.values())
        weights = softmax(factor * total(Rule(whole(rule.weights)), project, problem), axis=1) @ weights
    of_rows = by_text or rule.by_query
    result = np.zeros(0)
    for number, expert in enumerate(problem.nearest.experts):
        scores = problem.scores[expert].T if by_text else problem.scores[expert]
        if rule.scores == "z":
            scores = (scores - scores.mean(axis=1, keepdims=True)) / (scores.std(axis=1, keepdims=True) + 1e-9)
        elif rule.scores != "cosine":
            scores = scores * (project.own_scales if rule.scores == "own" else project.scales)[expert]
        if rule.scores in ("mixed", "own"):
            scores = softmax(scores, axis=1)
        weight = weights[..., number]
        term = scores * (weight[:, None] if of_rows and weight.ndim else weight)
        result = result + term if result.ndim > 1 else term
    return result


def figures(problem: Problem, scores: Callable[[bool], Array], wanted: str = "all") -> dict[str, float]:
    """Accuracy, or recall both ways.

    Args:
        scores: -> rows images, columns texts; with True the other way round.
        wanted: `all`, or `recall@1`: the mean of both ways only.
    """
    if problem.labels is not None:
        return {"accuracy": metrics.accuracy(metrics.ranks(scores(False), problem.labels))}
    assert problem.owners is not None
    image = metrics.ranks(scores(True), problem.owners)
    text = metrics.best_ranks(scores(False), problem.owners)
    if wanted == "recall@1":
        return {"recall@1": (metrics.accuracy(image) + metrics.accuracy(text)) / 2}
    found: dict[str, float] = {}
    for k in (1, 10):
        found |= {f"image recall@{k}": metrics.accuracy(image, k), f"text recall@{k}": metrics.accuracy(text, k)}
    return found


def all_figures(project: Project, scores: Callable[[Problem, bool], Array]) -> dict[str, float]:
    """One row of the table."""
    row: dict[str, float] = {}
    accuracies = {}
    for task, problem in project.tests.items():
        for name, value in figures(problem, partial(scores, problem)).items():
            if name == "accuracy":
                accuracies[task] = value
            else:
                row[f"{task} {name}"] = value
    if accuracies:
        row = {"zero-shot": statistics.fmean(accuracies.values())} | row
    if len(accuracies) <= 6:
        row |= accuracies
    found = [figures(problem, partial(scores, problem))["accuracy"] for problem in project.neighbourhoods]
    row["held-out tasks"] = statistics.fmean(found)
    row["held-out retrieval"] = figures(project.held_out, partial(scores, project.held_out), "recall@1")["recall@1"]
    return row


def compare(project: Project) -> dict[str, dict[str, float]]:
    """Rule or model -> its figures."""
    rows = {}
    for name in OTHERS:
        if name in project.held_out.scores:
            rows[name] = all_figures(project, partial(_alone, name))
    experts = [all_figures(project, partial(_alone, name)) for name in project.router.experts]
    rows["an expert alone, mean"] = {key: statistics.fmean(row[key] for row in experts) for key in experts[0]}
    rows["best expert per task, by the test labels"] = _best_by_label(project, experts)
    for name, rule in RULES.items():
        rows[name] = all_figures(project, partial(total, rule, project))
        print(f"  {name}", file=sys.stderr)
    return rows


def _alone(name: str, problem: Problem, by_text: bool) -> Array:
    """What one model says."""
    scores = problem.scores[name]
    return scores.T if by_text else scores


def _best_by_label(project: Project, experts: list[dict[str, float]]) -> dict[str, float]:
    """What the best expert of each task would reach, chosen with the test labels; no rule that could be used."""
    best = []
    for problem in project.tests.values():
        if problem.labels is not None:
            ranks = [metrics.ranks(problem.scores[name], problem.labels) for name in project.router.experts]
            best.append(max(metrics.accuracy(found) for found in ranks))
    row = {key: max(expert[key] for expert in experts) for key in experts[0] if not key.startswith("held-out")}
    return row | ({"zero-shot": statistics.fmean(best)} if best else {})


def open_project(root: Path) -> Project:
    """Encode all that is needed, once."""
    params = load_params(root / "params.yaml")
    router = Router.load(root / "models" / "ensemble")
    names = [*OTHERS, *router.experts]
    clips = {
        name: load_model(root / "models" / name) for name in names if (root / "models" / name / "card.json").is_file()
    }
    for clip in clips.values():
        clip.model.eval()
    tests = _tests(root, router, clips)
    held_out, vectors_of_images = _held_out(root, params, router, clips)
    neighbourhoods = _neighbourhoods(held_out, vectors_of_images, params.random_seed)
    captions = _held_out_captions(root, params)[1]
    parts = router.embedder.encode(partial_captions(captions, params.random_seed))
    useful = parts.any(axis=1) & held_out.known
    assigned = held_out.nearest.distances[useful].argmin(axis=1)
    project = Project(
        name=str(root),
        router=router,
        tests=tests,
        held_out=held_out,
        neighbourhoods=neighbourhoods,
        partial=(class_distances(parts[useful], router.conditions), assigned),
        scales={name: _scale([(p.scores[name], p.labels) for p in neighbourhoods]) for name in router.experts},
        own_scales={name: clips[name].model.logit_scale.exp().item() for name in router.experts},
        pair_temperature=1.0,
    )
    return Project(**{**vars(project), "pair_temperature": _pair_temperature(project)})


def _tests(root: Path, router: Router, clips: Mapping[str, Clip]) -> dict[str, Problem]:
    where = json.loads((root / "data" / "tasks" / "tasks.json").read_text(encoding="utf-8"))
    tasks = open_tasks([root / task for task in where])
    problems = {}
    for task, images in encode_tasks(tasks, clips, batch_size=BATCH, workers=1, device="cpu"):
        columns = {
            name: encode_prompts(clip, task.prompts, batch_size=BATCH, device="cpu") for name, clip in clips.items()
        }
        vectors = class_vectors(router.embedder, task.prompts)
        problems[task.name] = Problem(
            {name: (images[name] @ columns[name].T).numpy() for name in clips},
            vectors,
            class_distances(vectors, router.conditions),
            owners=task.owners if task.kind == "retrieval" else None,
            labels=None if task.kind == "retrieval" else task.labels,
        )
    return problems


def _held_out_captions(root: Path, params: Params) -> tuple[NDArray[np.int64], list[str], NDArray[np.int64]]:
    """Rows of the held-out pairs, their captions, and their images numbered from 0."""
    index = PairIndex.load(root / "data" / "index" / params.training.source)
    count = params.training.held_out
    if not count:
        sys.exit(f"error: {root}: training.held_out is 0: nothing was held out to compare rules on")
    rows = np.flatnonzero(held_out_images(index.images, count, params.random_seed)[index.image])
    captions = index.captions(rows)
    distinct = np.unique(captions, return_index=True)[1]  # of captions that several images have, one image's
    rows = rows[np.sort(distinct)]
    return rows, index.captions(rows), np.unique(index.image[rows], return_inverse=True)[1]


def _held_out(
    root: Path, params: Params, router: Router, clips: Mapping[str, Clip]
) -> tuple[Problem, NDArray[np.int64]]:
    index = PairIndex.load(root / "data" / "index" / params.training.source)
    rows, captions, owners = _held_out_captions(root, params)
    first = rows[np.unique(owners, return_index=True)[1]]
    image = params.image.model_copy(update={"crop_scale": None})
    pixels, _ = ImageStore(index, root, image, cache_mb=0, rows=first).load(first)
    scores = {}
    for name, clip in clips.items():
        preprocess = Preprocess(clip)
        with torch.inference_mode():
            parts = [
                F.normalize(clip.model.encode_image(preprocess.normalise(b)), dim=-1)
                for b in torch.split(pixels, BATCH)
            ]
        texts = encode_texts(clip, captions, batch_size=BATCH, device="cpu", name=name)
        scores[name] = (torch.cat(parts) @ texts.T).numpy()
    vectors = router.embedder.encode(captions)
    return Problem(scores, vectors, class_distances(vectors, router.conditions), owners=owners), owners


def _neighbourhoods(held_out: Problem, owners: NDArray[np.int64], seed: int) -> list[Problem]:
    """Small tasks: a held-out caption and those next to it, one of each image."""
    random = np.random.default_rng(seed)
    anchors = random.permutation(np.flatnonzero(held_out.known))[:TASKS]
    tasks = []
    for anchor in anchors:
        order = np.argsort(-(held_out.vectors @ held_out.vectors[anchor]), kind="stable")
        order = order[np.sort(np.unique(owners[order], return_index=True)[1])]  # the nearest caption of each image
        columns = order[:CHOICES]
        tasks.append(
            Problem(
                {name: scores[np.ix_(owners[columns], columns)] for name, scores in held_out.scores.items()},
                held_out.vectors[columns],
                Nearest(held_out.nearest.experts, held_out.nearest.distances[columns]),
                labels=np.arange(len(columns)),
            )
        )
    return tasks


def _surprise(parts: list[tuple[Array, NDArray[np.int64]]], scale: float) -> float:
    """Mean negative log likelihood of the right columns under softmax(scale * scores)."""
    rows = [log_softmax(scale * scores, axis=1)[np.arange(len(labels)), labels] for scores, labels in parts]
    return -float(np.concatenate(rows).mean())


def _scale(parts: list[tuple[Array, NDArray[np.int64] | None]]) -> float:
    """The factor that makes the right columns most likely."""
    given = [(scores, labels) for scores, labels in parts if labels is not None]
    found = minimize_scalar(lambda x: _surprise(given, np.exp(x)), bounds=(0.0, 6.0), method="bounded")
    return float(np.exp(found.x))


def _pair_temperature(project: Project) -> float:
    """Of the routing: the one under which the ensemble makes held-out pairs most likely, at its best scale."""

    def surprise(temperature: float) -> float:
        rule = Rule(whole(lambda _, problem: posterior(problem, temperature)))
        parts = [(total(rule, project, problem), problem.labels) for problem in project.neighbourhoods]
        scale = _scale(parts)
        return _surprise([(scores, labels) for scores, labels in parts if labels is not None], scale)

    return float(min(temperature_of(project) * np.geomspace(1e-2, 1e2, 13), key=surprise))


def main() -> None:
    """Compare, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("projects", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="keep all figures there, as JSON")
    arguments = parser.parse_args()
    experiments: dict[tuple[str, ...], list[dict[str, dict[str, float]]]] = defaultdict(list)
    kept = {}
    for root in arguments.projects:
        print(root, file=sys.stderr)
        project = open_project(root)
        kept[str(root)] = compare(project)
        experiments[tuple(sorted(project.tests))].append(kept[str(root)])
    for runs in experiments.values():
        print(table(runs), end="\n\n")
    print(choice(list(experiments.values())))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def table(runs: list[dict[str, dict[str, float]]]) -> str:
    """Markdown: a row per rule, mean ± standard deviation over the runs."""
    columns = list(runs[0]["uniform"])
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name in runs[0]:
        cells = [spread([run[name][column] for run in runs if column in run[name]]) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, in percent."""
    if not values:
        return "–"
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def choice(experiments: list[list[dict[str, dict[str, float]]]]) -> str:
    """What the held-out pairs say: the mean over experiments of the mean over seeds, and the best rule by it."""
    lines = []
    for column in ("held-out tasks", "held-out retrieval"):
        mean = {
            rule: statistics.fmean(statistics.fmean(run[rule][column] for run in runs) for runs in experiments)
            for rule in RULES
        }
        best = max(mean, key=lambda rule: mean[rule])
        lines.append(f"{column}: {best} {100 * mean[best]:.2f}; calibrated {100 * mean['calibrated']:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
