"""How fast a machine is and how large data are: the numbers that a plan is worked out from, each with its source.

There are three layers, the later before the earlier: the defaults below, what `mode plan --measure` has found on this
machine with this project's data, and what a person gives (`mode plan --rates FILE`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mode.errors import ModeError, in_one_line
from mode.files import write_aside

Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
#: A share of a peak.
Share = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
#: A share that is left out of a whole.
SpareShare = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]

#: Where the defaults come from; docs/scaling.md says how.
MEASURED_ELSEWHERE = "docs/scaling.md: measured"
ASSUMED = "docs/scaling.md: assumed"
PUBLISHED = "docs/scaling.md: published by others"
WORKED_OUT = "worked out from peak, share and FLOP a pair"
#: Where other values come from.
MEASURED_HERE = "measured here"


def _default(value: float | None, source: str) -> Any:
    return Field(default=value, json_schema_extra={"source": source})


class Rates(BaseModel):
    """Every number that a plan needs and that params.yaml does not say; units are in the names.

    Rates of a core are of one core of a current x86-64 server, alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    index_headers_images_per_core_second: Rate = _default(17_000.0, MEASURED_ELSEWHERE)
    """Images indexed by headers and texts alone (`index.check_images: false`)."""
    index_checked_images_per_core_second: Rate = _default(500.0, MEASURED_ELSEWHERE)
    """Images indexed and decoded (`index.check_images: true`); the default is for JPEGs of 320 pixels, 19 kB."""
    decode_images_per_core_second: Rate = _default(500.0, MEASURED_ELSEWHERE)
    """Training images read, decoded and resized; the default is for JPEGs of 320 pixels, 19 kB."""
    lsa_captions_per_core_second: Rate = _default(360_000.0, MEASURED_ELSEWHERE)
    """Captions embedded by `lsa` of 64 dimensions; words of clusters are taken to be counted as fast."""
    encoder_flops_per_core_second: Rate = _default(8.2e10, MEASURED_ELSEWHERE)
    """Of a neural embedder on a CPU; the default is 30 captions of 16 tokens a second through BERT base's shape."""
    evaluation_flops_per_core_second: Rate = _default(8.2e10, ASSUMED)
    """Of models' image towers in the evaluation on a CPU; the default is the encoder's."""
    assign_multiply_adds_per_core_second: Rate = _default(4.2e10, MEASURED_ELSEWHERE)
    """Of the search for nearest centres, pairs x centres x dimensions; 53,000 pairs/s at 1,024 x 768."""
    fit_multiply_adds_per_core_second: Rate = _default(3.5e10, MEASURED_ELSEWHERE)
    """Of a fit of balanced k-means, vectors x passes x centres x dimensions."""
    training_flops_per_core_second: Rate = _default(4.1e10, MEASURED_ELSEWHERE)
    """Of a training on a CPU; the default is `mode plan --measure` with the demo's model."""
    training_share_of_peak: Share = _default(0.13, PUBLISHED)
    """What a training makes of a GPU's peak (MFU); the default is OpenCLIP's 12.8 billion samples of ViT-B/16 in
    10,700 A100 hours: 332 samples/s on each."""
    inference_share_of_peak: Share = _default(0.4, ASSUMED)
    """What a neural embedder or an evaluation makes of a GPU's peak."""
    training_samples_per_second: Rate | None = _default(None, WORKED_OUT)
    """Samples that one device (a GPU, or a training process on a CPU) trains in a second with the plan's model; null:
    worked out from peak, share and operations."""
    gpu_context_bytes: NotNegative = _default(1.5e9, ASSUMED)
    """Of a GPU's memory, what CUDA, its libraries and NCCL take in each process."""
    gpu_spare_share: SpareShare = _default(0.1, ASSUMED)
    """Of a GPU's memory, what is left free: for gaps between tensors, and for those that live for one operation."""
    start_seconds: NotNegative = _default(1.0, MEASURED_ELSEWHERE)
    """What a stage takes of one core before it works: Python and what it imports."""
    words_start_seconds: NotNegative = _default(2.3, MEASURED_ELSEWHERE)
    """The same of a stage that learns words, from captions or for the names of clusters: scikit-learn besides."""
    model_start_seconds: NotNegative = _default(7.5, MEASURED_ELSEWHERE)
    """The same of a stage that runs models: a training, an encoder, the evaluation."""
    read_bytes_per_second: Rate = _default(3e9, ASSUMED)
    """Of the file system, for one machine, reading or writing."""
    small_read_seconds: NotNegative = _default(2e-4, ASSUMED)
    """A small read of a network file system; an index without decoding makes three of them an image, one after the
    other in each process."""
    image_bytes: Rate = _default(25_000.0, ASSUMED)
    """An encoded image with its share of the tar; the default is for 256 to 320 pixels."""
    captions_per_image: Rate = _default(1.0, ASSUMED)
    """Pairs of an image."""
    caption_bytes: Rate = _default(55.0, MEASURED_ELSEWHERE)
    """A caption before compression."""
    index_bytes_per_pair: Rate = _default(114.0, MEASURED_ELSEWHERE)
    """`data/index/SOURCE` on disk; 28 with five captions an image."""
    lsa_words: Rate = _default(50_000.0, ASSUMED)
    """Words that `lsa` keeps: 50,000 at most."""
    tokenizer_words: Rate = _default(50_000.0, ASSUMED)
    """Distinct words of the captions, of which `model.tokenizer: words` keeps `model.vocabulary`."""


#: What is `measured here` for one device and one model.
OF_A_MODEL = "training_samples_per_second"


@dataclass(frozen=True)
class Measured:
    """What `mode plan --measure` found.

    Attributes:
        device: that trained: `cpu`, or a GPU's name.
        flops_per_pair: of the model that was trained, forward and backward.
        values: rates by name, those that could be measured.
    """

    device: str
    flops_per_pair: float
    values: Mapping[str, float]

    def save(self, path: Path) -> None:
        """Write as JSON, aside and then moved."""
        content = {"device": self.device, "flops_per_pair": self.flops_per_pair, "rates": dict(self.values)}
        with write_aside(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Measured | None:
        """Read what `save` wrote; None where nothing was measured.

        Raises:
            ModeError: the file holds something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            device, flops, values = content["device"], content["flops_per_pair"], content["rates"]
            if not isinstance(device, str) or not isinstance(values, dict) or not 0 < float(flops) < float("inf"):
                raise ValueError
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ModeError(f"{path}: not what `mode plan --measure` writes", "measure again") from None
        return cls(device, float(flops), checked(values, str(path)))

    def of(self, device: str, flops_per_pair: float) -> dict[str, float]:
        """What holds for a plan with this device and model.

        Operations take as long in another model, which is only roughly so; another device trains at another rate.
        """
        values = dict(self.values)
        if (rate := values.pop(OF_A_MODEL, None)) is not None and device == self.device:
            values[OF_A_MODEL] = rate * self.flops_per_pair / flops_per_pair
        return values


@dataclass(frozen=True)
class SourcedRates:
    """Rates, and for each the words that say where it comes from."""

    rates: Rates
    sources: Mapping[str, str]


def sourced(*layers: tuple[str, Mapping[str, float]]) -> SourcedRates:
    """The defaults with (source, values) on top, the later before the earlier."""
    values: dict[str, float] = {}
    sources = {name: default_source(name) for name in Rates.model_fields}
    for source, layer in layers:
        values |= layer
        sources |= dict.fromkeys(layer, source)
    return SourcedRates(Rates(**values), sources)


def default_source(name: str) -> str:
    """Where the default of a rate comes from."""
    extra = Rates.model_fields[name].json_schema_extra
    return str(extra["source"]) if isinstance(extra, dict) else ASSUMED


def load_rates(path: Path) -> dict[str, float]:
    """Read a person's rates: YAML or JSON, any of the keys of `Rates`.

    Raises:
        ModeError: no such file, neither YAML nor JSON, an unknown key, or a value that is no such number.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModeError(f"{path}: no such file", "--rates names a YAML or JSON file of rates") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ModeError(f"{path}: neither YAML nor JSON: {in_one_line(error)}") from None
    return checked(content, str(path))


def checked(content: object, where: str) -> dict[str, float]:
    """Values of some rates by name; `where` is the file, in errors.

    Raises:
        ModeError: an unknown key, or a value that is no such number.
    """
    advice = "docs/scaling.md explains each rate"
    if not isinstance(content, dict):
        raise ModeError(f"{where}: keys and numbers are wanted, such as `image_bytes: 30000`", advice)
    if unknown := [key for key in content if key not in Rates.model_fields]:
        raise ModeError(f"{where}: {unknown[0]}: no such rate", advice)
    try:
        return Rates.model_validate(content).model_dump(include={*content})
    except ValidationError as error:
        faults = [f"{fault['loc'][0]}: {fault['msg']}, not {fault['input']!r}" for fault in error.errors()]
        raise ModeError(f"{where}: {'; '.join(faults)}", advice) from None
