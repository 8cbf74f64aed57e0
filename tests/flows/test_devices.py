"""Which training may compute where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from flows.devices import DevicePool, Devices, Machine, job_places, places_for, visible_gpus
from flows.locks import is_held, take
from mode.errors import ModeError


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    monkeypatch.setenv("MODE_LOCKS", str(tmp_path / "locks"))
    return tmp_path


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def devices_of(devices: Devices, root: Path, workers: int = 2, per_device: int = 1) -> list[str]:
    return [place.device for place in places_for(devices, workers, per_device, root)]


def test_auto_takes_every_gpu(three_gpus: Path) -> None:
    assert devices_of("auto", three_gpus) == ["cuda:0", "cuda:1", "cuda:2"]


def test_auto_without_gpu_takes_the_cpu_for_each_worker(no_gpu: Path) -> None:
    assert devices_of("auto", no_gpu, workers=3) == ["cpu", "cpu", "cpu"]


def test_cpu_is_taken_though_there_are_gpus(three_gpus: Path) -> None:
    assert devices_of("cpu", three_gpus, workers=1) == ["cpu"]


def test_gpus_are_shared_only_after_all_are_in_use(three_gpus: Path) -> None:
    assert devices_of([2, 0], three_gpus, per_device=2) == ["cuda:2", "cuda:0", "cuda:2", "cuda:0"]


def test_a_gpu_is_locked_by_its_own_number_for_all_projects(three_gpus: Path) -> None:
    here, there = (places_for([1], 1, 1, three_gpus / name)[0] for name in ("here", "there"))
    assert here.locks == there.locks
    assert [lock.name for lock in here.locks] == ["gpu-5-0"]


def test_the_folder_of_their_locks_is_this_users_alone(three_gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODE_LOCKS")
    monkeypatch.setattr("tempfile.tempdir", str(three_gpus))
    [place] = places_for([1], 1, 1, three_gpus)
    [folder] = three_gpus.iterdir()
    assert place.locks == (folder / "gpu-5-0",)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert places_for([1], 1, 1, three_gpus) == [place]


@pytest.mark.parametrize("made", ["by somebody else", "as a link", "as a link to nothing", "as a file"])
def test_a_folder_of_locks_that_somebody_else_has_made_is_refused(
    three_gpus: Path, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    """With links in it to files of this user, which taking a lock would empty."""
    monkeypatch.delenv("MODE_LOCKS")
    monkeypatch.setattr("tempfile.tempdir", str(three_gpus))
    folder = three_gpus / f"mode-locks-{os.getuid()}"
    if made == "by somebody else":
        folder.mkdir()
        if os.getuid():
            pytest.skip("only root gives folders away")
        os.chown(folder, 12345, 12345)
    elif made == "as a file":
        folder.touch()
    else:
        folder.symlink_to(three_gpus if made == "as a link" else three_gpus / "nothing")
    with pytest.raises(ModeError, match=r"mode-locks-\d+: somebody else has made it \(set MODE_LOCKS to .*\)$"):
        places_for("auto", 1, 1, three_gpus)


@pytest.mark.parametrize(
    ("devices", "message"), [([3], "no GPU 3 here.*shows 3"), ([0, 0], "names a GPU twice"), ([], "an empty list")]
)
def test_wrong_gpus_are_refused(three_gpus: Path, devices: Devices, message: str) -> None:
    with pytest.raises(ModeError, match=message):
        places_for(devices, 1, 1, three_gpus)


@pytest.mark.parametrize("given", ["gpu", [-1], 0, ["a"], None])
def test_other_words_are_no_devices(given: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Devices).validate_python(given)


@pytest.mark.parametrize(("value", "count"), [("", 0), ("-1", 0), ("2", 1), ("0, 1", 2), ("GPU-8ab1", 1)])
def test_visible_gpus_are_those_that_cuda_shows(monkeypatch: pytest.MonkeyPatch, value: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert len(visible_gpus()) == count


def test_a_place_is_taken_once_and_comes_back(no_gpu: Path) -> None:
    places = places_for("cpu", 2, 1, no_gpu)
    mine, other = DevicePool(places, 8), DevicePool(places, 8)  # of two flows
    first, second = mine.take("a"), other.take("b")
    assert first is not None
    assert second is not None
    assert first.place != second.place
    assert mine.take("c") is None
    first.free()
    third = other.take("c")
    assert third is not None
    assert third.place == first.place


@pytest.mark.parametrize(("cores", "workers", "each"), [(8, 2, 4), (2, 2, 1), (2, 3, 1), (7, 2, 3)])
def test_threads_are_divided_among_workers(no_gpu: Path, cores: int, workers: int, each: int) -> None:
    pool = DevicePool(places_for("cpu", workers, 1, no_gpu), cores)
    assert pool.threads(alone=False) == each
    assert pool.threads(alone=True) == cores


def test_gpus_that_train_together_are_neighbours_seen_by_their_stage_alone(three_gpus: Path) -> None:
    [place] = places_for("auto", 1, 1, three_gpus, together=2)
    assert place.device == "cuda:0,1"
    assert [lock.name for lock in place.locks] == ["gpu-4-0", "gpu-5-0"]
    assert dict(place.settings) == {
        "MODE_LAUNCH": "local",
        "MODE_DEVICE": "cuda",
        "CUDA_VISIBLE_DEVICES": "4,5",
        "MODE_PROCESSES": "2",
    }
    chosen = places_for([2, 0, 1], 1, 2, three_gpus, together=3)
    assert [each.device for each in chosen] == ["cuda:2,0,1", "cuda:2,0,1"]
    assert [lock.name for lock in chosen[1].locks] == ["gpu-7-1", "gpu-4-1", "gpu-5-1"]


def test_a_group_is_taken_whole_or_not_at_all(three_gpus: Path) -> None:
    [group] = places_for("auto", 1, 1, three_gpus, together=3)
    with take(group.locks[1], "another training") as other:
        assert other
        assert group.take("mine") is None
        assert not is_held(group.locks[0])
    slot = group.take("mine")
    assert slot is not None
    assert all(map(is_held, group.locks))
    assert group.holders() == "mine"
    slot.free()
    assert not any(map(is_held, group.locks))


def test_too_few_gpus_for_a_training_are_refused(three_gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModeError, match="gpus_per_training: 4, but there are 3"):
        places_for("auto", 1, 1, three_gpus, together=4)
    with pytest.raises(ModeError, match="gpus_per_training: 2, but trainings run on the CPU"):
        places_for("cpu", 1, 1, three_gpus, together=2)


def test_jobs_are_told_what_differs_from_params_yaml(tmp_path: Path) -> None:
    assert [dict(place.settings) for place in job_places(Machine(workers=2), tmp_path)] == [
        {"MODE_LAUNCH": "slurm"}
    ] * 2
    machine = Machine.model_validate(
        {"gpus_per_training": 4, "nodes_per_training": 2, "slurm": {"partition": "gpu", "resources": {"nvme": 1}}}
    )
    first, second = job_places(machine, tmp_path)
    assert first.locks != second.locks
    assert dict(first.settings) == {
        "MODE_LAUNCH": "slurm",
        "MODE_PROCESSES": "4",
        "MODE_NODES": "2",
        "MODE_SLURM": '{"partition":"gpu","resources":{"nvme":1}}',
    }
    on_cpus = job_places(Machine(devices="cpu", workers=1), tmp_path)
    assert [dict(place.settings) for place in on_cpus] == [{"MODE_LAUNCH": "slurm", "MODE_DEVICE": "cpu"}]


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"devices": [0]}, r"devices: \[0\], but a scheduler chooses"),
        ({"devices": "cpu", "gpus_per_training": 2}, r"gpus_per_training: 2, but devices: cpu \(set devices to `auto`"),
    ],
)
def test_what_no_scheduler_has_is_refused(tmp_path: Path, machine: dict[str, object], message: str) -> None:
    with pytest.raises(ModeError, match=message):
        job_places(Machine.model_validate(machine), tmp_path)


def test_the_queue_divides_no_threads(tmp_path: Path) -> None:
    pool = DevicePool(job_places(Machine(workers=2), tmp_path), 0)
    assert (pool.threads(alone=True), pool.threads(alone=False)) == (0, 0)
