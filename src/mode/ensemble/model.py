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
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mode.clip.device import Precision, fastest_precision, pick_device
from mode.clip.folder import is_model
from mode.clip.model import Clip, folded, load_models, save_model
from mode.clip.preprocess import Preprocess
from mode.ensemble.combine import by_model, combine, logit_scales, query_weights
from mode.ensemble.encoder import JointEncoder
from mode.ensemble.images import Images, rgb_batches
from mode.ensemble.merge import Merge, even_batches, merge_models, merge_on_kept, statistics_layers
from mode.ensemble.router import DESCRIPTION, Router
from mode.ensemble.rules import keep_share, keep_top, uniform_weights
from mode.errors import ModeError
from mode.roles import ENSEMBLE

#: What a class name is put into where no templates are given; `{c}` is its place.
TEMPLATES = ("{c}",)


class Ensemble(JointEncoder):
    """A trained ensemble that is not adapted to a task yet; `adapt` does that.

    As an open_clip model it is the uniform average of its experts, for it knows no task; `adapt(classes)` gives one
    with the routing weights of these classes.

    Args:
        router: weighs the experts for a task.
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
        batch_size = batch_size or (64 if where.type == "cpu" else 256)
        self.router, self.members = router, router.members(models)
        weights = by_model(self.members, uniform_weights(router.experts))
        super().__init__(models, weights, precision or fastest_precision(where), batch_size)
        self.to(where)

    @classmethod
    def load(
        cls,
        router: Path,
        models: Mapping[str, Path],
        device: str | None = None,
        precision: Precision | None = None,
        batch_size: int | None = None,
    ) -> Ensemble:
        """Open the folder that `Router.save` wrote and those model folders that are needed, else as the class.

        Raises:
            ModeError: a folder cannot be read, or an expert has neither a model nor the seed to stand in for it.
        """
        opened = Router.load(router)
        where = str(pick_device(device or "auto"))
        needed = dict.fromkeys(opened.members(models).values())
        folders = {name: models[name] for name in needed}
        clips = load_models(folders, where, "bf16" if precision == "bf16" else "fp32")
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
        merge: Merge | None = None,
        density: float | None = None,
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
            merge: `weights`: average the parameters of the experts, by weight, into one model, in which adapters are
                folded. They must have branched from one seed, as those of this pipeline do. Normalisation statistics
                (BatchNorm) cannot be averaged and are estimated anew. `ties`, `dare`: of experts that are adapters,
                thin their changes of the seed out first (`mode.ensemble.merge.combine_deltas`).
            density: of `ties` and `dare`: the share of each change that is kept; default 0.2 and 0.5.
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
        if density is not None and merge not in ("ties", "dare"):
            raise ModeError("density is only used to merge by ties or dare", "add merge='ties', or leave it out")
        if images is not None and merge is None:
            raise ModeError("images are only used to merge experts", "add merge='weights', or leave them out")
        per_model = by_model(self.members, routed)
        clips = {name: self.clips[name] for name, weight in per_model.items() if weight > 0}
        if merge is not None:
            clips = {"merged": self._merged(clips, per_model, routed, images, merge, density)}
            per_model = {"merged": 1.0}
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
                (`QueryWeights`). Default, as the router's `routing.retrieval` says: `together`, or with `query` and
                `paper` `text`. To rank texts for an image by the paper's protocol, ask for `together`.

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
        if query is None:
            query = "together" if self.router.routing.protocol == "together" else "text"
        if query == "together":
            return self.adapt(texts).scores(images)
        prompts = _prompts(texts, None)
        routed = self.router.weights(prompts)
        # All models: one that has no weight in the task as a whole may have it in a text.
        task = TaskModel(tuple(texts), prompts, routed, self.clips, self.per_model, self)
        found = {name: scores.cpu().numpy() for name, scores in task.similarities(images).items()}
        weights = query_weights(
            self.router, self.members, texts, by_model(self.members, routed), logit_scales(self.clips)
        )
        if query == "image":
            return torch.from_numpy(weights.of_images(0, found)).to(self.device)
        return torch.from_numpy(weights.of_texts(0, {name: s.T for name, s in found.items()})).T.to(self.device)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As open_clip's: features of images and texts, and the factor from their inner products to logits."""
        return self.encode_image(image), self.encode_text(text), self.logit_scale.exp()

    def _merged(
        self,
        clips: dict[str, Clip],
        per_model: dict[str, float],
        routed: dict[str, float],
        images: Images | None,
        how: Merge,
        density: float | None,
    ) -> Clip:
        """The experts' parameters averaged, with statistics of `images` or of the kept training images."""
        if images is None:
            return merge_on_kept(clips, per_model, self.router.images, routed, self.batch_size, how, density)
        preprocess = Preprocess(next(iter(clips.values())))
        pixels = torch.empty(0)
        if any(statistics_layers(clip.model) for clip in clips.values()):
            read = [preprocess.pixels(image) for batch in rgb_batches(images, self.batch_size) for image in batch]
            pixels = torch.stack(read) if read else torch.empty(0)
        batches = (preprocess.normalise(batch.to(self.device)) for batch in even_batches(pixels, self.batch_size))
        return merge_models(clips, per_model, batches, how, density)


class TaskModel(JointEncoder):
    """An ensemble adapted to classes (made by `Ensemble.adapt`): images in, probabilities out.

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
        return combine(self.similarities(images), self.per_model)

    def similarities(self, images: Images) -> dict[str, Tensor]:
        """Each model's own cosine similarities, model -> float32 [n, L]; `images` as in `forward`."""
        return self._cosines(images, self._columns)

    def opinions(self, images: Images) -> dict[str, Tensor]:
        """Each model's own probabilities, model -> float32 [n, L], with its own logit scale."""
        factors = {name: clip.model.logit_scale.detach().exp().float() for name, clip in self.clips.items()}
        return {name: F.softmax(factors[name] * each, dim=1) for name, each in self.similarities(images).items()}

    def labels(self, images: Images) -> list[str]:
        """The most probable class of each image."""
        return [self.classes[column] for column in self.scores(images).argmax(dim=1).tolist()]

    def retrieve(self, images: Images, texts: Sequence[str]) -> Tensor:
        """Similarities float32 [images, texts], with this task's weights (`Ensemble.retrieve`: with the texts' own)."""
        return combine(self._cosines(images, self._encode_prompts([[text] for text in texts])), self.per_model)

    def save(self, folder: str | Path) -> None:
        """Write a merged model as a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` opens.

        Raises `ModeError` if the task still has several models.
        """
        if len(self.clips) > 1:
            raise ModeError("a task of several experts is no single model", "adapt(..., merge='weights') makes one")
        [(name, clip)] = self.clips.items()
        save_model(
            Path(folder), folded(clip), {"name": name, "merged_from": self.weights, "classes": list(self.classes)}
        )

    def _cosines(self, images: Images, texts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Model -> cosines [images, texts]; `texts`: model -> unit vectors."""
        return {name: rows @ texts[name].to(self.device).T for name, rows in self._encode_images(images).items()}


def find_folders(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The folder of the saved router, and name -> folder of the models beside it.

    `folder` is the router's, or the one that holds it as `ensemble`. Raises `ModeError` if it is neither.
    """
    for router in (folder, folder / ENSEMBLE.name):
        if (router / DESCRIPTION).is_file():
            models = router.resolve().parent
            return router, {path.name: path for path in sorted(models.glob("*/")) if is_model(path)}
    raise ModeError(f"{folder}: no ensemble there", "give the folder `models` of a finished run; `dvc repro` makes it")


def _prompts(classes: Sequence[str], templates: Sequence[str] | None) -> list[list[str]]:
    if isinstance(classes, str) or isinstance(templates, str):
        raise ModeError("classes and templates are lists of texts, not one text", "put it into [ ]")
    if not classes or not all(name.strip() for name in classes):
        raise ModeError("classes: needs at least one name, and none of them empty")
    templates = templates or TEMPLATES
    if bad := next((text for text in templates if "{c}" not in text), None):
        raise ModeError(f"templates: '{bad}' has no {{c}}", "it goes where the class name goes")
    return [[template.replace("{c}", name) for template in templates] for name in classes]
