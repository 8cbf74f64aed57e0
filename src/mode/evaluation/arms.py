"""What the arms of the stage `variants` are: other weights of the same experts, and experts merged into one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mode.clip.model import Clip
from mode.embedding.base import Embedder
from mode.ensemble.combine import TextWeights, by_model
from mode.ensemble.merge import MERGE_BATCH, images_of_kept, merge_on_kept
from mode.ensemble.router import STAND_IN, Router
from mode.ensemble.rules import keep_share, keep_top, uniform_weights
from mode.errors import ModeError
from mode.evaluation.growth import steps
from mode.evaluation.mixtures import Mixture, Routed
from mode.evaluation.probes import dense_models, probe_rows
from mode.evaluation.tasks import Task
from mode.params import Arm, RoutingParams, View, parse_arm
from mode.training.soup import Pairs, learned_soup

#: The oracle: of each task the expert that does best on it.
BEST_BY_LABEL = "best-by-label"
#: Kinds of arms that need no words: those of a router of images.
OF_IMAGES = ("by-range", BEST_BY_LABEL, "probe")


class Arms:
    """The arms that are asked for, made ready for the experts of a router.

    Args:
        names: of `mode.params.ARMS`.
        router: of the ensemble.
        available: names of the models that there are.
        captions, random_seed: as of `Router.fit`, which `coarse` calls.
        pairs: as of `mode.training.soup.learned_soup`, which `merged-layers` calls.

    Raises:
        ModeError: an arm that needs the seed where there is none, or words where the router is one of images;
            `by-class` with a rule that gives no class weights, or `coarse` with one that looks at no centres; a model
            with the name of a variant.
        ValueError: no such arm.
    """

    def __init__(
        self,
        names: Sequence[str],
        router: Router,
        available: Sequence[str],
        captions: Sequence[str],
        random_seed: int,
        pairs: Pairs = (),
    ) -> None:
        self.arms: dict[str, Arm] = {name: parse_arm(name) for name in names}
        if unfit := without_words(names, router):
            advice = f"leave them out; without words there are {', '.join(OF_IMAGES)}"
            raise ModeError(f"variants.arms: {', '.join(unfit)}: experts weighed by each image have no words", advice)
        self.router = replace(router, embedder=_Remembering(router.embedder))
        self.members = router.members(available)
        self.order = range_order(router.conditions)
        self._available, self._pairs = available, pairs
        for name, arm in self.arms.items():
            if arm.kind in ("by-range", "merged-seed-X") and STAND_IN not in available:
                raise ModeError(f"variants.arms: '{name}' needs the seed, which is not there", "`dvc repro seed`")
            if arm.kind == "by-class" and not router.routing.gives_probabilities:
                raise ModeError(
                    "variants.arms: 'by-class' needs routing.kind 'calibrated' or 'evidence', not"
                    f" '{router.routing.kind}'",
                    "leave it out",
                )
            if arm.kind == "coarse" and router.routing.kind == "evidence":
                raise ModeError(
                    "variants.arms: 'coarse' needs a routing.kind that looks at centres, not 'evidence'", "leave it out"
                )
        self._others = self._other_routers(captions, random_seed)
        if taken := set(available) & set(self.variants):
            raise ModeError(f"a model is called '{taken.pop()}', which names a variant in the results", "rename it")

    @property
    def variants(self) -> dict[str, list[list[str]]]:
        """Their rows in the results, and which models' training each takes; with several sets it is their mean."""
        rows: dict[str, list[list[str]]] = {}
        for name, arm in self.arms.items():
            if arm.kind == "by-range":
                rows |= {
                    row: [[*dict.fromkeys([STAND_IN, *self._first(count).values()])]]
                    for row, count in self._by_range().items()
                }
            elif arm.kind == "probe":
                rows |= probe_rows(self._available, self.experts)
            else:
                rows[name] = [self.experts]
        return rows

    @property
    def experts(self) -> list[str]:
        """The models that answer for the experts, each once."""
        return [*dict.fromkeys(self.members.values())]

    @property
    def models(self) -> list[str]:
        """Models that they need."""
        kinds = {arm.kind for arm in self.arms.values()}
        seed = [STAND_IN] if kinds & {"by-range", "merged-seed-X"} else []
        dense = dense_models(self._available) if "probe" in kinds else []
        return [*dict.fromkeys([*seed, *dense, *self.experts])]

    def mixtures(self, task: Task, routed: Routed, scales: Mapping[str, float]) -> dict[str, Mixture]:
        """Of the arms that are one, in a task.

        Args:
            task: of either kind.
            routed: what `router` makes of it.
            scales: as of `Routed.mixture`.
        """
        found: dict[str, Mixture] = {}
        for name, arm in self.arms.items():
            found |= self._mixtures(name, arm, task, routed, scales)
        return found

    def merged(self, clips: Mapping[str, Clip], task: Task | None = None) -> dict[str, Clip]:
        """Models that a task merges by its weights; without a task those that are the same for all."""
        kinds = {"merged-uniform", "merged-layers"} if task is None else {"merged", "merged-N", "merged-seed-X"}
        arms = {name: arm for name, arm in self.arms.items() if arm.kind in kinds}
        if not arms:
            return {}
        routed = uniform_weights(self.router.experts) if task is None else self.router.weights(task.prompts)
        return {name: self._merge(arm, routed, clips) for name, arm in arms.items()}

    def _merge(self, arm: Arm, routed: dict[str, float], clips: Mapping[str, Clip]) -> Clip:
        if arm.kind == "merged-layers":
            experts = {model: clips[model] for model in self.experts}
            return learned_soup(experts, self._pairs, images_of_kept(experts, self.router.images, routed, MERGE_BATCH))
        if arm.kind == "merged-N":
            routed = keep_top(routed, int(arm.number or 0))
        of_seed = (arm.number or 0.0) if arm.kind == "merged-seed-X" else 0.0
        shares = by_model(self.members, {expert: (1 - of_seed) * weight for expert, weight in routed.items()})
        shares[STAND_IN] = shares.get(STAND_IN, 0.0) + of_seed
        shares = {model: share for model, share in shares.items() if share > 0}
        parts = {model: clips[model] for model in shares}
        return merge_on_kept(parts, shares, self.router.images, routed, MERGE_BATCH)

    def _by_range(self) -> dict[str, int]:
        return {f"by-range-{count}": count for count in steps(len(self.order))[1:]}

    def _other_routers(self, captions: Sequence[str], random_seed: int) -> dict[str, Router]:
        """Kind of an arm -> its router."""
        kinds = {arm.kind for arm in self.arms.values()}
        router, routing = self.router, self.router.routing
        others: dict[str, Router] = {
            kind: replace(
                router, routing=RoutingParams(kind=kind, divisor=routing.divisor, bandwidth=routing.bandwidth)
            )
            for kind in ("published", "paper")
            if kind in kinds
        }
        if "coarse" in kinds:
            centres = {expert: fine.mean(axis=0, keepdims=True) for expert, fine in router.conditions.items()}
            others["coarse"] = Router.fit(centres, router.embedder, routing, captions, random_seed)
        return others

    def _mixtures(
        self, name: str, arm: Arm, task: Task, routed: Routed, scales: Mapping[str, float]
    ) -> dict[str, Mixture]:
        """Of one arm; none if it is no mixture."""
        match arm.kind:
            case "top-N":
                chosen = routed.among(keep_top(routed.weights, int(arm.number or 0)))
            case "share-X":
                chosen = routed.among(keep_share(routed.weights, arm.number or 0.0))
            case "published" | "paper" | "coarse":
                chosen = Routed.by(self._others[arm.kind], task)
            case "by-class":
                by_class = by_model(self.members, self.router.class_weights(task.prompts))
                return {name: Mixture(by_model(self.members, routed.weights), TextWeights(by_class))}
            case "by-range":
                return {row: routed.mixture(self._first(count), scales) for row, count in self._by_range().items()}
            case _:
                return {}
        return {name: chosen.mixture(self.members, scales)}

    def _first(self, count: int) -> dict[str, str]:
        """Expert -> the model that answers for it, with the `count` of largest range alone."""
        there = self.order[:count]
        return {expert: model if expert in there else STAND_IN for expert, model in self.members.items()}


def without_words(names: Sequence[str], router: Router) -> list[str]:
    """Those of some arms that this router has no words for; none of a router of words."""
    return [name for name in names if router.by_image and parse_arm(name).kind not in OF_IMAGES]


def range_order(conditions: Mapping[str, NDArray[np.floating]]) -> list[str]:
    """Experts by the range of their cluster, the largest first: the mean distance of its fine centres to their mean.

    That is the order of the paper's Figure 7. Equal ones stay in the given order.

    >>> range_order({"a": np.array([[0.0], [2.0]]), "b": np.array([[0.0], [6.0]]), "c": np.array([[5.0]])})
    ['b', 'a', 'c']
    """
    ranges = {
        expert: float(np.linalg.norm(centres - centres.mean(axis=0), axis=1).mean())
        for expert, centres in conditions.items()
    }
    return sorted(ranges, key=lambda expert: -ranges[expert])


class _Remembering:
    """An embedder that several routers ask for the same texts: it encodes them once."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._encoded = lru_cache(maxsize=16)(embedder.encode)

    @property
    def name(self) -> str:
        return self._embedder.name

    @property
    def dimensions(self) -> int:
        return self._embedder.dimensions

    @property
    def view(self) -> View:
        return self._embedder.view

    @property
    def fingerprint(self) -> str:
        return self._embedder.fingerprint

    def encode(self, captions: Sequence[str]) -> NDArray[np.float32]:
        return self._encoded(tuple(captions))

    def save(self, folder: Path) -> None:
        self._embedder.save(folder)
