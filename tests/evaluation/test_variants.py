"""Other ways to use the experts: against the evaluation itself, against sums worked out by hand, and at their ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from mode.clip.model import Clip
from mode.embedding.lsa import LsaEmbedder
from mode.embedding.open_clip import OpenClipEmbedder
from mode.ensemble.model import Ensemble
from mode.ensemble.router import Router
from mode.ensemble.rules import largest_first
from mode.errors import ModeError
from mode.evaluation import features
from mode.evaluation.arms import OF_IMAGES, Arms, range_order
from mode.evaluation.evaluate import evaluate_tasks
from mode.evaluation.features import encode_metadata, encode_tasks
from mode.evaluation.mixtures import Routed
from mode.evaluation.tasks import Task, open_task
from mode.evaluation.variants import _cost_of, evaluate_variants
from mode.params import MachineParams, RoutingParams, parse_arm, parse_params
from mode.results import Cost, Results
from tests.evaluation.conftest import CLASSES, COLOURS, TaskFolders, draw

CPU = MachineParams(device="cpu", inference_batch=16)
CAPTIONS = ["a red spot", "yellow paper", "white photo", "red yellow white", "dark grey photo", "blue spot",
            "green paper", "the dark blue colour", "dark green", "grey and blue"] * 10  # fmt: skip
ARMS = ["top-1", "top-2", "share-0", "share-1", "merged", "merged-1", "merged-2", "merged-uniform", "merged-layers",
        "merged-seed-0", "merged-seed-1", "published", "paper", "coarse", "by-class", "by-range",
        "best-by-label"]  # fmt: skip

#: No arms.
BAD = ["top", "top-0", "top-1.5", "share-2", "share-.5", "merged-seed", "Top-1", "top-1\n", ""]
#: The least that params.yaml may hold.
PARAMS = {"sources": {"base": {"shards": "glyphs"}}, "experts": {}, "model": {"name": "ViT-B-32"}}


@pytest.fixture(scope="module")
def embedder() -> LsaEmbedder:
    return LsaEmbedder.fit(CAPTIONS, 6, 0)


@pytest.fixture(scope="module")
def router(embedder: LsaEmbedder) -> Router:
    """Experts for bright and dark colours, each by query, with images for merged models."""
    conditions = {
        "expert-0": embedder.encode(["red", "yellow white"]),
        "expert-1": embedder.encode(["blue", "dark grey", "green"]),
    }
    random = np.random.default_rng(0)
    kept = {name: random.integers(0, 255, (40, 3, 32, 32), dtype=np.uint8) for name in conditions}
    return replace(Router.fit(conditions, embedder, RoutingParams(), CAPTIONS, 0), images=kept)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    folders = TaskFolders(tmp_path_factory.mktemp("tasks"))
    return [
        open_task(folders.classification("colours", [i % 6 for i in range(36)])),
        open_task(folders.retrieval("captions", 24)),
        open_task(folders.classification("others", [i % 3 for i in range(21)], classes=["blue", "green", "red"])),
    ]


@pytest.fixture(scope="module")
def plain(clips: dict[str, Clip], router: Router, tasks: list[Task]) -> Results:
    """What `evaluate` says of the same."""
    return evaluate_tasks(clips, router, tasks, CPU)


@pytest.fixture(scope="module")
def found(clips: dict[str, Clip], router: Router, tasks: list[Task]) -> Results:
    """All arms, each with both kinds of tasks."""
    costs = {"seed": Cost(samples_seen=10), "expert-0": Cost(samples_seen=15), "expert-1": Cost(samples_seen=17)}
    return evaluate_variants(clips, router, tasks, CPU, ARMS, CAPTIONS, 0, costs, pairs())


def pairs() -> list[tuple[Tensor, list[str]]]:
    """Training pairs: coloured pictures that their captions name, in two batches."""
    pictures = [np.array(draw(COLOURS[number % 6], number, (32, 32))) for number in range(24)]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    captions = [f"a {CLASSES[number % 6]} photo" for number in range(24)]
    return [(images[:12], captions[:12]), (images[12:], captions[12:])]


def figures(results: Results, name: str) -> dict[str, Mapping[str, Any]]:
    """Task -> figures of one model."""
    return {task: models[name] for task, models in {**results.details, **results.retrieval.tasks}.items()}


def same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return {task: dict(each) for task, each in found.items()} == {task: dict(each) for task, each in expected.items()}


@pytest.mark.parametrize("arm", ["top-2", "share-1", "by-range-2"])
def test_all_experts_are_the_ensemble(found: Results, plain: Results, arm: str) -> None:
    assert same(figures(found, arm), figures(plain, "ensemble"))
    assert found.encoders[arm] == 2


@pytest.mark.parametrize("protocol", ["together", "query", "paper"])
def test_all_experts_are_the_ensemble_by_every_protocol_of_retrieval(
    clips: dict[str, Clip], router: Router, tasks: list[Task], protocol: Literal["together", "query", "paper"]
) -> None:
    routing = router.routing.model_copy(update={"retrieval": protocol})
    routed, captions = replace(router, routing=routing), [task for task in tasks if task.kind == "retrieval"]
    found = evaluate_variants(clips, routed, captions, CPU, ["top-2"], CAPTIONS, 0)
    assert same(figures(found, "top-2"), figures(evaluate_tasks(clips, routed, captions, CPU), "ensemble"))


@pytest.mark.parametrize("arm", ["top-1", "share-0", "merged-1"])
def test_one_expert_is_the_one_of_most_weight(found: Results, plain: Results, arm: str) -> None:
    first = {task: largest_first(weights)[0] for task, weights in plain.routing.items()}
    assert same(figures(found, arm), {task: figures(plain, expert)[task] for task, expert in first.items()})
    assert found.encoders[arm] == 1


def test_fewer_experts_weigh_a_text_among_themselves() -> None:
    routed = Routed(
        {"a": 0.5, "b": 0.3, "c": 0.2},
        {"a": np.array([0.6, 0.0]), "b": np.array([0.2, 0.0]), "c": np.array([0.2, 1.0])},
    ).among({"a": 0.625, "b": 0.375, "c": 0.0})
    assert routed.texts is not None
    # The second text is the third expert's alone: the others weigh it as they weigh the task.
    expected = {"a": [0.75, 0.625], "b": [0.25, 0.375], "c": [0.0, 0.0]}
    assert {expert: each.round(9).tolist() for expert, each in routed.texts.items()} == expected


def test_merged_is_what_adapt_merges(found: Results, clips: dict[str, Clip], router: Router, tasks: list[Task]) -> None:
    ensemble = Ensemble(router, {name: clips[name] for name in router.experts}, "cpu")
    for task in tasks:
        if task.kind == "classification":
            adapted = ensemble.adapt(task.classes, task.templates, merge="weights")
            scores = adapted.scores([image.read() for image in task.images]).numpy()
            assert found.zeroshot.tasks[task.name]["merged"] == pytest.approx(
                (scores.argmax(axis=1) == task.labels).mean()
            )
    for arm in ("merged-seed-0", "merged-2"):
        assert same(figures(found, arm), figures(found, "merged"))
    assert found.encoders["merged"] == found.encoders["merged-uniform"] == 1


def test_merged_with_all_of_the_seed_is_the_seed(found: Results, plain: Results) -> None:
    assert same(figures(found, "merged-seed-1"), figures(plain, "seed"))


def test_one_merge_for_all_tasks_is_that_of_equal_weights(
    found: Results, clips: dict[str, Clip], router: Router, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Router, "weights", lambda self, _: dict.fromkeys(self.experts, 1 / 2))
    merged = evaluate_variants(clips, router, tasks, CPU, ["merged"])
    assert same(figures(found, "merged-uniform"), figures(merged, "merged"))


@pytest.mark.parametrize("kind", ["published", "paper"])
def test_another_rule_is_an_ensemble_by_it(
    found: Results, clips: dict[str, Clip], router: Router, tasks: list[Task], kind: Any
) -> None:
    other = replace(router, routing=RoutingParams(kind=kind))
    assert same(figures(found, kind), figures(evaluate_tasks(clips, other, tasks, CPU), "ensemble"))


class TestCoarse:
    def test_the_centre_of_the_fine_centres_stands_for_them(
        self, found: Results, clips: dict[str, Clip], router: Router, tasks: list[Task], embedder: LsaEmbedder
    ) -> None:
        centres = {expert: fine.mean(axis=0)[None] for expert, fine in router.conditions.items()}
        other = Router.fit(centres, embedder, RoutingParams(), CAPTIONS, 0)
        assert same(figures(found, "coarse"), figures(evaluate_tasks(clips, other, tasks, CPU), "ensemble"))

    def test_with_one_fine_centre_each_it_is_the_ensemble(
        self, clips: dict[str, Clip], tasks: list[Task], embedder: LsaEmbedder
    ) -> None:
        single = {"expert-0": embedder.encode(["red"]), "expert-1": embedder.encode(["blue"])}
        router = Router.fit(single, embedder, RoutingParams(), CAPTIONS, 5)
        coarse = evaluate_variants(clips, router, tasks, CPU, ["coarse"], CAPTIONS, 5)
        assert same(figures(coarse, "coarse"), figures(evaluate_tasks(clips, router, tasks, CPU), "ensemble"))


def test_each_class_weighs_the_experts_by_itself(
    found: Results, clips: dict[str, Clip], router: Router, tasks: list[Task]
) -> None:
    experts = {name: clips[name] for name in router.experts}
    texts = encode_metadata(tasks, experts, batch_size=50, device="cpu")
    encoded = encode_tasks(tasks, experts, batch_size=50, workers=1, device="cpu")
    for number, (task, images) in enumerate(encoded):
        weights = router.class_weights(task.prompts)
        scores = sum(weights[name] * (images[name] @ texts[name][number].T).numpy() for name in experts)
        if task.kind == "classification":
            accuracy = (scores.argmax(axis=1) == task.labels).mean()
            assert found.zeroshot.tasks[task.name]["by-class"] == pytest.approx(accuracy)
        else:
            best = [scores[:, text].argmax() for text in range(len(task.texts))]
            recall = found.retrieval.tasks[task.name]["by-class"]
            assert recall["image_recall@1"] == pytest.approx((np.array(best) == task.owners).mean())
            owners = task.owners[scores.argmax(axis=1)]
            assert recall["text_recall@1"] == pytest.approx((owners == np.arange(len(owners))).mean())
    assert found.encoders["by-class"] == 2


def test_what_trainings_cost_together_is_not_known_if_that_of_one_is_not() -> None:
    known = {"seed": Cost(samples_seen=10), "expert-0": Cost(samples_seen=15), "expert-1": Cost(samples_seen=17)}
    assert _cost_of(known, [["expert-0", "expert-1"]]) == Cost(samples_seen=22)
    assert _cost_of(known, [["seed", "expert-0", "expert-1"]]) == Cost(samples_seen=22)
    assert _cost_of(known, [["expert-0", "expert-2"]]) == Cost()  # and not what the first alone has cost


def test_the_widest_clusters_come_first() -> None:
    wide, narrow = np.array([[0.0, 0.0], [0.0, 4.0]]), np.array([[9.0, 0.0], [9.0, 1.0], [9.0, 2.0]])
    assert range_order({"narrow": narrow, "one": wide[:1], "wide": wide, "two": narrow}) == [
        "wide", "narrow", "two", "one"
    ]  # fmt: skip


def test_the_seed_answers_for_the_narrower_clusters(
    found: Results, clips: dict[str, Clip], router: Router, tasks: list[Task]
) -> None:
    widest = range_order(router.conditions)[0]
    fewer = evaluate_tasks({name: clips[name] for name in ("seed", widest)}, router, tasks, CPU)
    assert same(figures(found, "by-range-1"), figures(fewer, "ensemble"))
    assert found.encoders["by-range-1"] == 2
    assert found.cost["by-range-1"].samples_seen == {"expert-0": 15, "expert-1": 17}[widest]
    assert found.cost["by-range-2"].samples_seen == found.cost["merged"].samples_seen == 22


def test_the_best_by_label_is_the_best(found: Results, plain: Results) -> None:
    for task, models in plain.zeroshot.tasks.items():
        assert found.zeroshot.tasks[task]["best-by-label"] == max(models["expert-0"], models["expert-1"])


def test_rows_are_in_the_order_of_the_arms_and_means_are_means(found: Results, tasks: list[Task]) -> None:
    rows = [row for arm in ARMS for row in (["by-range-1", "by-range-2"] if arm == "by-range" else [arm])]
    assert list(found.zeroshot.mean) == list(found.encoders) == list(found.cost) == rows
    assert list(found.retrieval.tasks["captions"]) == rows
    for name, mean in found.zeroshot.mean.items():
        both = [found.zeroshot.tasks[task][name] for task in ("colours", "others")]
        assert mean == pytest.approx(np.mean(both))
    assert found.tasks == {task.name: task.summary() for task in tasks}


def test_an_image_is_decoded_once_and_the_file_is_kept_whole(
    clips: dict[str, Clip], router: Router, tasks: list[Task], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decoded: list[int] = []
    once = features.decode
    monkeypatch.setattr(features, "decode", lambda content: decoded.append(len(content)) or once(content))
    results = evaluate_variants(clips, router, tasks, CPU, ["top-1", "merged", "by-range"])
    assert sorted(decoded) == sorted(image.size for task in tasks for image in task.images)
    results.save(tmp_path / "variants.json")
    assert Results.load(tmp_path / "variants.json") == results


def test_an_untrained_expert_is_stood_in_for(clips: dict[str, Clip], router: Router, tasks: list[Task]) -> None:
    there = {name: clips[name] for name in ("seed", "expert-1")}
    found = evaluate_variants(there, router, tasks, CPU, ["top-2", "merged-seed-0", "by-range"])
    plain = evaluate_tasks(there, router, tasks, CPU)
    assert same(figures(found, "top-2"), figures(plain, "ensemble"))
    assert same(figures(found, "by-range-2"), figures(plain, "ensemble"))


def test_layers_of_experts_that_are_one_are_that_expert(
    clips: dict[str, Clip], router: Router, tasks: list[Task]
) -> None:
    """Whatever is learned, a mean of the same is the same; and it is one model for all tasks."""
    twins = {"expert-0": clips["expert-0"], "expert-1": clips["expert-0"]}
    found = evaluate_variants(twins, router, tasks, CPU, ["merged-layers", "merged-uniform"], pairs=pairs())
    assert same(figures(found, "merged-layers"), figures(found, "merged-uniform"))
    assert found.encoders["merged-layers"] == 1


class TestARouterOfImages:
    @pytest.fixture
    def by_image(self, clips: dict[str, Clip]) -> Router:
        eyes = OpenClipEmbedder(clips["seed"], "seed", view="image", device="cpu")
        seen = [eyes.encode_images(eyes.preprocess.pixels(draw(COLOURS[c], 0))[None]) for c in range(6)]
        conditions = {"expert-0": np.concatenate(seen[:2]), "expert-1": np.concatenate(seen[2:])}
        return Router(conditions, eyes, RoutingParams(), temperature=0.02)

    def test_weighs_by_image_and_knows_the_best(
        self, clips: dict[str, Clip], by_image: Router, tasks: list[Task]
    ) -> None:
        widest = range_order(by_image.conditions)[0]
        plain = evaluate_tasks(clips, by_image, tasks, CPU)
        fewer = evaluate_tasks({name: clips[name] for name in ("seed", widest)}, by_image, tasks, CPU)
        found = evaluate_variants(clips, by_image, tasks, CPU, ["by-range", "best-by-label", "probe"])
        assert same(figures(found, "by-range-1"), figures(fewer, "ensemble"))
        assert same(figures(found, "by-range-2"), figures(plain, "ensemble"))
        for task, models in plain.zeroshot.tasks.items():
            assert found.zeroshot.tasks[task]["best-by-label"] == max(models["expert-0"], models["expert-1"])
        # The router looks at an image as well.
        assert [found.encoders[row] for row in ("by-range-1", "by-range-2", "best-by-label")] == [3, 3, 1]
        assert "probe zero-shot concatenated" in found.zeroshot.mean

    @pytest.mark.parametrize("arm", [arm for arm in ARMS if parse_arm(arm).kind not in OF_IMAGES])
    def test_has_no_words_for_other_arms(
        self, clips: dict[str, Clip], by_image: Router, tasks: list[Task], arm: str
    ) -> None:
        with pytest.raises(ModeError, match=f"arms: {arm}: experts weighed by each image have no words"):
            evaluate_variants(clips, by_image, tasks, CPU, ["by-range", arm])


class TestBadInput:
    def test_layers_learn_from_pairs(self, clips: dict[str, Clip], router: Router, tasks: list[Task]) -> None:
        with pytest.raises(ModeError, match="there is no pair to learn a soup's weights on"):
            evaluate_variants(clips, router, tasks, CPU, ["merged-layers"])

    @pytest.mark.parametrize("arm", BAD)
    def test_an_unknown_arm_is_one_line(self, arm: str) -> None:
        with pytest.raises(ModeError, match=r"no arm is called .*there are: top-N, share-X, merged,") as said:
            parse_params(PARAMS | {"variants": {"arms": [arm]}})
        assert "\n" not in str(said.value)

    def test_an_arm_is_named_once(self) -> None:
        with pytest.raises(ModeError, match=r"variants\.arms: 'top-1' is named twice"):
            parse_params(PARAMS | {"variants": {"arms": ["top-1", "coarse", "top-1"]}})

    def test_the_seed_is_missing(self, clips: dict[str, Clip], router: Router, tasks: list[Task]) -> None:
        experts = {name: clips[name] for name in router.experts}
        for arm in ("by-range", "merged-seed-0.5"):
            with pytest.raises(ModeError, match=f"variants.arms: '{arm}' needs the seed"):
                evaluate_variants(experts, router, tasks, CPU, [arm])
        assert evaluate_variants(experts, router, tasks, CPU, ["top-1"]).zeroshot.mean

    def test_a_rule_without_class_weights(self, clips: dict[str, Clip], router: Router, tasks: list[Task]) -> None:
        published = replace(router, routing=RoutingParams(kind="published"), temperature=None)
        with pytest.raises(ModeError, match=r"'by-class' needs routing\.kind 'calibrated' or 'evidence', not 'publ"):
            evaluate_variants(clips, published, tasks, CPU, ["by-class"])

    def test_evidence_weighs_classes_and_has_no_centres(self, router: Router) -> None:
        evidence = replace(router, routing=RoutingParams(kind="evidence"), temperature=None)
        assert Arms(["by-class"], evidence, router.experts, (), 0).variants == {"by-class": [[*router.experts]]}
        with pytest.raises(ModeError, match=r"^variants\.arms: 'coarse' needs [^\n]*, not 'evidence' \(leave"):
            Arms(["coarse"], evidence, router.experts, (), 0)

    def test_a_model_with_the_name_of_a_variant(
        self, clips: dict[str, Clip], router: Router, tasks: list[Task]
    ) -> None:
        with pytest.raises(ModeError, match="a model is called 'top-1', which names a variant"):
            evaluate_variants({**clips, "top-1": clips["seed"]}, router, tasks, CPU, ["top-1"])
