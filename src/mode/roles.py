"""The arms of an experiment, said once: what each is, what it starts from, what it sees, and for how long.

A new arm is one more of `ROLES` and a stage of the same name in dvc.yaml. Parameters, training plans, stages, flows,
MLflow and the report read the table; none of them lists the arms itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

#: What MLflow's tag `role` says, and what the report groups by.
Kind = Literal["seed", "dense", "expert", "ensemble"]


@dataclass(frozen=True)
class Role:
    """One arm.

    Attributes:
        name: of the arm, of its stage in dvc.yaml, and of its model; where there are `many`, see `model`.
        kind: which part of the method it is.
        label: what sentences call it.
        note: Markdown for its run's page in MLflow.
        parent: `seed`, whose weights it starts from; None: from random weights, or (`update`) from those of the model
            that params.yaml names.
        pairs: what a training sees: all pairs of a source, or those of one cluster. None: not trained, but derived
            from other models.
        length: how long a training is, see `mode.training.plan`.
        many: there is one for each key of `experts` in params.yaml (of an `update`: of `updates`), with the source,
            epochs and learning rate that stand there, made by a stage `NAME@KEY`.
        dispensable: the rest of the pipeline can do without it; the seed answers for a missing expert.
        colour: of its models in plots and on the page.
    """

    name: str
    kind: Kind
    label: str
    note: str
    parent: str | None = None
    pairs: Literal["all", "cluster"] | None = None
    length: Literal["seed", "dense", "expert", "total", "update"] | None = None
    many: bool = False
    dispensable: bool = False
    colour: str = "#cc79a7"

    @property
    def mean(self) -> str:
        """What tables call the mean of its models, where there are several."""
        return f"{self.name}s, mean"

    @property
    def trained(self) -> bool:
        """Whether a stage trains it; the others are derived from trained models."""
        return self.pairs is not None

    def model(self, key: str | None = None) -> str:
        """Name of its model; with `many`, of the one of that key: an expert's is the key, others' the two joined.

        >>> DENSE_LONG.model(), EXPERT.model("expert-3")
        ('dense-long', 'expert-3')
        """
        if key is None:
            return self.name
        return key if self.kind == "expert" else f"{self.name}-{key}"


SEED = Role(
    "seed",
    "seed",
    "the seed",
    "The partly trained model that every expert and every dense baseline continues from.",
    pairs="all",
    length="seed",
    colour="#8a8f98",
)
DENSE = Role(
    "dense",
    "dense",
    "the dense model",
    "The dense baseline: continues from the seed on all pairs, for as long as an expert.",
    parent="seed",
    pairs="all",
    length="dense",
    colour="#0072b2",
)
DENSE_LONG = Role(
    "dense-long",
    "dense",
    "the dense model of equal total cost",
    "The dense baseline of equal total cost: sees as many samples as the seed and all experts together.",
    parent="seed",
    pairs="all",
    length="total",
    colour="#0072b2",
)
EXPERT = Role(
    "expert",
    "expert",
    "an expert alone",
    "A data expert: continues from the seed on one cluster of pairs, and on a few from outside it.",
    parent="seed",
    pairs="cluster",
    length="expert",
    many=True,
    dispensable=True,
    colour="#e69f00",
)
FULL = Role(
    "full",
    "dense",
    "a model on everything, as long as an expert",
    "Like an expert in all but its data: continues from the seed on all pairs, in an order of its own.",
    parent="seed",
    pairs="all",
    length="expert",
    many=True,
    dispensable=True,
    colour="#009e73",
)
UPDATE = Role(
    "update",
    "expert",
    "an expert that was trained on",
    "A data expert of later: continues from an expert on pairs of its cluster that have arrived since, and takes its"
    " place.",
    pairs="cluster",
    length="update",
    many=True,
    dispensable=True,
    colour="#e69f00",
)
UNIFORM = Role(
    "uniform",
    "ensemble",
    "averaging the same experts uniformly",
    "The experts together, all weighed alike: the control for routing.",
    colour="#56b4e9",
)
UNIFORM_FULL = Role(
    "uniform-full",
    "ensemble",
    "averaging as many models on everything",
    "Models on all pairs together, all weighed alike: tells specialising from averaging (the paper's Full-n).",
    colour="#009e73",
)
ENSEMBLE = Role(
    "ensemble",
    "ensemble",
    "the routed ensemble",
    "The experts together, weighed per task by the words of its classes.",
    colour="#d55e00",
)

#: In the order of every table.
ROLES = (SEED, DENSE, DENSE_LONG, FULL, EXPERT, UPDATE, UNIFORM_FULL, UNIFORM, ENSEMBLE)
TRAINED = tuple(role for role in ROLES if role.trained)
DERIVED = tuple(role for role in ROLES if not role.trained)


def role_of(model: str) -> Role:
    """The role of a model by its name; `NAME-...` is one of several, and any name that no other role has an expert's.

    >>> role_of("dense-long").kind, role_of("uniform").kind, role_of("expert-3").name
    ('dense', 'ensemble', 'expert')
    """
    own = [role for role in ROLES if (model.startswith(f"{role.name}-") if role.many else model == role.name)]
    return max(own, key=lambda role: len(role.name), default=EXPERT)


def models_of(versions: Mapping[str, str]) -> list[str]:
    """Names of all models that a run may have trained and goes on using, in the order of the tables.

    Args:
        versions: expert -> its newest version, which is the expert itself or an update of it.

    >>> models_of({"expert-0": "expert-0", "expert-1": "expert-1-v2"})
    ['seed', 'dense', 'dense-long', 'full-expert-0', 'full-expert-1', 'expert-0', 'expert-1-v2']
    """
    keys: dict[Role, Iterable[str]] = {EXPERT: versions.values(), UPDATE: ()}
    return [role.model(key) for role in TRAINED for key in (keys.get(role, versions) if role.many else [None])]
