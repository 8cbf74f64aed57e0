"""The results of an evaluation, `reports/metrics.json`: the one schema, read and written here alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, StrictFloat, StrictInt, ValidationError

from mode.checksums import SEAL
from mode.errors import ModeError, first_fault
from mode.files import write_aside
from mode.roles import ENSEMBLE, EXPERT, SEED, UNIFORM, role_of


def _defined(value: object) -> object:
    """JSON has no NaN: an undefined figure is `None`."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


#: A figure, `None` where it is undefined; a whole number stays one.
Figure = Annotated[StrictInt | StrictFloat | None, BeforeValidator(_defined)]
Figures = Mapping[str, Figure]


class ZeroShot(BaseModel):
    """Classification, 0..1.

    Attributes:
        mean: MODEL -> the mean over the tasks.
        tasks: TASK -> MODEL -> the task's metric.
    """

    mean: Figures = {}
    tasks: Mapping[str, Figures] = {}


class Retrieval(BaseModel):
    """Retrieval: TASK -> MODEL -> `image_recall@1` ..., 0..1."""

    tasks: Mapping[str, Mapping[str, Figures]] = {}


class TaskFacts(BaseModel):
    """A task itself: figures whose tasks have different hashes do not compare.

    Attributes:
        kind, metric: what is measured, and how.
        images, classes, templates, texts: how many it has.
        hash: of templates, classes, texts and the number of images.
    """

    kind: Literal["classification", "retrieval"]
    metric: str
    images: int
    classes: int
    templates: int
    texts: int
    hash: str


class GrowthCurve(BaseModel):
    """Accuracy with only some experts trained, see `mode.evaluation.growth`.

    Attributes:
        order: experts, that of the largest weight first; the mean over tasks has none, for each has its own.
        experts: how many of them are trained.
        by_task: the figure at each of these numbers, in that order.
        reversed: the same in the reverse order.
    """

    order: list[str] = []
    experts: list[int] = []
    by_task: Sequence[Figure] = []
    reversed: Sequence[Figure] = []


class Growth(BaseModel):
    """Curves by task, and their mean over the classification tasks."""

    tasks: Mapping[str, GrowthCurve] = {}
    mean: GrowthCurve = GrowthCurve()


class Cost(BaseModel):
    """What it took to have a model, starting from nothing: an expert's and a dense model's cost includes the seed's.

    Attributes:
        samples_seen: image-caption pairs seen in training.
        flops: floating-point operations of the training.
        seconds: of training, summed over the processes that trained together: device-seconds.
    """

    samples_seen: Figure = None
    flops: Figure = None
    seconds: Figure = None


class SuiteFacts(BaseModel):
    """A standard suite by `name`, and which of its tasks were `missing`."""

    name: str
    missing: list[str]


class Results(BaseModel):
    """Everything that one evaluation found; figures are in 0..1, an undefined one is `None`.

    A part that is missing in a file is empty here and stays missing when it is saved again.

    Attributes:
        zeroshot, retrieval: figures by task and model.
        routing: TASK -> EXPERT -> weight; empty without a router.
        details: TASK -> MODEL -> `acc1`, `acc5`, `mean_per_class_recall` (and `roc_auc`), as CLIP_benchmark's.
        tasks: what each task is.
        encoders: MODEL -> image encoders that run for an image, the mean over the tasks; of variants alone.
        stand_ins: EXPERT -> the model that answered for it, where that is not its own.
        growth: expert by expert; empty without a router or a seed.
        cost: MODEL -> what its training took.
        provenance: what made the figures; commit, parameters, versions, machine.
        suite: the suite that the tasks are of, if they are of one.

    Example:
        >>> results = Results.model_validate({"zeroshot": {"mean": {"seed": 0.25, "expert-0": float("nan")}}})
        >>> results.models, results.experts, results.zeroshot.mean["expert-0"]
        (['seed', 'expert-0'], ['expert-0'], None)
    """

    zeroshot: ZeroShot = ZeroShot()
    retrieval: Retrieval = Retrieval()
    routing: Mapping[str, Figures] = {}
    details: Mapping[str, Mapping[str, Figures]] = {}
    tasks: dict[str, TaskFacts] = {}
    encoders: dict[str, float] = {}
    stand_ins: dict[str, str] = {}
    growth: Growth = Growth()
    cost: dict[str, Cost] = {}
    provenance: dict[str, Any] = {}
    suite: SuiteFacts | None = None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a metrics file.

        Raises:
            ModeError: it is not there, is damaged, is no JSON, or is not made of figures.
        """
        try:
            SEAL.check(path)
            results = cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ModeError(f"{path}: no such file", "run `dvc repro` first") from None
        except ValidationError as error:
            what = f"{path}: no metrics file: {first_fault(error)}"
            raise ModeError(what, "`dvc repro evaluate` writes one") from None
        if not results.model_fields_set:
            raise ModeError(f"{path}: no metrics file: it has no part of one", "`dvc repro evaluate` writes one")
        return results

    def save(self, path: Path) -> None:
        """Write a metrics file, with its checksum; one that is there is replaced as a whole."""
        with write_aside(path) as temporary:
            content = json.dumps({**self.model_dump(exclude_unset=True), "checksum": SEAL.blank}, indent=2)
            temporary.write_text(content + "\n", encoding="utf-8")
            SEAL.fill(temporary)

    @property
    def models(self) -> list[str]:
        """Every model that has a figure, in the order in which they first appear."""
        tasks: list[Iterable[str]] = [*self.zeroshot.tasks.values(), *self.retrieval.tasks.values()]
        return list(dict.fromkeys(chain(self.zeroshot.mean, *tasks, self.cost)))

    @property
    def experts(self) -> list[str]:
        """The experts, trained or not: whatever is routed to, and models of that role, in natural order."""
        routed = {expert for weights in self.routing.values() for expert in weights}
        alone = {model for model in self.models if role_of(model) == EXPERT} - {*self.stand_ins.values()}
        return sorted(routed | alone, key=natural)

    @property
    def costs(self) -> dict[str, Cost]:
        """Cost of every model; an ensemble's, where it is not given, is the seed's and every expert's part after it."""
        seed, *experts = (self.cost.get(name, Cost()) for name in (SEED.name, *self.experts))
        together = cost_together(seed, experts) if experts else Cost()
        return {UNIFORM.name: together, ENSEMBLE.name: together} | self.cost


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sorting key that puts `expert-2` before `expert-10`."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def cost_together(seed: Cost, branched: Sequence[Cost]) -> Cost:
    """What a seed and models that branched from it cost together: the seed once, and what each took beyond it.

    A kind of cost is not known together if it is not known of one of them.

    >>> cost_together(Cost(samples_seen=27), [Cost(samples_seen=32), Cost(samples_seen=33)]).samples_seen
    38
    """

    def total(kind: str) -> float | None:
        of_seed, *others = (getattr(cost, kind) for cost in (seed, *branched))
        if of_seed is None or None in others:
            return None
        whole: float = of_seed + sum(cost - of_seed for cost in others)
        return round(whole, 3)  # seconds; whole numbers stay what they are

    return Cost(**{kind: total(kind) for kind in Cost.model_fields})
