"""What a model needs of a GPU's memory, found without one: its own forward pass, on tensors that have shapes alone.

Nothing is computed and no weight is made (torch's `FakeTensorMode`): a trace takes a second, whatever the model.
The operations are those that torch chooses on a CPU, which keep what a GPU's do: of attention queries, keys, values and
the result, and never the matrix of scores. Where autocast on a GPU does otherwise, so does the trace: layer norms work
in float32.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mode.clip.device import Precision, autocast
from mode.training.learner import Towers

#: Pairs of the two traces that a line is drawn through; batch norm wants more than one.
_FEW, _MORE = 2, 4


@dataclass(frozen=True)
class Line:
    """Bytes that grow with the number of pairs, images or texts."""

    fixed: float
    each: float

    def of(self, count: float) -> float:
        """Of so many."""
        return self.fixed + self.each * count


@dataclass(frozen=True)
class Footprint:
    """A model's bytes on a GPU beside its weights.

    Attributes:
        activations: of a training's forward pass: what autograd keeps for the way back, the images included, by pairs;
            with gradient checkpointing also what a block has while it is computed again.
        image, text: the most that a tower holds at a time in inference, the batch included, by images or texts.
    """

    activations: Line
    image: Line
    text: Line


def footprint_of(
    network: open_clip.CLIP, size: int, context: int, precision: Precision, grad_checkpointing: bool
) -> Footprint | None:
    """Trace a network.

    Args:
        network: on the `meta` device, in the precision that it is trained in; it stays as it is.
        size: pixels a side of an image.
        context: tokens of a text: all are counted, though a training cuts a batch after its longest text.
        precision: of the training. Inference is traced in float32, as an evaluation runs; embedding holds less.
        grad_checkpointing: as `machine.grad_checkpointing`.

    Returns:
        None where a tower cannot be traced, because it looks at numbers on its way.
    """
    shapes = FakeTensorMode()
    training, inference = _with_shapes(network, shapes), _with_shapes(network, shapes, torch.float32)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def images(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(count, 3, size, size, dtype=dtype)

    def texts(count: int) -> Tensor:
        return torch.zeros(count, context, dtype=torch.int64)

    def kept(count: int) -> float:
        return _kept_bytes(training, images(count, dtype), texts(count), precision, grad_checkpointing)

    def held(tower: Callable[[Tensor], Tensor], given: Callable[[int], Tensor]) -> Callable[[int], float]:
        return lambda count: _held_bytes(lambda: tower(given(count)))

    try:
        with shapes:
            return Footprint(
                activations=_line(kept),
                image=_line(held(inference.encode_image, images)),
                text=_line(held(inference.encode_text, texts)),
            )
    except (RuntimeError, TypeError, ValueError):
        return None


def _line(bytes_of: Callable[[int], float]) -> Line:
    """Through two points."""
    few, more = bytes_of(_FEW), bytes_of(_MORE)
    each = (more - few) / (_MORE - _FEW)
    return Line(few - each * _FEW, each)


def _with_shapes(network: open_clip.CLIP, shapes: FakeTensorMode, dtype: torch.dtype | None = None) -> open_clip.CLIP:
    """A copy whose parameters and buffers have shapes alone, on the CPU; floating-point ones of `dtype`, if given."""
    network = copy.deepcopy(network)
    with shapes:
        for module in network.modules():
            for kind, wrap in ((module._parameters, nn.Parameter), (module._buffers, lambda tensor, _: tensor)):
                for name, tensor in kind.items():
                    if tensor is not None:
                        as_it_is = dtype is None or not tensor.is_floating_point()
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype if as_it_is else dtype)
                        kind[name] = wrap(empty, tensor.requires_grad)
    return network


def _kept_bytes(
    network: open_clip.CLIP, images: Tensor, tokens: Tensor, precision: Precision, grad_checkpointing: bool
) -> float:
    """What is in memory when the way back begins, or a block of it is computed again."""
    network.train()
    whole = _saved_by_block(network, images, tokens, precision)
    if not grad_checkpointing:
        return sum(whole.values())
    network.set_grad_checkpointing(True)
    try:
        kept = sum(_saved_by_block(network, images, tokens, precision).values())
    finally:
        network.set_grad_checkpointing(False)
    blocks = [size for block, size in whole.items() if block is not None]
    again = max(blocks, default=0.0) if kept < sum(whole.values()) else 0.0
    return kept + again


def _saved_by_block(
    network: open_clip.CLIP, images: Tensor, tokens: Tensor, precision: Precision
) -> dict[nn.Module | None, float]:
    """Bytes that autograd saves in a forward pass, by block of a transformer; None: outside of all."""
    # A storage is counted once, whatever views of it are saved; those of the model itself are its weights'.
    seen = {_key(tensor): tensor.untyped_storage() for tensor in [*network.parameters(), *network.buffers()]}
    found: dict[nn.Module | None, float] = defaultdict(float)
    within: list[nn.Module | None] = [None]

    def save(tensor: Tensor) -> Tensor:
        if _key(tensor) not in seen:
            seen[_key(tensor)] = tensor.untyped_storage()  # kept, so that no other takes its place
            found[within[-1]] += tensor.untyped_storage().nbytes()
        return tensor

    with ExitStack() as stack:
        for block in _blocks(network):
            for hook in (
                block.register_forward_pre_hook(lambda block, _: within.append(block)),
                block.register_forward_hook(lambda *_: within.__delitem__(-1)),
            ):
                stack.callback(hook.remove)
        stack.enter_context(saved_tensors_hooks(save, lambda tensor: tensor))
        stack.enter_context(_as_on_a_gpu(precision))
        Towers(network)(images, tokens)
    return dict(found)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks that are computed again one by one."""
    for module in network.modules():
        if isinstance(blocks := getattr(module, "resblocks", None), nn.ModuleList):
            yield from blocks


def _held_bytes(forward: Callable[[], Tensor]) -> float:
    """The most that a forward pass in inference has in memory at a time, beside the weights."""
    held = _Held()
    with held, torch.inference_mode():
        forward()
    return held.most


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that were made and are still there, and the most that these ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(tensor) for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in given:  # no view, and nothing in place
                storage = tensor.untyped_storage()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._drop, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _drop(self, size: int) -> None:
        self.now -= size


class _NormsInFloat32(TorchFunctionMode):
    """Layer norms as autocast runs them on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.layer_norm:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def _as_on_a_gpu(precision: Precision) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(autocast(torch.device("cpu"), precision))
        if precision == "amp":
            stack.enter_context(_NormsInFloat32())
        yield


def _key(tensor: Tensor) -> int:
    """The same for all views of a storage."""
    return int(tensor.untyped_storage()._cdata)
