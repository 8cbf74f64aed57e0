"""The router: which experts there are, what each stands for, and how a task's words weigh them.

It holds no model: the experts' parameters lie in their own folders. What is here is all that routing needs, so that an
expert can be added, removed or not be trained yet without touching the others.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mode.checksums import ADVICE, check_manifest, write_manifest
from mode.embedding.base import Embedder, load_embedder, text_part
from mode.ensemble.evidence import VECTORS, WORDS, Captions, Evidence
from mode.ensemble.rules import (
    calibrate_temperature,
    calibrated_weights,
    class_distances,
    paper_posteriors,
    paper_weights,
    partial_captions,
    posteriors,
    published_posteriors,
    published_weights,
    uniform_weights,
)
from mode.errors import ModeError, in_one_line
from mode.files import is_there, write_aside
from mode.params import RoutingParams
from mode.roles import SEED

if TYPE_CHECKING:
    from mode.embedding.open_clip import OpenClipEmbedder

#: The model that stands in for an expert that is not trained yet: the one it branches from.
STAND_IN = SEED.name
#: The file by which a router's folder is known, and what lies beside it.
DESCRIPTION, _EMBEDDER = "ensemble.json", "embedder"
_CONDITIONS, _IMAGES = "conditions.safetensors", "images.safetensors"
#: Of the saved folder; one of another format is refused instead of read wrongly.
_FORMAT = 1
#: Of one whose conditions are of images: an older program would compare words with them.
_FORMAT_OF_IMAGES = 2
#: Texts embedded at once.
_BLOCK = 4096


@dataclass(frozen=True)
class Router:
    """Experts' conditions, the embedder of the captions, and the routing rule.

    Attributes:
        conditions: expert's name -> fine centres float32 [k, d] of the cluster that it is trained on. The order is the
            experts' order everywhere.
        embedder: the one that the pairs were clustered with; d is its number of dimensions. If its view is `image`,
            each image of a task is routed by itself (`image_weights`), and a task's words say nothing.
        routing: which rule, and its numbers.
        temperature: of the `calibrated` rule, in squared units of distance; `None` for the other rules.
        images: expert -> uint8 [k, 3, size, size], training images of its cluster in random order, that the
            normalisation statistics of merged experts are estimated on (`mode.ensemble.merge`); may be empty.
        evidence: of the `evidence` rule, what it knows of the training captions; `None` for the other rules.
        earlier: expert that goes on from others -> these, the latest first: while it is not trained, one of them
            answers for it.
    """

    conditions: Mapping[str, NDArray[np.float32]]
    embedder: Embedder
    routing: RoutingParams
    temperature: float | None = None
    images: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    evidence: Evidence | None = None
    earlier: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        conditions: Mapping[str, NDArray[np.float32]],
        embedder: Embedder,
        routing: RoutingParams,
        captions: Sequence[str],
        random_seed: int,
        evidence: Mapping[str, Captions] | None = None,
    ) -> Router:
        """A router whose temperature, if its rule has one, is set from training captions.

        Of centres and evidence of captions and images together (view `both`) the router keeps the captions' halves
        (`text_part`), for a task's words can be compared with no other.

        Args:
            conditions, embedder, routing: as in the class; the embedder's view is not `image` (`fit_to_images`).
            captions: training captions of the sources that the experts stand for; of those,
                `routing.calibration_captions` are drawn. Other rules than `calibrated` need none.
            random_seed: of that draw and of the words that are left out.
            evidence: of the `evidence` rule, a random sample of the captions of every expert. It is kept, and the
                temperature set from it, with as many captions of each expert as of another.

        Raises:
            ModeError: no expert; a condition without centres or of another dimension than the embedder's; no caption
                that the embedder knows a word of; or `evidence` that is not of these experts and this embedder.
        """
        _check_conditions(conditions, embedder)
        evidence = evidence or {}
        if embedder.view == "both":
            conditions = {name: text_part(centres, "both") for name, centres in conditions.items()}
            evidence = {name: Captions(texts, text_part(both, "both")) for name, (texts, both) in evidence.items()}
            embedder = cast("OpenClipEmbedder", embedder).of_texts()
        router = cls(conditions, embedder, routing)
        if routing.kind == "evidence":
            return replace(router, evidence=router._fitted_evidence(evidence, random_seed))
        if routing.kind != "calibrated":
            return router
        return replace(router, temperature=router._fitted_temperature(captions, random_seed))

    @classmethod
    def fit_to_images(
        cls,
        conditions: Mapping[str, NDArray[np.float32]],
        embedder: Embedder,
        routing: RoutingParams,
        whole: NDArray[np.float32],
        partial: NDArray[np.float32],
    ) -> Router:
        """A router of images, whose temperature is set from training images as `fit` sets it from captions.

        The temperature is that under which parts of images best predict which expert the whole images belong to.

        Args:
            conditions, embedder, routing: as in the class; the embedder's view is `image`, the rule `calibrated`.
            whole: vectors of training images of the experts' sources, [n, d], n at least 1.
            partial: vectors of a part of each of them, [n, d] (`mode.ensemble.views`).

        Raises:
            ModeError: no expert, or a condition without centres or of another dimension than the embedder's.
        """
        _check_conditions(conditions, embedder)
        assigned = class_distances(whole, conditions).distances.argmin(axis=1)
        temperature = calibrate_temperature(class_distances(partial, conditions).distances, assigned)
        return cls(conditions, embedder, routing, temperature)

    def _fitted_temperature(self, captions: Sequence[str], random_seed: int) -> float:
        """See `calibrate_temperature`."""
        drawn = np.random.default_rng(random_seed).permutation(len(captions))[: self.routing.calibration_captions]
        whole = [captions[row] for row in drawn]
        vectors = self.embedder.encode(whole)
        partial = self.embedder.encode(partial_captions(whole, random_seed))
        known = vectors.any(axis=1) & partial.any(axis=1)
        if not known.any():
            raise ModeError(
                f"routing: none of {len(whole)} training captions has words that embedder '{self.embedder.name}' knows",
                "give captions of the experts' sources, or set routing.kind to `published` or `paper`",
            )
        assigned = class_distances(vectors[known], self.conditions).distances.argmin(axis=1)
        return calibrate_temperature(class_distances(partial[known], self.conditions).distances, assigned)

    def _fitted_evidence(self, captions: Mapping[str, Captions], random_seed: int) -> Evidence:
        """See `Evidence.fit`."""
        for name in self.experts:
            if name not in captions:
                raise ModeError(f"routing: no captions of expert '{name}'", "give some of every expert as evidence")
        ordered = {name: captions[name] for name in self.experts}
        return Evidence.fit(ordered, self.embedder, self.routing.calibration_captions, random_seed)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts."""
        return tuple(self.conditions)

    @property
    def by_image(self) -> bool:
        """Whether each image weighs the experts by itself, and words say nothing."""
        return self.embedder.view == "image"

    def weights(self, metadata: Sequence[Sequence[str]]) -> dict[str, float]:
        """p(expert | task), from the task's words alone.

        A class none of whose words the embedder (with `evidence`, or any expert's captions) knows says nothing and is
        left out; if none is left the weights are uniform.

        Args:
            metadata: the prompts of each class; for retrieval each text is a class of one prompt.

        Returns:
            Weight per expert, all positive or 0, of sum 1.

        Raises:
            ModeError: the clusters are of images, with which words cannot be compared.
        """
        vectors = self._class_vectors(metadata)
        if self.routing.kind == "evidence":
            found, known = self._by_evidence(metadata, vectors)
            mean = found[known].mean(axis=0).tolist() if known.any() else [*uniform_weights(self.experts).values()]
            return dict(zip(self.experts, mean, strict=True))
        vectors = vectors[vectors.any(axis=1)]
        if not len(vectors):
            return uniform_weights(self.experts)
        if self.routing.kind == "paper":
            return paper_weights(vectors, self.conditions, self.routing.bandwidth)
        nearest = class_distances(vectors, self.conditions)
        if self.routing.kind == "published":
            return published_weights(nearest, self.routing.divisor)
        if self.temperature is None:
            raise self._not_calibrated()
        return calibrated_weights(nearest, self.temperature)

    def text_weights(self, texts: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """p(expert | text) of every text by itself, expert -> [texts]; all alike where no word of it is known.

        It is `weights([[text]])` of each text, computed at once.
        """
        return self.class_weights([[text] for text in texts])

    def class_weights(self, metadata: Sequence[Sequence[str]]) -> dict[str, NDArray[np.float64]]:
        """The same of every class by its prompts, expert -> [classes]; `metadata` as of `weights`."""
        vectors = self._class_vectors(metadata)
        known = vectors.any(axis=1)
        if self.routing.kind == "evidence":
            weights, known = self._by_evidence(metadata, vectors)
        elif self.routing.kind == "paper":
            weights = paper_posteriors(vectors, self.conditions, self.routing.bandwidth)
        elif self.routing.kind == "published":
            weights = published_posteriors(class_distances(vectors, self.conditions), self.routing.divisor)
        elif self.temperature is None:
            raise self._not_calibrated()
        else:
            weights = posteriors(class_distances(vectors, self.conditions), self.temperature)
        weights[~known] = 1 / len(self.experts)
        return dict(zip(self.experts, weights.T, strict=True))

    def _class_vectors(self, metadata: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        """See `class_vectors`; a router of images refuses words."""
        if self.by_image:
            advice = "`mode evaluate` weighs by image; to be routed by words, cluster with embedding.view text or both"
            raise ModeError("these experts are weighed by each image, not by words", advice)
        return class_vectors(self.embedder, metadata)

    def _by_evidence(
        self, metadata: Sequence[Sequence[str]], vectors: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """See `Evidence.posteriors`."""
        if self.evidence is None:
            raise self._not_calibrated()
        return self.evidence.posteriors(metadata, vectors)

    @staticmethod
    def _not_calibrated() -> ModeError:
        return ModeError("the router is not calibrated", "make it with Router.fit, or load a saved one")

    def image_weights(self, vectors: NDArray[np.floating]) -> dict[str, NDArray[np.float64]]:
        """p(expert | image) of every image by itself, expert -> [n]; `vectors`: of view `image`, [n, d]."""
        if not self.by_image or self.temperature is None:
            raise ModeError("these experts are weighed by words, not by images", "see embedding.view")
        weights = posteriors(class_distances(vectors, self.conditions), self.temperature)
        return dict(zip(self.experts, weights.T, strict=True))

    def members(self, available: Collection[str]) -> dict[str, str]:
        """Expert -> the model that answers for it: its own; where it is not trained yet, an earlier one, or the seed.

        Raises:
            ModeError: an expert is missing and so is the seed.
        """
        own = {
            expert: next((name for name in (expert, *self.earlier.get(expert, ())) if name in available), None)
            for expert in self.experts
        }
        missing = [expert for expert, model in own.items() if model is None]
        if missing and STAND_IN not in available:
            raise ModeError(
                f"no model for {', '.join(missing)}, nor '{STAND_IN}' to stand in",
                f"train one of them first; there are: {', '.join(sorted(available)) or 'none'}",
            )
        return {expert: model or STAND_IN for expert, model in own.items()}

    def save(self, folder: Path) -> None:
        """Write `folder` (replaced as a whole): ensemble.json, conditions.safetensors, embedder/, images.safetensors
        and evidence.safetensors and .json if there are any, and the checksums of all of these. No pickles.
        """
        with write_aside(folder) as temporary:
            temporary.mkdir()
            description = {
                "format": _FORMAT_OF_IMAGES if self.by_image else _FORMAT,
                "experts": list(self.experts),
                "routing": self.routing.model_dump(),
                "temperature": self.temperature,
                "embedder": self.embedder.name,
            }
            if self.earlier:
                description["earlier"] = {expert: list(names) for expert, names in self.earlier.items()}
            (temporary / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            tensors = {name: np.ascontiguousarray(centres, np.float32) for name, centres in self.conditions.items()}
            save_file(tensors, temporary / _CONDITIONS)
            if self.images:
                images = {name: np.ascontiguousarray(each) for name, each in self.images.items()}
                save_file(images, temporary / _IMAGES)
            if self.evidence is not None:
                self.evidence.save(temporary)
            self.embedder.save(temporary / _EMBEDDER)
            write_manifest(temporary)

    @classmethod
    def load(cls, folder: Path) -> Router:
        """Read what `save` has written.

        Raises:
            ModeError: not such a folder, or one that is damaged or of another format.
        """
        is_there(folder)
        present = [name for name in (DESCRIPTION, _CONDITIONS, _IMAGES, VECTORS, WORDS) if (folder / name).is_file()]
        check_manifest(folder, present)  # the embedder's folder has one of its own
        try:
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            if description["format"] not in (_FORMAT, _FORMAT_OF_IMAGES):
                what = f"{folder}: format {description['format']}, this program reads {_FORMAT_OF_IMAGES}"
                raise ModeError(what, "use the version of mode that wrote it, or run `dvc repro ensemble`")
            tensors = load_file(folder / _CONDITIONS)
            conditions = {name: tensors[name] for name in description["experts"]}
            routing = RoutingParams.model_validate(description["routing"])
            temperature, earlier = description["temperature"], description.get("earlier", {})
            if not isinstance(earlier, dict) or not all(_are_names(names) for names in earlier.values()):
                raise ValueError("earlier versions of experts that are no names")
            images = load_file(folder / _IMAGES) if (folder / _IMAGES).is_file() else {}
            _check_numbers(conditions, images, temperature)
            evidence = Evidence.load(folder, conditions) if routing.kind == "evidence" else None
        except FileNotFoundError:
            missing = next(name for name in (DESCRIPTION, _CONDITIONS, VECTORS, WORDS) if name not in present)
            raise ModeError(
                f"{folder}: no saved ensemble: {missing} is missing", "`dvc repro ensemble` makes it"
            ) from None
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModeError(f"{folder}: damaged ensemble: {in_one_line(error)}", ADVICE) from None
        embedder = load_embedder(folder / _EMBEDDER)
        _check_conditions(conditions, embedder)
        return cls(conditions, embedder, routing, temperature, images, evidence, earlier)


def _check_conditions(conditions: Mapping[str, NDArray[np.float32]], embedder: Embedder) -> None:
    if not conditions:
        raise ModeError("the ensemble has no expert", "name at least one under `experts`")
    for name, centres in conditions.items():
        if centres.ndim != 2 or not len(centres) or centres.shape[1] != embedder.dimensions:
            raise ModeError(
                f"condition of expert '{name}': shape {centres.shape}, not [centres, {embedder.dimensions}]"
                f" of embedder '{embedder.name}'",
                "cluster again with this embedder",
            )


def _check_numbers(
    conditions: Mapping[str, NDArray[np.generic]], images: Mapping[str, NDArray[np.generic]], temperature: object
) -> None:
    """Refuse with a `ValueError` what `Router.save` never writes: a folder may be somebody else's."""
    for name, centres in conditions.items():
        if centres.dtype != np.float32 or not np.isfinite(centres).all():
            raise ValueError(f"condition of expert '{name}': {centres.dtype}, or not finite")
    for name, pixels in images.items():
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"images of expert '{name}': {pixels.dtype} {list(pixels.shape)}")
    if temperature is not None and not (isinstance(temperature, float | int) and 0 < temperature < np.inf):
        raise ValueError(f"temperature {temperature!r}")


def _are_names(names: object) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def class_vectors(embedder: Embedder, metadata: Sequence[Sequence[str]]) -> NDArray[np.float32]:
    """One unit vector per class, float32 [L, d]: the mean over its prompts of their unit vectors, normalised again.

    The published code does the same. A class without a known word has the zero vector. `metadata` are the prompts of
    each of L classes, at least one each.
    """
    owners = [number for number, prompts in enumerate(metadata) for _ in prompts]
    prompts = list(chain.from_iterable(metadata))
    sums = np.zeros((len(metadata), embedder.dimensions), np.float32)
    for start in range(0, len(prompts), _BLOCK):
        np.add.at(sums, owners[start : start + _BLOCK], embedder.encode(prompts[start : start + _BLOCK]))
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.asarray(np.divide(sums, norms, out=np.zeros_like(sums), where=norms > 0))


def images_to_keep(experts: int, size: int) -> int:
    """How many images of each expert are kept with an ensemble: as many as 16 MiB hold, at most 512."""
    return max(1, min(512, 16 * 2**20 // (experts * 3 * size**2)))
