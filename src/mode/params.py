"""`params.yaml` as checked, frozen models: the one door for every number of a run.

A section belongs to the stages that read it, and dvc.yaml names whole sections: whatever is in one decides what its
stages make. What only says where and how fast they run is in `machine:`, which no stage depends on; each of its keys
can be overridden by one environment variable, `MODE_` and the key in capitals.

Unknown keys and wrong types are refused with the path of the key, so that a typo never becomes a silent default. The
text below a field explains it to people: `mode params` prints it.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from mode.errors import ModeError, in_one_line
from mode.roles import DENSE_LONG, EXPERT, FULL, ROLES, SEED, TRAINED, UPDATE, Role

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
#: YAML has no tuples: a list stands for one.
Decays = Annotated[tuple[Decay, Decay], Field(strict=False)]
Pair = Annotated[tuple[float, float], Field(strict=False)]
Triple = Annotated[tuple[float, float, float], Field(strict=False)]
PositiveTriple = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], Field(strict=False)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
#: What Slurm calls a partition, an account, a feature; and a generic resource, perhaps with its kind: `gpu:a100`.
SlurmName = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=64)]
SlurmResource = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(:[A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=64)
]
#: How often a pass over the data shows an image; at a thousand the order of a pass would fill the memory.
Factor = Annotated[float, Field(gt=0.0, le=1_000.0)]

#: What of a pair is embedded.
View = Literal["text", "image", "both"]

#: The seed's folder, as parameters name it.
SEED_MODEL = f"models/{SEED.name}"

#: How names of files with weights end; a tag of open_clip ends otherwise.
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")

#: Keys of earlier versions, and where they went.
MOVED = {
    "embedding.fit_on": "embedding.made_from",
    "embedding.device": "machine.device",
    "embedding.batch_size": "machine.inference_batch",
    "training.device": "machine.device",
    "training.threads": "machine.threads",
    "training.workers": "machine.workers",
    "training.cache_mb": "machine.cache_mb",
    "training.checkpoint_minutes": "machine.checkpoint_minutes",
    "training.outside_share": "branch.outside_share",
    "training.dense_long": "baselines.dense_long",
    "evaluation.batch_size": "machine.inference_batch",
    "evaluation.workers": "machine.decode_threads",
    "evaluation.device": "machine.device",
}

#: What other trainers call a parameter: open_clip, Hugging Face's.
CALLED = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "accum_freq": "accumulate",
    "gradient_accumulation_steps": "accumulate",
    "grad_clip_norm": "clip_norm",
    "max_grad_norm": "clip_norm",
    "lr_scheduler": "schedule",
    "warmup_steps": "warmup",
    "num_workers": "workers",
    "train_num_samples": "epoch_samples",
}
#: What to do without a params.yaml.
_NEW = "`mode init FOLDER` writes a whole one"

#: What reading YAML raises; ValueError: it is no UTF-8, or a date that there is not.
_NO_YAML = (yaml.YAMLError, ValueError, RecursionError)
#: A number that PyYAML takes for a text, because it has no point or its exponent has no sign.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _may_be_float(annotation: Any) -> bool:
    return annotation is float or any(map(_may_be_float, get_args(annotation)))


class Section(BaseModel):
    """A part of `params.yaml`: immutable, unknown keys and numbers that are not finite refused, no conversion between
    types.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        serialize_by_alias=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: object, info: ValidationInfo) -> object:
        """`1e-4`: a number to YAML 1.2, and so to DVC, but a text to PyYAML, which reads YAML 1.1."""
        if isinstance(value, str) and _may_be_float(cls.model_fields[info.field_name or ""].annotation):
            return float(value) if _EXPONENT.fullmatch(value) else value
        return value


class Comparison(NamedTuple):
    """A filter: what is kept has a value in `column` that is >=, >, <=, <, == or != `value`."""

    column: str
    sign: str
    value: float | str


_COMPARISON = re.compile(r"\s*([^<>=!]*[^<>=!\s])\s*(>=|<=|==|!=|>|<)\s*(\S.*?)\s*", re.DOTALL)


def parse_comparison(text: str) -> Comparison:
    """A filter of `sources.NAME.filters`.

    Raises:
        ValueError: it is none, or compares the size of something that is not a number.

    Example:
        >>> parse_comparison("similarity >= 0.3")
        Comparison(column='similarity', sign='>=', value=0.3)
    """
    found = _COMPARISON.fullmatch(text)
    if not found:
        raise ValueError(f"'{text}' is no filter: write COLUMN >= NUMBER (or >, <=, <), COLUMN == VALUE (or !=)")
    column, sign, value = found.groups()
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return Comparison(column, sign, number)
    if sign not in ("==", "!="):
        raise ValueError(f"'{text}' is no filter: '{value}' is not a number")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return Comparison(column, sign, value[1:-1] if quoted else value)


class SourceParams(Section):
    """One source of image-caption pairs. Each is indexed, embedded and clustered by itself."""

    shards: str | dict[str, Factor]
    """`glyphs` (the built-in data); or a folder of tars, a glob of tars, or a csv, tsv or parquet table of image paths
    and captions; or tars by URL: one, a range `{000..999}`, a prefix, a glob; or a `.txt` that lists paths and URLs.
    Or several sets of tars, each with how often a pass over the data shows its images: `{/data/web: 1, /my/own: 2}`."""
    checksum: bool = False
    """Tell shards by their content in place of size and modification time: reads every byte at each `dvc repro`, and a
    copy, or a data set that was downloaded once more, trains nothing anew."""
    image_column: str = "image"
    """Column of a table that holds image paths; tars have none."""
    caption_column: str = "caption"
    """Column of a table that holds captions; tars have none."""
    filters: list[str] = []
    """Images of tars to keep: those that meet all of these, such as `similarity >= 0.3`, `NSFW == UNLIKELY`. Values
    come from the parquet beside each tar (img2dataset's), or where no tar has one, from the json of each image."""
    captions: dict[str, Annotated[float, Field(gt=0.0, le=1.0)]] | None = None
    """Where captions of tars stand, and how probable it is that a training sample takes one from there: `txt` is the
    txt, any other a key of the json, such as `{caption: 0.5, synthetic: 0.5}`. `null`: the json's `texts`, or else the
    txt, or else the json's `caption`, all of an image's captions alike."""
    fine: PositiveInt | None = None
    """Fine clusters of this source; default `clustering.fine`."""
    coarse: PositiveInt | None = None
    """Coarse clusters of this source; default `clustering.coarse`."""
    families: dict[str, NonNegativeInt] | None = None
    """Of `glyphs`: family of characters -> how many of its first ones are drawn; `"*"` stands for those that are not
    named, which have `glyphs.per_family`. `{chess: 0}` is all but chess, `{"*": 0, chess: 4}` nothing else."""
    continues: Name | None = None
    """A source of which this one has later shards: its pairs are assigned to the clusters of that source, and it has
    none of its own. `mode arrivals` enters such a source."""

    #: What decides how shards are read: alike in a source and in those that continue it.
    READING: ClassVar[tuple[str, ...]] = ("checksum", "image_column", "caption_column", "filters", "captions")

    @field_validator("shards")
    @classmethod
    def _sets_are_of_tars(cls, shards: str | dict[str, float]) -> str | dict[str, float]:
        if isinstance(shards, dict) and (not shards or "glyphs" in shards):
            raise ValueError("several sets are folders, globs, URLs or lists of tars, at least one; not `glyphs`")
        return shards

    @model_validator(mode="after")
    def _families_are_drawn(self) -> SourceParams:
        if self.families is not None and self.shards != "glyphs":
            raise ValueError("families are those of the built-in data: `shards: glyphs`")
        return self

    @field_validator("filters")
    @classmethod
    def _filters_are_comparisons(cls, filters: list[str]) -> list[str]:
        for text in filters:
            parse_comparison(text)
        return filters

    @field_validator("captions")
    @classmethod
    def _captions_are_probabilities(cls, captions: dict[str, float] | None) -> dict[str, float] | None:
        if captions is not None and abs(sum(captions.values()) - 1) > 1e-6:
            raise ValueError(f"the probabilities add up to {sum(captions.values()):g}, not 1")
        return captions


class GlyphParams(Section):
    """The built-in data set."""

    pairs: PositiveInt = 60_000
    """Training pairs to draw; a source that has some of the characters alone, its share of these."""
    shard_pairs: PositiveInt = 5_000
    """Pairs in one tar."""
    image_size: PositiveInt = 32
    """Pixels a side."""
    per_family: Annotated[int, Field(ge=2)] | None = None
    """Characters of each family at most, its first ones; `null`: all 938. With fewer a model learns them sooner."""
    test_images: PositiveInt = 8
    """Images per class in the evaluation tasks, drawn in a font that training never sees."""
    noise_share: Share = 0.1
    """Share of captions replaced by web noise such as "click here to view image"."""
    dropped_word_share: Share = 0.2
    """Share of captions that lose one word."""


class IndexParams(Section):
    """Reading shards."""

    max_bad_share: Share = 0.05
    """Largest share of bad members before the stage stops."""
    check_images: bool = True
    """Decode every image once, to find bad ones before training; else the loader counts and replaces them."""
    drop_leaked: bool = False
    """Leave out the training images that `leakage.json` lists, which `mode leakage` writes: copies of test images."""


class EmbeddingParams(Section):
    """Captions to unit vectors."""

    kind: Literal["lsa", "transformers", "open_clip", "seed"] = "lsa"
    """`lsa` (TF-IDF and SVD, no weights), `seed` (the text tower of this project's seed; `made_from: models/seed`),
    `transformers` (any Hugging Face encoder) or `open_clip` (another CLIP's text tower)."""
    view: View = "text"
    """What of a pair is embedded with `seed`: `text` (its caption), `image`, or `both` (the two vectors one after the
    other). Clusters of `image` route each test image by itself; those of `both`, as those of `text`, a task's words."""
    name: str | None = None
    """A Hugging Face name or a local folder; for `open_clip` a `MODEL:PRETRAINED` tag or a model folder."""
    made_from: str = "data/index/base"
    """What the embedder stage waits for and depends on: `data/index/SOURCE`, whose captions `lsa` is fitted on; or the
    folder that `name` gives, where that is one of this project's, such as `models/seed`."""
    sample: PositiveInt = 200_000
    """Captions used for the fit, at most."""
    dimensions: PositiveInt = 64
    """Length of the `lsa` vectors."""
    pooling: Literal["cls", "mean", "pooler"] = "cls"
    """What `transformers` takes as a caption's vector: `cls` (the first token's last state), `mean` (over tokens) or
    `pooler` (the model's own output, which the paper's published code takes from SimCSE)."""
    max_tokens: PositiveInt = 77
    """Tokens after which a caption is cut."""

    @property
    def encoder(self) -> str | None:
        """`name`, or the seed's folder with `kind: seed`."""
        return SEED_MODEL if self.kind == "seed" else self.name

    @property
    def fit_on(self) -> str | None:
        """The source that the embedder is fitted on; None where it is made from a model of the project."""
        folder, _, source = self.made_from.rpartition("/")
        return source if folder == "data/index" else None

    @model_validator(mode="after")
    def _made_from_what_is_named(self) -> EmbeddingParams:
        if self.kind == "seed" and (self.name is not None or self.made_from != SEED_MODEL):
            raise ValueError(f"kind 'seed' needs `made_from: {SEED_MODEL}`, which says it to DVC, and no name")
        if self.view != "text" and self.kind != "seed":
            raise ValueError(f"view '{self.view}' needs kind 'seed': `{self.kind}` embeds captions alone")
        if self.kind not in ("lsa", "seed") and not self.name:
            raise ValueError(f"kind '{self.kind}' needs `name`: which encoder to load")
        if self.kind == "lsa" and self.fit_on is None:
            raise ValueError(f"made_from: '{self.made_from}', but lsa is fitted on captions: data/index/SOURCE")
        name = self.name or ""
        if self.kind != "lsa" and name.startswith(("models/", "data/")) and self.made_from != name:
            raise ValueError(f"name is '{name}', which this project makes: `made_from: {name}` says so to DVC")
        return self


class ClusteringParams(Section):
    """Two levels of balanced k-means (paper, section 3.2)."""

    strategy: Literal["two-level", "one-step", "random", "targets"] = "two-level"
    """`two-level`; `one-step` (k-means straight into `coarse` clusters) and `random` are for comparison; `targets`
    (coarse cluster 0 is the fine clusters nearest to `targets`, 1 all others) makes one expert for a purpose."""
    fine: PositiveInt = 64
    """Fine clusters of a source: m."""
    coarse: PositiveInt = 4
    """Coarse clusters of a source, one expert each: n."""
    balance: Annotated[float, Field(ge=1.0)] = 1.1
    """The largest cluster, as a multiple of the mean, on the fitted vectors."""
    sample: PositiveInt = 1_000_000
    """Vectors used for the fit, at most."""
    iterations: PositiveInt = 20
    """Iterations of Lloyd's algorithm, at most."""
    targets: list[Annotated[str, Field(pattern=r"\S")]] = []
    """Of `targets`: words or phrases such as the class names of a task, which `mode targets TASK` prints."""
    targets_nearest: PositiveInt = 1
    """Of `targets`: so many fine clusters nearest to each of them."""

    @model_validator(mode="after")
    def _coarse_fits_fine(self) -> ClusteringParams:
        if self.coarse > self.fine:
            raise ValueError(f"coarse ({self.coarse}) exceeds fine ({self.fine}): a coarse cluster needs a fine centre")
        if (self.strategy == "targets") != bool(self.targets):
            raise ValueError("`strategy: targets` and `targets` go together: words or phrases to train an expert for")
        return self


class ExpertParams(Section):
    """One data expert."""

    source: str = "base"
    """The source whose coarse cluster it is trained on."""
    cluster: NonNegativeInt
    """Number of that coarse cluster, from 0."""
    epochs: PositiveInt | None = None
    """Its own length in epochs, in place of `training.epochs - training.seed_epochs`."""
    lr: PositiveFloat | None = None
    """Its own learning rate, in place of `training.lr`."""
    outside_share: Share | None = None
    """Its own share of pairs from outside its cluster, in place of `branch.outside_share`."""


class UpdateParams(Section):
    """A training that goes on from an expert, on pairs of its cluster that have arrived since; in the ensemble the
    model takes the expert's place. `mode update-expert` enters it.
    """

    continues: Name
    """The expert that it goes on from, or an earlier update of one."""
    source: Name
    """Where the new pairs are from: a source that continues the expert's."""
    cluster: NonNegativeInt
    """Number of the expert's coarse cluster."""
    replays: Name
    """The expert's own source, of whose pairs some are shown again."""
    replay_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Share of its pairs that are not new, but of those that the expert was trained on: without any it forgets them."""
    epochs: PositiveInt | None = None
    """Its own length in epochs; default: as many samples for each of its pairs as an expert sees of each of its own in
    `training.epochs - training.seed_epochs`, and no more than an expert sees."""
    lr: PositiveFloat | None = None
    """Its own learning rate at its highest, in place of `training.lr`, or an adapter's."""
    outside_share: Share | None = None
    """Its own share of pairs from outside its cluster, in place of `branch.outside_share`."""


class SeedParams(Section):
    """The model that every other one goes on from."""

    origin: Literal["scratch", "pretrained"] = Field(default="scratch", alias="from")
    """`scratch` (trained here, from random weights, for `training.seed_epochs`) or `pretrained` (a CLIP that is there:
    its architecture, preprocessing and tokenizer are those of every model; `model: {}` and `seed_epochs: 0`)."""
    name: str | None = None
    """Of `pretrained`: `hf-hub:ORG/NAME`; a model folder, of another run too (`local-dir:FOLDER`, or its path); or an
    open_clip architecture such as `ViT-B-16`, or a configuration file of one's own, with `weights`."""
    weights: str | None = None
    """Of an architecture: a tag of open_clip such as `laion2b_s34b_b88k`, or a `.safetensors`, `.pt` or `.bin` file."""

    @property
    def pretrained(self) -> bool:
        """Whether the seed is a model that is there already."""
        return self.origin == "pretrained"

    @property
    def is_local(self) -> bool:
        """Whether a pretrained seed is made of files on this machine, and not of a hub's or of a tag of open_clip."""
        if (self.name or "").startswith("hf-hub:"):
            return False
        return self.weights is None or self.weights.endswith(WEIGHT_FILES)

    @model_validator(mode="after")
    def _named(self) -> SeedParams:
        if not self.pretrained and (self.name or self.weights):
            raise ValueError("name and weights are those of a pretrained seed: `from: pretrained`")
        if self.pretrained and not self.name:
            raise ValueError("`from: pretrained` needs `name`: a model folder, hf-hub:ORG/NAME, or an architecture")
        if self.weights and (self.name or "").startswith(("hf-hub:", "local-dir:")):
            raise ValueError(f"weights is '{self.weights}', but '{self.name}' brings its own: leave weights out")
        return self


class ModelParams(Section):
    """The CLIP that every role trains: either `name` or `config`; nothing, `{}`, with a pretrained seed."""

    name: str | None = None
    """An open_clip model name such as `ViT-B-32`, or the path of a configuration file of one's own."""
    config: dict[str, Any] | None = None
    """The configuration itself (`embed_dim`, `vision_cfg`, `text_cfg`), as open_clip defines it."""
    tokenizer: Literal["words", "model"] = "model"
    """`words` (a vocabulary learnt from captions, for small models) or `model` (what open_clip pairs with it)."""
    vocabulary: PositiveInt = 8_000
    """Words that `words` keeps, most frequent first."""

    @model_validator(mode="after")
    def _one_of_name_and_config(self) -> ModelParams:
        if self.name is not None and self.config is not None:
            raise ValueError("give either `name` or `config`")
        return self


class ImageParams(Section):
    """How an image becomes a tensor. A pretrained seed has a size, mean, std, interpolation and resize mode of its own:
    leave these out, since another value is an error.
    """

    size: PositiveInt = 224
    """Pixels a side."""
    mean: Triple = (0.48145466, 0.4578275, 0.40821073)
    """Per channel, for the normalisation; default open_clip's (OpenAI's)."""
    std: PositiveTriple = (0.26862954, 0.26130258, 0.27577711)
    """Per channel, for the normalisation; default open_clip's (OpenAI's)."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Of the resizing."""
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    """`shortest` (the shorter side becomes `size`, and the centre is cut out), `longest` (the longer one does, and the
    rest is filled) or `squash` (both do, whatever the proportions)."""
    fill_color: NonNegativeInt = 0
    """Of what `longest` fills."""
    crop_scale: Share | None = None
    """Least share of a training image that a random crop keeps; `null`: no crop (needed to keep decoded images)."""
    crop_ratio: Pair = (3 / 4, 4 / 3)
    """Width by height of that crop, at least and at most, before it is resized."""
    flip: bool = False
    """Mirror half of the training images."""
    shift: NonNegativeInt = 0
    """Pixels by which a training image is moved at random, either way."""
    color_jitter: Annotated[tuple[float, float, float, float], Field(strict=False)] | None = None
    """Most by which brightness, contrast, saturation (0 to 1 and more) and hue (to 0.5) of a training image change, as
    in open_clip's `aug_cfg`; needs `color_jitter_prob`."""
    color_jitter_prob: Share = 0.0
    """Share of the training images to which `color_jitter` happens."""
    gray_scale_prob: Share = 0.0
    """Share of the training images that are made grey."""
    decode: Literal["fast", "exact", "gpu"] = "fast"
    """How training images are decoded and resized: `fast` (JPEGs with torch: one value in some 200 differs by 1 in 255
    from open_clip's), `exact` (bit for bit as open_clip, three times as long) or `gpu` (JPEGs decoded and resized on
    the GPU, by the training process itself; `fast` where there is none)."""

    @model_validator(mode="after")
    def _augmentation_is_possible(self) -> ImageParams:
        least, most = self.crop_ratio
        if not 0 < least <= most:
            raise ValueError(f"crop_ratio: {least:g} to {most:g}, but it goes from a number above 0 to one as large")
        jitter = self.color_jitter
        if jitter is not None and not (all(0 <= most <= 10 for most in jitter) and jitter[3] <= 0.5):
            raise ValueError("color_jitter: each from 0 to 10 (brightness, contrast, saturation, hue), hue at most 0.5")
        if (jitter is None) != (self.color_jitter_prob == 0):
            raise ValueError("color_jitter says by how much, color_jitter_prob how often: give both or none")
        return self


class ValidateParams(Section):
    """Figures of a model while it trains, to be looked at: they choose nothing, and the model is the same without."""

    every: PositiveInt | None = None
    """Steps between two looks, counted from the beginning of the seed; a training also begins and ends with one.
    `null`: none."""
    tasks: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Tasks of the project by name, or task folders: their zero-shot accuracy (of retrieval the mean recall@10)."""
    held_out: NonNegativeInt = 0
    """Of `training.held_out`, so many images: the contrastive loss of their pairs, in batches of `batch_size`."""

    @model_validator(mode="after")
    def _something_at_some_steps(self) -> ValidateParams:
        if self.every is None and (self.tasks or self.held_out):
            raise ValueError("every: needed with `tasks` or `held_out`: how many steps lie between two looks?")
        if self.every is not None and not (self.tasks or self.held_out):
            raise ValueError("every: needs `tasks` or `held_out`: what is to be looked at?")
        return self


class KeepParams(Section):
    """Models of the way, `checkpoints/NAME/kept/STEP/`: folders as in `models/`, which stay after the training."""

    every: PositiveInt | None = None
    """Steps between two that are kept, counted from the beginning of the seed; `null`: none is."""
    last: PositiveInt | None = None
    """Keep so many, the last ones; `null`: all."""


class AdapterParams(Section):
    """Experts as adapters: low-rank changes of the seed's weights in place of weights of their own. An update trains
    those of its expert on.
    """

    kind: Literal["lora"] = "lora"
    """`lora`: every adapted layer computes W x + alpha / rank * B A x, and only A and B are trained."""
    rank: PositiveInt = 16
    """Rows of A and columns of B; at most the smaller side of each adapted layer."""
    alpha: PositiveFloat | None = None
    """The scale of the change, times the rank; `null`: twice the rank."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Which layers, as patterns of their names: `visual.*`, `*.attn`, `*.mlp.*`; `null`: all that have room for the
    rank."""
    lr: PositiveFloat | None = None
    """Learning rate at its highest, in place of `training.lr`; an expert's own `lr` comes before it."""

    @property
    def scale(self) -> float:
        """`alpha`, as a number."""
        return self.alpha or 2.0 * self.rank


class TrainingParams(Section):
    """One recipe for seed, dense models and experts (paper, section 4.1): a change trains all of them again."""

    source: str = "base"
    """The source whose pairs train the seed and the dense models."""
    held_out: NonNegativeInt = 0
    """Images of each source, drawn by `random_seed`, that no model trains on: there, routing rules are compared."""
    epoch_samples: PositiveInt | None = None
    """Samples of one epoch, for every role; `null`: as many as there are training images."""
    epochs: PositiveInt = 32
    """Length of the dense model, in epochs."""
    seed_epochs: NonNegativeInt = 27
    """Epochs after which experts branch off; an expert trains for `epochs - seed_epochs`. 0 with a pretrained seed."""
    batch_size: PositiveInt = 128
    """Pairs in one optimiser step, over all processes and accumulation steps."""
    accumulate: PositiveInt = 1
    """Forward passes in one step."""
    lr: PositiveFloat = 5e-4
    """Learning rate at its highest."""
    betas: Decays = (0.9, 0.98)
    """AdamW's decay rates of the two moments."""
    eps: PositiveFloat = 1e-6
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.2
    """AdamW's weight decay; gains, biases and the logit scale are not decayed."""
    warmup: NonNegativeInt = 2_000
    """Steps of linear warm-up: of the seed, or of every model that goes on from a pretrained one."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """`wsd` (constant until the branch, then linear to 0) or `cosine` (over all epochs); from a pretrained seed both
    fall from the end of the warm-up to 0 at the end of each model's own training."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest gradient norm; `null` for no clipping."""
    precision: Literal["fp32", "bf16", "amp"] = "fp32"
    """`fp32`, `bf16` (weights and activations) or `amp` (bfloat16 autocast)."""
    compile: bool = False
    """Run both towers through `torch.compile`: takes minutes to start, needs a C++ compiler, and rounds differently."""
    adapter: AdapterParams | None = None
    """Train experts as adapters of the seed, some megabytes each; dense models are whole. `null`: experts are whole."""
    validation: ValidateParams = Field(default=ValidateParams(), alias="validate")  # pydantic has a `validate`
    keep_checkpoints: KeepParams = KeepParams()

    #: What is done beside a training and decides nothing in it.
    BESIDE: ClassVar[frozenset[str]] = frozenset({"validation", "keep_checkpoints"})

    read: Literal["random", "sequential"] = "random"
    """How images come from their shards, which decides the order of samples: `random` (each by itself, all of a pass
    mixed) or `sequential` (in long ranges, for object storage; `shuffle_images` of them mixed)."""
    shuffle_images: PositiveInt = 10_000
    """Of `sequential`: images that are mixed with one another. Chunks of 256 neighbours are drawn at random; so many
    images of them are on the disk at a time, and twice as many more that come next (`machine.spool_mb`)."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Learning rate of a group of layers, as a multiple of that of the group above it; the head has `lr` itself."""
    unlocked_image_groups: NonNegativeInt | None = None
    """Lock the image tower but for so many of its last groups: stem, blocks and head are one each; `null`: no lock."""
    unlocked_text_groups: NonNegativeInt | None = None
    """The same for the text tower."""
    seed_share: Share | Literal["held-out"] = 0.0
    """Mix each model that goes on from the seed with so much of it in the end (WiSE-FT), which keeps more of what the
    seed knows; `held-out`: that of 0, 0.1 ... 1 with the least loss on pairs that are held out."""

    @model_validator(mode="after")
    def _seed_before_end(self) -> TrainingParams:
        if self.seed_epochs >= self.epochs:
            raise ValueError(f"seed_epochs ({self.seed_epochs}) must be smaller than epochs ({self.epochs})")
        if self.seed_share == "held-out" and not self.held_out:
            raise ValueError("seed_share: 'held-out' needs `held_out`: pairs to choose the share on")
        if self.seed_share and self.adapter is not None:
            raise ValueError("seed_share: an adapter is mixed by its alpha: leave one of the two out")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size ({self.batch_size}) is not a multiple of accumulate ({self.accumulate})")
        if self.validation.held_out > self.held_out:
            raise ValueError(
                f"validate.held_out: {self.validation.held_out} images, but training.held_out keeps {self.held_out} out"
            )
        return self


class BranchParams(Section):
    """What experts do differently from the seed that they branch from."""

    outside_share: Share = 0.02
    """Share of the pairs *outside* its cluster that an expert also sees."""


class BaselineParams(Section):
    """What is trained for comparison only."""

    dense_long: bool = True
    """Also train one dense model for as many samples as the seed and all experts together."""


class RoutingParams(Section):
    """How a task's words become a weight per expert (see `mode.ensemble.rules`)."""

    kind: Literal["calibrated", "evidence", "published", "paper"] = "calibrated"
    """`calibrated` (scale-free; its temperature comes from the training captions), `evidence` (how densely
    each expert's training captions lie around the words, and how often they use them), `published` (the reference
    formula) or `paper` (softmax of summed affinities)."""
    divisor: PositiveFloat = 8.0
    """Of `published`: the softmax is taken of w / divisor."""
    bandwidth: PositiveFloat = 1.0
    """Lambda of `paper`."""
    calibration_captions: PositiveInt = 4_096
    """Training captions that set the temperature of `calibrated` and `evidence`."""
    evidence_captions: PositiveInt = 16_384
    """Of `evidence`: training captions whose vectors and words are kept with the ensemble, equally many per expert."""
    retrieval: Literal["together", "query", "paper"] | None = None
    """`together` (a retrieval task is routed by all its texts), `query` (every text and image by itself; needs
    `calibrated` or `evidence`) or `paper` (a text that looks for images by itself, an image that looks for texts by all
    of them); default `query` with `calibrated` and `evidence`, else `together`."""

    @model_validator(mode="after")
    def _query_needs_probabilities(self) -> RoutingParams:
        if self.retrieval == "query" and not self.gives_probabilities:
            raise ValueError(f"retrieval 'query' needs kind 'calibrated' or 'evidence', not '{self.kind}'")
        return self

    @property
    def gives_probabilities(self) -> bool:
        """Whether the rule knows p(expert | text) of a single text."""
        return self.kind in ("calibrated", "evidence")

    @property
    def by_query(self) -> bool:
        """Whether every text and image of a retrieval task weighs the experts by itself."""
        return self.gives_probabilities and self.retrieval in (None, "query")

    @property
    def protocol(self) -> Literal["together", "query", "paper"]:
        """`retrieval`, or what it is by default."""
        return self.retrieval or ("query" if self.by_query else "together")


class EvaluationParams(Section):
    """Evaluation."""

    tasks: Literal["glyphs"] | list[str] = "glyphs"
    """`glyphs`, or folders in CLIP_benchmark's webdataset layout."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _many(cls, tasks: object) -> object:
        if isinstance(tasks, str) and tasks != "glyphs":
            raise ValueError(f"'{tasks}', but it is `glyphs` or a list of folders: [{tasks}]")
        return tasks


class Arm(NamedTuple):
    """Another way to use the trained models: `kind` is what `ARMS` lists, `number` what stands in place of N or X."""

    kind: str
    number: float | None = None


#: Ways to use the trained models (`mode.evaluation.variants`); N stands for a number from 1 on, X for a share in 0..1.
ARMS = (
    "top-N",
    "share-X",
    "merged",
    "merged-N",
    "merged-uniform",
    "merged-layers",
    "merged-seed-X",
    "published",
    "paper",
    "coarse",
    "by-class",
    "by-range",
    "best-by-label",
    "probe",
)
_NUMBERS = {"N": r"([1-9][0-9]{0,8})", "X": r"(0(?:\.[0-9]{1,9})?|1(?:\.0)?)"}


def parse_arm(text: str) -> Arm:
    """A name of `variants.arms`.

    Raises:
        ValueError: it is none, with what there is.

    Example:
        >>> parse_arm("top-2"), parse_arm("merged-seed-0.3"), parse_arm("coarse")
        (Arm(kind='top-N', number=2.0), Arm(kind='merged-seed-X', number=0.3), Arm(kind='coarse', number=None))
    """
    for kind in ARMS:
        stem, _, place = kind.rpartition("-")
        if text == kind and place not in _NUMBERS:
            return Arm(kind)
        if place in _NUMBERS and (found := re.fullmatch(f"{stem}-{_NUMBERS[place]}", text)):
            return Arm(kind, float(found[1]))
    raise ValueError(f"no arm is called '{text}'; there are: {', '.join(ARMS)} (N: 1, 2 ...; X: a share such as 0.9)")


class VariantParams(Section):
    """Other ways to use the trained models, measured by the stage `variants`; nothing is trained for them."""

    arms: list[str] = []
    """Any of `top-1` (`top-2` ...), `share-0.9`, `merged`, `merged-2`, `merged-uniform`, `merged-layers`,
    `merged-seed-0.3`, `published`, `paper`, `coarse`, `by-class`, `by-range`, `best-by-label`, `probe`: see
    docs/guide.md."""

    @field_validator("arms")
    @classmethod
    def _arms_are_known(cls, arms: list[str]) -> list[str]:
        for number, text in enumerate(arms):
            parse_arm(text)
            if text in arms[:number]:
                raise ValueError(f"'{text}' is named twice")
        return arms


class SlurmParams(Section):
    """What Slurm is asked for, for the job of a training: names and numbers, no text that anything would take apart."""

    partition: SlurmName = ""
    """Of which the nodes are; empty: the cluster's default."""
    account: SlurmName = ""
    """Whom the time is charged to; empty: the user's default."""
    qos: SlurmName = ""
    """Quality of service; empty: the default."""
    minutes: PositiveInt | None = None
    """Time limit of a job; `null`: the partition's. A training that needs longer goes on in another job, from its
    checkpoint."""
    notice_seconds: Annotated[int, Field(ge=0, le=65_535)] = 120
    """How long before the time limit a training is told to write its checkpoint."""
    cpus: PositiveInt | None = None
    """Cores of a job on each of its nodes; `null`: for each process one, and one for each of its `workers`."""
    memory_gb: PositiveInt | None = None
    """Memory on each node, in GiB; `null`: the partition's default."""
    gpu: SlurmName = ""
    """The kind of GPU, as the cluster calls it, such as `h100`; empty: any."""
    constraint: SlurmName = ""
    """A feature that nodes must have; empty: none."""
    resources: dict[SlurmResource, PositiveInt] = {}
    """Other generic resources of each node and how many, such as `{nvme: 1}`."""
    poll_seconds: Annotated[float, Field(ge=0.1, le=3_600)] = 5.0
    """Time between two looks at a job."""


class MachineParams(Section):
    """Where and how fast stages run; no result depends on it, but for rounding in another order.

    The environment variable `MODE_KEY` overrides each key: `MODE_DEVICE=cuda:1`, `MODE_CACHE_MB=8192`.
    """

    device: str = "auto"
    """`auto` (the GPU where there is one), `cpu`, `cuda`, `cuda:1` ..."""
    threads: PositiveInt | None = None
    """Threads of torch on the CPU, in a training. Sums in another number of threads round differently, so a fixed
    number gives the same bits alone and side by side; `null`: the share that a flow gives, or torch's own choice."""
    processes: PositiveInt = 1
    """Processes that train one model together on a machine, each on a GPU of its own."""
    launch: Literal["local", "slurm"] = "local"
    """Where trainings run: `local`, on this machine; `slurm`, each as a job of Slurm, which sees the project folder and
    the shards under the same paths."""
    nodes: PositiveInt = 1
    """Machines that train one model together, with so many `processes` on each; a job of Slurm has them."""
    slurm: SlurmParams = SlurmParams()
    workers: NonNegativeInt = 0
    """Processes that read and decode for a training; 0 reads in the training process."""
    decode_threads: NonNegativeInt = 2
    """Threads that decode images for an evaluation."""
    cache_mb: NonNegativeInt = 1_024
    """Decoded images of a training are kept in memory if they all fit into this many MiB."""
    spool_mb: PositiveInt = 4_096
    """Of `training.read: sequential`: room on the disk beside the checkpoint, in MiB, for the images that are mixed and
    those that come next. A training that needs more ends at its start."""
    packs: dict[Name, Annotated[str, Field(min_length=1)]] = {}
    """Where trainings read their images in place of the source's shards: by name of the model, the folder or URL that
    `mode pack NAME` wrote, such as `{expert-2: s3://bucket/expert-2}`."""
    inference_batch: PositiveInt = 256
    """Captions, texts or images in one forward pass of embedding and evaluation."""
    models_mb: PositiveInt = 8_192
    """Weights of models that an evaluation keeps in memory at once, in MiB. More are opened one group after the other,
    one model at least, and images are decoded once for each group."""
    grad_checkpointing: bool = False
    """Compute activations again on the way back instead of keeping them: less memory, a third more time. Transformers
    only."""
    checkpoint_minutes: PositiveFloat = 1.0
    """Time between a training's checkpoints."""
    checkpoint_url: Annotated[str, Field(min_length=1)] | None = None
    """Where copies of checkpoints outlive the machine: a URL that fsspec knows (`s3://bucket/mode`, `file:///mnt/shared`).
    A training that finds no checkpoint of its own goes on from the newest copy, on any machine."""
    checkpoint_url_minutes: PositiveFloat = 10.0
    """Time between two copies. One more is made when a training is told to stop, if `stop_seconds` are long enough."""
    checkpoint_url_keep: PositiveInt = 2
    """Copies that stay. All go when the training is done."""
    stop_seconds: PositiveFloat = 12.0
    """Time that a training has to end in once it is told to stop (SIGTERM, Ctrl-C), until a flow, say, kills it. Its
    checkpoint is written in any case; a last copy that is not sent in three quarters of it is given up."""
    engine: str = "local"
    """Where captions are embedded and assigned: `local`, `dask` (processes here) or a scheduler's `tcp://host:8786`."""


class Params(Section):
    """All of `params.yaml`."""

    random_seed: NonNegativeInt = 0
    """Decides everything that is random: the built-in data, clusters, first weights, the order of samples."""
    sources: dict[Name, SourceParams]
    experts: dict[Name, ExpertParams]
    updates: dict[Name, UpdateParams] = {}
    model: ModelParams = ModelParams()
    seed: SeedParams = SeedParams()
    glyphs: GlyphParams = GlyphParams()
    index: IndexParams = IndexParams()
    embedding: EmbeddingParams = EmbeddingParams()
    clustering: ClusteringParams = ClusteringParams()
    image: ImageParams = ImageParams()
    training: TrainingParams = TrainingParams()
    branch: BranchParams = BranchParams()
    baselines: BaselineParams = BaselineParams()
    full: list[Name] = []
    """Experts of which to train a copy on all pairs, in an order of its own; the copies are averaged (the paper's
    Full-n), which tells what experts gain by specialising from what any models gain by being several."""
    routing: RoutingParams = RoutingParams()
    evaluation: EvaluationParams = EvaluationParams()
    variants: VariantParams = VariantParams()
    machine: MachineParams = MachineParams()

    @model_validator(mode="after")
    def _names_agree(self) -> Params:
        if not self.sources:
            raise ValueError("sources: at least one is needed")
        self._seed_and_model_agree()
        self._continuations_agree()
        self._views_agree()
        self._clusters_agree()
        self._experts_agree()
        self._updates_agree()
        return self

    def _views_agree(self) -> None:
        """Clusters of images are compared with no words."""
        if self.embedding.view == "image" and (self.routing.kind, self.routing.protocol) != ("calibrated", "query"):
            raise ValueError(
                "embedding.view: 'image' weighs the experts by each image: it needs routing.kind 'calibrated' and"
                f" routing.retrieval 'query', not '{self.routing.kind}' and '{self.routing.protocol}'"
            )
        if self.embedding.view == "image" and self.clustering.strategy == "targets":
            raise ValueError(
                "clustering.targets are words, which no image is compared with: embedding.view text or both"
            )

    def _clusters_agree(self) -> None:
        """Sources that are named are there, and each is divided into as many clusters as it can be."""
        for key, source in (("embedding.made_from", self.embedding.fit_on), ("training.source", self.training.source)):
            if source is not None and source not in self.sources:
                raise ValueError(f"{key}: no source is called '{source}'")
        for name, each in self.sources.items():
            fine, coarse = self.clusters_of(name)
            if coarse > fine:
                raise ValueError(f"sources.{name}: coarse ({coarse}) exceeds fine ({fine}) of {each.shards}")
            if self.clustering.strategy == "targets" and coarse != 2:
                raise ValueError(
                    f"clustering: source '{name}' has {coarse} coarse clusters, but strategy 'targets' makes two, the"
                    " targets' and the rest: `coarse: 2`"
                )

    def _experts_agree(self) -> None:
        """Each expert has a cluster that is there, and has it alone."""
        for name in self.full:
            if name not in self.experts:
                raise ValueError(f"full: no expert is called '{name}'")
        taken: dict[tuple[str, int], str] = {}
        for name, expert in self.experts.items():
            if any(name == role.name for role in ROLES if role is not EXPERT):
                raise ValueError(f"experts.{name}: that name belongs to another model")
            if expert.source not in self.sources:
                raise ValueError(f"experts.{name}.source: no source is called '{expert.source}'")
            if root := self.sources[expert.source].continues:
                raise ValueError(
                    f"experts.{name}.source: '{expert.source}' continues '{root}' and has no clusters of its own:"
                    f" `mode update-expert` trains an expert of '{root}' on"
                )
            coarse = self.coarse_of(expert.source)
            if expert.cluster >= coarse:
                raise ValueError(
                    f"experts.{name}.cluster: {expert.cluster}, but source '{expert.source}' has {coarse} coarse"
                    f" clusters (0 to {coarse - 1}): fewer experts, or a larger clustering.coarse"
                )
            other = taken.setdefault((expert.source, expert.cluster), name)
            if other != name:
                raise ValueError(f"experts.{name}: '{other}' already has cluster {expert.cluster} of '{expert.source}'")

    def _continuations_agree(self) -> None:
        """A source that continues another one is read as that one is, and is nothing that needs clusters of its own."""
        for name, each in self.sources.items():
            if each.continues is None:
                continue
            key, root = f"sources.{name}", self.sources.get(each.continues)
            if each.continues == name or root is None:
                raise ValueError(f"{key}.continues: no other source is called '{each.continues}'")
            if root.continues is not None:
                raise ValueError(f"{key}.continues: '{each.continues}' itself continues '{root.continues}': name that")
            if "glyphs" in (each.shards, root.shards) and (each.shards != root.shards or each.families is None):
                raise ValueError(
                    f"{key}.continues: the built-in data are made at once: only `shards: glyphs` with `families` of its"
                    " own can arrive in them"
                )
            if each.fine is not None or each.coarse is not None:
                raise ValueError(f"{key}: fine and coarse are those of '{each.continues}', whose clusters these are")
            for field in SourceParams.READING:
                if getattr(each, field) != getattr(root, field):
                    raise ValueError(f"{key}.{field}: not that of '{each.continues}', which it continues")
        if root_of_seed := self.sources.get(self.training.source, SourceParams(shards="glyphs")).continues:
            raise ValueError(f"training.source: '{self.training.source}' continues '{root_of_seed}': name that")

    def _updates_agree(self) -> None:
        """Updates of an expert are a chain, and each has another source."""
        followed: dict[str, str] = {}
        for name, update in self.updates.items():
            key = f"updates.{name}"
            if name in self.experts or any(name == role.name for role in ROLES):
                raise ValueError(f"{key}: that name belongs to another model")
            if update.continues not in {**self.experts, **self.updates}:
                raise ValueError(f"{key}.continues: no expert and no update is called '{update.continues}'")
            other = followed.setdefault(update.continues, name)
            if other != name:
                raise ValueError(f"{key}.continues: '{other}' already goes on from '{update.continues}'")
        # Each update follows one model at most, and none follows two: what no expert leads to is a circle.
        led_to = {name for versions in self.versions.values() for name in versions}
        for name in self.updates:
            if name not in led_to:
                raise ValueError(f"updates.{name}.continues: '{self.updates[name].continues}' leads back to '{name}'")
        for expert, (_, *names) in self.versions.items():
            root, seen = self.experts[expert].source, dict[str, str]()
            for name in names:
                update, key = self.updates[name], f"updates.{name}"
                if update.source not in self.continuations_of(root):
                    raise ValueError(f"{key}.source: '{update.source}' is no source that continues '{root}'")
                if update.cluster != self.experts[expert].cluster:
                    raise ValueError(
                        f"{key}.cluster: {update.cluster}, but {expert} has cluster {self.experts[expert].cluster}"
                    )
                if update.replays != root:
                    raise ValueError(f"{key}.replays: '{update.replays}', but {expert} has pairs of '{root}'")
                other = seen.setdefault(update.source, name)
                if other != name:
                    raise ValueError(f"{key}.source: '{other}' has seen '{update.source}' already")

    @property
    def versions(self) -> dict[str, list[str]]:
        """Expert -> its own name and those of its updates, the newest last."""
        after = {update.continues: name for name, update in self.updates.items()}
        found = {}
        for expert in self.experts:
            names = [expert]
            while (name := after.get(names[-1])) is not None:
                names.append(name)
            found[expert] = names
        return found

    @property
    def trainings(self) -> list[tuple[Role, str | None]]:
        """The trainings of a run as (role, key where there are many), in the order of the tables.

        A pretrained seed is none, nor is a dense model that is not asked for.
        """
        keys: dict[Role, Iterable[str | None]] = {
            SEED: () if self.seed.pretrained else (None,),
            DENSE_LONG: (None,) if self.baselines.dense_long else (),
            FULL: self.full,
            EXPERT: self.experts,
            UPDATE: self.updates,
        }
        return [(role, key) for role in TRAINED for key in keys.get(role, (None,))]

    def versions_of(self, name: str) -> list[str]:
        """The `versions` of an expert, by its name or that of an update of it; empty: there is none of that name."""
        return next((names for names in self.versions.values() if name in names), [])

    def sources_of(self, name: str) -> list[str]:
        """The sources whose pairs an expert, or an update of one, was trained on, its own before those of later."""
        versions = self.versions_of(name)
        expert, *updates = versions[: versions.index(name) + 1]
        return [self.experts[expert].source, *(self.updates[update].source for update in updates)]

    def unseen_by(self, name: str) -> list[str]:
        """The sources that continue an expert's own, and that neither it nor an update of it was trained on."""
        own, *later = self.sources_of(self.versions_of(name)[-1])
        return [source for source in self.continuations_of(own) if source not in later]

    @property
    def members(self) -> dict[str, ExpertParams]:
        """What the ensemble is made of: each expert, under the name of its newest version."""
        return {names[-1]: self.experts[expert] for expert, names in self.versions.items()}

    def _seed_and_model_agree(self) -> None:
        model, epochs = self.model.name or self.model.config, self.training.seed_epochs
        if not self.seed.pretrained and model is None:
            raise ValueError("model: give either `name` or `config`, or a pretrained seed")
        if not self.seed.pretrained and not epochs:
            raise ValueError("training.seed_epochs: 0, but a seed from scratch has to be trained")
        if self.seed.pretrained and model is not None:
            raise ValueError(f"model: the architecture is that of seed.name, '{self.seed.name}': `model: {{}}`")
        if self.seed.pretrained and epochs:
            raise ValueError(f"training.seed_epochs: {epochs}, but a pretrained seed is not trained here: 0")

    def clusters_of(self, source: str) -> tuple[int, int]:
        """(fine, coarse) of a source, or of the one that it continues: its own numbers, or those of `clustering`."""
        return self.sources[self.root_of(source)].fine or self.clustering.fine, self.coarse_of(source)

    def coarse_of(self, source: str) -> int:
        """Coarse clusters of a source, or of the one that it continues: its own number, or that of `clustering`."""
        return self.sources[self.root_of(source)].coarse or self.clustering.coarse

    def root_of(self, source: str) -> str:
        """The source whose clusters the pairs of a source are assigned to: itself, or the one that it continues."""
        return self.sources[source].continues or source

    def continuations_of(self, source: str) -> list[str]:
        """The sources that continue a source, in the order in which they came."""
        return [name for name, each in self.sources.items() if each.continues == source]


def load_params(path: Path) -> Params:
    """Read and check `params.yaml`, with the overrides of the environment.

    Raises:
        ModeError: the file is missing, is not YAML, or a key is unknown, missing or of the wrong type.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ModeError(f"{path}: no such file", "run inside the project, where params.yaml lies") from None
    except _NO_YAML as error:
        raise ModeError(f"{path}: not valid YAML: {_as_line(error)}") from None
    return parse_params(content, str(path), os.environ)


class _Loader(yaml.SafeLoader):
    """YAML's plain types; a key that is given twice is an error, as it is to DVC, and not the last one's value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        known: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in known:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                known.add(key.value)
        return super().construct_mapping(node, deep)


def _as_line(error: Exception) -> str:
    """What is wrong with a file, and in which line and column of it."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return in_one_line(error)
    said = " ".join(filter(None, (getattr(error, "context", None), getattr(error, "problem", None))))
    return f"line {mark.line + 1}, column {mark.column + 1}: {said}"


def parse_params(content: object, where: str = "params.yaml", environment: Mapping[str, str] | None = None) -> Params:
    """Check parsed YAML; `where` is its name in errors, and variables of `environment` override its `machine`.

    Raises:
        ModeError: a key is unknown, missing or of the wrong type.
    """
    overrides = _overrides(environment or {})
    if not isinstance(content, Mapping):
        given = "it is empty" if content is None else f"not {content!r}"
        raise ModeError(f"{where}: sections are wanted, such as `sources:` and `training:`; {given}", _NEW)
    if overrides and isinstance(machine := content.get("machine") or {}, dict):
        content = {**content, "machine": {**machine, **overrides}}
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        faults = error.errors()
        raise ModeError("; ".join(_describe(where, fault, overrides) for fault in faults), _hint(faults)) from None


def parse_seed(content: Mapping[str, Any], where: str) -> SeedParams:
    """Check a seed that is named elsewhere than in params.yaml. Raises `ModeError` as `parse_params`."""
    try:
        return SeedParams.model_validate(content)
    except ValidationError as error:
        raise ModeError("; ".join(_describe(where, fault, {}) for fault in error.errors())) from None


def explanations(section: type[BaseModel] = Params, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of params.yaml with what it does; `*` stands for the name of a source or an expert.

    >>> dict(explanations())["clustering.coarse"]
    'Coarse clusters of a source, one expert each: n.'
    """
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        below = _section_of(field.annotation)
        text = field.description or (below[1].__doc__ if below else "") or ""
        yield key, " ".join(text.split())
        if below:
            yield from explanations(below[1], f"{key}.*." if below[0] else f"{key}.")


def _section_of(annotation: Any) -> tuple[bool, type[Section]] | None:
    """(whether by name, the section) of a field that is one or may be one, or a dictionary of them."""
    if NoneType in get_args(annotation):
        annotation = next(each for each in get_args(annotation) if each is not NoneType)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return False, annotation
    value = get_args(annotation)[1:] if get_origin(annotation) is dict else ()
    return (True, value[0]) if value and isinstance(value[0], type) and issubclass(value[0], Section) else None


def _overrides(environment: Mapping[str, str]) -> dict[str, Any]:
    """Values of `machine` that the environment gives, written as in YAML; an empty variable is none.

    Raises:
        ModeError: one is no YAML, or has a name that is nearly that of a setting: it would be ignored for hours.
    """
    overrides = {}
    settings = [key.upper() for key in MachineParams.model_fields]
    given = sorted(each.removeprefix("MODE_") for each in environment if each.startswith("MODE_"))
    for name in given:
        if name not in settings and (close := difflib.get_close_matches(name, settings, n=1, cutoff=0.8)):
            raise ModeError(f"environment: MODE_{name}: unknown setting", f"did you mean MODE_{close[0]}?")
    for key in MachineParams.model_fields:
        variable = f"MODE_{key.upper()}"
        if value := environment.get(variable):
            try:
                overrides[key] = yaml.safe_load(value)
            except _NO_YAML:
                raise ModeError(f"environment: {variable}: not valid YAML: {value!r}") from None
    return overrides


def _describe(where: str, fault: Any, overrides: Mapping[str, Any]) -> str:
    """One line on one fault: where it is, and what is wrong."""
    path = [str(part) for part in fault["loc"]]
    key = ".".join(path)
    if len(path) > 1 and path[0] == "machine" and path[1] in overrides:
        where, key = "environment", f"MODE_{path[1].upper()}"
    if fault["type"] == "extra_forbidden":
        return f"{where}: {key}: " + (f"is now {MOVED[key]}" if key in MOVED else "unknown parameter")
    if fault["type"] == "missing":
        return f"{where}: {key}: missing"
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if fault["type"] == "value_error" else f", not {fault['input']!r}"
    return f"{where}: {key}: {message}{given}" if key else f"{where}: {message}{given}"


def _hint(faults: Sequence[Any]) -> str:
    """What the key of the only fault is for, or which key is meant."""
    if len(faults) != 1:
        return ""
    key = ".".join(str(part) for part in faults[0]["loc"])
    known = dict(explanations())
    if faults[0]["type"] == "extra_forbidden":
        close = _meant(key, known)
        section = key.partition(".")[0]
        listing = f"mode params {section}" if "." in key and section in known else "mode params"
        return f"did you mean {close}?" if close and key not in MOVED else f"`{listing}` lists all"
    return known.get(key, "")


def _meant(key: str, known: Iterable[str]) -> str | None:
    """The key that an unknown one stands for: of its name, there or in another section, or else one alike beside it."""
    section, _, name = key.rpartition(".")
    name = CALLED.get(name, name)
    beside = [other.rpartition(".")[2] for other in known if fnmatchcase(section, other.rpartition(".")[0])]
    elsewhere = [other for other in known if other.rpartition(".")[2] == name and "*" not in other]
    if name not in beside and elsewhere:
        return elsewhere[0]
    close = difflib.get_close_matches(name, beside, n=1)
    return ".".join(filter(None, (section, *close))) if close else None
