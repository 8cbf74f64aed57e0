"""The ensemble as one model: open it, adapt it to classes, and ask it about images.

    >>> ensemble = mode.load("models")
    >>> task = ensemble.adapt(["white chess king", "ace of hearts"], templates=["a picture of {c}"])
    >>> list(task.weights)                                    # of each expert, from the words alone
    ['expert-0', 'expert-1']
    >>> task(["king.png", "ace.png", "rook.png"]).shape       # probabilities, float32 [images, classes]
    torch.Size([3, 2])
    >>> ensemble.retrieve(["king.png", "ace.png"], ["a king", "two aces", "an ace"]).shape    # cosines [images, texts]
    torch.Size([2, 3])

`Ensemble` and `TaskModel` also have the interface of an open_clip model (`encode_image`, `encode_text`, `logit_scale`,
`preprocess`, `tokenizer`), for tools that expect one; `JointEncoder` says what their features mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from mode.clip.device import pick_device
from mode.clip.encode import encode_prompts
from mode.clip.model import CONFIG, Clip, load_model, write_model_files
from mode.clip.preprocess import Preprocess
from mode.ensemble.images import Images, batches_of_pixels
from mode.ensemble.merge import draw_images, even_batches, has_statistics, merge_models
from mode.ensemble.router import QueryWeights, Router
from mode.ensemble.rules import keep_share, keep_top, uniform_weights
from mode.errors import ModeError
from mode.files import write_aside

Precision = Literal["fp32", "bf16", "amp"]
Weight = TypeVar("Weight", float, NDArray[np.float64])

#: What a class name is put into where no templates are given; `{c}` is its place.
TEMPLATES = ("{c}",)

#: Name of a task's only model after its experts were merged.
MERGED = "merged"


class JointEncoder(nn.Module):
    """Several CLIPs as one model with open_clip's interface.

    The features of an image are those of all models one after the other, each of length 1 and then scaled by the root
    of the model's weight::

        encode_image(x) = [sqrt(w_1) f_1(x) / |f_1(x)|, sqrt(w_2) f_2(x) / |f_2(x)|, ...],     sum of w = 1

    and those of a text likewise. So they have length 1, and the inner product of an image and a text is the weighted
    sum of the models' cosine similarities: the ensemble's own score. Zero-shot classification by any tool is therefore
    that of the ensemble, exactly if a class has one prompt. With several, tools average a class's features and
    normalise the average as a whole, where the ensemble does so for each model by itself: a model whose prompts of a
    class agree less then counts for a little less.

    Args:
        clips: name -> model; all on one device.
        weights: name -> weight, of sum 1. A model of weight 0 is left out.
        precision: as in `mode.load`.
        batch_size: images or texts in one forward pass of the methods that take more.

    Attributes:
        clips: name -> model, those with a weight.
        per_model: name -> its weight.
    """

    def __init__(
        self,
        clips: Mapping[str, Clip],
        weights: Mapping[str, float],
        precision: Precision,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.clips = {name: clips[name] for name, weight in weights.items() if weight > 0}
        self.per_model = {name: weights[name] for name in self.clips}
        self._networks = nn.ModuleList(clip.model for clip in self.clips.values())
        self.precision, self.batch_size = precision, batch_size
        self._preprocesses = {name: Preprocess(clip) for name, clip in self.clips.items()}
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the models are; `.to(device)` moves them (a task and the ensemble that it is of have the same)."""
        return next(self._networks.parameters()).device

    @property
    def logit_scale(self) -> Tensor:
        """As open_clip's, float32 scalar: log of the models' weighted mean factor from cosines to logits."""
        factors = [weight * self.clips[name].model.logit_scale.exp().float() for name, weight in self.per_model.items()]
        return torch.stack(factors).sum().log().detach()

    @property
    def preprocess(self) -> Any:
        """PIL image -> float32 [3, size, size], what `encode_image` takes a batch of (open_clip's transform)."""
        clip = self._common()
        known = set(PreprocessCfg.__dataclass_fields__)
        config = {"size": clip.model.visual.image_size, **clip.preprocess_cfg}
        return image_transform_v2(PreprocessCfg(**{key: config[key] for key in known & set(config)}), is_train=False)

    @property
    def tokenizer(self) -> Any:
        """Texts -> int64 [texts, context], what `encode_text` takes."""
        return self._common().tokenizer

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Features of images, see the class.

        Args:
            image: float [n, 3, size, size], of `preprocess`.
            normalize: no matter: the features have length 1 anyway.

        Returns:
            float32 [n, sum of the models' dimensions].

        Raises:
            ModeError: the models take images of different sizes or normalisation.
        """
        del normalize
        self._common()
        return self._joined(self._encode_pixels(clip, image) for clip in self.clips.values())

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Features of texts, see the class.

        Args:
            text: int64 [n, context], of `tokenizer`.
            normalize: no matter: the features have length 1 anyway.

        Returns:
            float32 [n, sum of the models' dimensions].

        Raises:
            ModeError: the models have different text towers.
        """
        del normalize
        self._common()
        with self._autocast():
            encoded = [clip.model.encode_text(text.to(self.device)) for clip in self.clips.values()]
        return self._joined(F.normalize(vectors.float(), dim=-1) for vectors in encoded)

    def _joined(self, vectors: Any) -> Tensor:
        """Unit vectors of each model to the features of the class."""
        roots = [weight**0.5 for weight in self.per_model.values()]
        return torch.cat([root * each for root, each in zip(roots, vectors, strict=True)], dim=-1)

    def _encode_pixels(self, clip: Clip, batch: Tensor) -> Tensor:
        """Normalised pixels to unit vectors float32 [n, d]."""
        batch = batch.to(self.device, torch.bfloat16 if self.precision == "bf16" else torch.float32)
        with self._autocast():
            vectors: Tensor = clip.model.encode_image(batch)
        return F.normalize(vectors.float(), dim=-1)

    def _encode_images(self, images: Images) -> dict[str, Tensor]:
        """Model -> unit vectors float32 [n, d] of whatever `images` may be; each is decoded once."""
        parts: dict[str, list[Tensor]] = {
            name: [torch.empty(0, clip.model_cfg["embed_dim"], device=self.device)] for name, clip in self.clips.items()
        }
        if isinstance(images, Tensor) and images.is_floating_point():
            self._common()
            batches = torch.split(images[None] if images.ndim == 3 else images, self.batch_size)
            inputs = (dict.fromkeys(self.clips, batch) for batch in batches)
        else:
            inputs = self._read(images)
        with torch.inference_mode():
            for batch in inputs:
                for name, clip in self.clips.items():
                    parts[name].append(self._encode_pixels(clip, batch[name]))
        return {name: torch.cat(vectors) for name, vectors in parts.items()}

    def _read(self, images: Images) -> Any:
        """Batches of model -> normalised pixels; models with the same preprocessing share them."""
        geometries = {each.geometry: each.pixels for each in self._preprocesses.values()}
        for batch in batches_of_pixels(images, geometries, self.batch_size):
            on_device = {geometry: pixels.to(self.device) for geometry, pixels in batch.items()}
            normalised = {
                each.key: each.normalise(on_device[each.geometry])
                for each in {each.key: each for each in self._preprocesses.values()}.values()
            }
            yield {name: normalised[each.key] for name, each in self._preprocesses.items()}

    def _encode_prompts(self, prompts: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """Model -> unit vectors float32 [classes, d]."""
        with self._autocast():
            return {
                name: encode_prompts(clip, prompts, batch_size=self.batch_size, device=str(self.device), name=name)
                for name, clip in self.clips.items()
            }

    def _common(self) -> Clip:
        """Any of the models, after a check that all take the same input."""
        first = next(iter(self.clips.values()))
        if len({each.key for each in self._preprocesses.values()}) > 1:
            raise ModeError("the experts take images of different sizes or normalisation", "give images, not a tensor")
        if any(clip.model_cfg["text_cfg"] != first.model_cfg["text_cfg"] for clip in self.clips.values()):
            raise ModeError("the experts have different text towers", "use adapt() and retrieve(), which take texts")
        return first

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "amp" else nullcontext()


class Ensemble(JointEncoder):
    """A trained ensemble that is not adapted to a task yet; `adapt` does that.

    As an open_clip model it is the uniform average of its experts, for it knows no task; `adapt(classes)` gives one
    with the routing weights of these classes.

    Args:
        router: routes.
        models: expert -> its model; an expert that has none is stood in for by `seed`.
        device, precision, batch_size: as in `mode.load`.
    """

    def __init__(
        self,
        router: Router,
        models: Mapping[str, Clip],
        device: str | None = None,
        precision: Precision | None = None,
        batch_size: int | None = None,
    ) -> None:
        where = pick_device(device or "auto")
        on_gpu = where.type != "cpu"
        self.router, self.members = router, router.members(models)
        for model in set(self.members.values()):
            models[model].model.to(where)
        weights = self._per_model(uniform_weights(router.experts))
        chosen: Precision = precision or ("amp" if on_gpu else "fp32")
        super().__init__(models, weights, chosen, batch_size or (256 if on_gpu else 64))

    @classmethod
    def load(
        cls,
        router: Path,
        models: Mapping[str, Path],
        device: str | None = None,
        precision: Precision | None = None,
        batch_size: int | None = None,
    ) -> Ensemble:
        """From the folder of a saved router and model folders, of which only the needed ones are read.

        Raises:
            ModeError: a folder cannot be read, or an expert has neither a model nor the seed to stand in for it.
        """
        opened = Router.load(router)
        where = str(pick_device(device or "auto"))
        needed = dict.fromkeys(opened.members(models).values())
        clips = {name: load_model(models[name], where, "bf16" if precision == "bf16" else "fp32") for name in needed}
        return cls(opened, clips, where, precision, batch_size)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts."""
        return self.router.experts

    def adapt(
        self,
        classes: Sequence[str],
        templates: Sequence[str] | None = None,
        *,
        top_k: int | None = None,
        threshold: float | None = None,
        merge: Literal["weights"] | None = None,
        images: Images | None = None,
    ) -> TaskModel:
        """A zero-shot classifier for these classes.

        The routing weights follow from the words alone; class names are encoded here, once. Whatever is left out by
        `top_k` or `threshold` costs nothing afterwards, and `merge` leaves a single model.

        Args:
            classes: L names (or texts).
            templates: prompts, `{c}` in each is the place of the class name; default the bare name. A class's vector is
                the mean over its prompts.
            top_k: keep the experts with the largest weights, so many; their weights are scaled to sum 1.
            threshold: keep the fewest experts whose weights sum to at least this share (0 to 1); scaled likewise.
            merge: `weights`: average the parameters of the experts, by weight, into one model. They must have branched
                from one seed, as those of this pipeline do. Normalisation statistics (BatchNorm) cannot be averaged and
                are estimated anew.
            images: of `merge`, for that estimate: some hundred unlabelled images. Default: the training images kept
                with the ensemble, those of an expert in proportion to its weight. Not needed by models without
                BatchNorm, such as ViTs.

        Raises:
            ModeError: no classes or an empty one, a template without `{c}`, both or senseless `top_k` and `threshold`,
                or a merge of models that cannot be merged or lack images.

        Example:
            >>> ensemble = mode.load("models")
            >>> len(ensemble.adapt(["white chess king", "ace of hearts"], top_k=1).clips)
            1
            >>> task = ensemble.adapt(["white chess king", "ace of hearts"], ["a picture of {c}"], merge="weights")
            >>> task.save("kings-and-aces")           # an ordinary open_clip folder
        """
        prompts = _prompts(classes, templates)
        routed = self.router.weights(prompts)
        if top_k is not None and threshold is not None:
            raise ModeError("top_k and threshold both say which experts to keep", "give one of them")
        if top_k is not None:
            routed = keep_top(routed, top_k)
        if threshold is not None:
            routed = keep_share(routed, threshold)
        if images is not None and merge is None:
            raise ModeError("images are only used to merge experts", "add merge='weights', or leave them out")
        per_model = self._per_model(routed)
        clips = {name: self.clips[name] for name, weight in per_model.items() if weight > 0}
        if merge is not None:
            if merge != "weights":
                raise ModeError(f"merge: '{merge}' is unknown", "it may be 'weights'")
            clips, per_model = {MERGED: self._merged(clips, per_model, routed, images)}, {MERGED: 1.0}
        return TaskModel(tuple(classes), prompts, routed, clips, per_model, self)

    def retrieve(
        self, images: Images, texts: Sequence[str], query: Literal["together", "text", "image"] | None = None
    ) -> Tensor:
        """Similarities of images and texts.

        Args:
            images: n of them, see `TaskModel.forward`.
            texts: m of them.
            query: what the experts are weighed by. `together`: by all the texts, once; `text`: for each text by itself,
                to rank the images for a text; `image`: for each image by itself, to rank the texts for an image
                (`QueryWeights`). Default: `together` or `text`, as `routing.retrieval` of the ensemble says.

        Returns:
            float32 [n, m], weighted sums of cosine similarities. Row i ranks the texts for image i, unless `query` is
            `text`; column j ranks the images for text j, unless it is `image`.

        Example:
            >>> ensemble = mode.load("models")
            >>> similarities = ensemble.retrieve(["king.png", "ace.png"], ["a king", "two aces", "an ace"])
            >>> best_image_of_each_text = similarities.argmax(dim=0)
            >>> best_image_of_each_text.shape
            torch.Size([3])
        """
        task = self.adapt(texts)
        if query is None:
            query = "text" if self.router.routing.by_query else "together"
        if query == "together":
            return task.scores(images)
        found = {name: scores.cpu().numpy() for name, scores in task.similarities(images).items()}
        weights = query_weights(self.router, self.members, texts, task.per_model, self.clips)
        if query == "image":
            return torch.from_numpy(weights.of_images(0, found)).to(self.device)
        return torch.from_numpy(weights.of_texts(0, {name: s.T for name, s in found.items()})).T.to(self.device)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As open_clip's: features of images and texts, and the factor from their inner products to logits."""
        return self.encode_image(image), self.encode_text(text), self.logit_scale.exp()

    def _per_model(self, routed: Mapping[str, float]) -> dict[str, float]:
        """Weights by model: a model that stands in for several experts has the sum of theirs."""
        return by_model(self.members, routed, 0.0)

    def _merged(
        self,
        clips: Mapping[str, Clip],
        per_model: Mapping[str, float],
        routed: Mapping[str, float],
        images: Images | None,
    ) -> Clip:
        """The experts' parameters averaged, with statistics of `images` or of the kept training images."""
        preprocess = Preprocess(next(iter(clips.values())))
        pixels = torch.empty(0)
        if has_statistics(clips.values()):
            if images is None:
                pixels = draw_images(self.router.images, routed)
            else:
                read = batches_of_pixels(images, {preprocess.geometry: preprocess.pixels}, self.batch_size)
                pixels = torch.cat([pixels, *(batch[preprocess.geometry] for batch in read)])
        batches = (preprocess.normalise(batch.to(self.device)) for batch in even_batches(pixels, self.batch_size))
        return merge_models(clips, per_model, batches)


class TaskModel(JointEncoder):
    """An ensemble adapted to classes (`Ensemble.adapt`): images in, probabilities out.

    As an open_clip model it has the task's routing weights.

    Attributes:
        classes: L names.
        weights: routing weight of each expert; 0 for those that are left out.
    """

    def __init__(
        self,
        classes: tuple[str, ...],
        prompts: list[list[str]],
        weights: dict[str, float],
        clips: Mapping[str, Clip],
        per_model: Mapping[str, float],
        ensemble: Ensemble,
    ) -> None:
        super().__init__(clips, per_model, ensemble.precision, ensemble.batch_size)
        self.classes, self.weights = classes, weights
        self._columns = self._encode_prompts(prompts)

    def forward(self, images: Images) -> Tensor:
        """Probabilities of the classes.

        The softmax of the ensemble's cosine similarities, which is a routing-weighted sum of the experts', times the
        routing-weighted mean of the experts' logit scales. The scale changes no answer, only how sure it sounds.

        Args:
            images: a path, an encoded image (bytes), a PIL image, a uint8 array [height, width, 3], or a sequence of
                these; a uint8 array [n, height, width, 3]; or float [n, 3, size, size], made by `preprocess`.

        Returns:
            float32 [n, L] on the model's device, rows of sum 1; one image has n = 1.

        Raises:
            ModeError: an image that cannot be decoded (named by its path or number).

        Example:
            >>> task = mode.load("models").adapt(["white chess king", "black chess king"])
            >>> task(["king.png", Image.open("ace.png"), np.zeros((40, 30, 3), np.uint8)]).sum(dim=1).round().tolist()
            [1.0, 1.0, 1.0]
        """
        return F.softmax(self.logit_scale.exp() * self.scores(images), dim=1)

    def scores(self, images: Images) -> Tensor:
        """The ensemble's cosine similarities float32 [n, L], without scale or softmax; `images` as in `forward`."""
        return self._weighted(self._encode_images(images), self._columns)

    def similarities(self, images: Images) -> dict[str, Tensor]:
        """Each model's own cosine similarities, model -> float32 [n, L]; `images` as in `forward`."""
        rows = self._encode_images(images)
        return {name: rows[name] @ self._columns[name].to(self.device).T for name in self.clips}

    def opinions(self, images: Images) -> dict[str, Tensor]:
        """Each model's own probabilities, model -> float32 [n, L], with its own logit scale."""
        opinions = {}
        for name, cosines in self.similarities(images).items():
            opinions[name] = F.softmax(self.clips[name].model.logit_scale.detach().exp().float() * cosines, dim=1)
        return opinions

    def labels(self, images: Images) -> list[str]:
        """The most probable class of each image."""
        return [self.classes[column] for column in self.scores(images).argmax(dim=1).tolist()]

    def retrieve(self, images: Images, texts: Sequence[str]) -> Tensor:
        """Similarities of images and texts, with this task's weights (`Ensemble.retrieve`: with the texts' own).

        Args:
            images: n of them, as in `forward`.
            texts: m of them.

        Returns:
            float32 [n, m]: row i ranks the texts for image i, column j the images for text j.
        """
        return self._weighted(self._encode_images(images), self._encode_prompts([[text] for text in texts]))

    def save(self, folder: str | Path) -> None:
        """Write a merged model as a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` opens.

        Raises:
            ModeError: the task still has several models.
        """
        if len(self.clips) > 1:
            raise ModeError("a task of several experts is no single model", "adapt(..., merge='weights') makes one")
        [(name, clip)] = self.clips.items()
        card = {"name": name, "merged_from": self.weights, "classes": list(self.classes)}
        with write_aside(Path(folder)) as temporary:
            write_model_files(temporary, clip, card)

    def _weighted(self, rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> Tensor:
        count = len(next(iter(columns.values())))
        total = torch.zeros(len(next(iter(rows.values()))), count, device=self.device)
        for name, weight in self.per_model.items():
            if count:
                total += weight * (rows[name] @ columns[name].to(self.device).T)
        return total


def query_weights(
    router: Router,
    members: Mapping[str, str],
    texts: Sequence[str],
    task: Mapping[str, float],
    clips: Mapping[str, Clip],
) -> QueryWeights:
    """Weights of every query of a retrieval task.

    Args:
        router: routes.
        members: expert -> the model that answers for it.
        texts: of the task.
        task: model -> its weight in the task as a whole.
        clips: name -> model.
    """
    factor = sum(weight * clips[name].model.logit_scale.exp().item() for name, weight in task.items())
    return QueryWeights(task, by_model(members, router.text_weights(texts), np.zeros(len(texts))), factor)


def by_model(members: Mapping[str, str], routed: Mapping[str, Weight], zero: Weight) -> dict[str, Weight]:
    """Weights by model from weights by expert: a model that stands in for several experts has the sum of theirs."""
    weights = dict.fromkeys(members.values(), zero)
    for expert, weight in routed.items():
        weights[members[expert]] = weights[members[expert]] + weight
    return weights


def find_folders(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The router's folder and the model folders beside it.

    Args:
        folder: the router's, or the one that holds it as `ensemble`.

    Raises:
        ModeError: neither.
    """
    for router in (folder, folder / "ensemble"):
        if Router.is_saved_in(router):
            models = router.resolve().parent
            return router, {path.parent.name: path.parent for path in sorted(models.glob(f"*/{CONFIG}"))}
    raise ModeError(f"{folder}: no ensemble there", "give the folder `models` of a finished run; `dvc repro` makes it")


def _prompts(classes: Sequence[str], templates: Sequence[str] | None) -> list[list[str]]:
    """The prompts of each class."""
    if isinstance(classes, str) or isinstance(templates, str):
        raise ModeError("classes and templates are lists of texts, not one text", "put it into [ ]")
    if not classes or not all(name.strip() for name in classes):
        raise ModeError("classes: needs at least one name, and none of them empty")
    templates = templates or TEMPLATES
    if bad := next((text for text in templates if "{c}" not in text), None):
        raise ModeError(f"templates: '{bad}' has no {{c}}", "it goes where the class name goes")
    return [[template.replace("{c}", name) for template in templates] for name in classes]
