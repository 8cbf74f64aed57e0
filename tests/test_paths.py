"""One folder, one set of names: those of dvc.yaml."""

from __future__ import annotations

from pathlib import Path

import yaml

from mode.paths import Paths

REPOSITORY = Path(__file__).parents[1]


def outputs_of(stage: str, key: str) -> set[Path]:
    """What a stage of dvc.yaml writes, for one item of its group."""
    described = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]
    described = described.get("do", described)
    names = [out if isinstance(out, str) else next(iter(out)) for out in described["outs"]]
    return {REPOSITORY / name.replace("${item}", key).replace("${key}", key) for name in names}


def test_stages_write_where_paths_say() -> None:
    paths = Paths(REPOSITORY)
    assert outputs_of("names", "") == {paths.names}
    assert outputs_of("data", "base") == {paths.shards("base")}
    assert outputs_of("tasks", "") == {paths.tasks}
    assert outputs_of("watch-tasks", "") == {paths.tasks_manifest}
    assert outputs_of("watch-seed", "") == {paths.seed_manifest}
    assert outputs_of("index", "base") == {paths.index("base")}
    assert outputs_of("embedder", "") == {paths.embedder}
    assert outputs_of("embed", "base") == {paths.vectors("base")}
    assert outputs_of("cluster", "base") == {paths.clusters("base")}
    assert outputs_of("assign", "base") == {paths.assignment("base")}
    for model in ("seed", "dense", "dense-long"):
        assert outputs_of(model, "") == {paths.model(model)}
    assert outputs_of("expert", "expert-0") == {paths.model("expert-0")}
    assert outputs_of("ensemble", "") == {paths.ensemble}
    assert outputs_of("evaluate", "") == {paths.metrics}
    assert outputs_of("variants", "") == {paths.variants}


def test_root_is_made_absolute() -> None:
    assert Paths(Path()).params_file == Path.cwd().resolve() / "params.yaml"
