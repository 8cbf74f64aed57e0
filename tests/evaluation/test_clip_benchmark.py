"""Our figures equal those of the clip_benchmark package, on the same model folder and the same task folders."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

from mode.clip.model import Clip, save_model
from mode.embedding.lsa import LsaEmbedder
from mode.ensemble.model import Ensemble
from mode.ensemble.router import Router
from mode.evaluation.evaluate import evaluate_tasks
from mode.evaluation.tasks import open_task
from mode.params import MachineParams, RoutingParams

CPU = MachineParams(device="cpu", inference_batch=32)


@pytest.fixture(autouse=True)
def _numpy_2_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """clip_benchmark 1.6.2 calls float() on an array of one element, which NumPy refuses since 2.4."""

    def to_float(value: Any) -> float:
        return builtins.float(value.item() if isinstance(value, np.ndarray) else value)

    monkeypatch.setattr(zeroshot_classification, "float", to_float, raising=False)


@pytest.fixture
def model_folder(clips: dict[str, Clip], tmp_path: Path) -> Callable[[str], Path]:
    def save(name: str) -> Path:
        save_model(tmp_path / name, clips[name], {})
        return tmp_path / name

    return save


def theirs(folder: Path, model_folder: Path, batch_size: int = 16) -> dict[str, float]:
    """The package's own reader and metrics, with the model opened by plain open_clip."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{model_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_folder}")
    return theirs_of(folder, model.eval(), transform, tokenizer, batch_size)


def theirs_of(folder: Path, model: Any, transform: Any, tokenizer: Any, batch_size: int = 16) -> dict[str, float]:
    """Of any model that has open_clip's interface."""
    dataset = build_wds_dataset(folder.name, transform, data_dir=str(folder))
    retrieval = dataset.classes is None
    collate = {"collation_fn": image_captions_collate_fn} if retrieval else {}
    loader = torch.utils.data.DataLoader(dataset.batched(batch_size, **collate), batch_size=None)
    if retrieval:
        return dict(zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]))
    loader.dataset.classes = dataset.classes
    return dict(
        zeroshot_classification.evaluate(model, loader, tokenizer, dataset.classes, dataset.templates, "cpu", amp=False)
    )


@pytest.mark.parametrize("name", ["seed", "expert-0"])
@pytest.mark.parametrize("labels", [[i % 6 for i in range(70)], [0] * 30 + [1] * 7 + [4]])
def test_classification(folders: Any, model_folder: Callable[[str], Path], name: str, labels: list[int]) -> None:
    """Balanced and unbalanced labels, classes without an image, all four image formats, several tars."""
    folder = folders.classification("colours", labels, shards=3)
    model = model_folder(name)
    ours = evaluate_tasks({name: model}, None, [folder], CPU).details["colours"][name]
    expected = theirs(folder, model)
    assert set(ours) == set(expected)
    assert ours == pytest.approx(expected, abs=1e-7)
    assert 0 < ours["acc1"] < 1  # or any two programs would agree


def test_fewer_than_five_classes(folders: Any, model_folder: Callable[[str], Path]) -> None:
    folder = folders.classification("three", [0, 1, 2] * 10, classes=["red", "green", "blue"], templates=["{c}"])
    model = model_folder("seed")
    ours = evaluate_tasks({"seed": model}, None, [folder], CPU).details["three"]["seed"]
    expected = theirs(folder, model)
    assert np.isnan(expected.pop("acc5"))
    assert ours.pop("acc5") is None
    assert ours == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("name", ["seed", "expert-1"])
def test_retrieval(folders: Any, model_folder: Callable[[str], Path], name: str) -> None:
    """1 to 4 captions an image, more images than a batch."""
    folder = folders.retrieval("captions", 40)
    model = model_folder(name)
    ours = evaluate_tasks({name: model}, None, [folder], CPU).retrieval.tasks["captions"][name]
    expected = theirs(folder, model)
    assert {key.replace("_recall", "_retrieval_recall"): value for key, value in ours.items()} == pytest.approx(
        expected, abs=1e-6
    )
    assert len(set(ours.values())) > 3


@pytest.mark.parametrize("kind", ["classification", "retrieval"])
def test_the_ensemble_as_one_open_clip_model(folders: Any, clips: dict[str, Clip], kind: str) -> None:
    """One prompt per class, so that the features' inner products are the ensemble's scores exactly."""
    labels = [i % 6 for i in range(50)]
    folder = (
        folders.classification("colours", labels, templates=("the colour {c}",))
        if kind == "classification"
        else folders.retrieval("captions", 23)
    )
    captions = ["a red spot", "yellow paper", "white photo", "dark grey photo", "blue spot", "green paper"] * 5
    embedder = LsaEmbedder.fit(captions, 6, 0)
    conditions = {"expert-0": embedder.encode(["red", "yellow"]), "expert-1": embedder.encode(["blue", "dark grey"])}
    router = Router.fit(conditions, embedder, RoutingParams(retrieval="together"), captions, random_seed=0)
    task = open_task(folder)
    texts = task.texts if kind == "retrieval" else task.classes
    adapted = Ensemble(router, clips, "cpu").adapt(texts, task.templates)
    found = theirs_of(folder, adapted, adapted.preprocess, adapted.tokenizer)
    ours = evaluate_tasks(clips, router, [folder], CPU)
    if kind == "classification":
        details = ours.details["colours"]["ensemble"]
        assert {name: found[name] for name in ("acc1", "acc5", "mean_per_class_recall")} == pytest.approx(details)
    else:
        recall = ours.retrieval.tasks["captions"]["ensemble"]
        assert found["image_retrieval_recall@5"] == pytest.approx(recall["image_recall@5"])
        assert found["text_retrieval_recall@5"] == pytest.approx(recall["text_recall@5"])
