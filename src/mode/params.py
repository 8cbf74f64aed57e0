"""`params.yaml` as checked, frozen models: the one door for every number of a run.

Unknown keys and wrong types are refused with the path of the key, so that a typo never becomes a silent default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mode.errors import ModeError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]

#: Models that a run trains besides its experts; an expert may not take one of these names.
RESERVED_MODELS = ("seed", "dense", "dense-long", "uniform", "ensemble")


class Section(BaseModel):
    """A part of `params.yaml`: immutable, unknown keys refused, no conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SourceParams(Section):
    """One source of image-caption pairs. Each is indexed, embedded and clustered by itself.

    Attributes:
        shards: `glyphs` (the built-in data), or a folder of tars, a glob of tars, or a csv / tsv / parquet table of
            (image path, caption); or tars by URL: one, a range `{000..999}`, a prefix, a glob; or a `.txt` that lists
            paths and URLs.
        checksum: notice a changed shard by its content as well as by size and modification time (reads every byte).
        image_column, caption_column: columns of a table; ignored for tars.
        fine, coarse: numbers of clusters for this source; default those of `clustering`.
    """

    shards: str
    checksum: bool = False
    image_column: str = "image"
    caption_column: str = "caption"
    fine: PositiveInt | None = None
    coarse: PositiveInt | None = None


class GlyphParams(Section):
    """The built-in data set (see `mode.data.glyphs`).

    Attributes:
        pairs: training pairs to draw.
        shard_pairs: pairs in one tar.
        image_size: pixels a side.
        test_images: images per class in the evaluation tasks, drawn in a font that training never sees.
        noise_share: share of captions replaced by web noise such as "click here to view image".
        dropped_word_share: share of captions that lose one word.
    """

    pairs: PositiveInt = 60_000
    shard_pairs: PositiveInt = 5_000
    image_size: PositiveInt = 32
    test_images: PositiveInt = 8
    noise_share: Share = 0.1
    dropped_word_share: Share = 0.2


class IndexParams(Section):
    """Reading shards.

    Attributes:
        max_bad_share: largest share of bad members before the stage stops.
        check_images: decode every image once, so that an undecodable one is found before training; without it the
            loader counts and replaces it when it meets it.
    """

    max_bad_share: Share = 0.05
    check_images: bool = True


class EmbeddingParams(Section):
    """Captions to unit vectors.

    Attributes:
        kind: `lsa` (TF-IDF and SVD, needs no weights), `transformers` (any Hugging Face encoder) or `open_clip` (a text
            tower).
        name: a Hugging Face name or local folder; for `open_clip` a `MODEL:PRETRAINED` tag or a model folder.
        fit_on: the source whose captions `lsa` is fitted on.
        sample: captions used for the fit, at most.
        dimensions: of the `lsa` vectors.
        pooling: of `transformers`: `cls` (the first token's last state), `mean` (over tokens) or `pooler` (the model's
            own output, which the paper's published code takes from SimCSE).
        batch_size: captions in one forward pass.
        max_tokens: tokens after which a caption is cut.
        device: `auto`, `cpu`, `cuda`, `cuda:1` ...
    """

    kind: Literal["lsa", "transformers", "open_clip"] = "lsa"
    name: str | None = None
    fit_on: str = "base"
    sample: PositiveInt = 200_000
    dimensions: PositiveInt = 64
    pooling: Literal["cls", "mean", "pooler"] = "cls"
    batch_size: PositiveInt = 256
    max_tokens: PositiveInt = 77
    device: str = "auto"

    @model_validator(mode="after")
    def _needs_name(self) -> EmbeddingParams:
        if self.kind != "lsa" and not self.name:
            raise ValueError(f"kind '{self.kind}' needs `name`: which encoder to load")
        return self


class ClusteringParams(Section):
    """Two levels of balanced k-means (paper, section 3.2).

    Attributes:
        strategy: `two-level`; `one-step` (k-means straight into `coarse` clusters) and `random` are for comparison.
        fine, coarse: m and n.
        balance: the largest cluster, as a multiple of the mean, on the fitted vectors.
        sample: vectors used for the fit, at most.
        iterations: of Lloyd's algorithm, at most.
    """

    strategy: Literal["two-level", "one-step", "random"] = "two-level"
    fine: PositiveInt = 64
    coarse: PositiveInt = 4
    balance: Annotated[float, Field(ge=1.0)] = 1.1
    sample: PositiveInt = 1_000_000
    iterations: PositiveInt = 20

    @model_validator(mode="after")
    def _coarse_fits_fine(self) -> ClusteringParams:
        if self.coarse > self.fine:
            raise ValueError(f"coarse ({self.coarse}) exceeds fine ({self.fine}): a coarse cluster needs a fine centre")
        return self


class ExpertParams(Section):
    """One data expert.

    Attributes:
        source: the source whose coarse cluster it is trained on.
        cluster: number of that coarse cluster, from 0.
        epochs, lr, outside_share: this expert's own values in place of those of `training`.
    """

    source: str = "base"
    cluster: Annotated[int, Field(ge=0)]
    epochs: PositiveInt | None = None
    lr: PositiveFloat | None = None
    outside_share: Share | None = None


class ModelParams(Section):
    """The CLIP that every role trains.

    Attributes:
        name: an open_clip model name such as `ViT-B-32`, or the path of a configuration file of one's own; or
        config: the configuration itself (`embed_dim`, `vision_cfg`, `text_cfg`), as open_clip defines it.
        tokenizer: `words` (a vocabulary learnt from the training captions, for small models) or `model` (the one that
            open_clip pairs with the model).
        vocabulary: words kept, most frequent first.
    """

    name: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: Literal["words", "model"] = "model"
    vocabulary: PositiveInt = 8_000

    @model_validator(mode="after")
    def _one_of_name_and_config(self) -> ModelParams:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` or `config`")
        return self


class ImageParams(Section):
    """How an image becomes a tensor.

    Attributes:
        size: pixels a side; the shorter side is resized to it (bicubic) and the centre is cut out.
        mean, std: per channel, for the normalisation; default open_clip's (OpenAI's).
        crop_scale: training cuts a random area of at least this share out of the image; `null` for none (needed for
            decoded images to be kept in memory).
        flip: mirror half of the training images.
        shift: pixels by which a training image is moved at random, either way.
        decode: how training images are decoded and resized: `fast` (JPEGs with torch: one value in some 200 differs by
            1 in 255 from open_clip's), `exact` (bit for bit as open_clip, three times as long) or `gpu` (JPEGs decoded
            and resized on the GPU, by the training process itself; `fast` where there is none).
    """

    size: PositiveInt = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    crop_scale: Share | None = None
    flip: bool = False
    shift: Annotated[int, Field(ge=0)] = 0
    decode: Literal["fast", "exact", "gpu"] = "fast"


class TrainingParams(Section):
    """One recipe for seed, dense models and experts (paper, section 4.1).

    Attributes:
        source: the source whose pairs train the seed and the dense models.
        epoch_samples: samples of one epoch, for every role; `null`: as many as there are training images.
        epochs: of the dense model.
        seed_epochs: after which experts branch off; an expert trains for `epochs - seed_epochs`.
        outside_share: share of the pairs *outside* its cluster that an expert also sees.
        held_out: images of each source, drawn by `random_seed`, whose pairs no model is trained on: routing rules are
            compared on them without a test label (benchmarks/routing.py).
        dense_long: also train one dense model for as many samples as seed and experts together.
        batch_size: of one optimiser step, over all processes and accumulation steps.
        accumulate: forward passes in one step.
        lr: at its highest; betas, eps, weight_decay: of AdamW.
        warmup: steps of linear warm-up.
        schedule: `wsd` (constant until the branch, then linear to 0) or `cosine` (over all epochs).
        clip_norm: largest gradient norm, `null` for no clipping.
        precision: `fp32`, `bf16` (weights and activations) or `amp` (bfloat16 autocast).
        compile: run both towers through `torch.compile`, which fuses what a GPU would do one by one. It takes minutes
            at the start, needs a C++ compiler, and rounds differently.
        workers: processes that read and decode; 0 reads in the training process.
        cache_mb: decoded images are kept in memory if they all fit into this many MiB.
        checkpoint_minutes: time between checkpoints.
        device: `auto`, `cpu`, `cuda`, `cuda:1` ...
        threads: of torch on the CPU. Sums in another number of threads round differently, so a fixed number gives the
            same bits alone and side by side; `null`: the share that a flow gives, or torch's own choice.
    """

    source: str = "base"
    epoch_samples: PositiveInt | None = None
    epochs: PositiveInt = 32
    seed_epochs: PositiveInt = 27
    outside_share: Share = 0.02
    held_out: Annotated[int, Field(ge=0)] = 0
    dense_long: bool = True
    batch_size: PositiveInt = 128
    accumulate: PositiveInt = 1
    lr: PositiveFloat = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.2
    warmup: Annotated[int, Field(ge=0)] = 2_000
    schedule: Literal["wsd", "cosine"] = "wsd"
    clip_norm: PositiveFloat | None = 1.0
    precision: Literal["fp32", "bf16", "amp"] = "fp32"
    compile: bool = False
    workers: Annotated[int, Field(ge=0)] = 0
    cache_mb: Annotated[int, Field(ge=0)] = 1_024
    checkpoint_minutes: PositiveFloat = 1.0
    device: str = "auto"
    threads: PositiveInt | None = None

    @model_validator(mode="after")
    def _seed_before_end(self) -> TrainingParams:
        if self.seed_epochs >= self.epochs:
            raise ValueError(f"seed_epochs ({self.seed_epochs}) must be smaller than epochs ({self.epochs})")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size ({self.batch_size}) is not a multiple of accumulate ({self.accumulate})")
        return self


class RoutingParams(Section):
    """How a task's words become a weight per expert (see `mode.ensemble.rules`).

    Attributes:
        kind: `calibrated` (scale-free; its temperature comes from the training captions), `published` (the reference
            formula) or `paper` (softmax of summed affinities).
        divisor: of `published`: w / divisor goes into the softmax.
        bandwidth: lambda of `paper`.
        calibration_captions: training captions that set the temperature of `calibrated`.
        retrieval: `together` (a retrieval task is routed by all its texts) or `query` (every text and image by itself;
            needs `calibrated`); default `query` with `calibrated`, else `together`.
    """

    kind: Literal["calibrated", "published", "paper"] = "calibrated"
    divisor: PositiveFloat = 8.0
    bandwidth: PositiveFloat = 1.0
    calibration_captions: PositiveInt = 4_096
    retrieval: Literal["together", "query"] | None = None

    @model_validator(mode="after")
    def _query_needs_probabilities(self) -> RoutingParams:
        if self.retrieval == "query" and self.kind != "calibrated":
            raise ValueError(f"retrieval 'query' needs kind 'calibrated', not '{self.kind}'")
        return self

    @property
    def by_query(self) -> bool:
        """Whether every text and image of a retrieval task weighs the experts by itself."""
        return self.kind == "calibrated" and self.retrieval != "together"


class EvaluationParams(Section):
    """Evaluation.

    Attributes:
        tasks: `glyphs`, or folders in CLIP_benchmark's webdataset layout.
        batch_size: images in one forward pass.
        workers: threads that decode images.
        device: `auto`, `cpu`, `cuda` ...
    """

    tasks: Literal["glyphs"] | list[str] = "glyphs"
    batch_size: PositiveInt = 256
    workers: Annotated[int, Field(ge=0)] = 2
    device: str = "auto"


class Params(Section):
    """All of `params.yaml`."""

    random_seed: Annotated[int, Field(ge=0)] = 0
    sources: dict[Name, SourceParams]
    experts: dict[Name, ExpertParams]
    model: ModelParams
    glyphs: GlyphParams = GlyphParams()
    index: IndexParams = IndexParams()
    embedding: EmbeddingParams = EmbeddingParams()
    clustering: ClusteringParams = ClusteringParams()
    image: ImageParams = ImageParams()
    training: TrainingParams = TrainingParams()
    routing: RoutingParams = RoutingParams()
    evaluation: EvaluationParams = EvaluationParams()

    @model_validator(mode="after")
    def _names_agree(self) -> Params:
        if not self.sources:
            raise ValueError("sources: at least one is needed")
        if self.embedding.fit_on not in self.sources:
            raise ValueError(f"embedding.fit_on: no source is called '{self.embedding.fit_on}'")
        if self.training.source not in self.sources:
            raise ValueError(f"training.source: no source is called '{self.training.source}'")
        for name, source in self.sources.items():
            fine, coarse = self.clusters_of(name)
            if coarse > fine:
                raise ValueError(f"sources.{name}: coarse ({coarse}) exceeds fine ({fine}) of {source.shards}")
        taken: dict[tuple[str, int], str] = {}
        for name, expert in self.experts.items():
            if name in RESERVED_MODELS:
                raise ValueError(f"experts.{name}: that name belongs to another model")
            if expert.source not in self.sources:
                raise ValueError(f"experts.{name}.source: no source is called '{expert.source}'")
            coarse = self.clusters_of(expert.source)[1]
            if expert.cluster >= coarse:
                raise ValueError(
                    f"experts.{name}.cluster: {expert.cluster}, but source '{expert.source}' has {coarse} coarse"
                    f" clusters (0 to {coarse - 1}): fewer experts, or a larger clustering.coarse"
                )
            other = taken.setdefault((expert.source, expert.cluster), name)
            if other != name:
                raise ValueError(f"experts.{name}: '{other}' already has cluster {expert.cluster} of '{expert.source}'")
        return self

    def clusters_of(self, source: str) -> tuple[int, int]:
        """(fine, coarse) of a source: its own numbers, or those of `clustering`."""
        own = self.sources[source]
        return own.fine or self.clustering.fine, own.coarse or self.clustering.coarse


def load_params(path: Path) -> Params:
    """Read and check `params.yaml`.

    Raises:
        ModeError: the file is missing, is not YAML, or a key is unknown, missing or of the wrong type.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModeError(f"{path}: no such file", "run inside the project, where params.yaml lies") from None
    except yaml.YAMLError as error:
        raise ModeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return parse_params(content, str(path))


def parse_params(content: object, where: str = "params.yaml") -> Params:
    """Check parsed YAML; `where` names it in errors. Raises `ModeError` as `load_params` does."""
    try:
        return Params.model_validate(_tuples(content))
    except ValidationError as error:
        raise ModeError("; ".join(_describe(where, fault) for fault in error.errors())) from None


def _tuples(content: object) -> object:
    """YAML has no tuples, and strict models accept nothing else for one."""
    if not isinstance(content, dict):
        return content
    tupled = {"image": ("mean", "std"), "training": ("betas",)}
    copy = dict(content)
    for section, keys in tupled.items():
        if isinstance(copy.get(section), dict):
            copy[section] = {
                key: tuple(value) if key in keys and isinstance(value, list) else value
                for key, value in copy[section].items()
            }
    return copy


def _describe(where: str, fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{where}: {key}: unknown parameter"
    if fault["type"] == "missing":
        return f"{where}: {key}: missing"
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if fault["type"] == "value_error" else f", not {fault['input']!r}"
    return f"{where}: {key}: {message}{given}" if key else f"{where}: {message}"
