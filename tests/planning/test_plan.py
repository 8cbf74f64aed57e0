"""Plans worked out by hand, and what holds for any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss
from torch._subclasses.fake_tensor import FakeTensorMode

from mode.errors import ModeError
from mode.planning.account import Plan, StagePlan
from mode.planning.footprint import Footprint, Line, _Held
from mode.planning.machines import Cluster, Gpu
from mode.planning.needs import EmbedderShape, Workload
from mode.planning.plan import make_plan, queue
from mode.planning.rates import SourcedRates, sourced
from mode.planning.sizes import loss_bytes
from tests.planning.conftest import MODEL

#: A GPU of 1 TFLOP/s makes 100 samples of 1 GFLOP a second; nothing else is as slow, unless a test says so.
RATES = {
    "training_share_of_peak": 0.1,
    "inference_share_of_peak": 0.2,
    "decode_images_per_core_second": 1e6,
    "index_checked_images_per_core_second": 10.0,
    "lsa_captions_per_core_second": 100.0,
    "evaluation_flops_per_core_second": 2e9,
    "assign_multiply_adds_per_core_second": 2_000.0,
    "fit_multiply_adds_per_core_second": 1_000.0,
    "read_bytes_per_second": 1e12,
    "image_bytes": 1_000.0,
    "index_bytes_per_pair": 50.0,
    "caption_bytes": 64.0,
    "start_seconds": 0.0,
    "words_start_seconds": 0.0,
    "model_start_seconds": 0.0,
}

Make = Callable[..., Workload]
Machines = Callable[..., Cluster]


def rates(**changes: float) -> SourcedRates:
    return sourced(("round", {**RATES, **changes}))


def stages_of(plan: Plan) -> dict[str, StagePlan]:
    return {stage.stage: stage for stage in plan.stages}


def test_hours_worked_out_by_hand(workload: Make, machines: Machines) -> None:
    plan = make_plan(workload(), machines(), rates(), price=2.0)
    hours = {stage.stage: stage.hours for stage in plan.stages}
    second = 1 / 3600
    assert hours == pytest.approx(
        {
            "data@base": 0,
            "index@base": 1.0,  # 36,000 images, 10 a second
            "embedder": 0,
            "embed@base": 360 * second,  # 36,000 captions, 100 a second
            # 5 passes over 1,000 and 2 over 320 vectors; then all, fewer than 500,000; each x 10 centres
            # x 20 dimensions, 1,000 a second in the fit and 2,000 then;
            # then the words of 36,000 captions.
            "cluster@base": (5_640 / 5 + 36_000 / 10 + 360) * second,
            "assign@base": 1.0,
            "seed": 240 * second,  # 24,000 samples
            "dense": 160 * second,
            "dense-long": 320 * second,  # as long as two experts
            "expert@expert-0": 160 * second,
            "expert@expert-1": 160 * second,
            "ensemble": 0,
            # 5 models x (3,600 images x 0.2 GFLOP + 1,800 texts x 0.1 GFLOP), 0.2 TFLOP/s
            "evaluate": 22.5 * second,
        }
    )
    assert plan.hours == pytest.approx(sum(hours.values()))  # one GPU: everything after one another
    computed = (240 + 160 + 320 + 160 + 160 + 22.5) * second
    assert plan.device_hours == pytest.approx(computed)
    assert plan.cost == pytest.approx(2 * computed)
    assert plan.rented_cost == pytest.approx(2 * plan.hours)
    assert plan.bottleneck == "CPU cores"


def test_a_stage_starts_before_it_works(workload: Make, machines: Machines) -> None:
    plain = stages_of(make_plan(workload(), machines(), rates()))
    plan = stages_of(
        make_plan(workload(), machines(), rates(start_seconds=2.0, words_start_seconds=5.0, model_start_seconds=60.0))
    )
    later = {name: round((plan[name].hours - plain[name].hours) * 3600, 6) for name in plan}
    tables = dict.fromkeys(("index@base", "embed@base", "assign@base"), 2.0)  # with `lsa`
    words = dict.fromkeys(("embedder", "cluster@base"), 5.0)
    models = ("seed", "dense", "dense-long", "expert@expert-0", "expert@expert-1", "ensemble", "evaluate")
    assert later == dict.fromkeys(plan, 0.0) | tables | words | dict.fromkeys(models, 60.0)
    assert plan["evaluate"].bottleneck == "its start"  # 22.5 seconds of work
    assert plan["seed"].bottleneck == "GPUs"
    embedder = EmbedderShape(dimensions=16, flops_per_item=2e8, of_images=False, files_bytes=1.0)
    encoded = stages_of(make_plan(workload(embedder=embedder), machines(), rates(model_start_seconds=60.0)))
    assert encoded["embed@base"].hours == pytest.approx((36 + 60) / 3600)


def test_experts_wait_for_the_seed_and_for_room(workload: Make, machines: Machines) -> None:
    plan = stages_of(make_plan(workload(), machines(nodes=2, gpus=2), rates()))
    seed, second = plan["seed"], 1 / 3600
    assert (seed.devices, seed.hours) == (4, pytest.approx(60 * second))
    after = seed.begins_at_hours + seed.hours
    begins = {name: round((stage.begins_at_hours - after) * 3600) for name, stage in plan.items()}
    # Two places, of two GPUs each: the first is free again after 80 seconds, the second after 160.
    assert [begins[name] for name in ("dense", "dense-long", "expert@expert-0", "expert@expert-1")] == [0, 0, 80, 160]
    assert begins["evaluate"] == 240


def test_an_embedder_made_from_the_seed_waits_for_it(workload: Make, machines: Machines) -> None:
    embedder = EmbedderShape(dimensions=16, flops_per_item=2e8, of_images=True, files_bytes=1.0)
    embedding = {"kind": "seed", "made_from": "models/seed", "view": "image"}
    work = workload(embedder=embedder, embedding=embedding)
    plan = stages_of(make_plan(work, machines(), rates(decode_images_per_core_second=50.0)))
    assert plan["embed@base"].begins_at_hours == pytest.approx(1.0 + 24_000 / 50 / 3600)
    # 36,000 images: the GPU makes 1,000 a second, and one core decodes 50.
    assert plan["embed@base"].hours == pytest.approx(36_000 / 50 / 3600)
    assert plan["embed@base"].bottleneck == "CPU cores"


def test_disk_worked_out_by_hand(workload: Make, machines: Machines) -> None:
    plan = make_plan(workload(), machines(), rates())
    disk = {stage.stage: stage.disk_bytes for stage in plan.stages}
    assert disk["data@base"] == 36_000_000
    assert disk["index@base"] == 1_800_000
    assert disk["embed@base"] == 36_000 * 2 * 20
    assert disk["assign@base"] == pytest.approx(36_000 * 10.4)
    assert disk["cluster@base"] == 1_000 + 12 * (4 * 20 + 146)
    assert disk["seed"] - disk["dense"] == 8_000_000  # two moments of a million parameters
    assert disk["expert@expert-0"] == 4_004_000
    assert plan.disk_bytes == pytest.approx(sum(disk.values()))


def test_memory_worked_out_by_hand(workload: Make, machines: Machines) -> None:
    plan = stages_of(make_plan(workload(), machines(gpus=4, per_training=2), rates()))
    for name in ("seed", "dense", "expert@expert-1"):
        assert plan[name].process_memory_bytes == pytest.approx(6.7e8 + 16e6)
    assert plan["seed"].node_memory_bytes == pytest.approx(4 * plan["seed"].process_memory_bytes + 4.5e8)
    assert plan["dense"].node_memory_bytes == pytest.approx(4 * plan["dense"].process_memory_bytes + 4.5e8)


def test_no_memory_grows_with_the_pairs(workload: Make, machines: Machines) -> None:
    few, many = (stages_of(make_plan(workload(pairs), machines(), rates())) for pairs in (36_000, 50_000_000))
    assert [each.node_memory_bytes for each in few.values()] == [each.node_memory_bytes for each in many.values()]


def test_what_does_not_fit_is_said(workload: Make, machines: Machines) -> None:
    assert make_plan(workload(), machines(memory=2e9), rates()).shortages == []
    short = make_plan(workload(), machines(memory=1.05e9), rates()).shortages
    assert [line.partition(":")[0] for line in short] == ["seed", "dense", "dense-long"] + [
        f"expert@expert-{n}" for n in (0, 1)
    ]


def test_a_training_waits_for_what_is_slowest(workload: Make, machines: Machines) -> None:
    for slow, named, factor in (
        ({}, "GPUs", 1),
        ({"decode_images_per_core_second": 50.0}, "CPU cores", 2),
        ({"read_bytes_per_second": 20_000.0}, "storage", 5),
    ):
        seed = stages_of(make_plan(workload(), machines(), rates(**slow)))["seed"]
        assert (seed.bottleneck, seed.hours) == (named, pytest.approx(factor * 240 / 3600))


def test_kept_images_are_decoded_once(workload: Make, machines: Machines) -> None:
    slow = rates(decode_images_per_core_second=50.0)
    kept = workload(pairs=6_000, machine={"cache_mb": 2})  # 6,000 x 300 bytes
    assert stages_of(make_plan(kept, machines(), slow))["seed"].phases[-1]["CPU cores"] == pytest.approx(120 / 3600)
    cropped = workload(pairs=6_000, machine={"cache_mb": 2}, image={"crop_scale": 0.5})
    assert stages_of(make_plan(cropped, machines(), slow))["seed"].phases[-1]["CPU cores"] == pytest.approx(480 / 3600)


def test_an_epoch_is_all_images_unless_it_is_said(workload: Make, machines: Machines) -> None:
    work = workload(pairs=36_000, training={"epoch_samples": None})
    plan = make_plan(work, machines(), rates(captions_per_image=4.5))
    assert plan.epoch_samples == 8_000
    assert stages_of(plan)["seed"].samples == 24_000


def test_accumulation_takes_a_third_longer_and_a_given_rate_is_taken_as_it_is(
    workload: Make, machines: Machines
) -> None:
    work = workload(training={"accumulate": 2})
    assert stages_of(make_plan(work, machines(), rates()))["seed"].hours == pytest.approx(320 / 3600)
    given_rate = rates(training_samples_per_second=1_000.0)
    assert stages_of(make_plan(work, machines(), given_rate))["seed"].hours == pytest.approx(24 / 3600)


def test_workers_gain_until_the_store_is_the_limit(workload: Make, machines: Machines) -> None:
    embedder = EmbedderShape(dimensions=16, flops_per_item=2e8, of_images=False, files_bytes=1.0)
    embedding = {"kind": "transformers", "name": "bert"}
    hours = [
        stages_of(
            make_plan(
                workload(embedder=embedder, embedding=embedding, machine={"engine": engine}),
                machines(gpus=2),
                rates(read_bytes_per_second=19_200.0),
            )
        )["embed@base"]
        for engine in ("local", "dask")
    ]
    # One GPU: 36,000 captions, 1,000 a second. Two would take half of it, but the store takes 600 of 32 bytes a second.
    assert [stage.hours for stage in hours] == pytest.approx([36 / 3600, 60 / 3600])
    assert [stage.bottleneck for stage in hours] == ["GPUs", "storage"]


def test_on_cpus_a_training_is_one_process(workload: Make, machines: Machines) -> None:
    on_cpu = replace(machines(), device="cpu", gpu=None, threads=2, cores_per_node=4)
    plan = make_plan(workload(), on_cpu, rates(training_flops_per_core_second=5e10))
    seed = stages_of(plan)["seed"]
    assert (seed.hours, seed.bottleneck) == (pytest.approx(240 / 3600), "training process")
    # 5 models x (3,600 images x 0.2 GFLOP + 1,800 texts x 0.1 GFLOP) on 4 cores of 2 GFLOP/s each
    assert stages_of(plan)["evaluate"].hours == pytest.approx((562.5 + 3_600 / 4e6) / 3600)


@pytest.mark.parametrize(("view", "seconds"), [("text", 1_800 / 1e3), ("image", 3_600 / 1e3)])
def test_what_weighs_the_experts_is_embedded_in_the_evaluation(
    workload: Make, machines: Machines, view: str, seconds: float
) -> None:
    """0.2 GFLOP a text or an image, 0.2 TFLOP/s; `lsa` takes no time that counts."""
    embedder = EmbedderShape(dimensions=16, flops_per_item=2e8, of_images=view == "image", files_bytes=1.0)
    embedding = {"kind": "seed", "made_from": "models/seed", "view": view}
    plan = stages_of(make_plan(workload(embedder=embedder, embedding=embedding), machines(), rates()))
    assert plan["evaluate"].hours == pytest.approx((22.5 + seconds) / 3600)


def test_a_pretrained_seed_is_not_trained(workload: Make, machines: Machines) -> None:
    work = workload(
        model={"name": None},
        seed={"from": "pretrained", "name": "ViT-B-32", "weights": "openai"},
        training={"seed_epochs": 0},
    )
    plan = stages_of(make_plan(work, machines(), rates()))
    assert plan["seed"].hours == 0
    assert plan["seed"].disk_bytes == 4_004_000
    assert plan["dense"].samples == 40_000


def test_places_are_given_in_order() -> None:
    assert queue([4, 1, 1, 3], places=2) == ([0, 0, 1, 2], [0, 1, 1, 1])
    assert queue([], places=2) == ([], [])


@pytest.mark.parametrize(
    ("nodes", "gpus", "each", "message"),
    [
        (1, 2, 4, "4 devices for one training, but there are 2 (give more --gpus or --nodes)"),
        (2, 4, 6, "6 devices for one training are not whole machines of 4 (give a multiple of --gpus, or fewer)"),
    ],
)
def test_trainings_that_have_no_room_are_refused(
    machines: Machines, nodes: int, gpus: int, each: int, message: str
) -> None:
    with pytest.raises(ModeError) as refused:
        machines(nodes, gpus, each)
    assert str(refused.value) == message


def test_json_is_the_whole_plan(workload: Make, machines: Machines) -> None:
    plan = make_plan(workload(), machines(nodes=2), rates(), price=1.5)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


SIZES = st.integers(1_000, 10**9)
MACHINES = st.tuples(st.integers(1, 6), st.integers(1, 8))


@settings(max_examples=50)
@given(MACHINES, st.integers(1, 4), st.booleans(), SIZES)
def test_more_gpus_never_take_longer(
    workload: Make, machines: Machines, given_machines: tuple[int, int], more: int, of_nodes: bool, pairs: int
) -> None:
    nodes, gpus = given_machines
    work = workload(pairs=pairs)
    few = make_plan(work, machines(nodes, gpus), rates())
    many = make_plan(work, machines(nodes + more * of_nodes, gpus + more * (not of_nodes)), rates())
    assert many.hours <= few.hours * (1 + 1e-9)
    assert many.disk_bytes == few.disk_bytes


@settings(max_examples=50)
@given(MACHINES, SIZES)
def test_twice_the_pairs_take_twice_the_disk(
    workload: Make, machines: Machines, given_machines: tuple[int, int], pairs: int
) -> None:
    once, twice = (
        stages_of(make_plan(workload(pairs=count), machines(*given_machines), rates())) for count in (pairs, 2 * pairs)
    )
    for stage in ("data@base", "index@base", "embed@base", "assign@base"):
        assert twice[stage].disk_bytes == pytest.approx(2 * once[stage].disk_bytes)
        assert twice[stage].hours == pytest.approx(2 * once[stage].hours)


@settings(max_examples=50)
@given(MACHINES, SIZES, st.floats(0.01, 100))
def test_parts_add_up(
    workload: Make, machines: Machines, given_machines: tuple[int, int], pairs: int, price: float
) -> None:
    plan = make_plan(workload(pairs=pairs), machines(*given_machines), rates(), price)
    assert plan.disk_bytes == pytest.approx(sum(stage.disk_bytes for stage in plan.stages))
    assert plan.device_hours == pytest.approx(sum(stage.device_hours for stage in plan.stages))
    assert plan.cost == pytest.approx(sum(stage.cost or 0 for stage in plan.stages))
    assert plan.cost == pytest.approx(price * plan.device_hours)
    assert plan.hours == pytest.approx(max(stage.begins_at_hours + stage.hours for stage in plan.stages))
    assert plan.device_hours <= plan.rented_device_hours * (1 + 1e-9)


def test_experts_that_are_adapters_worked_out_by_hand(workload: Make, machines: Machines) -> None:
    """Of 1,100,000 parameters a training changes 100,000; a pass keeps a fifth more."""
    adapter = replace(
        MODEL,
        parameters=1_100_000,
        state_bytes=4_400_000,
        learnt=100_000,
        learnt_bytes=400_000,
        footprint=Footprint(activations=Line(3e6, 1.2e6), image=Line(0.0, 2e5), text=Line(0.0, 1e5)),
    )
    work = replace(workload(training={"adapter": {"rank": 4}}), model=replace(MODEL, adapter=adapter))
    found = make_plan(work, on_gpus(machines(gpus=2), 1e9), rates(**MEMORY))
    whole = stages_of(make_plan(workload(), on_gpus(machines(gpus=2), 1e9), rates(**MEMORY)))
    plan = stages_of(found)
    for name in ("seed", "dense", "dense-long", "evaluate"):
        assert plan[name] == whole[name]
    expert = plan["expert@expert-0"]
    assert expert.disk_bytes == 404_000
    assert expert.process_memory_bytes == pytest.approx(6.7e8 + 4.4e6 + 1.2e6)
    assert expert.hours == whole["expert@expert-0"].hours
    assert "experts are adapters, which of so small a model are taken to train as fast as whole ones" in found.notes
    memory = expert.gpu_memory
    assert memory is not None
    assert (memory.weights, memory.gradients, memory.moments, memory.buckets) == (4.4e6, 4e5, 8e5, 4e5)
    assert memory.activations == pytest.approx(3e6 + 50 * 1.2e6)


@pytest.mark.parametrize("measured", [None, 100.0])
def test_adapters_of_a_large_model_train_faster_by_the_operations_that_they_save(
    workload: Make, machines: Machines, measured: float | None
) -> None:
    """10 GFLOP a pair are 10 samples/s, or 100 as measured of the whole model; 8 GFLOP are 12.5, or 125."""
    model = replace(MODEL, flops_per_pair=1e10, adapter=replace(MODEL, flops_per_pair=8e9))
    work = replace(workload(training={"adapter": {"rank": 4}}), model=model)
    found = make_plan(work, machines(), rates() if measured is None else rates(training_samples_per_second=measured))
    plan, seconds = stages_of(found), 16_000 / (measured or 10.0)
    assert plan["dense"].hours == pytest.approx(seconds / 3600)
    assert plan["expert@expert-0"].hours == pytest.approx(0.8 * seconds / 3600)
    assert not any("adapters" in note for note in found.notes)


def test_a_small_model_is_warned_of_where_its_rate_is_worked_out(workload: Make, machines: Machines) -> None:
    assert "does not fill a GPU" in make_plan(workload(), machines(), rates()).notes[0]
    assert make_plan(workload(), machines(), rates(training_samples_per_second=5.0)).notes == []
    assert make_plan(workload(), replace(machines(), gpu=None, device="cpu"), rates()).notes == []


def test_an_epoch_that_is_next_to_nothing_is_pointed_out(workload: Make, machines: Machines) -> None:
    given = rates(training_samples_per_second=5.0)
    assert make_plan(workload(pairs=800_000), machines(), given).notes == []
    [note] = make_plan(workload(pairs=800_001), machines(), given).notes
    assert note.startswith("an epoch has 8,000 samples, of 800,001 images")


def test_what_arrives_is_not_clustered_and_an_update_is_as_long_as_its_pairs(
    workload: Make, machines: Machines
) -> None:
    """A fifth as many pairs as the source has, and as many old ones: two fifths of an expert's 16,000 samples."""
    work = workload(
        sources={"base-2": {"shards": "/shards", "continues": "base"}},
        updates={"v2": {"continues": "expert-1", "source": "base-2", "cluster": 1, "replays": "base"}},
    )
    found = stages_of(make_plan(replace(work, pairs={**work.pairs, "base-2": 7_200}), machines(), rates()))
    assert {"index@base-2", "embed@base-2", "assign@base-2"} < found.keys()
    assert "cluster@base-2" not in found
    assert (found["expert@expert-1"].samples, found["update@v2"].samples) == (16_000, 6_400)
    before = stages_of(make_plan(workload(), machines(), rates()))
    assert found["evaluate"].hours == before["evaluate"].hours  # an update takes its expert's place


#: 7 MB of CUDA, and a fifth of each GPU left free.
MEMORY = {"gpu_context_bytes": 7e6, "gpu_spare_share": 0.2}


def on_gpus(cluster: Cluster, memory: float | None) -> Cluster:
    return replace(cluster, gpu=Gpu(1e12, memory))


def test_gpu_memory_worked_out_by_hand(workload: Make, machines: Machines) -> None:
    cluster = on_gpus(machines(gpus=2, per_training=1), 200e6)
    plan = stages_of(make_plan(workload(), cluster, rates(**MEMORY)))
    seed, dense = plan["seed"].gpu_memory, plan["dense"].gpu_memory
    assert seed is not None
    assert dense is not None
    # 100 pairs a step, on two GPUs and on one; vectors of 16.
    assert (seed.weights, seed.gradients, seed.moments, seed.context) == (4e6, 4e6, 8e6, 7e6)
    assert (seed.batch, seed.activations, seed.buckets) == (50, 53e6, 4e6)
    assert (dense.batch, dense.activations, dense.buckets) == (100, 103e6, 0.0)
    assert seed.loss == 4 * (4 * 50 * 100 + 2 * 16 * (50 + 300))
    assert dense.loss == 4 * (4 * 100 * 100 + 2 * 16 * 100)
    assert seed.total == pytest.approx(80e6 + seed.loss)
    assert dense.total == pytest.approx(126e6 + dense.loss)
    assert (seed.of, seed.usable) == (200e6, 160e6)
    # Of 160 MB 26 are taken by what does not grow: b MB of activations, and 16 b^2 + 128 b bytes of the loss.
    assert dense.largest_batch == 133
    assert plan["embed@base"].gpu_memory is None
    evaluation = plan["evaluate"].gpu_memory
    assert evaluation is not None
    # Five models in float32, 256 images; nothing is trained.
    assert (evaluation.weights, evaluation.activations, evaluation.largest_batch) == (20e6, 256 * 2e5, None)


def test_the_largest_batch_fits_and_the_next_does_not(workload: Make, machines: Machines) -> None:
    cluster = on_gpus(machines(gpus=2, per_training=1), 200e6)

    def memory(batch: int, stage: str) -> tuple[bool, int | None]:
        work = workload(training={"batch_size": batch, "accumulate": 2})
        found = stages_of(make_plan(work, cluster, rates(**MEMORY)))[stage].gpu_memory
        assert found is not None
        return found.fits, found.largest_batch

    for stage, together in (("seed", 4), ("dense", 2)):
        _, largest = memory(100, stage)
        assert largest is not None
        assert largest % together == 0
        assert memory(largest, stage)[0]
        assert not memory(largest + together, stage)[0]


def test_what_a_gpu_has_no_room_for_is_said_once_with_what_helps(workload: Make, machines: Machines) -> None:
    [short] = make_plan(workload(), on_gpus(machines(), 100e6), rates(**MEMORY)).shortages
    names, _, what = short.partition(": ")
    assert names == "seed, dense, dense-long, expert@expert-0, expert@expert-1"
    # 80 MB: in two passes 50 of activations, 3 of copies and 23; the loss has 0.2.
    assert "with training.accumulate: 2 they fit" in what
    again = workload(training={"accumulate": 2})
    assert make_plan(again, on_gpus(machines(), 100e6), rates(**MEMORY)).shortages == []
    [none] = make_plan(workload(), on_gpus(machines(), 30e6), rates(**MEMORY)).shortages[:1]
    assert "no number of passes fits" in none


def test_a_gpu_of_unknown_memory_is_compared_with_nothing(workload: Make, machines: Machines) -> None:
    plan = make_plan(workload(), on_gpus(machines(), None), rates(**MEMORY))
    memory = stages_of(plan)["seed"].gpu_memory
    assert memory is not None
    assert (memory.of, memory.usable, memory.largest_batch, memory.passes) == (None, None, None, None)
    assert plan.shortages == []


def test_a_model_that_cannot_be_traced_is_said(workload: Make, machines: Machines) -> None:
    work = workload()
    work = replace(work, model=replace(work.model, footprint=None))
    plan = make_plan(work, machines(), rates(training_samples_per_second=5.0))
    assert all(stage.gpu_memory is None for stage in plan.stages)
    assert "cannot be traced" in plan.notes[0]


@pytest.mark.parametrize("pairs", [256, 1_024])
def test_the_loss_holds_what_is_planned(pairs: int) -> None:
    """Four matrices of [pairs, pairs] in float32 and the features, against the most that its own pass holds."""
    features = torch.zeros(pairs, 16), torch.zeros(pairs, 16)
    held = _Held()
    with FakeTensorMode(), held:
        images, texts = (torch.zeros(feature.shape, requires_grad=True) for feature in features)
        ClipLoss()(images, texts, torch.ones(()))
    assert held.most == pytest.approx(loss_bytes(pairs, 1, 16), rel=0.1)
