"""What each stage of a run needs, by itself: disk, memory, hours, and of what it waits for most."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from mode.clustering.words import SAMPLE
from mode.ensemble.router import images_to_keep
from mode.experiments.plan import training_plan
from mode.params import Params
from mode.planning import hours as h
from mode.planning import sizes
from mode.planning.account import GpuMemory, StagePlan
from mode.planning.footprint import Line
from mode.planning.machines import Cluster
from mode.planning.rates import Rates
from mode.planning.shape import ModelShape
from mode.roles import SEED, UPDATE, Role
from mode.training.plan import TrainPlan, adapter_of

#: More pairs than any GPU takes in one pass.
_MOST_PAIRS = 2**24


@dataclass(frozen=True)
class EmbedderShape:
    """What embeds: `flops_per_item` is 0 of `lsa`, which computes on cores.

    Attributes:
        dimensions: of a vector.
        flops_per_item: forward, of a caption, or of an image, or of both.
        of_images: an item is an image, and has to be decoded.
        files_bytes: of `data/embedder`.
        held: bytes on a GPU by the items of a batch; None: not known.
    """

    dimensions: int
    flops_per_item: float
    of_images: bool
    files_bytes: float
    held: Line | None = None


@dataclass(frozen=True)
class Workload:
    """What is to be done.

    Attributes:
        params: all of params.yaml.
        pairs: by source.
        shard_bytes: by source, where they are known.
        model: that every role trains; where experts are adapters, with the shape of one.
        embedder: that captions or images are embedded by.
        evaluation_images, evaluation_texts: of all tasks; of a class its name in every template.
    """

    params: Params
    pairs: Mapping[str, int]
    shard_bytes: Mapping[str, float]
    model: ModelShape
    embedder: EmbedderShape
    evaluation_images: int
    evaluation_texts: int

    def trained_by(self, role: Role) -> ModelShape:
        """What a training of this role trains."""
        adapter = self.model.adapter if adapter_of(role, self.params.training) else None
        return self.model if adapter is None else adapter


class Needs:
    """The stages of one workload on machines of one kind, in groups of which each waits for the one before it."""

    def __init__(self, work: Workload, cluster: Cluster, rates: Rates) -> None:
        self._work, self._cluster, self._rates = work, cluster, rates
        self._params, self._model = work.params, work.model
        recipe = self._params.training
        self._images = {name: pairs / self._rates.captions_per_image for name, pairs in work.pairs.items()}
        self.epoch_samples = recipe.epoch_samples or round(self._images[recipe.source])

    def trainings(self) -> tuple[list[StagePlan], list[StagePlan]]:
        """The seed, and what goes on from it."""
        trainings = [self._training(key, plan) for key, plan in self._train_plans()]
        seed = [stage for stage in trainings if stage.stage == SEED.name]
        if self._params.seed.pretrained:  # its folder is there, too
            seed = [StagePlan(stage=SEED.name, disk_bytes=self._folder_bytes(self._model))]
        return seed, [stage for stage in trainings if stage.stage != SEED.name]

    def _train_plans(self) -> Iterator[tuple[str | None, TrainPlan]]:
        for role, key in self._params.trainings:
            share = self._share_of_update(key) if role is UPDATE and key is not None else 1.0
            yield key, training_plan(self._params, role, key, self.epoch_samples, share)

    def _share_of_update(self, key: str) -> float:
        """Pairs of an update as a multiple of the expert's: clusters are taken to be equally large, as everywhere."""
        update, pairs = self._params.updates[key], self._work.pairs
        new = pairs[update.source] / pairs[update.replays]
        return new + min(1.0, new * update.replay_share / (1 - update.replay_share))

    def preparation(self) -> tuple[list[StagePlan], list[StagePlan]]:
        """What comes before an embedder, and what it is needed for."""
        before, after = [], []
        for source in self._work.pairs:
            before += [self._shards(source), self._index(source)]
        start = self._embedders_start(self._rates.words_start_seconds)
        after.append(_stage("embedder", start, [], disk_bytes=self._work.embedder.files_bytes))
        for source in self._work.pairs:
            clustered = [self._cluster_stage(source)] if self._params.root_of(source) == source else []
            after += [self._embed(source), *clustered, self._assign(source)]
        return before, after

    def _shards(self, source: str) -> StagePlan:
        known = self._work.shard_bytes.get(source)
        return StagePlan(
            stage=f"data@{source}",
            disk_bytes=self._images[source] * self._rates.image_bytes if known is None else known,
        )

    def _index(self, source: str) -> StagePlan:
        rates, images, decodes = self._rates, self._images[source], self._params.index.check_images
        phases = h.index_phases(
            images,
            rates.index_checked_images_per_core_second if decodes else rates.index_headers_images_per_core_second,
            self._cluster.cores_per_node,
            read_bytes=images * rates.image_bytes if decodes else 0.0,
            read_bytes_per_second=rates.read_bytes_per_second,
            small_reads=0.0 if decodes or not self._cluster.is_elsewhere else h.SMALL_READS * images,
            small_read_seconds=rates.small_read_seconds,
        )
        disk = self._work.pairs[source] * rates.index_bytes_per_pair
        return _stage(f"index@{source}", rates.start_seconds, phases, disk_bytes=disk, memory=sizes.STREAMING_BYTES)

    def _embed(self, source: str) -> StagePlan:
        """With an engine every worker writes its vectors to the store, which is the limit of many."""
        rates, embedder, cluster = self._rates, self._work.embedder, self._cluster
        engine, pairs = self._params.machine.engine, self._work.pairs[source]
        items = self._images[source] if embedder.of_images else pairs
        nodes = self._nodes_of_engine
        cores = nodes * cluster.cores_per_node
        devices = 0
        if not embedder.flops_per_item:
            phases = h.lsa_phases(pairs, rates.lsa_captions_per_core_second, 1 if engine == "local" else cores)
        else:
            decoding = {h.CORES: h.per_hour(items, rates.decode_images_per_core_second * cores)}
            decoding = decoding if embedder.of_images else {}
            if cluster.gpu is None:
                speed = rates.encoder_flops_per_core_second * cores
                phases = h.encoder_phases(items, embedder.flops_per_item, speed, h.CORES)
            else:
                devices = 1 if engine == "local" else nodes * cluster.devices_per_node
                speed = cluster.gpu.peak_flops_per_second * rates.inference_share_of_peak * devices
                phases = h.encoder_phases(items, embedder.flops_per_item, speed, h.GPU, decoding)
        disk = pairs * float(sizes.FLOAT16 * embedder.dimensions)
        if engine != "local":
            phases = [{**phases[0], h.STORAGE: h.per_hour(disk, rates.read_bytes_per_second * nodes)}]
        held, weights = embedder.held, embedder.files_bytes
        gpu_memory = self._inference_memory(weights, held) if devices and held is not None else None
        start = self._embedders_start(rates.start_seconds)
        return _stage(f"embed@{source}", start, phases, devices, disk, sizes.STREAMING_BYTES, gpu_memory)

    def _embedders_start(self, of_lsa: float) -> float:
        """Seconds of a stage that opens the embedder, or `of_lsa`, which is no model."""
        return self._rates.model_start_seconds if self._work.embedder.flops_per_item else of_lsa

    def _cluster_stage(self, source: str) -> StagePlan:
        """Fit on a sample, then find the clusters of some pairs and count their words, to name the clusters."""
        rates, pairs, d = self._rates, self._work.pairs[source], self._work.embedder.dimensions
        fine, coarse = self._params.clusters_of(source)
        params = self._params.clustering
        named = min(float(SAMPLE), pairs)
        fitted = h.fit_vectors(min(params.sample, pairs), fine, params.iterations)
        fitting = rates.fit_multiply_adds_per_core_second * self._cluster.cores_per_node
        phases: list[h.Phase] = [
            {h.CORES: h.search_hours(fitted, fine, d, fitting), h.STORAGE: self._reading_vectors(source)},
            {h.CORES: h.search_hours(named, fine, d, self._search_speed)},
            {h.ONE_CORE: h.per_hour(named, rates.lsa_captions_per_core_second)},
        ]
        disk, start = sizes.cluster_files_bytes(fine, coarse, d), rates.words_start_seconds
        return _stage(f"cluster@{source}", start, phases, disk_bytes=disk, memory=sizes.STREAMING_BYTES)

    def _assign(self, source: str) -> StagePlan:
        pairs, d = self._work.pairs[source], self._work.embedder.dimensions
        fine, _ = self._params.clusters_of(source)
        nodes = self._nodes_of_engine
        speed = self._search_speed * nodes
        searching = {h.CORES: h.search_hours(pairs, fine, d, speed), h.STORAGE: self._reading_vectors(source) / nodes}
        disk = pairs * sizes.ASSIGNMENT_BYTES_PER_PAIR
        start = self._rates.start_seconds
        return _stage(f"assign@{source}", start, [searching], disk_bytes=disk, memory=sizes.STREAMING_BYTES)

    @property
    def _nodes_of_engine(self) -> int:
        """Machines that embed and assign: all, where `machine.engine` is the address of a scheduler."""
        return self._cluster.nodes if "://" in self._params.machine.engine else 1

    @property
    def _search_speed(self) -> float:
        """Multiply-adds a second of one machine's cores."""
        return self._rates.assign_multiply_adds_per_core_second * self._cluster.cores_per_node

    def _reading_vectors(self, source: str) -> float:
        vectors = self._work.pairs[source] * float(sizes.FLOAT16 * self._work.embedder.dimensions)
        return h.per_hour(vectors, self._rates.read_bytes_per_second)

    def _training(self, key: str | None, plan: TrainPlan) -> StagePlan:
        """One training; `key` of an expert."""
        cluster, rates, params, model = self._cluster, self._rates, self._params, self._work.trained_by(plan.role)
        devices = cluster.devices_of_seed if plan.role is SEED else cluster.devices_per_training
        own = self._pairs_of(key, plan)
        own_images = own / rates.captions_per_image
        crops = params.image.crop_scale is not None
        cached = sizes.cached_image_bytes(own_images, model.image_size, params.machine.cache_mb, crops)
        read = min(plan.samples, own_images) if cached else float(plan.samples)
        nodes = devices / cluster.devices_per_node
        phases = h.training_phases(
            h.TRAINER if cluster.gpu is None else h.GPU,
            plan.samples,
            devices * self.samples_per_device_second() * self._speed_up(model),
            0.0 if params.image.decode == "gpu" and cluster.gpu is not None else read,
            rates.decode_images_per_core_second * cluster.cores_of(devices),
            read * rates.image_bytes,
            rates.read_bytes_per_second * nodes,
        )
        phases = h.started(phases, rates.model_start_seconds)
        process = sizes.training_process_bytes(model.parameters, model.learnt, cached)
        side_by_side = 1 if plan.role is SEED else min(cluster.trainings_per_node, self._queued)
        processes = side_by_side * min(devices, cluster.devices_per_node)
        moments = 2 * sizes.FLOAT32 * model.parameters if plan.role is SEED else 0
        return StagePlan(
            stage=plan.name if key is None else f"{plan.role.name}@{key}",
            samples=plan.samples,
            disk_bytes=self._folder_bytes(model) + moments,
            process_memory_bytes=process,
            node_memory_bytes=sizes.training_node_bytes(process, processes),
            gpu_memory=self._training_memory(model, devices),
            devices=devices,
            hours=h.hours_of(phases),
            device_hours=devices * h.hours_of(phases),
            bottleneck=h.bottleneck_of(phases),
            phases=[dict(phase) for phase in phases],
        )

    def _training_memory(self, model: ModelShape, devices: int) -> GpuMemory | None:
        """Of each of the processes that train one model together."""
        gpu, recipe = self._cluster.gpu, self._params.training
        if gpu is None or model.footprint is None:
            return None
        kept = model.footprint.activations

        def needed(batch: float, passes: int) -> sizes.GpuBytes:
            whole, learnt, context = float(model.state_bytes), float(model.learnt_bytes), self._rates.gpu_context_bytes
            return sizes.training_gpu_bytes(whole, learnt, model.embed_dim, kept, batch, devices, passes, context)

        usable, largest, passes, each = self._usable, None, None, recipe.batch_size // devices
        if usable is not None:
            together = devices * recipe.accumulate
            counts = range(1, _MOST_PAIRS)
            largest = together * bisect_left(
                counts, True, key=lambda count: needed(count * together, recipe.accumulate).total > usable
            )
            dividing = (count for count in range(1, each + 1) if each % count == 0)
            passes = next((count for count in dividing if needed(recipe.batch_size, count).total <= usable), None)
        found = needed(recipe.batch_size, recipe.accumulate)
        return GpuMemory(
            **asdict(found),
            total=found.total,
            of=gpu.memory_bytes,
            usable=usable,
            batch=math.ceil(recipe.batch_size / devices / recipe.accumulate),
            largest_batch=largest,
            passes=passes,
        )

    def _inference_memory(self, weights: float, held: Line) -> GpuMemory | None:
        """Of a process that runs models whose weights are so large, on batches of `machine.inference_batch`."""
        gpu, batch, context = self._cluster.gpu, self._params.machine.inference_batch, self._rates.gpu_context_bytes
        if gpu is None:
            return None
        activations = held.of(batch)
        return GpuMemory(
            context=context,
            weights=weights,
            activations=activations,
            total=context + weights + activations,
            of=gpu.memory_bytes,
            usable=self._usable,
            batch=batch,
        )

    @property
    def _usable(self) -> float | None:
        """Bytes of a GPU without the share that is left free."""
        gpu = self._cluster.gpu
        if gpu is None or gpu.memory_bytes is None:
            return None
        return gpu.memory_bytes * (1 - self._rates.gpu_spare_share)

    def samples_per_device_second(self) -> float:
        """What one device trains, waiting for nothing; as it was measured, or from its peak."""
        rates, recipe, machine = self._rates, self._params.training, self._params.machine
        if rates.training_samples_per_second is not None:
            return rates.training_samples_per_second
        gpu = self._cluster.gpu
        if gpu is None:
            flops = rates.training_flops_per_core_second * self._cluster.threads
        else:
            flops = gpu.peak_flops_per_second * rates.training_share_of_peak
        again = h.ACCUMULATION if recipe.accumulate > 1 else 1.0
        again *= h.RECOMPUTATION if machine.grad_checkpointing else 1.0
        return flops / self._model.flops_per_pair / again

    def _speed_up(self, model: ModelShape) -> float:
        """How much faster than the whole model it, or an adapter of it, trains: frozen weights need no gradient.

        In a small model, more and smaller operations take what that saves.
        """
        return self._model.flops_per_pair / model.flops_per_pair if self._model.is_large else 1.0

    @property
    def _queued(self) -> int:
        """Trainings after the seed."""
        return sum(role is not SEED for role, _ in self._params.trainings)

    def _pairs_of(self, key: str | None, plan: TrainPlan) -> float:
        """Pairs that a model is trained on: clusters are taken to be equally large."""
        if plan.cluster is None or key is None:
            return float(self._work.pairs[plan.source])
        params, is_update = self._params, plan.role is UPDATE
        trained, inside = params.updates[key] if is_update else params.experts[key], 1 / params.coarse_of(plan.source)
        outside = params.branch.outside_share if trained.outside_share is None else trained.outside_share
        of_expert = self._work.pairs[params.root_of(plan.source)] * (inside + outside * (1 - inside))
        return of_expert * (self._share_of_update(key) if is_update else 1.0)

    def _folder_bytes(self, model: ModelShape) -> float:
        """Of a model's folder: one of an adapter has no tokenizer."""
        if model is self._model.adapter:
            return model.learnt_bytes + sizes.CARD_BYTES
        words = min(self._params.model.vocabulary, self._rates.tokenizer_words)
        tokenizer = words * sizes.TOKENIZER_BYTES_PER_WORD if self._params.model.tokenizer == "words" else 0.0
        return model.state_bytes + tokenizer + sizes.CARD_BYTES

    def conclusion(self) -> list[StagePlan]:
        """The ensemble, which is read from clusters and embedder, and the evaluation of all models on one device."""
        rates, cluster, params = self._rates, self._cluster, self._params
        kept = images_to_keep(max(1, len(params.experts)), self._model.image_size)
        fine = sum(params.clusters_of(source)[0] for source in self._work.pairs if params.root_of(source) == source)
        conditions = fine * self._work.embedder.dimensions * sizes.FLOAT32
        images = len(params.experts) * kept * 3 * self._model.image_size**2
        disk = conditions + images + self._work.embedder.files_bytes
        start = rates.model_start_seconds
        ensemble = _stage("ensemble", start, [], disk_bytes=disk)
        used = sum(role is not UPDATE for role, _ in params.trainings)  # an update takes another model's place
        models = used + params.seed.pretrained
        images, texts, embedder = self._work.evaluation_images, self._work.evaluation_texts, self._work.embedder
        flops = models * (images * self._model.flops_per_image + texts * self._model.flops_per_text)
        flops += (images if params.embedding.view == "image" else texts) * embedder.flops_per_item  # what is routed
        decoding = h.per_hour(images, rates.decode_images_per_core_second * cluster.cores_per_node)
        if cluster.gpu is None:
            computing = h.per_hour(flops, rates.evaluation_flops_per_core_second * cluster.cores_per_node)
            phases = [{h.CORES: computing + decoding}]
            return [ensemble, _stage("evaluate", start, phases, memory=sizes.STREAMING_BYTES)]
        computing = h.per_hour(flops, cluster.gpu.peak_flops_per_second * rates.inference_share_of_peak)
        phases = [{h.GPU: computing, h.CORES: decoding}]
        memory = None
        if (traced := self._model.footprint) is not None:
            # As many models at once as may be, but one at least, in float32 whatever they were trained in.
            one = float(sizes.FLOAT32 * self._model.parameters)
            fitting = max(1.0, min(float(models), params.machine.models_mb * 2**20 // one))
            memory = self._inference_memory(fitting * one, max(traced.image, traced.text, key=lambda line: line.each))
        return [ensemble, _stage("evaluate", start, phases, 1, memory=sizes.STREAMING_BYTES, gpu_memory=memory)]


def _stage(
    name: str,
    start: float,
    work: Sequence[h.Phase],
    devices: int = 0,
    disk_bytes: float = 0.0,
    memory: float = 0.0,
    gpu_memory: GpuMemory | None = None,
) -> StagePlan:
    """A stage in one process of one machine, which takes `start` seconds to start."""
    phases = h.started(work, start)
    wall = h.hours_of(phases)
    return StagePlan(
        stage=name,
        disk_bytes=disk_bytes,
        process_memory_bytes=memory,
        node_memory_bytes=memory,
        gpu_memory=gpu_memory,
        devices=devices,
        hours=wall,
        device_hours=devices * wall,
        bottleneck=h.bottleneck_of(phases),
        phases=[dict(phase) for phase in phases],
    )
