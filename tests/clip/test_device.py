from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from mode.clip.device import autocast, fastest_precision, pick_device, side_by_side, without_numbers
from mode.errors import ModeError


def test_auto_is_the_gpu_where_there_is_one() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    expected = ("cuda", "cuda:0") if torch.cuda.is_available() else ("cpu", "cpu")
    assert (str(pick_device("auto")), str(pick_device("auto", number=0))) == expected


@pytest.mark.parametrize(
    ("device", "number", "message"),
    [
        ("abacus", None, "device 'abacus' is not usable here: .*abacus"),
        ("cuda:77", None, "device 'cuda:77' is not usable here"),
        ("cuda", 77, "device 'cuda:77' is not usable here"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(device: str, number: int | None, message: str) -> None:
    with pytest.raises(ModeError, match=message) as caught:
        pick_device(device, number)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.float32), ("amp", torch.bfloat16)]
)
def test_only_amp_changes_what_products_are_computed_in(precision: str, dtype: torch.dtype) -> None:
    with autocast(torch.device("cpu"), precision):  # type: ignore[arg-type]
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_the_fastest_precision() -> None:
    assert [fastest_precision(torch.device(name)) for name in ("cpu", "cuda:1")] == ["fp32", "amp"]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
class TestSideBySide:
    def test_in_order_each_in_one_thread_and_two_at_a_time(self) -> None:
        both = threading.Barrier(2)  # one alone would wait for ever

        def forward(batch: int) -> tuple[int, int]:
            both.wait(timeout=60)
            return batch, torch.get_num_threads()

        with side_by_side(torch.device("cpu")) as run:
            assert run(forward, range(4)) == [(0, 1), (1, 1), (2, 1), (3, 1)]
        assert torch.get_num_threads() == 2

    def test_a_failure_comes_through_and_leaves_the_threads_as_they_were(self) -> None:
        def forward(batch: int) -> float:
            return 1 / batch

        with pytest.raises(ZeroDivisionError), side_by_side(torch.device("cpu")) as run:
            run(forward, [1, 0])
        assert torch.get_num_threads() == 2

    def test_fewer_at_a_time_have_more_threads_each(self) -> None:
        torch.set_num_threads(3)
        with side_by_side(torch.device("cpu"), 4) as run:
            found = run(lambda name: (name.upper(), torch.get_num_threads()), ["a", "b", "c", "d"])
            assert found == [("A", 1), ("B", 1), ("C", 1), ("D", 1)]
        assert torch.get_num_threads() == 3
        with side_by_side(torch.device("cpu"), 1) as run:
            assert run(lambda _: torch.get_num_threads(), ["a"]) == [3]

    def test_nothing_gives_nothing(self) -> None:
        with side_by_side(torch.device("cpu")) as run:
            assert run(abs, []) == []


def test_attention_is_left_to_kernels_whose_gradients_are_numbers() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)  # as torch starts
    pick_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


def test_a_copy_without_numbers_has_the_same_names_shapes_and_gradients_and_copies_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was copied")

    for kind in (torch.Tensor, torch.nn.Parameter):
        monkeypatch.setattr(kind, "__deepcopy__", refuse)
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    network[0].bias.requires_grad_(False)
    copied = without_numbers(network)
    assert {each.device.type for each in copied.state_dict().values()} == {"meta"}
    assert {each.device.type for each in network.state_dict().values()} == {"cpu"}
    own, others = dict(network.named_parameters()), dict(copied.named_parameters())
    assert {key: (each.shape, each.dtype, each.requires_grad) for key, each in own.items()} == {
        key: (each.shape, each.dtype, each.requires_grad) for key, each in others.items()
    }
    assert copied(torch.empty(4, 3, device="meta")).shape == (4, 2)


def test_a_parameter_that_is_two_layers_is_one_without_numbers() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    network[1].weight = network[0].weight
    copied = without_numbers(network)
    assert copied[1].weight is copied[0].weight
