"""A project so small that its stages take parts of a second, and its stages run in forked processes."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import yaml

from mode.stages import run_stage
from tests.killing import SERVER, served

REPOSITORY = Path(__file__).parent.parent.parent

#: Changes to the project's params.yaml that make everything as small as it can be.
CHANGES: dict[str, dict[str, object]] = {
    "glyphs": {"pairs": 120, "shard_pairs": 60, "image_size": 16, "test_images": 1},
    "embedding": {"dimensions": 8},
    "clustering": {"fine": 6, "coarse": 2},
    "model": {
        "config": {
            "embed_dim": 16,
            "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
            "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
        },
        "vocabulary": 200,
    },
    "image": {"size": 16},
    "training": {"epoch_samples": 32, "epochs": 5, "seed_epochs": 3, "batch_size": 8, "warmup": 2},
    "baselines": {"dense_long": False},
    "routing": {"calibration_captions": 60},
    "machine": {"checkpoint_minutes": 0.00001},  # a checkpoint after every step
}

#: Every stage, in an order in which each finds what it needs, and what it writes.
STAGES: dict[tuple[str, str | None], str] = {
    ("names", None): "data/names.txt",
    ("data", "base"): "data/shards/base",
    ("tasks", None): "data/tasks",
    ("index", "base"): "data/index/base",
    ("embedder", None): "data/embedder",
    ("embed", "base"): "data/vectors/base.npy",
    ("cluster", "base"): "data/clusters/base",
    ("assign", "base"): "data/assignment/base.parquet",
    ("seed", None): "models/seed",
    ("dense", None): "models/dense",
    ("expert", "expert-0"): "models/expert-0",
    ("expert", "expert-1"): "models/expert-1",
    ("ensemble", None): "models/ensemble",
    ("evaluate", None): "reports",
    ("report", None): "reports",
}


#: What stages import: once, in the process that theirs are forked from.
SERVER.set_forkserver_preload(
    ["mlflow", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store",
     "sklearn.decomposition", "torch.utils.flop_counter", "faiss", "mode.integrity", "mode.stages.evaluation",
     "mode.training.loop", "mode.evaluation.evaluate", "mode.tracking.runs", "mode.reporting.page",
     "mode.reporting.plots", "mode.reporting.card"]
)  # fmt: skip


def make(root: Path) -> None:
    """Write params.yaml, and run every stage but the report in a process of its own."""
    root.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    for section, changes in CHANGES.items():
        content[section] |= changes
    content["experts"] = {f"expert-{n}": {"source": "base", "cluster": n} for n in range(2)}
    (root / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    (root / "leakage.json").write_text("{}")
    shutil.copy(REPOSITORY / "watch.yaml", root)
    for name, key in [*STAGES][:-1]:
        assert served(partial(stage, root, name, key)) == 0, name


def stage(root: Path, name: str, key: str | None) -> None:
    """Run a stage as the command does, in this process, without a word."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):  # noqa: PTH123
        os.chdir(root)
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # one core: no stage starts processes of its own
        run_stage(name, key, root, root / "params.yaml")


def files_below(path: Path) -> Iterator[Path]:
    """All files of an output, which may be one file."""
    yield from sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
