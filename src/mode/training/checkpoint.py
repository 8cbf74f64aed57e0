"""The state of a training in one file: replaced in one piece, refused under another configuration.

A checkpoint is a safetensors file with the weights (`model.*`), AdamW's moments (`optimizer.*`) and, in its metadata,
the step and the running figures as JSON, and a checksum of all of it. There is no random state in it: every random
choice is a function of the random seed and the position (see `mode.training.loop`). The seed's folder also keeps the
moments (`optimizer.*`), so that other models can branch off from it.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from mode.clip.folder import WEIGHTS, base_of
from mode.clip.model import Clip, load_model
from mode.errors import ModeError, in_one_line
from mode.files import NoRoom, write_aside
from mode.parallel import cores

BRANCH_STATE = "branch_state.safetensors"
#: Folder beside a checkpoint: what model it is of.
CONFIGURATION = "model"

#: Of the metadata: SHA-256 of tensors and metadata, and what else there may be.
_DIGEST, _KEYS = "sha256", {"state", "fingerprint", "step", "format"}
#: What holds all of that, as JSON; a file of an older version has its parts one by one.
_RECORD = "record"
_REMOVE = "remove it to start again"


@dataclass
class RunState:
    """How far a training has come.

    Attributes:
        step: the next optimiser step, counted from the beginning of the seed.
        losses: of the steps since figures were last reported.
        recent: of the last steps, for the card.
        seconds: spent so far, in all attempts, and once for each process: device-seconds.
        bad_images: images that could not be decoded and were replaced.
    """

    step: int
    losses: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    seconds: float = 0.0
    bad_images: int = 0


def save_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, state: RunState, fingerprint: str) -> None:
    """Write all that it takes to resume exactly; the previous checkpoint stays until the new one is whole.

    Of an adapter the base's parameters are left out: they are frozen, and the fingerprint is of them as well.
    """
    weights = {f"model.{name}": tensor for name, tensor in _learnt(model).items()}
    _save(
        path,
        weights | _optimizer_tensors(model, optimizer),
        {"state": json.dumps(asdict(state)), "fingerprint": fingerprint},
    )


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, fingerprint: str) -> RunState:
    """Resume from `path`: fills model and optimiser.

    Raises:
        ModeError: it was made under another configuration, or is damaged.
    """
    tensors, metadata = _load(path)
    state = _read_state(path, metadata)
    if metadata.get("fingerprint") != fingerprint:
        raise ModeError(
            f"{path}: this checkpoint was made under another configuration (data, model or training parameters)",
            f"restore the parameters, or remove {path.parent} to start again",
        )
    _load_weights(path, model, tensors)
    _restore_optimizer(path, model, optimizer, tensors)
    return state


def open_checkpoint(path: Path, models: Path = Path("models")) -> tuple[Clip, int]:
    """The model of an unfinished training, in float32 on the CPU, and the step that it has come to.

    Args:
        path: of a checkpoint, with the model's configuration beside it, as `mode.training.loop` writes both.
        models: folder of the models of which it may be an adapter; default `models` in the working folder.

    Raises:
        ModeError: the checkpoint or the configuration is missing or damaged, or they do not belong together.
    """
    tensors, metadata = _load(path)
    state, configuration = _read_state(path, metadata), path.parent / CONFIGURATION
    if not configuration.is_dir():
        raise ModeError(f"{configuration}: missing, and {path.name} alone does not say what model it is of", _REMOVE)
    with TemporaryDirectory() as name:
        folder = Path(name) / "_"
        shutil.copytree(configuration, folder, symlinks=True)
        try:
            if (base := base_of(folder)) is None:
                save_file(_weights(tensors), folder / WEIGHTS)
                return load_model(folder), state.step
            base.symlink_to((models / base.name).absolute())
            clip = load_model(folder)  # with the deltas of the first checkpoint
            _load_weights(path, clip.model, tensors)
        except ModeError as error:
            said = str(error).replace(str(folder), str(configuration))
            raise ModeError(said.replace(name, str(models))) from None
        return clip, state.step


def check_checkpoint(path: Path) -> bool:
    """Compare a checkpoint or branch state with its own checksum; False where it has none.

    Raises:
        ModeError: it is damaged.
    """
    _, metadata = _load(path)
    return _DIGEST in metadata


def save_branch_state(path: Path, model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Write AdamW's moments after `step` steps."""
    _save(path, _optimizer_tensors(model, optimizer), {"step": str(step)})


def load_branch_state(path: Path, model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Give `optimizer` the moments that the seed left off with.

    Raises:
        ModeError: the file is missing, damaged, of another model, or from another step than `step`.
    """
    if not path.is_file():
        raise ModeError(
            f"{path.parent}: no {path.name}: this model is not one that others can branch from", "train the seed"
        )
    tensors, metadata = _load(path)
    if metadata.get("step") != str(step):
        raise ModeError(
            f"{path.parent}: trained for {metadata.get('step')} steps, but this training branches off at {step}",
            "train the seed with the present parameters",
        )
    _restore_optimizer(path, model, optimizer, tensors)


def _weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a checkpoint's tensors that are the model's, by their names in it."""
    return {name[len("model.") :]: tensor for name, tensor in tensors.items() if name.startswith("model.")}


def _load_weights(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a model a checkpoint's weights; of an adapter, whose base it already has, its own."""
    learnt = _learnt(model)
    frozen = {name: tensor for name, tensor in model.state_dict().items() if name not in learnt}
    try:
        model.load_state_dict(frozen | _weights(tensors))
    except RuntimeError as error:
        raise ModeError(f"{path}: does not fit the model: {in_one_line(error)}", _REMOVE) from None


def _learnt(model: nn.Module) -> dict[str, Tensor]:
    """State of a model; of an adapter without its base's parameters."""
    if not any(".lora_" in name for name, _ in model.named_parameters()):
        return model.state_dict()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    states = ((names[parameter], state) for parameter, state in optimizer.state.items())
    return {f"optimizer.{name}.{key}": value for name, state in states for key, value in state.items()}


def _restore_optimizer(path: Path, model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    # AdamW counts steps beside the parameter where it is fused, else on the CPU.
    fused = bool(optimizer.defaults.get("fused"))
    try:
        for name, parameter in model.named_parameters():
            if f"optimizer.{name}.step" not in tensors:
                continue  # it never had a gradient
            state = optimizer.state[parameter]
            state["step"] = tensors[f"optimizer.{name}.step"].to(parameter.device if fused else "cpu")
            for key in ("exp_avg", "exp_avg_sq"):
                # In the memory layout of the parameter: the fused kernel walks both in memory order.
                state[key] = torch.empty_like(parameter, requires_grad=False).copy_(tensors[f"optimizer.{name}.{key}"])
    except (KeyError, RuntimeError) as error:
        raise ModeError(f"{path}: does not fit the model: {error}", "train the seed again") from None


def _read_state(path: Path, metadata: dict[str, str]) -> RunState:
    """How far the training was. Raises `ModeError` where that is not said, or cannot be."""
    try:
        state = RunState(**json.loads(metadata["state"]))
        figures = [state.seconds, *state.losses, *state.recent]
        if not all(isinstance(number, int) and number >= 0 for number in (state.step, state.bad_images)):
            raise ValueError("a count that is none")
        if not all(isinstance(figure, float | int) and math.isfinite(figure) for figure in figures) or figures[0] < 0:
            raise ValueError("a figure that is none")
    except (KeyError, TypeError, ValueError) as error:
        raise ModeError(f"{path}: says nothing sound of how far the training was: {error}", _REMOVE) from None
    return state


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with write_aside(path) as temporary:
            # In one text: safetensors writes several in an order that changes from one process to the next.
            record = json.dumps({**metadata, _DIGEST: _digest(tensors, metadata)}, sort_keys=True)
            save_file(tensors, temporary, {_RECORD: record})
    except (NoRoom, OSError, SafetensorError) as error:
        kept = "; the one before is kept, and the next run goes on from it" if path.is_file() else ""
        # What the system said; safetensors wraps it.
        wrapped = str(error).partition("I/O error: ")[2].partition(" (os error")[0]
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or wrapped or str(error)
        raise ModeError(f"{path}: cannot be written: {reason}{kept}", "make room and run it again") from None


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModeError(f"{path}: cannot be read: {error}", _REMOVE) from None
    if _RECORD in metadata:
        metadata = _read_record(path, metadata[_RECORD])
    own = {key: value for key, value in metadata.items() if key != _DIGEST}
    digest = metadata.get(_DIGEST)  # one of an older version has none
    if not own.keys() <= _KEYS or (digest is not None and digest != _digest(tensors, own)):
        raise ModeError(f"{path}: damaged: not the content that its own checksum is of", _REMOVE)
    return tensors, metadata


def _read_record(path: Path, text: str) -> dict[str, str]:
    try:
        record = json.loads(text)
        if not isinstance(record, dict) or not all(isinstance(value, str) for value in record.values()):
            raise ValueError
    except (ValueError, RecursionError):
        raise ModeError(f"{path}: damaged: its metadata cannot be read", _REMOVE) from None
    return record


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of tensors and metadata; of several tensors at a time."""
    with ThreadPoolExecutor(cores(), thread_name_prefix="digest") as pool:
        digests = pool.map(_digest_of, tensors.values())
        listed = dict(zip(tensors, digests, strict=True))
    return hashlib.sha256(json.dumps([listed, metadata], sort_keys=True).encode()).hexdigest()


def _digest_of(tensor: Tensor) -> str:
    content = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    content.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()
