"""Runs of an experiment: what DVC is told, and what is printed and kept. tests/e2e makes real ones."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from flows.runs import folders, own_parameters, set_params, show_plan
from mode.errors import ModeError
from mode.experiments.definition import Experiment
from mode.experiments.plan import overridden, plan_runs

REPOSITORY = Path(__file__).parents[2]
CONTENT: dict[str, Any] = yaml.safe_load((REPOSITORY / "params.yaml").read_text())


@pytest.mark.parametrize(
    "overrides",
    [
        {"clustering.coarse": 2, "training.lr": 0.5, "image.flip": True, "glyphs.per_family": None},
        {"experts": {"expert-0": {"source": "base", "cluster": 0, "epochs": 3}}, "full": ["expert-0"], "new": []},
        {"sources.base.shards": {"/a b/c(1)": 1.0, "/data/{0..9}.tar": 0.5, "/x:y,z=w\\": 2.0}},
        {"training.adapter": {"rank": 4}, "model": {}, "model.name": "ViT-B-32"},
        {"x": "a, {b} [c] \"d\" 'e' $f: \\ #"},
        {"x": 'quote after a backslash \\"'},
        {"x": "ends with a backslash\\"},
        {"x": "two\nlines", "y": "é", "z": "1", "u": "null", "v": "{photos}"},
    ],
)
def test_dvc_reads_back_what_it_is_told(tmp_path: Path, overrides: dict[str, Any]) -> None:
    path = tmp_path / "params.yaml"
    shutil.copy(REPOSITORY / "params.yaml", path)
    apply_overrides(path, set_params(overrides)[1::2])
    assert yaml.safe_load(path.read_text()) == overridden(CONTENT, overrides)


@pytest.mark.parametrize("value", ["${x}", 1e-06, math.inf, {"é": 1}, {"~a": 1}, [{"a": 1e-7}]])
def test_what_dvc_cannot_be_told_is_one_line(value: object) -> None:
    with pytest.raises(ModeError, match=r"^a\.b: [^\n]* cannot be passed on to DVC"):
        set_params({"a.b": value})


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    assert folders([f"photos={tmp_path}/a=b"]) == {"photos": tmp_path / "a=b"}
    for wrong in ("photos", f"photos={tmp_path}/none", "photos="):
        with pytest.raises(ModeError, match="no folder"):
            folders([wrong])


def test_committed_parameters_name_folders_and_models_and_not_where_they_lie() -> None:
    runs = {
        "first": {"set": {"sources.base.shards": {"{photos}/train": 1.0}}},
        "second": {"starts_from": ["first", "dense"], "set": {"training.epochs": 4}},
    }
    made = Experiment.model_validate(
        {"title": "t", "question": "q", "data": {"photos": "photographs"}, "runs": runs, "rows": {}}
    )
    assert own_parameters(made, "first") == {"sources.base.shards": {"{photos}/train": 1.0}}
    assert own_parameters(made, "second") == {
        "seed": {"from": "pretrained", "name": "local-dir:first/dense"},
        "model": {},
        "image": {},
        "training.seed_epochs": 0,
        "training.epochs": 4,
    }


def test_the_plan_as_text() -> None:
    made = Experiment.model_validate({"title": "t", "question": "q", "runs": {"a": {}, "b": {}}, "rows": {}})
    shown = show_plan(plan_runs("x", made, CONTENT, {}, [0]), [], None, 2)
    assert "all, 2 side by side" in shown
    assert "0 of 2 done" in shown
    assert shown.endswith("the first finished run will tell how long; stages in common are made once")
