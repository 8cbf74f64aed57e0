"""Compare routing rules on finished projects. Nothing is trained.

    python -m benchmarks.routing PROJECT... [--out reports/routing.json]

A project is a folder in which `dvc repro` has finished with `training.held_out` above 0 (params.yaml): that many images
were kept out of every training. Projects with the same tasks are seeds of one experiment: a row is a mean ± standard
deviation over them.

Three kinds of figures are printed for every rule, all in percent:

- on the test tasks: zero-shot accuracy, recall@1 and recall@10;
- `held-out tasks`: accuracy on small tasks made of held-out training pairs, with no test image, label or class name: a
  random held-out caption and the 15 nearest to it (by the caption embedder), each with its image: whose is which?
- `held-out retrieval`: mean of recall@1 both ways among all held-out pairs.

Held-out pairs are those of every source that an expert is of; where these are several, held-out tasks are also shown by
the source of their first caption: an expert that was added later has to be found for its own.

The rule by which the default is chosen looks at the last two alone, see docs/results.md.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from benchmarks.study import Row, Rows, compare_projects, mean_row, row_of
from mode.clip.encode import encode_prompts, encode_texts, unit_vectors
from mode.clip.model import Clip, load_model
from mode.clip.preprocess import Preprocess
from mode.data.loading.selection import is_held_out
from mode.data.loading.store import ImageStore
from mode.data.shards.index import PairIndex
from mode.ensemble import rules
from mode.ensemble.router import Router, class_vectors
from mode.evaluation import metrics
from mode.evaluation.features import encode_tasks
from mode.evaluation.tasks import Task
from mode.params import Params, load_params
from mode.stages.project import Project as Stages
from mode.stages.routing import evidence_of

#: Held-out tasks: how many, and captions in each.
TASKS, CHOICES = 400, 16
#: Models that are no experts, and stand in the table for comparison.
OTHERS = ("seed", "dense", "dense-long")
BATCH = 256
#: Of `own_prior`: many more than it takes.
EM_STEPS = 200

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Problem:
    """Images, texts, and what every model says of them.

    Attributes:
        scores: model -> cosines float32 [images, texts].
        vectors: of the texts (or classes), by the caption embedder, [texts, d]; zero where it knows no word.
        nearest: distances of the texts to the experts.
        prompts: of each text or class.
        owners: [texts], the image that a text belongs to, for retrieval; or
        labels: [images], the text (class) that is right.
        source: of a small task, that of its first caption.
    """

    scores: Mapping[str, Array]
    vectors: Array
    nearest: rules.Nearest
    prompts: Sequence[Sequence[str]]
    owners: NDArray[np.int64] | None = None
    labels: NDArray[np.int64] | None = None
    source: str = ""

    @property
    def known(self) -> NDArray[np.bool_]:
        """Texts that the embedder knows a word of."""
        return np.asarray(self.vectors.any(axis=1))

    def among(self, texts: NDArray[np.generic]) -> rules.Nearest:
        """Distances of some of the texts."""
        return self.nearest._replace(distances=self.nearest.distances[texts])


@dataclass(frozen=True)
class Project:
    """A finished project: its tasks as problems, and its held-out pairs.

    Attributes:
        router: by the calibrated rule.
        by_evidence: that of the same experts by the rule `evidence`.
        tests: by task.
        held_out: retrieval among all held-out pairs.
        neighbourhoods: small tasks of held-out pairs.
        temperatures: of the posterior, by how they were found: by the `router`, from training captions with half their
            words; from held-out `captions` alone; from held-out `pairs`, as the one that makes them most likely.
        scales: of each expert's scores, that which makes held-out pairs most likely ...
        own_scales: ... and that which it learnt in training.
    """

    router: Router
    by_evidence: Router
    tests: dict[str, Problem]
    held_out: Problem
    neighbourhoods: list[Problem]
    temperatures: dict[str, float]
    scales: dict[str, float]
    own_scales: dict[str, float]


Weights = Callable[[Project, Problem], Array]
#: Scores of a problem: rows are images, columns texts; with True the other way round.
Scoring = Callable[[Problem, bool], Array]


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
    found: Array = rules.posteriors(problem.nearest, temperature)
    found[~problem.known] = 1 / found.shape[1]
    return found


def whole(weigh: Weights) -> Weights:
    """The mean of a rule's weights over the texts that say anything."""

    def weights(project: Project, problem: Problem) -> Array:
        rows = weigh(project, problem)[problem.known]
        return rows.mean(axis=0) if len(rows) else np.full(rows.shape[1], 1 / rows.shape[1])

    return weights


def own_prior(weigh: Weights) -> Weights:
    """The task's weights by maximum likelihood: those of which its texts' posteriors are a mixture.

    A text that several experts could mean goes where the others go: a posterior under equal priors is corrected for the
    priors of this task, which are estimated from it by expectation maximisation (Saerens et al., Neural Computation
    2002). One text's worth of equal weights is added, or a single text would decide for a single expert.
    """

    def weights(project: Project, problem: Problem) -> Array:
        rows = weigh(project, problem)[problem.known]
        prior = np.full(rows.shape[1], 1 / rows.shape[1])
        found = prior
        for _ in range(EM_STEPS if len(rows) else 0):
            mine = rows * found
            found = ((mine / mine.sum(axis=1, keepdims=True)).sum(axis=0) + prior) / (len(rows) + 1)
        return np.asarray(found)

    return weights


def at(temperature: str) -> Weights:
    """Per text, the posterior with one of the project's temperatures."""
    return lambda project, problem: posterior(problem, project.temperatures[temperature])


calibrated = at("router")


def evidence(project: Project, problem: Problem) -> Array:
    """Per text, the posterior by the experts' training captions; uniform where nothing is known of it."""
    assert project.by_evidence.evidence is not None
    found, known = project.by_evidence.evidence.posteriors(problem.prompts, problem.vectors)
    found[~known] = 1 / found.shape[1]
    return found


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


def named(weigh: Callable[[Project, Problem], Mapping[str, float]]) -> Weights:
    """Of a rule that names the experts."""
    return lambda project, problem: np.array([*weigh(project, problem).values()])


def top(project: Project, problem: Problem) -> Mapping[str, float]:
    """The expert with the largest calibrated weight, alone."""
    return rules.keep_top(dict(zip(problem.nearest.experts, whole(calibrated)(project, problem), strict=True)), 1)


def published(divisor: float) -> Weights:
    """The published code's."""
    return named(lambda _, problem: rules.published_weights(problem.among(problem.known), divisor))


def paper(bandwidth: float) -> Weights:
    """The paper's text."""
    return named(
        lambda project, task: rules.paper_weights(task.vectors[task.known], project.router.conditions, bandwidth)
    )


#: The control.
uniform = named(lambda _, problem: rules.uniform_weights(problem.nearest.experts))

RULES: dict[str, Rule] = {
    "uniform": Rule(uniform),
    "published, divisor 8": Rule(published(8)),
    "published, divisor 1": Rule(published(1)),
    "paper, bandwidth 1": Rule(paper(1)),
    "paper, bandwidth 0.1": Rule(paper(0.1)),
    "calibrated": Rule(whole(calibrated)),
    "calibrated, temperature from held-out captions": Rule(whole(at("captions"))),
    "calibrated, temperature from held-out pairs": Rule(whole(at("pairs"))),
    "calibrated, the task's own prior": Rule(own_prior(calibrated)),
    "evidence": Rule(whole(evidence)),
    "evidence, the task's own prior": Rule(own_prior(evidence)),
    "share of texts": Rule(whole(share)),
    "calibrated and share, half each": Rule(whole(half)),
    "calibrated, squared": Rule(squared),
    "calibrated, best expert only": Rule(named(top)),
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
    "evidence by query": Rule(evidence, by_query=True),
    "share by query": Rule(share, by_query=True),
    "nearest expert per text": Rule(share),
    "nearest expert per text, standardised scores": Rule(share, "z"),
}


def total(rule: Rule, project: Project, problem: Problem, by_text: bool = False) -> Array:
    """The ensemble's scores, a row per query: an image, or with `by_text` a text."""
    weights = rule.weights(project, problem)
    if rule.by_query and not by_text:
        factor = statistics.fmean(project.own_scales.values())
        weights = softmax(factor * total(Rule(whole(rule.weights)), project, problem), axis=1) @ weights
    result = np.zeros(())
    for number, expert in enumerate(problem.nearest.experts):
        scores = alone(expert, problem, by_text)
        if rule.scores == "z":
            scores = (scores - scores.mean(axis=1, keepdims=True)) / (scores.std(axis=1, keepdims=True) + 1e-9)
        elif rule.scores != "cosine":
            scores = scores * (project.own_scales if rule.scores == "own" else project.scales)[expert]
        if rule.scores in ("mixed", "own"):
            scores = softmax(scores, axis=1)
        weight = weights[..., number]
        result = result + scores * (weight[:, None] if (by_text or rule.by_query) and weight.ndim else weight)
    return result


def accuracy(problem: Problem, scores: Scoring) -> float:
    """Of a problem with labels."""
    assert problem.labels is not None
    return metrics.accuracy(metrics.ranks(scores(problem, False), problem.labels))


def recalls(problem: Problem, scores: Scoring) -> Row:
    """Both ways, of a problem with owners."""
    assert problem.owners is not None
    image = metrics.ranks(scores(problem, True), problem.owners)
    text = metrics.best_ranks(scores(problem, False), problem.owners)
    both = {"image": image, "text": text}
    return {f"{kind} recall@{k}": metrics.accuracy(ranks, k) for k in (1, 10) for kind, ranks in both.items()}


def all_figures(project: Project, scores: Scoring) -> Row:
    """One row of the table."""
    accuracies, others = Row(), Row()
    for task, problem in project.tests.items():
        if problem.labels is not None:
            accuracies[task] = accuracy(problem, scores)
        else:
            others |= {f"{task} {name}": value for name, value in recalls(problem, scores).items()}
    held_out_tasks = [(problem.source, accuracy(problem, scores)) for problem in project.neighbourhoods]
    others["held-out tasks"] = statistics.fmean(value for _, value in held_out_tasks)
    sources = sorted({source for source, _ in held_out_tasks})
    for source in sources if len(sources) > 1 else []:
        others[f"held-out tasks of {source}"] = statistics.fmean(x for which, x in held_out_tasks if which == source)
    held_out = recalls(project.held_out, scores)
    others["held-out retrieval"] = (held_out["image recall@1"] + held_out["text recall@1"]) / 2
    return row_of(accuracies, others)


def compare(root: Path, tasks: list[Task]) -> Rows:
    """Rule or model -> its figures."""
    project = open_project(root, tasks)
    others = {name: all_figures(project, partial(alone, name)) for name in OTHERS if name in project.held_out.scores}
    experts = [all_figures(project, partial(alone, name)) for name in project.router.experts]
    rows = others | {
        "an expert alone, mean": mean_row(experts),
        "best expert per task, by the test labels": _best_by_label(project, experts),
    }
    for name, rule in RULES.items():
        rows[name] = all_figures(project, partial(total, rule, project))
        print(f"  {name}", file=sys.stderr)
    return rows


def alone(model: str, problem: Problem, by_text: bool) -> Array:
    """What one model says."""
    return problem.scores[model].T if by_text else problem.scores[model]


def _best_by_label(project: Project, experts: list[Row]) -> Row:
    """What the best expert of each task would reach, chosen with the test labels; no rule that could be used."""
    labelled = [problem for problem in project.tests.values() if problem.labels is not None]
    best = [max(accuracy(problem, partial(alone, name)) for name in project.router.experts) for problem in labelled]
    row = {key: max(expert[key] for expert in experts) for key in experts[0] if not key.startswith("held-out")}
    return row | ({"zero-shot": statistics.fmean(best)} if best else {})


def open_project(root: Path, tasks: list[Task]) -> Project:
    """Encode all that is needed, once."""
    params = load_params(root / "params.yaml")
    router = Router.load(root / "models" / "ensemble")
    folders = [root / "models" / name for name in (*OTHERS, *router.experts)]
    clips = {folder.name: load_model(folder) for folder in folders if (folder / "card.json").is_file()}
    for clip in clips.values():
        clip.model.eval()
    held_out, captions, sources = _held_out(root, params, router, clips)
    neighbourhoods = _neighbourhoods(held_out, sources, params.random_seed)
    assert router.routing.kind == "calibrated", "the project's routing.kind must be calibrated"
    assert router.temperature is not None
    project = Project(
        router=router,
        by_evidence=_with_evidence(root, params, router),
        tests=_tests(tasks, router, clips),
        held_out=held_out,
        neighbourhoods=neighbourhoods,
        temperatures={"router": router.temperature},
        scales={name: _scale([problem.scores[name] for problem in neighbourhoods]) for name in router.experts},
        own_scales={name: clips[name].model.logit_scale.exp().item() for name in router.experts},
    )
    parts = router.embedder.encode(rules.partial_captions(captions, params.random_seed))
    useful = parts.any(axis=1) & held_out.known
    distances = rules.class_distances(parts[useful], router.conditions).distances
    assigned = held_out.nearest.distances[useful].argmin(axis=1)
    project.temperatures["captions"] = rules.calibrate_temperature(distances, assigned)
    project.temperatures["pairs"] = _pair_temperature(project)
    return project


def _with_evidence(root: Path, params: Params, router: Router) -> Router:
    """The router that the ensemble stage would make with `routing.kind: evidence`."""
    project = Stages(root, params)
    evidence = {name: evidence_of(project, name) for name in router.experts}
    routing = params.routing.model_copy(update={"kind": "evidence"})
    return Router.fit(router.conditions, router.embedder, routing, [], params.random_seed, evidence)


def _tests(tasks: list[Task], router: Router, clips: Mapping[str, Clip]) -> dict[str, Problem]:
    problems = {}
    encode = partial(encode_prompts, batch_size=BATCH, device="cpu")
    for task, images in encode_tasks(tasks, clips, batch_size=BATCH, workers=1, device="cpu"):
        scores = {name: (images[name] @ encode(clip, task.prompts).T).numpy() for name, clip in clips.items()}
        vectors = class_vectors(router.embedder, task.prompts)
        owners, labels = (task.owners, None) if task.kind == "retrieval" else (None, task.labels)
        nearest = rules.class_distances(vectors, router.conditions)
        problems[task.name] = Problem(scores, vectors, nearest, task.prompts, owners, labels)
    return problems


def _held_out(
    root: Path, params: Params, router: Router, clips: Mapping[str, Clip]
) -> tuple[Problem, list[str], list[str]]:
    """Retrieval among the held-out pairs of all sources that experts are of: the captions, and the source of each."""
    count = params.training.held_out
    if not count:
        sys.exit(f"error: {root}: training.held_out is 0: nothing was held out to compare rules on")
    image = params.image.model_copy(update={"crop_scale": None})
    captions: list[str] = []
    sources: list[str] = []
    owners: list[NDArray[np.int64]] = []
    pixels: list[torch.Tensor] = []
    for source in dict.fromkeys(expert.source for expert in params.experts.values()):
        index = PairIndex.load(root / "data" / "index" / source)
        rows = np.flatnonzero(is_held_out(index.image[:], count, index.images, params.random_seed))
        # Of captions that several images have, one image's.
        rows = rows[np.sort(np.unique(index.captions(rows), return_index=True)[1])]
        _, first, own = np.unique(index.image[rows], return_index=True, return_inverse=True)
        captions += index.captions(rows)
        owners.append(own + sum(len(each) for each in pixels))
        sources += [source] * len(rows)
        pixels.append(ImageStore(index, root, image, cache_mb=0, rows=rows[first]).load(rows[first])[0])
    scores = {}
    for name, clip in clips.items():
        batches = [Preprocess(clip).normalise(batch) for batch in torch.split(torch.cat(pixels), BATCH)]
        images = torch.cat([unit_vectors(clip.model.encode_image, batch, name) for batch in batches])
        texts = encode_texts(clip, captions, batch_size=BATCH, device="cpu", name=name)
        scores[name] = (images @ texts.T).numpy()
    vectors = router.embedder.encode(captions)
    nearest = rules.class_distances(vectors, router.conditions)
    prompts = [[caption] for caption in captions]
    return Problem(scores, vectors, nearest, prompts, owners=np.concatenate(owners)), captions, sources


def _neighbourhoods(held_out: Problem, sources: list[str], random_seed: int) -> list[Problem]:
    """Small tasks: a held-out caption and those next to it, one of each image; the right answers are the diagonal."""
    owners = held_out.owners
    assert owners is not None
    random = np.random.default_rng(random_seed)
    anchors = random.permutation(np.flatnonzero(held_out.known))[:TASKS]
    tasks = []
    for anchor in anchors:
        order = np.argsort(-(held_out.vectors @ held_out.vectors[anchor]), kind="stable")
        nearest_of_image = np.sort(np.unique(owners[order], return_index=True)[1])
        columns = order[nearest_of_image[:CHOICES]]
        scores = {name: table[np.ix_(owners[columns], columns)] for name, table in held_out.scores.items()}
        labels = np.arange(len(columns))
        vectors, nearest = held_out.vectors[columns], held_out.among(columns)
        prompts = [held_out.prompts[column] for column in columns]
        tasks.append(Problem(scores, vectors, nearest, prompts, labels=labels, source=sources[anchor]))
    return tasks


def _surprise(tasks: list[Array], scale: float) -> float:
    """Mean negative log likelihood of the right columns (the diagonals) under softmax(scale * scores)."""
    return -float(np.concatenate([log_softmax(scale * scores, axis=1).diagonal() for scores in tasks]).mean())


def _scale(tasks: list[Array]) -> float:
    """The factor that makes the right columns most likely."""
    found = minimize_scalar(lambda x: _surprise(tasks, np.exp(x)), bounds=(0.0, 6.0), method="bounded")
    return float(np.exp(found.x))


def _pair_temperature(project: Project) -> float:
    """Of the routing: the one under which the ensemble makes held-out pairs most likely, at its best scale."""

    def surprise(temperature: float) -> float:
        rule = Rule(whole(lambda _, problem: posterior(problem, temperature)))
        tasks = [total(rule, project, problem) for problem in project.neighbourhoods]
        return _surprise(tasks, _scale(tasks))

    return float(min(project.temperatures["router"] * np.geomspace(1e-2, 1e2, 13), key=surprise))


def choice(experiments: Sequence[Sequence[Rows]]) -> str:
    """What the held-out pairs say: the mean over experiments of the mean over seeds, and the best rule by it."""
    means = {rule: mean_row([mean_row([run[rule] for run in runs]) for runs in experiments]) for rule in RULES}
    lines = []
    for head in ("held-out tasks", "held-out retrieval"):
        best = max(RULES, key=lambda rule: means[rule][head])
        lines.append(f"{head}: {best} {100 * means[best][head]:.2f}; calibrated {100 * means['calibrated'][head]:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(choice(compare_projects(__doc__, compare)))
