from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mode.embedding.base import build_embedder
from mode.ensemble.classifier import Classifier, from_base64
from mode.ensemble.mixture import Mixture
from mode.errors import ModeError
from mode.params import EmbeddingParams, ImageParams, ModelParams, RoutingParams
from mode.tracking import Tracker
from mode.training.model import build_model, load_model, save_model

CAPTIONS = [f"{colour} chess {piece}" for colour in ("white", "black", "red") for piece in ("king", "queen", "rook")]
CAPTIONS += [f"playing card {rank} of {suit}" for rank in ("ace", "two", "ten") for suit in ("hearts", "spades")]
MODEL = ModelParams(
    config={
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    },
    tokenizer="words",
)
CLASSES = ("white chess king", "ace of hearts", "black rook")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts, a seed and their mixture, untrained."""
    root = tmp_path_factory.mktemp("project")
    for number, name in enumerate(("seed", "expert-0", "expert-1")):
        save_model(root / name, build_model(MODEL, ImageParams(size=16), CAPTIONS, number), {})
    embedder = build_embedder(EmbeddingParams(dimensions=4), CAPTIONS, 0)
    vectors = embedder.encode(CAPTIONS)
    conditions = {"expert-0": vectors[:9], "expert-1": vectors[9:]}
    Mixture.fit(conditions, embedder, RoutingParams(), CAPTIONS, 0).save(root / "mixture")
    return root


def models(project: Path, *names: str) -> dict[str, Path]:
    return {name: project / name for name in names}


@pytest.fixture(scope="module")
def classifier(project: Path) -> Classifier:
    return Classifier.load(project / "mixture", models(project, "expert-0", "expert-1"), "cpu")


def png(seed: int, size: tuple[int, int] = (20, 31)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def test_probabilities_are_the_weighted_cosine_similarities(project: Path, classifier: Classifier) -> None:
    """Against open_clip alone, step by step."""
    images = [png(0), png(1)]
    answer = classifier.classify(images, CLASSES)
    total, scale = torch.zeros(2, 3), 0.0
    for name, weight in answer.weights.items():
        network, _, transform = open_clip.create_model_and_transforms(f"local-dir:{project / name}")
        tokens = open_clip.get_tokenizer(f"local-dir:{project / name}")(list(CLASSES))
        with torch.no_grad():
            pixels = torch.stack([transform(Image.open(io.BytesIO(content))) for content in images])
            rows = F.normalize(network.eval().encode_image(pixels), dim=-1)
            total += weight * (rows @ F.normalize(network.encode_text(tokens), dim=-1).T)
            scale += weight * float(network.logit_scale.exp())
    torch.testing.assert_close(answer.probabilities, F.softmax(scale * total, dim=1), rtol=1e-4, atol=1e-6)
    assert answer.labels == [CLASSES[column] for column in total.argmax(dim=1)]
    assert sum(answer.weights.values()) == pytest.approx(1)


def test_batches_do_not_matter(project: Path, classifier: Classifier) -> None:
    images = [png(seed) for seed in range(5)]
    small = Classifier(
        classifier.mixture, {name: load_model(project / name) for name in ("expert-0", "expert-1")}, "cpu", batch_size=2
    )
    torch.testing.assert_close(
        small.classify(images, CLASSES).probabilities, classifier.classify(images, CLASSES).probabilities
    )


def test_the_seed_stands_in_with_the_experts_weight(project: Path, classifier: Classifier) -> None:
    stood = Classifier.load(project / "mixture", models(project, "seed", "expert-1"), "cpu").classify([png(0)], CLASSES)
    both = classifier.classify([png(0)], CLASSES)
    assert stood.weights == both.weights
    assert not torch.equal(stood.probabilities, both.probabilities)
    alone = Classifier.load(project / "mixture", models(project, "seed"), "cpu").classify([png(0)], CLASSES)
    assert sum(alone.weights.values()) == pytest.approx(1)


def test_no_image_gives_no_answer(classifier: Classifier) -> None:
    answer = classifier.classify([], CLASSES)
    assert answer.probabilities.shape == (0, 3)
    assert answer.labels == []


@pytest.mark.parametrize(
    ("images", "classes", "templates", "message"),
    [
        ([], [], ["{c}"], "at least one name"),
        ([], ["a", " "], ["{c}"], "none of them empty"),
        ([], ["a"], ["a photo"], r"'a photo' has no \{c\}"),
        ([b"no image"], ["a"], ["{c}"], "image 0: cannot be decoded"),
        ([png(0), png(1)[:200]], ["a"], ["{c}"], "image 1: cannot be decoded"),
    ],
)
def test_bad_requests_are_named(
    classifier: Classifier, images: list[bytes], classes: list[str], templates: list[str], message: str
) -> None:
    with pytest.raises(ModeError, match=message):
        classifier.classify(images, classes, templates)


def test_base64() -> None:
    assert from_base64(base64.b64encode(b"abc").decode(), 0) == b"abc"
    assert from_base64("data:image/png;base64," + base64.b64encode(b"abc").decode(), 0) == b"abc"
    with pytest.raises(ModeError, match="image 3: not base64"):
        from_base64("?!", 3)


def test_the_registered_model_answers_as_the_classifier(project: Path, classifier: Classifier, tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "mlruns")
    members = models(project, "expert-0", "expert-1")
    with tracker.run("ensemble", "ensemble") as run:
        pass
    version = tracker.register_ensemble(project / "mixture", members, run_id=run.run_id)
    assert version == "1"
    assert tracker.register_ensemble(project / "mixture", members) == "1"  # the same: no second version
    assert tracker.register_ensemble(project / "mixture", models(project, "expert-0", "seed"), alias=None) == "2"
    client = tracker._store.client
    champion = client.get_model_version_by_alias("mode-ensemble", "champion")
    assert (str(champion.version), champion.run_id) == ("1", run.run_id)

    import mlflow

    mlflow.set_tracking_uri(tracker.uri)
    mlflow.set_registry_uri(tracker.uri)
    loaded = mlflow.pyfunc.load_model("models:/mode-ensemble@champion")
    images = [png(0), png(1)]
    frame = pd.DataFrame({"image": [base64.b64encode(content).decode() for content in images]})
    answer = loaded.predict(frame, params={"classes": list(CLASSES), "templates": ["{c}"]})
    expected = classifier.classify(images, CLASSES)
    assert list(answer["label"]) == expected.labels
    assert np.array(list(answer["probabilities"])) == pytest.approx(expected.probabilities.numpy(), rel=1e-5)
    with pytest.raises(mlflow.MlflowException, match="image 0: not base64") as caught:
        loaded.predict(pd.DataFrame({"image": ["?"]}), params={"classes": ["a"]})
    assert caught.value.get_http_status_code() == 400
    artifacts = list((tmp_path / "mlruns" / "artifacts").rglob("*"))
    assert any(path.name == "input_example.json" for path in artifacts)
    assert not [path for path in artifacts if path.suffix in (".pkl", ".pickle", ".cloudpickle")]


def test_a_missing_folder_is_named(project: Path, tmp_path: Path) -> None:
    with pytest.raises(ModeError, match="nowhere: no such folder"):
        Tracker(tmp_path).register_ensemble(project / "mixture", {"expert-0": tmp_path / "nowhere"})
