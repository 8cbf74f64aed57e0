"""`mode plan`: what is planned, from params.yaml, the files that are there and what is asked for in their place."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mode.errors import ModeError
from mode.params import AdapterParams, ModelParams, Params, load_params, parse_params
from mode.stages.project import BUILT_IN, Project, counted, task_folders

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mode.planning.account import Plan
    from mode.planning.machines import Cluster
    from mode.planning.needs import EmbedderShape
    from mode.planning.rates import Measured
    from mode.planning.shape import ModelShape

#: What is planned where no project is, and none is asked for.
PAPER = "paper-b16"
#: Images and texts of all tasks of the paper, roughly (1,000 classes of ImageNet in 80 templates each are most of the
#: texts); also where the project's own are not there yet.
EVALUATION_IMAGES, EVALUATION_TEXTS = 200_000, 110_000
#: CPU cores of a machine for each of its GPUs, where nobody says how many.
_CORES_PER_GPU = 8
#: A count as people write it.
_COUNT = re.compile(r"([0-9][0-9,_]*(?:\.[0-9]+)?)\s*([kMBG]?)")
_MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
#: BERT base's weights on disk, in float32, with its tokenizer.
_BERT_BYTES, _BERT_DIMENSIONS = 4.4e8, 768


@dataclass(frozen=True)
class Asked:
    """What stands in place of the project and of this machine.

    Attributes:
        preset: of `mode init`, in place of the project.
        pairs: of the source that the seed is trained on.
        model: an architecture of open_clip, or a configuration file.
        experts: of that source.
        settings: `KEY=VALUE` of params.yaml.
        nodes, gpus, gpu, peak_tflops, cores, memory_gb: the machines; `gpus` and what follows are of each.
        gpu_memory_gb: of a GPU, in place of what its kind has.
        gpus_per_training, gpus_of_seed: default all of a machine, and all.
        evaluation_images: of all tasks, which have as many texts for each image as those that are planned otherwise.
        price: of a GPU hour.
        rates: a file.
    """

    preset: str | None = None
    pairs: str | None = None
    model: str | None = None
    experts: int | None = None
    settings: Sequence[str] = ()
    nodes: int = 1
    gpus: int | None = None
    gpu: str | None = None
    peak_tflops: float | None = None
    cores: int | None = None
    memory_gb: float | None = None
    gpu_memory_gb: float | None = None
    gpus_per_training: int | None = None
    gpus_of_seed: int | None = None
    evaluation_images: int | None = None
    price: float | None = None
    rates: Path | None = None


def count_of(text: str) -> int:
    """A count such as `400M`, `2.5B`, `40k`, `12,000`.

    Raises:
        ModeError: it is none, or not above 0.

    >>> count_of("400M"), count_of("2.5B"), count_of("12,000")
    (400000000, 2500000000, 12000)
    """
    found = _COUNT.fullmatch(text.strip())
    count = round(float(re.sub("[,_]", "", found[1])) * _MULTIPLES[found[2]]) if found else 0
    if count < 1:
        raise ModeError(f"--pairs: '{text}' is no number of pairs", "a whole number above 0, or such as 400M or 2.5B")
    return count


def plan_project(root: Path, params_file: Path, asked: Asked) -> Plan:
    """The plan of a project, of a preset, or of either with other numbers.

    Raises:
        ModeError: there is neither, a number is no such number, nothing says how many pairs there are, a model's shape
            is not known here, or a file of rates is not one.
    """
    from mode.planning.needs import Workload
    from mode.planning.plan import make_plan
    from mode.planning.rates import MEASURED_HERE, Measured, load_rates, sourced

    project, is_here = _what_is_planned(root, params_file, asked)
    params = project.params
    measured = Measured.load(project.rates) if is_here else None
    shard_bytes = {} if asked.pairs or not is_here else _shard_bytes(project)
    estimated = _estimated_pairs(project, shard_bytes, measured)
    pairs = _pairs(project, asked, is_here, estimated)
    cluster = _cluster(params, asked)
    facts = _facts(project) if is_here else {}
    given = load_rates(asked.rates) if asked.rates else {}
    words = {**(measured.values if measured else {}), **facts, **given}.get("tokenizer_words")
    checkpointing = None if cluster.gpu is None else params.machine.grad_checkpointing
    model = _model_shape(project, asked, words, checkpointing, params.training.adapter)
    here = measured.of(cluster.device, model.flops_per_pair) if measured else {}
    layers = ((MEASURED_HERE, here), ("files of this project", facts), (str(asked.rates), given))
    rates = sourced(*layers)
    embedder = _embedder_shape(project, model, rates.rates.lsa_words)
    images, texts = _images_and_texts(project, is_here, asked.evaluation_images)
    work = Workload(
        params=params,
        pairs=pairs,
        shard_bytes=shard_bytes,
        model=model,
        embedder=embedder,
        evaluation_images=images,
        evaluation_texts=texts,
    )
    plan = make_plan(work, cluster, rates, asked.price)
    notes = [
        f"pairs of {source} are estimated from its shards, as if all were like the first: `dvc repro index@{source}`"
        " counts them"
        for source in estimated
    ]
    return plan.model_copy(update={"notes": [*plan.notes, *notes]})


def measure_project(root: Path, params_file: Path, asked: Asked) -> None:
    """Measure this machine's rates on the project's data, and keep them for later plans.

    Raises:
        ModeError: as `mode.planning.measure.measure`, there are no shards yet, or a plan would not know how many pairs
            there are.
    """
    from mode.data.shards.manifest import Manifest
    from mode.planning.measure import measure

    project = Project(root, load_params(params_file))
    source = project.params.training.source
    manifest = project.manifest(source)
    if not manifest.is_file():
        raise ModeError(f"{manifest}: no shards are listed there yet", f"`dvc repro index@{source}` lists them")
    for other in project.params.sources.keys() - _shard_bytes(project).keys():  # of tars they will be estimated
        if not (asked.pairs and other == source):
            _pairs_of(project, other, is_here=True)
    # The model's operations do not change with its words, its embedder's vectors have their length whatever it knows.
    model = _model_shape(project, Asked(), None)
    embedder = _embedder_shape(project, model, words=1e6)
    measured = measure(
        project.params,
        Manifest.load(manifest),
        project.root,
        embedder.dimensions,
        lambda words: _model_shape(project, Asked(), words).flops_per_pair,
        embedder.flops_per_item,
        model.flops_per_image,
    )
    measured.save(project.rates)


def _what_is_planned(root: Path, params_file: Path, asked: Asked) -> tuple[Project, bool]:
    """A project with the parameters that are asked for, and whether it is the one that lies here."""
    from mode.experiments.plan import overridden
    from mode.stages.starting import preset_called, preset_text

    is_here = asked.preset is None and (params_file.exists() or asked.pairs is None)
    if is_here:
        load_params(params_file)  # its own faults come before those of the changes
        content = yaml.safe_load(params_file.read_text(encoding="utf-8"))
        where = str(params_file)
    else:
        name = asked.preset or PAPER
        preset = preset_called(name)
        content, where = yaml.safe_load(preset_text(preset.file, dict(preset.changes))), f"preset {name}"
    changes = {**_expert_changes(content, asked), **_model_changes(content, asked), **_settings(asked.settings)}
    return Project(root, parse_params(overridden(content, changes), where)), is_here


def _settings(settings: Sequence[str]) -> dict[str, Any]:
    """Values by dotted key."""
    values = {}
    for text in settings:
        key, sign, value = text.partition("=")
        if not (key and sign):
            raise ModeError(f"--set: '{text}' is no KEY=VALUE", "such as training.epoch_samples=400000000")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ModeError(f"--set: {key}: not valid YAML: {value!r}") from None
    return values


def _expert_changes(content: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
    if asked.experts is None:
        return {}
    source = (content.get("training") or {}).get("source", "base")
    others = {name: each for name, each in content["experts"].items() if (each or {}).get("source", "base") != source}
    own = {f"expert-{number}": {"source": source, "cluster": number} for number in range(asked.experts)}
    return {"experts": {**own, **others}, f"sources.{source}.coarse": asked.experts, "full": [], "updates": {}}


def _model_changes(content: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
    """Another model, and images of its size; that of a pretrained seed is none of the parameters."""
    if asked.model is None or (content.get("seed") or {}).get("from") == "pretrained":
        return {}
    from mode.planning.shape import image_size_of

    model = {"name": asked.model, "tokenizer": "model"}
    return {"model": model, "image.size": image_size_of(ModelParams(name=asked.model))}


def _cluster(params: Params, asked: Asked) -> Cluster:
    """The machines that are asked for, or this one."""
    from mode.parallel import cores
    from mode.planning.machines import CPU, Cluster, Gpu, device_called, gpu_called

    given = {"price": asked.price, "memory": asked.memory_gb, "gpu-memory": asked.gpu_memory_gb}
    for option, number in {**given, "peak-tflops": asked.peak_tflops}.items():
        if number is not None and not math.isfinite(number):
            raise ModeError(f"--{option}: {number:g} is no number to plan with", "give a finite one")
    is_elsewhere = asked.gpu is not None or asked.nodes > 1
    device, gpus_here, memory_here = asked.gpu.lower() if asked.gpu else CPU, 1, None
    memory = asked.memory_gb * 1e9 if asked.memory_gb else None
    if asked.gpu is None and params.machine.device != CPU:
        import torch

        if torch.cuda.is_available():
            device, gpus_here = device_called(torch.cuda.get_device_name()), torch.cuda.device_count()
            memory_here = float(torch.cuda.get_device_properties().total_memory)
    gpu = None
    for option, number in (("peak-tflops", asked.peak_tflops), ("gpu-memory", asked.gpu_memory_gb)):
        if device == CPU and number:
            raise ModeError(f"--{option}: of which GPU?", "name it with --gpu NAME")
    if device != CPU:
        gpu = Gpu(asked.peak_tflops * 1e12) if asked.peak_tflops else gpu_called(device)
        if (of_gpu := asked.gpu_memory_gb * 1e9 if asked.gpu_memory_gb else memory_here) is not None:
            gpu = replace(gpu, memory_bytes=of_gpu)
    if memory is None and not is_elsewhere:
        import psutil

        memory = float(psutil.virtual_memory().total)
    gpus = asked.gpus or (8 if is_elsewhere and gpu else gpus_here)
    return Cluster(
        nodes=asked.nodes,
        devices_per_node=gpus,
        device=device,
        gpu=gpu,
        cores_per_node=asked.cores or (_CORES_PER_GPU * gpus if asked.gpu and gpu else cores()),
        memory_bytes_per_node=memory,
        threads=params.machine.threads or asked.cores or cores(),
        devices_per_training=asked.gpus_per_training or (gpus if gpu else 1),
        devices_of_seed=asked.gpus_of_seed or (gpus * asked.nodes if gpu else 1),
        is_elsewhere=is_elsewhere,
    )


def _pairs(project: Project, asked: Asked, is_here: bool, estimated: Mapping[str, int]) -> dict[str, int]:
    """Pairs of each source: asked for, estimated, of its index, or to be drawn."""
    main = project.params.training.source
    given = {main: count_of(asked.pairs)} if asked.pairs else {}
    known = {**estimated, **given}
    return {source: known.get(source) or _pairs_of(project, source, is_here) for source in project.params.sources}


def _estimated_pairs(project: Project, shard_bytes: Mapping[str, float], measured: Measured | None) -> dict[str, int]:
    """Of sources whose shards are listed and not yet indexed, by what was measured of an image and its captions."""
    if measured is None or not {"image_bytes", "captions_per_image"} <= measured.values.keys():
        return {}
    image_bytes, captions = measured.values["image_bytes"], measured.values["captions_per_image"]
    return {
        source: max(1, round(size / image_bytes * captions))
        for source, size in shard_bytes.items()
        if counted(project, source) is None and project.source(source).shards != BUILT_IN
    }


def _pairs_of(project: Project, source: str, is_here: bool) -> int:
    if is_here and (report := counted(project, source)):
        return report.pairs
    if (own := project.source(source)).shards == BUILT_IN:
        from mode.data.glyphs.dataset import pairs_of

        return pairs_of(project.params.glyphs, own.families)
    advice = f"`dvc repro index@{source}` counts them"
    if source == project.params.training.source:
        advice += ", or --pairs 400M says it"
    raise ModeError(f"source '{source}': nothing says how many pairs it has", advice)


def _shard_bytes(project: Project) -> dict[str, float]:
    """Bytes of the shards of each source that has listed them; of a table they are elsewhere."""
    from mode.data.shards.manifest import Manifest

    listed = {source: project.manifest(source) for source in project.params.sources}
    manifests = {source: Manifest.load(path) for source, path in listed.items() if path.is_file()}
    return {
        source: float(sum(shard.size for shard in manifest.shards))
        for source, manifest in manifests.items()
        if manifest.kind == "tars"
    }


def _facts(project: Project) -> dict[str, float]:
    """How large this project's data are, as its index has them."""
    from mode.clip.tokenizer import fit_words
    from mode.embedding.words import Vocabulary
    from mode.planning.measure import bytes_of

    source = project.params.training.source
    folder = project.index(source)
    if (report := counted(project, source)) is None:
        return {}
    images, pairs, _ = report
    captions = next(project.load_index(source).iter_captions(65_536))
    facts = {
        "captions_per_image": pairs / images,
        "index_bytes_per_pair": bytes_of(folder) / pairs,
        "caption_bytes": sum(len(caption.encode()) for caption in captions) / len(captions),
        "tokenizer_words": float(len(fit_words(captions, project.params.model.vocabulary))),
        "lsa_words": float(max(1, len(Vocabulary.learn(captions)))),
    }
    if shards := _shard_bytes(project).get(source):
        facts["image_bytes"] = shards / images
    return facts


def _images_and_texts(project: Project, is_here: bool, asked: int | None) -> tuple[int, int]:
    """Images and texts of the tasks that are listed, or given and there; else about as many as the paper's have.

    Where so many images are `asked` for, with as many texts for each.
    """
    from mode.evaluation.tasks import open_task

    given, folders = project.params.evaluation.tasks, []
    if is_here and project.task_list.is_file():
        folders = task_folders(project)
    elif is_here and given != BUILT_IN:
        folders = [project.root / where for where in given]
    images, texts = EVALUATION_IMAGES, EVALUATION_TEXTS
    if folders and all(folder.is_dir() for folder in folders):
        tasks = [open_task(folder) for folder in folders]
        images = sum(len(task.images) for task in tasks)
        texts = sum(len(prompts) for task in tasks for prompts in task.prompts)
    return (images, texts) if asked is None else (asked, round(texts * asked / images))


def _model_shape(
    project: Project,
    asked: Asked,
    words: float | None,
    checkpointing: bool | None = None,
    adapter: AdapterParams | None = None,
) -> ModelShape:
    """Of the model that every role trains, known without a network; `checkpointing` and `adapter` as of `shape_of`."""
    from mode.planning.shape import is_folder_of_model, shape_of, shape_of_folder
    from mode.roles import SEED

    params, precision = project.params, project.params.training.precision
    if asked.model is not None:
        model = params.model if not params.seed.pretrained else ModelParams(name=asked.model)
        return shape_of(model, None, words, precision, checkpointing, adapter)
    if not params.seed.pretrained:
        return shape_of(params.model, params.image.size, words, precision, checkpointing, adapter)
    seed, name = project.model(SEED.name), str(params.seed.name)
    folder = project.root / name.removeprefix("local-dir:")
    for known in (seed, folder):
        if is_folder_of_model(known):
            return shape_of_folder(known, precision, checkpointing, adapter)
    if name.startswith(("hf-hub:", "local-dir:")):
        raise ModeError(
            f"seed.name: the shape of '{name}' is not known here",
            "`dvc repro seed` fetches it, or --model names its like",
        )
    return shape_of(ModelParams(name=name), None, words, precision, checkpointing, adapter)


def _embedder_shape(project: Project, model: ModelShape, words: float) -> EmbedderShape:
    """Of `params.embedding`; an encoder of Hugging Face is taken for SimCSE, which is BERT base."""
    from mode.planning.hours import simcse_flops_per_caption
    from mode.planning.needs import EmbedderShape
    from mode.planning.shape import is_folder_of_model, shape_of, shape_of_folder
    from mode.planning.sizes import lsa_bytes

    params = project.params.embedding
    if params.kind == "lsa":
        dimensions = round(min(params.dimensions, words))
        return EmbedderShape(dimensions, 0.0, False, lsa_bytes(words, dimensions))
    if params.kind == "transformers":
        return EmbedderShape(_BERT_DIMENSIONS, simcse_flops_per_caption(), False, _BERT_BYTES)
    shape = model
    if params.kind == "open_clip":
        name = str(params.name)
        folder = project.root / name
        known = shape_of_folder(folder) if is_folder_of_model(folder) else None
        shape = known or shape_of(ModelParams(name=name.partition(":")[0]))
    flops = {"text": shape.flops_per_text, "image": shape.flops_per_image}.get(
        params.view, shape.flops_per_text + shape.flops_per_image
    )
    dimensions = shape.embed_dim * (2 if params.view == "both" else 1)
    traced = shape.footprint
    held = None if traced is None else traced.text if params.view == "text" else traced.image
    return EmbedderShape(dimensions, flops, params.view != "text", float(shape.state_bytes), held)
