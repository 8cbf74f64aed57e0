from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from mlflow import MlflowClient
from PIL import Image

import mode
from mode.clip.model import build_model, load_model, save_model
from mode.embedding.base import build_embedder
from mode.ensemble.model import Ensemble, find_folders
from mode.ensemble.router import Router
from mode.errors import ModeError
from mode.params import EmbeddingParams, ImageParams, RoutingParams
from mode.tracking.runs import Tracker
from tests.small import VIT

CAPTIONS = [f"{colour} chess {piece}" for colour in ("white", "black", "red") for piece in ("king", "queen", "rook")]
CAPTIONS += [f"playing card {rank} of {suit}" for rank in ("ace", "two", "ten") for suit in ("hearts", "spades")]
CLASSES = ("white chess king", "ace of hearts", "black rook")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts, a seed and their router, untrained."""
    root = tmp_path_factory.mktemp("project")
    for number, name in enumerate(("seed", "expert-0", "expert-1")):
        save_model(root / name, build_model(VIT, ImageParams(size=16), CAPTIONS, number), {})
    embedder = build_embedder(EmbeddingParams(dimensions=4), CAPTIONS, 0)
    vectors = embedder.encode(CAPTIONS)
    conditions = {"expert-0": vectors[:9], "expert-1": vectors[9:]}
    Router.fit(conditions, embedder, RoutingParams(), CAPTIONS, 0).save(root / "ensemble")
    return root


def models(project: Path, *names: str) -> dict[str, Path]:
    return {name: project / name for name in names}


@pytest.fixture(scope="module")
def ensemble(project: Path) -> Ensemble:
    return Ensemble.load(project / "ensemble", models(project, "expert-0", "expert-1"), "cpu")


def png(seed: int, size: tuple[int, int] = (20, 31)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def towers(project: Path, weights: dict[str, float], images: list[bytes], prompts: list[list[str]]) -> torch.Tensor:
    """The ensemble's scores by open_clip alone, step by step: [images, classes]."""
    total = torch.zeros(len(images), len(prompts))
    for name, weight in weights.items():
        network, _, transform = open_clip.create_model_and_transforms(f"local-dir:{project / name}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{project / name}")
        with torch.no_grad():
            pixels = torch.stack([transform(Image.open(io.BytesIO(content))) for content in images])
            rows = F.normalize(network.eval().encode_image(pixels), dim=-1)
            columns = torch.stack([F.normalize(network.encode_text(tokenizer(p)), dim=-1).mean(dim=0) for p in prompts])
            total += weight * (rows @ F.normalize(columns, dim=-1).T)
    return total


def scale_of(project: Path, weights: dict[str, float]) -> float:
    return sum(weight * load_model(project / name).model.logit_scale.exp().item() for name, weight in weights.items())


class TestAdapt:
    def test_probabilities_are_the_weighted_cosine_similarities(self, project: Path, ensemble: Ensemble) -> None:
        images = [png(0), png(1)]
        task = ensemble.adapt(CLASSES, ["a {c}", "{c}", "one {c} of a set"])
        total = towers(project, task.weights, images, [[f"a {c}", c, f"one {c} of a set"] for c in CLASSES])
        torch.testing.assert_close(task.scores(images), total, rtol=1e-4, atol=1e-6)
        expected = F.softmax(scale_of(project, task.weights) * total, dim=1)
        torch.testing.assert_close(task(images), expected, rtol=1e-4, atol=1e-6)
        assert task.labels(images) == [CLASSES[column] for column in total.argmax(dim=1)]
        assert sum(task.weights.values()) == pytest.approx(1)
        assert task.weights == ensemble.router.weights([[f"a {c}", c, f"one {c} of a set"] for c in CLASSES])

    def test_one_expert_says_what_open_clip_says(self, project: Path, ensemble: Ensemble) -> None:
        task = ensemble.adapt(CLASSES)
        opinion = task.opinions([png(0)])["expert-1"]
        alone = towers(project, {"expert-1": 1.0}, [png(0)], [[c] for c in CLASSES])
        expected = F.softmax(scale_of(project, {"expert-1": 1.0}) * alone, dim=1)
        torch.testing.assert_close(opinion, expected, rtol=1e-4, atol=1e-6)

    def test_the_seed_stands_in_with_the_experts_weight(self, project: Path, ensemble: Ensemble) -> None:
        stood = Ensemble.load(project / "ensemble", models(project, "seed", "expert-1"), "cpu").adapt(CLASSES)
        weights = ensemble.adapt(CLASSES).weights
        assert stood.weights == weights
        as_models = {"seed": weights["expert-0"], "expert-1": weights["expert-1"]}
        expected = towers(project, as_models, [png(0)], [[c] for c in CLASSES])
        torch.testing.assert_close(stood.scores(png(0)), expected, rtol=1e-4, atol=1e-6)
        alone = Ensemble.load(project / "ensemble", models(project, "seed"), "cpu").adapt(CLASSES)
        assert sum(alone.weights.values()) == pytest.approx(1)
        assert list(alone.clips) == ["seed"]

    def test_top_k_and_threshold_run_only_what_they_keep(self, project: Path, ensemble: Ensemble) -> None:
        weights = ensemble.adapt(CLASSES).weights
        first = max(weights, key=lambda name: weights[name])
        for task in (ensemble.adapt(CLASSES, top_k=1), ensemble.adapt(CLASSES, threshold=weights[first])):
            assert task.weights[first] == 1
            assert list(task.clips) == [first]
            expected = towers(project, {first: 1.0}, [png(3)], [[c] for c in CLASSES])
            torch.testing.assert_close(task.scores(png(3)), expected, rtol=1e-4, atol=1e-6)
        assert ensemble.adapt(CLASSES, top_k=2).weights == pytest.approx(weights)
        assert ensemble.adapt(CLASSES, threshold=1.0).weights == pytest.approx(weights)

    @pytest.mark.parametrize(
        ("classes", "templates", "options", "message"),
        [
            ([], None, {}, "at least one name"),
            (["a", " "], None, {}, "none of them empty"),
            ("dog", None, {}, "lists of texts"),
            (["a"], ["a photo"], {}, r"'a photo' has no \{c\}"),
            (["a"], None, {"top_k": 0}, "at least one expert"),
            (["a"], None, {"threshold": 1.5}, "from 0 to 1"),
            (["a"], None, {"top_k": 1, "threshold": 0.5}, "give one of them"),
            (["a"], None, {"merge": "soup"}, "'soup' is unknown"),
            (["a"], None, {"images": [b""]}, "only used to merge"),
        ],
    )
    def test_bad_requests_are_named(
        self,
        ensemble: Ensemble,
        classes: list[str],
        templates: list[str] | None,
        options: dict[str, object],
        message: str,
    ) -> None:
        with pytest.raises(ModeError, match=message):
            ensemble.adapt(classes, templates, **options)  # type: ignore[arg-type]


class TestImages:
    def test_whatever_an_image_is_given_as(self, ensemble: Ensemble, tmp_path: Path) -> None:
        content = png(4)
        (tmp_path / "a.png").write_bytes(content)
        picture = Image.open(io.BytesIO(content))
        array = np.array(picture)
        task = ensemble.adapt(CLASSES)
        expected = task([content])
        assert expected.shape == (1, 3)
        tensor = ensemble.preprocess(picture)
        for given in (content, tmp_path / "a.png", str(tmp_path / "a.png"), picture, array, array[None], tensor):
            torch.testing.assert_close(task(given), expected)
        mixed = task([str(tmp_path / "a.png"), picture, array, content])
        torch.testing.assert_close(mixed, expected.expand(4, 3))
        torch.testing.assert_close(task(torch.stack([tensor, tensor])), expected.expand(2, 3))

    @pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
    def test_batches_do_not_matter(self, project: Path, ensemble: Ensemble, count: int) -> None:
        small = Ensemble.load(project / "ensemble", models(project, "expert-0", "expert-1"), "cpu", batch_size=2)
        images = [png(seed) for seed in range(count)]
        answer = small.adapt(CLASSES)(images)
        assert answer.shape == (count, 3)
        torch.testing.assert_close(answer, ensemble.adapt(CLASSES)(images))

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ([b"no image"], "image 0: cannot be decoded"),
            ([png(0), png(1)[:200]], "image 1: cannot be decoded"),
            (["nowhere.png"], "nowhere.png: cannot be read: No such file"),
            ([np.zeros((4, 4), np.uint8)], r"image 0: an array of uint8 \[4, 4\]"),
            ([np.zeros((4, 4, 3))], "image 0: an array of float64"),
            ([None], "image 0: a NoneType is no image"),
            (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "a tensor of torch.uint8"),
        ],
    )
    def test_what_is_no_image_is_named(self, ensemble: Ensemble, images: object, message: str) -> None:
        with pytest.raises(ModeError, match=message):
            ensemble.adapt(CLASSES)(images)


def test_retrieval_is_routed_by_all_texts_or_by_the_task(project: Path, ensemble: Ensemble) -> None:
    images, texts = [png(0), png(1)], ["a white chess king", "ace of hearts", "two of spades", "red rook"]
    routed = ensemble.router.weights([[text] for text in texts])
    expected = towers(project, routed, images, [[text] for text in texts])
    torch.testing.assert_close(ensemble.retrieve(images, texts, query="together"), expected, rtol=1e-4, atol=1e-6)
    task = ensemble.adapt(["ace of hearts"])
    assert task.weights != pytest.approx(routed)
    expected = towers(project, task.weights, images, [[text] for text in texts])
    torch.testing.assert_close(task.retrieve(images, texts), expected, rtol=1e-4, atol=1e-6)
    assert task.retrieve([], texts).shape == (0, 4)


def test_retrieval_by_query(project: Path, ensemble: Ensemble) -> None:
    """Every text by itself, and every image by the texts that it seems to show; against loops."""
    images, texts = [png(0), png(1), png(2)], ["a white chess king", "ace of hearts", "zyxgfq", "red rook"]
    names = ("expert-0", "expert-1")
    alone = {name: towers(project, {name: 1.0}, images, [[text] for text in texts]) for name in names}
    task = ensemble.router.weights([[text] for text in texts])
    own = [ensemble.router.weights([[text]]) for text in texts]
    assert own[2] == {"expert-0": 0.5, "expert-1": 0.5}  # no known word
    by_text = torch.stack([sum(own[t][n] * alone[n][:, t] for n in names) for t in range(4)], dim=1)
    found = ensemble.retrieve(images, texts)
    torch.testing.assert_close(found, ensemble.retrieve(images, texts, query="text"))
    torch.testing.assert_close(found, by_text, rtol=1e-4, atol=1e-6)
    guess = F.softmax(scale_of(project, task) * sum(task[n] * alone[n] for n in names), dim=1)
    weights = {n: guess @ torch.tensor([own[t][n] for t in range(4)]) for n in names}
    by_image = sum(weights[n][:, None] * alone[n] for n in names)
    torch.testing.assert_close(ensemble.retrieve(images, texts, query="image"), by_image, rtol=1e-4, atol=1e-6)


def test_retrieval_by_the_papers_protocol(project: Path) -> None:
    """Texts of one expert's subject leave the other no weight in the task, but not in a text of its own."""
    saved = Router.load(project / "ensemble")
    routing = RoutingParams(kind="paper", bandwidth=0.01, retrieval="paper")
    clips = {name: load_model(project / name) for name in ("expert-0", "expert-1")}
    ensemble = Ensemble(Router(saved.conditions, saved.embedder, routing), clips, "cpu")
    images, texts = [png(0), png(1)], [*["white chess king"] * 800, "playing card ace of hearts"]
    task = ensemble.router.weights([[text] for text in texts])
    assert task == {"expert-0": 1.0, "expert-1": 0.0}
    expected = towers(project, ensemble.router.weights([["playing card ace of hearts"]]), images, [texts[-1:]])
    found = ensemble.retrieve(images, texts)
    torch.testing.assert_close(found[:, 800:], expected, rtol=1e-4, atol=1e-6)
    by_task = ensemble.retrieve(images, texts, query="together")
    torch.testing.assert_close(by_task[:, 800:], towers(project, task, images, [texts[-1:]]), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found[:, 800:], by_task[:, 800:])


class TestAsOpenClip:
    def test_inner_products_are_the_ensembles_scores(self, ensemble: Ensemble) -> None:
        pictures = [Image.open(io.BytesIO(png(seed))) for seed in range(3)]
        task = ensemble.adapt(CLASSES)
        images = task.encode_image(torch.stack([task.preprocess(picture) for picture in pictures]))
        texts = task.encode_text(task.tokenizer(list(CLASSES)), normalize=True)
        assert images.shape == texts.shape == (3, 32)
        torch.testing.assert_close(images.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(images @ texts.T, task.scores(pictures))
        probabilities = F.softmax(task.logit_scale.exp() * images @ texts.T, dim=1)
        torch.testing.assert_close(probabilities, task(pictures))

    def test_without_a_task_it_is_the_uniform_average(self, project: Path, ensemble: Ensemble) -> None:
        batch = torch.stack([ensemble.preprocess(Image.open(io.BytesIO(png(seed)))) for seed in range(2)])
        images, texts, scale = ensemble(batch, ensemble.tokenizer(list(CLASSES)))
        half = {"expert-0": 0.5, "expert-1": 0.5}
        expected = towers(project, half, [png(0), png(1)], [[c] for c in CLASSES])
        torch.testing.assert_close(images @ texts.T, expected, rtol=1e-4, atol=1e-6)
        assert scale.item() == pytest.approx(scale_of(project, half), rel=1e-5)

    def test_experts_of_another_size_answer_but_are_no_single_encoder(self, project: Path, tmp_path: Path) -> None:
        save_model(tmp_path / "large", build_model(VIT, ImageParams(size=24), CAPTIONS, 5), {})
        folders = {"expert-0": project / "expert-0", "expert-1": tmp_path / "large"}
        ensemble = Ensemble.load(project / "ensemble", folders, "cpu")
        assert ensemble.adapt(CLASSES)([png(0)]).shape == (1, 3)
        with pytest.raises(ModeError, match="images of different sizes"):
            ensemble.encode_image(torch.zeros(1, 3, 16, 16))
        with pytest.raises(ModeError, match="has other parameters"):
            ensemble.adapt(CLASSES, merge="weights")


@pytest.mark.parametrize("precision", ["amp", "bf16"])
def test_lower_precision_is_close(project: Path, ensemble: Ensemble, precision: str) -> None:
    members = models(project, "expert-0", "expert-1")
    low = Ensemble.load(project / "ensemble", members, "cpu", precision)  # type: ignore[arg-type]
    images = [png(seed) for seed in range(4)]
    difference = (low.adapt(CLASSES).scores(images) - ensemble.adapt(CLASSES).scores(images)).abs().max().item()
    assert 0 < difference < 0.05


class TestLoad:
    @pytest.mark.parametrize("where", ["", "ensemble"])
    def test_the_models_folder_and_the_ensembles_own(self, project: Path, ensemble: Ensemble, where: str) -> None:
        loaded = mode.load(project / where, device="cpu", batch_size=3)
        assert loaded.batch_size == 3
        assert loaded.experts == ("expert-0", "expert-1")
        torch.testing.assert_close(loaded.adapt(CLASSES)(png(0)), ensemble.adapt(CLASSES)(png(0)))

    def test_what_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModeError, match="no ensemble there"):
            find_folders(tmp_path)
        with pytest.raises(ModeError, match="holds no MLflow database"):
            mode.load("models:/mode-ensemble@champion", runs=tmp_path)

    def test_importing_it_imports_no_library(self) -> None:
        code = "import sys, mode; mode.load; print(sorted({'torch', 'mlflow', 'numpy'} & set(sys.modules)))"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_registered_model_answers_as_the_loaded_one(
    project: Path, ensemble: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    tracker = Tracker(tmp_path / "mlruns")
    members = models(project, "expert-0", "expert-1")
    with tracker.run("ensemble", "ensemble") as run:
        pass
    version = tracker.register_ensemble(project / "ensemble", members, run_id=run.run_id)
    assert version == "1"
    assert tracker.register_ensemble(project / "ensemble", members) == "1"  # the same: no second version
    assert tracker.register_ensemble(project / "ensemble", models(project, "expert-0", "seed"), alias=None) == "2"
    client = MlflowClient(tracker.uri)
    champion = client.get_model_version_by_alias("mode-ensemble", "champion")
    assert (str(champion.version), champion.run_id) == ("1", run.run_id)

    import mlflow

    images, task = [png(0), png(1)], ensemble.adapt(CLASSES)
    assert not {"MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"} & set(os.environ)
    mlflow.set_tracking_uri(None)  # as in a process that has not met MLflow
    mlflow.set_registry_uri(None)
    registered = mode.load("models:/mode-ensemble@champion", device="cpu", runs=tmp_path / "mlruns")
    torch.testing.assert_close(registered.adapt(CLASSES)(images), task(images))
    with pytest.raises(ModeError, match="models:/mode-ensemble@nobody"):
        mode.load("models:/mode-ensemble@nobody", runs=tmp_path / "mlruns")

    # A registry names no folder outside the model that it gives.
    [description] = (tmp_path / "mlruns").rglob(f"{champion.source.rpartition('/')[2]}/**/MLmodel")
    sound = description.read_text()
    description.write_text(sound.replace("path: artifacts/ensemble", f"path: {project / 'ensemble'}"))
    assert description.read_text() != sound
    with pytest.raises(ModeError, match=r"not an ensemble of this project \(check the name; `dvc repro report`"):
        mode.load("models:/mode-ensemble@champion", runs=tmp_path / "mlruns")
    description.write_text(sound)

    # Nothing of this stays, in the environment or in MLflow.
    assert not {"MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"} & set(os.environ)
    assert not mlflow.is_tracking_uri_set()
    assert mlflow.get_registry_uri() == mlflow.get_tracking_uri()
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, tracker.uri)  # which MLflow would leave behind for other tests
    mlflow.set_tracking_uri(tracker.uri)
    mlflow.set_registry_uri(tracker.uri)
    loaded = mlflow.pyfunc.load_model("models:/mode-ensemble@champion")
    frame = pd.DataFrame({"image": [base64.b64encode(content).decode() for content in images]})
    answer = loaded.predict(frame, params={"classes": list(CLASSES), "templates": ["{c}"]})
    assert list(answer["label"]) == task.labels(images)
    rounding = 0.05 if torch.cuda.is_available() else 1e-5  # it chose the GPU, `task` is on the CPU
    assert np.array(list(answer["probabilities"])) == pytest.approx(task(images).numpy(), rel=rounding)
    assert not [each for each in recwarn if "type hints" in str(each.message)]
    with pytest.raises(mlflow.MlflowException, match="image 0: not base64") as caught:
        loaded.predict(pd.DataFrame({"image": ["?"]}), params={"classes": ["a"]})
    assert caught.value.get_http_status_code() == 400
    artifacts = list((tmp_path / "mlruns" / "artifacts").rglob("*"))
    assert any(path.name == "input_example.json" for path in artifacts)
    assert not [path for path in artifacts if path.suffix in (".pkl", ".pickle", ".cloudpickle")]


def test_a_missing_folder_is_named(project: Path, tmp_path: Path) -> None:
    with pytest.raises(ModeError, match="nowhere: no such folder"):
        Tracker(tmp_path).register_ensemble(project / "ensemble", {"expert-0": tmp_path / "nowhere"})
