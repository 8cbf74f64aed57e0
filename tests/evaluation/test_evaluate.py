"""Evaluation of several models and their router: against naive computations, whatever the batches and blocks."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from mode.clip.model import Clip, load_models, save_model
from mode.embedding.lsa import LsaEmbedder
from mode.embedding.open_clip import OpenClipEmbedder
from mode.ensemble.combine import QueryWeights
from mode.ensemble.router import Router
from mode.errors import ModeError
from mode.evaluation import evaluate, features, scores
from mode.evaluation.evaluate import evaluate_tasks
from mode.evaluation.features import encode_tasks
from mode.evaluation.scores import classify, primary, retrieve
from mode.evaluation.tasks import Task, open_task
from mode.params import MachineParams, RoutingParams
from mode.results import Results
from tests.evaluation.conftest import COLOURS, draw

CPU = MachineParams(device="cpu", inference_batch=16)


@pytest.fixture(scope="module")
def router() -> Router:
    """Experts for bright and dark colours."""
    captions = ["a red spot", "yellow paper", "white photo", "red yellow white", "dark grey photo", "blue spot",
                "green paper", "the dark blue colour", "dark green", "grey and blue"] * 10  # fmt: skip
    embedder = LsaEmbedder.fit(captions, 6, 0)
    conditions = {
        "expert-0": embedder.encode(["red", "yellow white"]),
        "expert-1": embedder.encode(["blue", "dark grey", "green"]),
    }
    return Router.fit(conditions, embedder, RoutingParams(retrieval="together"), captions, random_seed=0)


def by_hand(clip: Clip, task: Task) -> np.ndarray:
    """Cosines [images, classes or texts], one image and one class at a time, with open_clip's own transform."""
    transform = image_transform_v2(PreprocessCfg(**clip.preprocess_cfg), is_train=False)
    with torch.no_grad():
        images = torch.cat(
            [
                clip.model.encode_image(
                    transform(Image.open(io.BytesIO(image.read())).convert("RGB"))[None], normalize=True
                )
                for image in task.images
            ]
        )
        columns = []
        for prompts in task.prompts:
            mean = clip.model.encode_text(clip.tokenizer(prompts), normalize=True).mean(dim=0)
            columns.append(mean / mean.norm())
        return (images @ torch.stack(columns).T).numpy()


class TestFeatures:
    @pytest.mark.parametrize("batch_size", [1, 7, 12, 13, features._AT_ONCE, features._AT_ONCE + 1, 100])
    def test_batches_run_across_tasks(self, folders: Any, clips: dict[str, Clip], batch_size: int) -> None:
        """A batch ends inside a task, at its end, or covers several; a thread decodes less than a batch, or all."""
        tasks = [open_task(folders.classification(f"t{n}", [i % 6 for i in range(n)], seed=n)) for n in (1, 12, 6)]
        found = list(encode_tasks(tasks, clips, batch_size=batch_size, workers=2, device="cpu"))
        assert [task.name for task, _ in found] == ["t1", "t12", "t6"]
        for task, vectors in found:
            assert list(vectors) == list(clips)
            for name, clip in clips.items():
                [(_, alone)] = encode_tasks([task], {name: clip}, batch_size=50, workers=0, device="cpu")
                assert vectors[name].shape == (len(task.images), 16)
                torch.testing.assert_close(vectors[name], alone[name])

    def test_an_image_is_decoded_once_for_all_models(
        self, folders: Any, clips: dict[str, Clip], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoded: list[int] = []
        plain = features.decode
        monkeypatch.setattr(features, "decode", lambda content: decoded.append(len(content)) or plain(content))
        task = open_task(folders.classification("colours", [0, 1, 2, 3, 4]))
        list(encode_tasks([task], clips, batch_size=2, workers=2, device="cpu"))
        assert sorted(decoded) == sorted(image.size for image in task.images)

    def test_an_image_that_cannot_be_decoded_is_named(self, folders: Any, clips: dict[str, Clip]) -> None:
        """Unlike in training it is not skipped: without it, it would be another benchmark."""
        folder = folders.classification("colours", [0, 1])
        tar = folder / "test" / "0.tar"
        tar.write_bytes(tar.read_bytes().replace(b"\x89PNG", b"?PNG"))
        task = open_task(folder)
        with pytest.raises(ModeError, match=r"0.tar: image s00001 cannot be decoded"):
            list(encode_tasks([task], clips, batch_size=2, workers=1, device="cpu"))

    def test_a_model_that_gives_nan_is_named(self, folders: Any, clips: dict[str, Clip]) -> None:
        folder = folders.classification("colours", [0, 1])
        weight = clips["expert-1"].model.visual.conv1.weight
        kept = weight.detach().clone()
        try:
            with torch.no_grad():
                weight[0, 0, 0, 0] = torch.nan
            with pytest.raises(ModeError, match="model 'expert-1' gives NaN"):
                evaluate_tasks(clips, None, [folder], CPU)
        finally:
            with torch.no_grad():
                weight.copy_(kept)


def vectors(seed: int, names: list[str], rows: int) -> dict[str, torch.Tensor]:
    """Random unit vectors of a different dimension for each name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.functional.normalize(torch.randn(rows, 4 + number, generator=generator), dim=1)
        for number, name in enumerate(names)
    }


MIXED = {"ensemble": {"a": 0.7, "b": 0.3}, "one": {"a": 0.0, "b": 1.0}}


@pytest.mark.parametrize("block", [1, 20, 21, 50, 10_000])
def test_similarity_blocks_equal_the_full_matrix(block: int) -> None:
    rows, columns = vectors(0, ["a", "b"], 11), vectors(1, ["a", "b"], 5)
    full = {name: (rows[name] @ columns[name].T).numpy() for name in rows}
    full["ensemble"] = 0.7 * full["a"] + 0.3 * full["b"]
    full["one"] = full["b"]
    covered = {name: [] for name in full}
    for start, name, part in scores.similarity_blocks(rows, columns, MIXED, block):
        np.testing.assert_allclose(part, full[name][start : start + len(part)], atol=1e-6)
        covered[name] += range(start, start + len(part))
    assert all(found == list(range(11)) for found in covered.values())


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 12), st.sampled_from([1, 30, 10_000]))
def test_retrieval_equals_a_naive_full_matrix(seed: int, images: int, block: int) -> None:
    random = np.random.default_rng(seed)
    owners = np.repeat(np.arange(images), random.integers(1, 4, images))
    task = Task("t", "retrieval", (), "recall", texts=("",) * len(owners), owners=owners)
    image_vectors, text_vectors = vectors(seed, ["a", "b"], images), vectors(seed + 1, ["a", "b"], len(owners))
    found = retrieve(task, image_vectors, text_vectors, MIXED, block)
    cosines = {name: (text_vectors[name] @ image_vectors[name].T).numpy() for name in ("a", "b")}
    cosines["ensemble"] = 0.7 * cosines["a"] + 0.3 * cosines["b"]
    for name, matrix in cosines.items():
        for k in (1, 5, 10):
            image_hits = [owners[text] in np.argsort(-matrix[text])[:k] for text in range(len(owners))]
            text_hits = [(owners[np.argsort(-matrix[:, image])[:k]] == image).any() for image in range(images)]
            assert found[name][f"image_recall@{k}"] == pytest.approx(np.mean(image_hits))
            assert found[name][f"text_recall@{k}"] == pytest.approx(np.mean(text_hits))


@pytest.mark.parametrize("block", [1, 17, 10_000])
def test_retrieval_by_query_equals_a_naive_full_matrix(block: int) -> None:
    random = np.random.default_rng(3)
    owners = np.repeat(np.arange(9), random.integers(1, 4, 9))
    task = Task("t", "retrieval", (), "recall", texts=("",) * len(owners), owners=owners)
    image_vectors, text_vectors = vectors(5, ["a", "b", "other"], 9), vectors(6, ["a", "b", "other"], len(owners))
    share = random.random(len(owners))
    weights = QueryWeights({"a": 0.6, "b": 0.4}, {"a": share, "b": 1 - share}, factor=7.0)
    found = retrieve(
        task, image_vectors, text_vectors, {"ensemble": {"a": 0.6, "b": 0.4}}, block, {"ensemble": weights}
    )
    a, b = ((text_vectors[name] @ image_vectors[name].T).numpy() for name in ("a", "b"))
    of_texts = share[:, None] * a + (1 - share)[:, None] * b
    odds = np.exp(7 * (0.6 * a + 0.4 * b))
    of_image = ((odds / odds.sum(axis=0)) * share[:, None]).sum(axis=0)
    of_images = of_image * a + (1 - of_image) * b
    for k in (1, 5, 10):
        image_hits = [owners[text] in np.argsort(-of_texts[text])[:k] for text in range(len(owners))]
        text_hits = [(owners[np.argsort(-of_images[:, image])[:k]] == image).any() for image in range(9)]
        assert found["ensemble"][f"image_recall@{k}"] == pytest.approx(np.mean(image_hits))
        assert found["ensemble"][f"text_recall@{k}"] == pytest.approx(np.mean(text_hits))
    plain = retrieve(task, image_vectors, text_vectors, {"ensemble": {"a": 0.6, "b": 0.4}}, block)
    assert plain["ensemble"] != found["ensemble"]


def test_an_evaluation_routes_retrieval_as_the_router_says(
    folders: Any, clips: dict[str, Clip], router: Router
) -> None:
    folder = folders.retrieval("captions", 30)
    by_query = replace(router, routing=RoutingParams())
    results = [evaluate_tasks(clips, each, [folder], CPU).retrieval.tasks["captions"] for each in (router, by_query)]
    assert results[0]["uniform"] == results[1]["uniform"]
    assert results[0]["ensemble"] != results[1]["ensemble"]


@pytest.mark.parametrize("kind", ["calibrated", "published", "paper"])
def test_the_papers_protocol_of_retrieval(folders: Any, clips: dict[str, Clip], router: Router, kind: str) -> None:
    """An image that looks for texts is weighed by all of them, a text that looks for images by itself."""
    folder = folders.retrieval("captions", 30)
    task = open_task(folder)
    found = {}
    for retrieval in ("together", "paper"):
        routing = RoutingParams(kind=kind, retrieval=retrieval, divisor=0.05, bandwidth=0.1)  # type: ignore[arg-type]
        routed = replace(router, routing=routing)
        found[retrieval] = evaluate_tasks(clips, routed, [folder], CPU).retrieval.tasks["captions"]["ensemble"]
    alone = [routed.weights([[text]]) for text in task.texts]
    matrices = {name: by_hand(clips[name], task) for name in routed.experts}  # [images, texts]
    by_text = sum(matrix * np.array([weights[name] for weights in alone])[None, :] for name, matrix in matrices.items())
    for k in (1, 5, 10):
        assert found["paper"][f"text_recall@{k}"] == found["together"][f"text_recall@{k}"]
        hits = [task.owners[text] in np.argsort(-by_text[:, text])[:k] for text in range(len(task.texts))]
        assert found["paper"][f"image_recall@{k}"] == pytest.approx(np.mean(hits))


def test_the_metric_of_a_task_is_its_figure(folders: Any) -> None:
    columns = vectors(1, ["a"], 6)
    folder = folders.classification("colours", [0, 0, 0, 1, 2, 3])
    for metric in ("acc1", "mean_per_class_recall", "mean_acc1_acc5"):
        task = open_task(folder, metric)
        figures = classify(task, vectors(0, ["a"], 6), columns, {})["a"]
        expected = {**figures, "mean_acc1_acc5": (figures["acc1"] + figures["acc5"]) / 2}[metric]
        assert primary(task, figures) == expected
    two = folders.classification("two", [0, 1, 1, 0], classes=["red", "green"])
    task = open_task(two, "roc_auc")
    margins = torch.tensor([[0.1, 0.0], [0.0, 0.3], [0.2, 0.0], [0.0, 0.1]])
    figures = classify(task, {"a": margins}, {"a": torch.eye(2)}, {})["a"]
    assert primary(task, figures) == figures["roc_auc"] == 0.5
    assert np.isnan(figures["acc5"])


class TestEvaluate:
    def test_equals_one_image_and_one_class_at_a_time(
        self, folders: Any, clips: dict[str, Clip], router: Router, tmp_path: Path
    ) -> None:
        """The whole path from model folders, with classification and retrieval, models, uniform and ensemble."""
        tasks = [
            folders.classification("bright", [0, 2, 1, 0, 1, 1, 2, 0, 2], classes=["red", "yellow", "white"], shards=2),
            folders.retrieval("captions", 14),
            folders.classification("colours", [i % 6 for i in range(20)]),
        ]
        for name, clip in clips.items():
            save_model(tmp_path / name, clip, {})
        found = evaluate_tasks({name: tmp_path / name for name in clips}, router, tasks, CPU)

        for folder in tasks:
            task = open_task(folder)
            cosines = {name: by_hand(clip, task) for name, clip in clips.items()}
            routed = router.weights(task.prompts)
            assert found.routing[task.name] == pytest.approx(routed)
            cosines["uniform"] = (cosines["expert-0"] + cosines["expert-1"]) / 2
            cosines["ensemble"] = sum(weight * cosines[expert] for expert, weight in routed.items())
            for name, matrix in cosines.items():
                if task.kind == "retrieval":
                    hits = [(task.owners[np.argsort(-row)[:5]] == i).any() for i, row in enumerate(matrix)]
                    figures = found.retrieval.tasks[task.name][name]
                    assert figures["text_recall@5"] == pytest.approx(np.mean(hits))
                else:
                    accuracy = (matrix.argmax(axis=1) == task.labels).mean()
                    assert found.zeroshot.tasks[task.name][name] == pytest.approx(accuracy)
        assert list(found.zeroshot.tasks) == ["bright", "colours"]
        for name, mean in found.zeroshot.mean.items():
            both = [found.zeroshot.tasks[task][name] for task in ("bright", "colours")]
            assert mean == pytest.approx(np.mean(both))
        assert list(found.zeroshot.mean) == [*clips, "uniform", "ensemble"]

    def test_the_result_is_kept_whole_and_says_what_it_is_about(
        self, folders: Any, clips: dict[str, Clip], router: Router, tmp_path: Path
    ) -> None:
        folder = folders.classification("two", [0, 1, 1], classes=["red", "green"])
        found = evaluate_tasks(clips, router, [folder], CPU)
        found.save(tmp_path / "metrics.json")
        assert Results.load(tmp_path / "metrics.json") == found
        assert found.details["two"]["ensemble"]["acc5"] is None
        assert found.tasks["two"] == open_task(folder).summary()
        assert found.stand_ins == {}

    def test_an_untrained_expert_is_stood_in_for_by_the_seed(
        self, folders: Any, clips: dict[str, Clip], router: Router
    ) -> None:
        folder = folders.retrieval("captions", 30)
        there = {name: clips[name] for name in ("seed", "expert-0")}
        found = evaluate_tasks(there, router, [folder], CPU)
        as_if = evaluate_tasks({**there, "expert-1": clips["seed"]}, router, [folder], CPU)
        figures, expected = found.retrieval.tasks["captions"], as_if.retrieval.tasks["captions"]
        for name in ("uniform", "ensemble"):
            assert figures[name] == pytest.approx(expected[name])
        assert "expert-1" not in figures
        assert found.stand_ins == {"expert-1": "seed"}
        assert set(found.routing["captions"]) == {"expert-0", "expert-1"}

    def test_no_expert_trained_is_the_seed(self, folders: Any, clips: dict[str, Clip], router: Router) -> None:
        folder = folders.classification("colours", [i % 6 for i in range(12)])
        figures = evaluate_tasks({"seed": clips["seed"]}, router, [folder], CPU).details["colours"]
        assert figures["uniform"] == figures["ensemble"] == figures["seed"]

    def test_every_image_is_routed_by_itself_if_the_clusters_are_of_images(
        self, folders: Any, clips: dict[str, Clip]
    ) -> None:
        """Against loops: weights of each image from the router's own model, for classes and both ways of retrieval."""
        eyes = OpenClipEmbedder(clips["seed"], "seed", view="image", device="cpu")
        seen = [torch.stack([eyes.preprocess.pixels(draw(COLOURS[c], n)) for n in range(8)]) for c in range(6)]
        centres = [eyes.encode_images(pixels).mean(axis=0) for pixels in seen]
        conditions = {"expert-0": np.stack(centres[:2]), "expert-1": np.stack(centres[2:])}
        router = Router(conditions, eyes, RoutingParams(), temperature=0.02)
        tasks = [folders.classification("colours", [i % 6 for i in range(24)]), folders.retrieval("captions", 12)]
        found = evaluate_tasks(clips, router, tasks, CPU)
        for folder in tasks:
            task = open_task(folder)
            cosines = {name: by_hand(clip, task) for name, clip in clips.items()}
            weights = []
            for image in task.images:
                vector = eyes.encode_images(eyes.preprocess.pixels(Image.open(io.BytesIO(image.read())))[None])[0]
                nearest = [min(((vector - c) ** 2).sum() for c in each) for each in conditions.values()]
                odds = np.exp(-np.array(nearest) / 0.02)
                weights.append(odds / odds.sum())
            by_image = np.array(weights)
            assert by_image.std(axis=0).min() > 0.02
            assert list(found.routing[task.name].values()) == pytest.approx(by_image.mean(axis=0), abs=1e-4)
            matrix = by_image[:, :1] * cosines["expert-0"] + by_image[:, 1:] * cosines["expert-1"]
            if task.kind == "classification":
                expected = (matrix.argmax(axis=1) == task.labels).mean()
                assert found.zeroshot.tasks["colours"]["ensemble"] == pytest.approx(expected)
            else:
                figures = found.retrieval.tasks["captions"]["ensemble"]
                hits = [(task.owners[np.argsort(-row)[:5]] == i).any() for i, row in enumerate(matrix)]
                assert figures["text_recall@5"] == pytest.approx(np.mean(hits))
                hits = [task.owners[text] in np.argsort(-column)[:5] for text, column in enumerate(matrix.T)]
                assert figures["image_recall@5"] == pytest.approx(np.mean(hits))
        grown = found.growth.tasks["colours"]
        figures = found.zeroshot.tasks["colours"]
        assert (grown.by_task[0], grown.by_task[2]) == (figures["seed"], figures["ensemble"])
        assert set(figures) == {*clips, "uniform", "ensemble"}

    def test_growth_begins_with_the_seed_and_ends_with_the_ensemble(
        self, folders: Any, clips: dict[str, Clip], router: Router
    ) -> None:
        tasks = [
            folders.classification("colours", [i % 6 for i in range(24)]),
            folders.classification("others", [i % 6 for i in range(12)], seed=1),
            folders.retrieval("captions", 12),
        ]
        found = evaluate_tasks(clips, router, tasks, CPU)
        growth, figures = found.growth, found.zeroshot.tasks
        for task, grown in growth.tasks.items():
            weights = found.routing[task]
            assert [weights[expert] for expert in grown.order] == sorted(weights.values(), reverse=True)
            assert grown.experts == [0, 1, 2]
            # One expert first: as if the other had never been trained.
            missing = grown.order[1]
            without = {name: clip for name, clip in clips.items() if name != missing}
            fewer = evaluate_tasks(without, router, tasks, CPU)
            if task in figures:
                assert grown.by_task[0] == grown.reversed[0] == figures[task]["seed"]
                assert grown.by_task[2] == grown.reversed[2] == figures[task]["ensemble"]
                assert grown.by_task[1] == fewer.zeroshot.tasks[task]["ensemble"]
            else:
                recalls = fewer.retrieval.tasks[task]["ensemble"]
                assert grown.by_task[1] == (recalls["image_recall@10"] + recalls["text_recall@10"]) / 2
        for order in ("by_task", "reversed"):
            curves = [getattr(growth.tasks[task], order) for task in figures]
            means = [(a + b) / 2 for a, b in zip(*curves, strict=True)]
            assert getattr(growth.mean, order) == pytest.approx(means)
        assert "by_task 1" not in figures["colours"]
        experts = {name: clips[name] for name in ("expert-0", "expert-1")}
        assert not evaluate_tasks(experts, router, tasks, CPU).growth.tasks

    def test_one_image_alone_is_no_sign_of_a_model_that_has_learnt_nothing(
        self, folders: Any, clips: dict[str, Clip]
    ) -> None:
        for labels in ([4], [4, 4]):  # the second time another image of the same colour
            folder = folders.classification(f"of-{len(labels)}", labels)
            assert set(evaluate_tasks(clips, None, [folder], CPU).zeroshot.mean) == set(clips)

    def test_without_a_router(self, folders: Any, clips: dict[str, Clip]) -> None:
        found = evaluate_tasks(clips, None, [folders.classification("colours", [0, 1])], CPU)
        assert list(found.zeroshot.mean) == list(clips)
        assert found.routing == {}

    def test_copies_on_all_pairs_are_averaged(self, folders: Any, clips: dict[str, Clip]) -> None:
        """The uniform average of the copies, whatever else is evaluated, and with no router."""
        task = open_task(folders.classification("colours", [0, 1, 2, 3, 4, 5]))
        copies = {"full-expert-0": clips["expert-0"], "full-expert-1": clips["expert-1"]}
        results = evaluate_tasks({"seed": clips["seed"], **copies}, None, [task], CPU)
        mean = sum(by_hand(clip, task) for clip in copies.values()) / 2
        expected = np.mean(mean.argmax(axis=1) == task.labels)
        assert results.zeroshot.tasks["colours"]["uniform-full"] == pytest.approx(expected)
        assert "uniform-full" not in evaluate_tasks({"seed": clips["seed"]}, None, [task], CPU).zeroshot.mean

    def test_a_loaded_model_keeps_its_mode(self, folders: Any, clips: dict[str, Clip]) -> None:
        """Batch normalisation in training mode would make an image's vector depend on its batch."""
        folder = folders.classification("colours", [0, 1, 2, 3])
        plain = evaluate_tasks(clips, None, [folder], CPU)
        clips["seed"].model.train()
        try:
            assert evaluate_tasks(clips, None, [folder], CPU) == plain
            assert clips["seed"].model.training
            assert not clips["expert-0"].model.training
        finally:
            clips["seed"].model.eval()

    def test_models_that_do_not_fit_together_are_opened_in_turn(
        self, folders: Any, clips: dict[str, Clip], router: Router, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The figures are the same, and no two models are open at once."""
        tasks = [folders.classification("colours", [0, 1, 2, 3, 4, 5, 0, 2]), folders.retrieval("captions", 5)]
        models = {name: tmp_path / name for name in clips}
        for name, clip in clips.items():
            save_model(models[name], clip, {})
        by_query = replace(router, routing=RoutingParams())
        together = evaluate_tasks(models, by_query, tasks, CPU)
        opened: list[list[str]] = []

        def opening(folders: dict[str, Path], device: str) -> dict[str, Clip]:
            opened.append([*folders])
            return load_models(folders, device)

        monkeypatch.setattr(evaluate, "load_models", opening)
        monkeypatch.setattr(evaluate, "_groups", lambda models, _: [[name] for name in models])
        in_turn = evaluate_tasks(models, by_query, tasks, CPU)
        assert opened == [[name] for name in clips]
        assert in_turn.routing == together.routing
        expected = together.retrieval.tasks["captions"]
        assert in_turn.zeroshot.tasks["colours"] == pytest.approx(together.zeroshot.tasks["colours"], abs=1e-6)
        for name, figures in in_turn.retrieval.tasks["captions"].items():
            assert figures == pytest.approx(expected[name], abs=1e-6)

    def test_groups_of_models_fit_into_the_memory_they_may_take(self, clips: dict[str, Clip], tmp_path: Path) -> None:
        models: dict[str, Path | Clip] = {}
        for name, size in {"a": 60, "b": 40, "c": 1, "huge": 500, "d": 99}.items():
            models[name] = tmp_path / name
            (tmp_path / name).mkdir()
            (tmp_path / name / "open_clip_model.safetensors").write_bytes(b"." * size)
            (tmp_path / name / "card.json").write_bytes(b"." * 1000)
        models["loaded"] = next(iter(clips.values()))
        assert evaluate._groups(models, 100) == [["a", "b"], ["c"], ["huge"], ["d", "loaded"]]
        assert evaluate._groups(models, 10_000) == [[*models]]

    def test_models_of_different_size_side_by_side(self, folders: Any, clips: dict[str, Clip]) -> None:
        clip = clips["seed"]
        cropped = Clip(clip.model, clip.tokenizer, clip.model_cfg, {**clip.preprocess_cfg, "resize_mode": "longest"})
        folder = folders.classification("colours", [i % 6 for i in range(24)])
        both = evaluate_tasks({"seed": clip, "other": cropped}, None, [folder], CPU).details["colours"]
        alone = evaluate_tasks({"other": cropped}, None, [folder], CPU).details["colours"]
        assert both["other"] == alone["other"]

    def test_bad_input(self, folders: Any, clips: dict[str, Clip], router: Router, tmp_path: Path) -> None:
        folder = folders.classification("colours", [0, 1])
        with pytest.raises(ModeError, match="no model to evaluate"):
            evaluate_tasks({}, None, [folder], CPU)
        with pytest.raises(ModeError, match="a model is called 'uniform'"):
            evaluate_tasks({"uniform": clips["seed"]}, None, [folder], CPU)
        with pytest.raises(ModeError, match="no model for expert-1, nor 'seed'"):
            evaluate_tasks({"expert-0": clips["expert-0"]}, router, [folder], CPU)
        with pytest.raises(ModeError, match="not a model folder"):
            evaluate_tasks({"seed": tmp_path}, None, [folder], CPU)
        with pytest.raises(ModeError, match="device 'abacus'"):
            evaluate_tasks(clips, None, [folder], MachineParams(device="abacus"))
