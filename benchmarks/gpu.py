"""All that is worth measuring on a GPU, in one go that fits into half an hour of one.

python -m benchmarks.gpu                                25 minutes; results in benchmarks/gpu.json, tables here
python -m benchmarks.gpu --minutes 12 --only batches,train
python -m benchmarks.gpu --quick --device cpu           tiny sizes, to see whether it works
python -m benchmarks.gpu --table                        the kept results as Markdown

Each measurement is a process of its own, so that it starts with an empty GPU and one that fails costs itself alone.
They come in the order of their worth; those that do not fit into the time that is left say so. What is done is kept at
once, beside what is there of other runs: an interrupted run has not been for nothing, nor is a few minutes of a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.__main__ import machine
from benchmarks.harness import Input
from benchmarks.inputs import captions, index_shards, make_shards, model_params
from benchmarks.train import Setting, matmul_flops, ours, peak_flops, theirs

if TYPE_CHECKING:
    from torch import Tensor

    from mode.clip.device import Precision
    from mode.clip.model import Clip

RESULTS = Path(__file__).with_name("gpu.json")
#: Steps before the clock starts, and steps that are timed.
_WARM, _TIMED = 4, 12
#: Seconds without which no measurement is begun.
_LEAST = 10
#: Trainings of the demo's model side by side.
_SIDE_BY_SIDE = (1, 4, 12)
#: A row of figures, by name.
Row = dict[str, Any]


@dataclass(frozen=True)
class Given:
    """What a measurement is made with: a folder with inputs, `cuda` or `cpu`, and whether sizes are tiny."""

    folder: Path
    device: str
    quick: bool

    @property
    def model(self) -> str:
        """The model of the measurements on one model."""
        return "demo" if self.quick else "ViT-B-16"


class Measurement(NamedTuple):
    """`measure` gives its rows; `seconds` is what it may take at most."""

    title: str
    seconds: int
    measure: Callable[[Given], list[Row]]


def device(given: Given) -> list[Row]:
    """What the GPU is, and the bfloat16 rate that a large matrix product reaches."""
    import torch

    if given.device == "cpu":
        return [{"device": "cpu"}]
    reached = matmul_flops() / 1e12
    free, total = torch.cuda.mem_get_info()
    context = (total - free - torch.cuda.memory_reserved()) / 1e9  # if nothing else is on it
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "memory_gb": total / 1e9}
    return [{**about, "cuda_gb": context, "matmul_tflops": reached, "stated_tflops": peak_flops() / 1e12}]


def _seconds(work: Callable[[], object], device: str) -> float:
    """Of one call, once the first few are over."""
    import torch

    def many(times: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(times):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    many(_WARM)
    return many(_TIMED) / _TIMED


def batches(given: Given) -> list[Row]:
    """Optimiser steps on images that are on the GPU already, each batch twice as large, to the limit of memory."""
    import torch

    rows: list[Row] = []
    batch = 8 if given.quick else 128
    while not given.quick or batch <= 16:
        try:
            rows.append(_steps(given, batch))
        except torch.OutOfMemoryError:
            rows.append({"batch": batch, "samples_per_second": None, "note": "does not fit"})
            break
        batch *= 2
    return rows


def compiled(given: Given) -> list[Row]:
    """The same with `training.compile`, and with `machine.grad_checkpointing`, at one batch size."""
    batch = 8 if given.quick else 512
    rows = [_row({"variant": "plain"}, lambda: _steps(given, batch))]
    if given.device == "cuda":  # on a CPU it needs a C++ compiler, and gains nothing (docs/performance.md)
        rows.append(_row({"variant": "compile"}, lambda: _steps(given, batch, compile_it=True)))
    checkpointed = partial(_steps, given, batch, checkpointing=not given.quick)
    return [*rows, _row({"variant": "grad_checkpointing"}, checkpointed)]


def _row(named: Row, measure: Callable[[], Row]) -> Row:
    """One row of several, with an empty GPU; one that fails says why, and costs itself alone."""
    import torch

    gc.collect()  # the model before this one
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        return {**named, **measure()}
    except Exception as error:
        traceback.print_exc()
        return {**named, "failed": _reason("".join(traceback.format_exception_only(error)))}


@dataclass(frozen=True)
class Held:
    """A training whose memory is planned and measured."""

    model: str
    batch: int
    precision: Precision = "bf16"
    passes: int = 1
    checkpointing: bool = False

    @property
    def about(self) -> str:
        """For a table."""
        more = [f"accumulate {self.passes}"] if self.passes > 1 else []
        more += ["grad_checkpointing"] if self.checkpointing else []
        return ", ".join([self.precision, *more])


_HELD = (
    Held("ViT-B-16", 256),
    Held("ViT-B-16", 128, "amp"),
    Held("ViT-B-16", 64, "fp32"),
    Held("ViT-B-16", 1_024, passes=8),
    Held("ViT-B-16", 512, checkpointing=True),
    Held("ViT-B-32", 1_024),
    Held("ViT-L-14", 64),
    Held("RN50", 128, "amp"),
    Held("demo", 4_096, "fp32"),
)


def attention(given: Given) -> list[Row]:
    """Gradients of a text tower's attention with its mask, for texts of 1 to 77 tokens, by kernel: are all numbers?"""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    on_gpu = given.device == "cuda"
    kernels = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    dtype = torch.bfloat16
    mask = torch.full((77, 77), float("-inf"), device=given.device, dtype=dtype).triu_(1)
    rows: list[Row] = []
    for kernel in kernels if on_gpu else kernels[-1:]:
        bad: list[int] = []
        without: list[int] = []
        for length in range(1, 4 if given.quick else 78):
            shape = (8 if given.quick else 256, 8, length, 64)
            q, k, v = (torch.randn(shape, device=given.device, dtype=dtype, requires_grad=True) for _ in range(3))
            try:
                with sdpa_kernel(kernel):
                    found = scaled_dot_product_attention(q, k, v, attn_mask=mask[:length, :length])
            except RuntimeError:  # cuDNN's takes no texts of one token
                without.append(length)
                continue
            grads = torch.autograd.grad(found, (q, k, v), torch.randn_like(found))
            if not all(bool(torch.isfinite(grad).all()) for grad in grads):
                bad.append(length)
        rows.append(
            {"kernel": kernel.name.lower(), "lengths": length, "not_finite_at": str(bad), "not_taken": str(without)}
        )
    return rows


def memory(given: Given) -> list[Row]:
    """What a training has on the GPU at most, beside what `mode plan` says of it."""
    held = (Held("demo", 8, "fp32"), Held("demo", 16, "fp32", passes=2)) if given.quick else _HELD
    return [_memory_of(each, given.device) for each in held]


def _memory_of(held: Held, device: str) -> Row:
    import torch

    from mode.planning.shape import shape_of
    from mode.planning.sizes import training_gpu_bytes

    model, image = model_params(held.model)
    shape = shape_of(model, image.size, precision=held.precision, checkpointing=held.checkpointing)
    assert shape.footprint is not None
    kept = shape.footprint.activations
    planned = training_gpu_bytes(
        shape.state_bytes, shape.learnt_bytes, shape.embed_dim, kept, held.batch, passes=held.passes
    ).total
    row: Row = {"model": held.model, "how": held.about, "batch": held.batch, "planned_gb": planned / 1e9}
    if device == "cpu":
        return row
    gc.collect()  # the model before this one
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step, _ = _stepper(held.model, held.batch, device, held.precision, False, held.checkpointing, held.passes)
    try:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return {**row, "note": "does not fit"}
    most, reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
    return {**row, "measured_gb": most / 1e9, "reserved_gb": reserved / 1e9, "share_of_planned": most / planned}


def _steps(given: Given, batch: int, compile_it: bool = False, checkpointing: bool = False) -> Row:
    """Samples a second of steps in bfloat16 on a GPU, in float32 on a CPU."""
    import torch

    from mode.training.card import flops_per_pair

    precision: Precision = "bf16" if given.device == "cuda" else "fp32"
    step, clip = _stepper(given.model, batch, given.device, precision, compile_it, checkpointing)
    started = time.perf_counter()
    step()
    first = time.perf_counter() - started
    seconds = _seconds(step, given.device)
    if not math.isfinite(value := float(step())):
        return {"batch": batch, "failed": f"the loss is {value}"}
    row: Row = {"batch": batch, "samples_per_second": batch / seconds, "first_step_seconds": first}
    if given.device == "cuda":
        row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row["share_of_peak"] = flops_per_pair(clip) * batch / seconds / peak_flops()
    return row


def _stepper(
    name: str,
    batch: int,
    device: str,
    precision: Precision = "fp32",
    compile_it: bool = False,
    checkpointing: bool = False,
    passes: int = 1,
) -> tuple[Callable[[], Tensor], Clip]:
    """An optimiser step as `mode.training.learner` makes it, on the same random images each time, and its model.

    A step gives its loss, on the device.
    """
    import torch

    from mode.clip.device import autocast, pick_device
    from mode.clip.model import build_model
    from mode.params import TrainingParams
    from mode.training.learner import Towers, adamw, backward, compile_towers, loss_of

    clip = build_model(*model_params(name), captions(256), random_seed=0, precision=precision)
    model = clip.model.to(pick_device(device)).train()
    model.set_grad_checkpointing(checkpointing)
    optimizer, loss = adamw(model, TrainingParams()), loss_of(model)
    towers: torch.nn.Module = Towers(model)
    if compile_it:
        compile_towers(towers)
    size = clip.model.visual.image_size
    height = size if isinstance(size, int) else size[0]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32  # as `Batches` gives them
    images = torch.randn(batch, 3, height, height, device=device, dtype=dtype)
    tokens = clip.tokenizer(captions(batch)).to(device)
    casting = partial(autocast, torch.device(device), precision)

    def step() -> Tensor:
        value = backward(towers, loss, images, tokens, passes, casting)
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step, clip


def train(given: Given) -> list[Row]:
    """Whole trainings from tars, with images decoded on the CPU and on the GPU, and open_clip's own loop."""
    setting = Setting(given.model, batch=8, steps=2) if given.quick else _TRAINING
    setting, on_gpu = replace(setting, gpu=given.device == "cuda"), replace(setting, workers=0, gpu=True)
    inputs = Input(given.folder / "pictures", "quick" if given.quick else "full", device=given.device)
    if not (inputs.folder / "index").is_dir():
        pairs = 32 if given.quick else setting.samples
        make_shards(inputs, pairs, max(pairs // 16, 1))
        index_shards(inputs.folder)
    rows = [_row({"side": "mode"}, lambda: ours(inputs, setting)())]
    if given.device == "cuda":
        rows.append(_row({"side": "mode, decode: gpu"}, lambda: ours(inputs, on_gpu, decode="gpu")()))
    rows.append(_row({"side": "open_clip_train"}, lambda: theirs(inputs, setting)()))
    first, last = rows[0], rows[-1]
    if "utilisation" in first and "samples_per_second" in last:
        last["utilisation"] = first["utilisation"] * last["samples_per_second"] / first["samples_per_second"]
    return rows


_TRAINING = Setting("ViT-B-16", batch=512, steps=48, precision="bf16", workers=12, gpu=True)


def nccl(given: Given) -> list[Row]:
    """NCCL (gloo on a CPU) with the one process there is: does it start, and what does a step's traffic cost?"""
    import torch
    import torch.distributed as dist

    backend = "nccl" if given.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{given.folder}/rendezvous", rank=0, world_size=1)
    features = torch.randn(4_096 // (64 if given.quick else 1), 512, device=given.device)
    gradients = torch.randn(150_000_000 // (1_000 if given.quick else 1), device=given.device)
    gathered = [torch.empty_like(features)]
    rows = [
        {
            "what": f"gather {len(features):,} features",
            "ms": 1e3 * _seconds(lambda: dist.all_gather(gathered, features), given.device),
        },
        {
            "what": f"reduce {len(gradients):,} gradients",
            "ms": 1e3 * _seconds(lambda: dist.all_reduce(gradients), given.device),
        },
    ]
    dist.destroy_process_group()
    return rows


def nearest(given: Given) -> list[Row]:
    """Nearest of 1,024 centres for a million vectors by faiss, on the GPU and on the CPU."""
    import faiss
    import numpy as np

    count, centres, width = (2_000, 64, 16) if given.quick else (1_000_000, 1_024, 768)
    random = np.random.default_rng(0)
    vectors = random.standard_normal((count, width), dtype=np.float32)
    flat = faiss.IndexFlatL2(width)
    flat.add(random.standard_normal((centres, width), dtype=np.float32))
    sides: dict[str, Any] = {"cpu": flat}
    if given.device == "cuda":
        if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
            return [{"side": "gpu", "note": "this faiss was built without GPUs"}]
        sides["gpu"] = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, flat)
    rows: list[Row] = []
    for side, index in sides.items():
        index.search(vectors[:1_000], 1)
        started = time.perf_counter()
        index.search(vectors, 1)
        rows.append({"side": side, "vectors_per_second": count / (time.perf_counter() - started)})
    return rows


def side_by_side(given: Given) -> list[Row]:
    """Trainings of the demo's small model on the one device, several at once, without and with CUDA's MPS."""
    rows = [_together(given, count, mps=False) for count in ((1, 2) if given.quick else _SIDE_BY_SIDE)]
    if given.device == "cuda" and _control_mps("-d"):
        rows.append(_together(given, _SIDE_BY_SIDE[-1], mps=True))
        _control_mps(quit_it=True)
    return rows


def _together(given: Given, count: int, mps: bool) -> Row:
    """So many processes that make steps of the demo's model for some seconds, at the same time."""
    seconds = "2" if given.quick else "12"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--child",
        "small",
        "--device",
        given.device,
        "--seconds",
        seconds,
    ]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    rates = [float(json.loads(process.communicate()[0].splitlines()[-1])) for process in processes]
    return {"trainings": count, "mps": mps, "samples_per_second_each": min(rates), "together": sum(rates)}


def small(device: str, seconds: float) -> float:
    """Samples a second of the demo's model, over the second half of so many seconds."""
    import torch

    torch.set_num_threads(1)
    batch = 128
    step, _ = _stepper("demo", batch, device)
    started, steps, half = time.perf_counter(), 0, 0.0
    while (now := time.perf_counter()) - started < seconds:
        if not half and now - started > seconds / 2:
            half, steps = now, 0
        step()
        steps += 1
        if device == "cuda" and steps % 20 == 0:
            torch.cuda.synchronize()
    if device == "cuda":
        torch.cuda.synchronize()
    return batch * steps / (time.perf_counter() - (half or started))


def _control_mps(*arguments: str, quit_it: bool = False) -> bool:
    """Start or end CUDA's multi-process service; False where there is none."""
    try:
        told = subprocess.run(
            ["nvidia-cuda-mps-control", *arguments], input="quit\n" if quit_it else None, text=True,
            capture_output=True, check=False, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return told.returncode == 0


#: In the order of their worth.
MEASUREMENTS = {
    "device": Measurement("The GPU", 60, device),
    "batches": Measurement("ViT-B/16 at 224, bf16, steps alone, by batch size", 240, batches),
    "attention": Measurement("Gradients of attention with a mask, bf16, texts of 1 to 77 tokens", 60, attention),
    "train": Measurement("ViT-B/16 at 224 from tars, batch 512, bf16", 480, train),
    "memory": Measurement("Memory of a training: planned, and the most that torch had", 180, memory),
    "compiled": Measurement("ViT-B/16, batch 512: compiled, and with activations computed again", 240, compiled),
    "nearest": Measurement("faiss: 1,000,000 vectors of 768, 1,024 centres", 120, nearest),
    "nccl": Measurement("NCCL with one process", 60, nccl),
    "side_by_side": Measurement("The demo's model, batch 128, fp32, trainings at once", 120, side_by_side),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module. Returns 1 if a measurement failed."""
    given = _parser().parse_args(arguments)
    if given.table:
        print(markdown(json.loads((given.out or RESULTS).read_text(encoding="utf-8"))))
        return 0
    if given.child == "small":
        print(json.dumps(small(given.device, given.seconds)))
        return 0
    if given.child:
        rows = MEASUREMENTS[given.child].measure(Given(given.work, given.device, given.quick))
        print(json.dumps({"on": _name(given.device), "rows": rows}))
        return 0
    return _measure(given)


def _parser() -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__, formatter_class=as_written)
    parser.add_argument("--minutes", type=float, default=25.0, help="to take at most (default 25)")
    parser.add_argument("--only", default="", help=f"of {', '.join(MEASUREMENTS)}, separated by commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; nothing is kept unless --out is given")
    parser.add_argument("--out", type=Path, help=f"where results go (default {RESULTS.name} in this folder)")
    parser.add_argument("--work", type=Path, help="folder for inputs, kept (default: a temporary one)")
    parser.add_argument("--table", action="store_true", help="print the kept results as Markdown and stop")
    parser.add_argument("--child", choices=(*MEASUREMENTS, "small"), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=10.0, help=argparse.SUPPRESS)
    return parser


def _measure(given: argparse.Namespace) -> int:
    wanted = [name.strip() for name in given.only.split(",") if name.strip()] or list(MEASUREMENTS)
    if unknown := [name for name in wanted if name not in MEASUREMENTS]:
        sys.exit(f"error: no measurement is called {unknown[0]}; there are: {', '.join(MEASUREMENTS)}")
    out = given.out or (None if given.quick else RESULTS)
    deadline, failed = time.monotonic() + given.minutes * 60, False
    kept: dict[str, Any] = {}
    if out is not None and out.is_file():
        kept = json.loads(out.read_text(encoding="utf-8"))
    about = f"{machine()['cores']} cores beside it, {datetime.now(UTC):%Y-%m-%d %H:%M UTC}"
    with tempfile.TemporaryDirectory(prefix="mode-gpu-", ignore_cleanup_errors=True) as temporary:
        for name in wanted:
            started = time.monotonic()
            limit = min(MEASUREMENTS[name].seconds, deadline - started)
            if limit < _LEAST and name in kept:
                print(f"{name}: not run: no time was left; what was measured before stays", file=sys.stderr, flush=True)
                continue
            on, rows = _in_a_process(name, given, given.work or Path(temporary), limit)
            failed |= any("failed" in row for row in rows)
            seconds = round(time.monotonic() - started, 1)
            title = f"{name}, tiny" if given.quick else MEASUREMENTS[name].title
            kept[name] = {"title": title, "on": f"{on}, {about}", "seconds": seconds, "rows": rows}
            print(f"{name}: {seconds:,.0f} s: {rows}", file=sys.stderr, flush=True)
            if out is not None:
                out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(markdown({name: kept[name] for name in wanted}))
    return int(failed)


def _name(device: str) -> str:
    """What a measurement is made on."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def _in_a_process(name: str, given: argparse.Namespace, work: Path, limit: float) -> tuple[str, list[Row]]:
    """What a measurement was made on and its rows, or one that says why there are none."""
    if limit < _LEAST:
        return given.device, [{"note": "not run: no time was left"}]
    command = [sys.executable, "-m", "benchmarks.gpu", "--child", name, "--device", given.device, "--work", str(work)]
    command += ["--quick"] if given.quick else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return given.device, [{"failed": f"took longer than {limit:,.0f} s"}]
    made = {"on": given.device, "rows": [{"failed": _reason(done.stderr) or f"exit code {done.returncode}"}]}
    if not done.returncode:
        made = json.loads(done.stdout.splitlines()[-1])
    if any("failed" in row for row in made["rows"]):
        print(done.stderr, file=sys.stderr)  # the whole of it: such a machine may not be had twice
    return made["on"], made["rows"]


def _reason(told: str) -> str:
    """The line of a traceback that names the error, or else the last one."""
    lines = [line for line in told.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    return (named or lines or [""])[-1][:300]


def markdown(kept: dict[str, Any]) -> str:
    """The results for docs/performance.md: a table for each measurement."""
    lines: list[str] = []
    for measured in kept.values():
        heads = list(dict.fromkeys(key for row in measured["rows"] for key in row))
        lines += ["", f"**{measured['title']}** ({measured['on']}; {measured['seconds']:,.0f} s)", ""]
        lines += ["| " + " | ".join(head.replace("_", " ") for head in heads) + " |", "|---" * len(heads) + "|"]
        lines += ["| " + " | ".join(_cell(row.get(head)) for head in heads) + " |" for row in measured["rows"]]
    return "\n".join(lines[1:])


def _cell(value: object) -> str:
    return "–" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
