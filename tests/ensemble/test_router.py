"""The router: metadata vectors, stand-ins, combination, calibration on captions, and the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mode.checksums import write_manifest
from mode.embedding.lsa import LsaEmbedder
from mode.ensemble.combine import combine
from mode.ensemble.evidence import Captions
from mode.ensemble.router import Router, class_vectors, images_to_keep
from mode.ensemble.rules import class_distances, published_weights
from mode.errors import ModeError
from mode.params import RoutingParams

ANIMALS = ["dog", "cat", "horse", "cow", "sheep", "bird", "fish", "lion"]
TOOLS = ["hammer", "saw", "drill", "pliers", "wrench", "file", "chisel", "screw"]
KINDS = ["calibrated", "evidence", "published", "paper"]
SHARED = ["red", "small", "old", "shiny"]


def make_captions(count: int = 600) -> list[str]:
    """Two domains that share a few words; a caption has three words of its domain and two shared ones."""
    random = np.random.default_rng(0)
    captions = []
    for number in range(count):
        domain = ANIMALS if number % 2 else TOOLS
        captions.append(" ".join([*random.choice(domain, 3), *random.choice(SHARED, 2)]))
    return captions


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return make_captions()


@pytest.fixture(scope="module")
def embedder(captions: list[str]) -> LsaEmbedder:
    return LsaEmbedder.fit(captions, 8, 0)


@pytest.fixture(scope="module")
def conditions(embedder: LsaEmbedder) -> dict[str, np.ndarray]:
    """One source's two experts."""
    return {
        "animals": embedder.encode(["dog cat horse", "bird fish lion", "cow sheep dog"]),
        "tools": embedder.encode(["hammer saw drill", "pliers wrench file"]),
    }


@pytest.fixture(scope="module")
def router(conditions: dict[str, np.ndarray], embedder: LsaEmbedder, captions: list[str]) -> Router:
    return Router.fit(conditions, embedder, RoutingParams(), captions, random_seed=0)


@pytest.fixture(scope="module")
def evidence(embedder: LsaEmbedder, captions: list[str]) -> dict[str, Captions]:
    """The captions of each expert's domain, and one that says nothing."""
    parts = {"animals": [*captions[1::2], "zyxgfq"], "tools": captions[0::2]}
    return {name: Captions(each, embedder.encode(each)) for name, each in parts.items()}


@pytest.fixture(scope="module")
def by_evidence(conditions: dict[str, np.ndarray], embedder: LsaEmbedder, evidence: dict[str, Captions]) -> Router:
    return Router.fit(conditions, embedder, RoutingParams(kind="evidence"), [], 0, evidence)


RouterOf = Callable[[RoutingParams], Router]


@pytest.fixture(scope="module")
def router_of(
    conditions: dict[str, np.ndarray], embedder: LsaEmbedder, captions: list[str], evidence: dict[str, Captions]
) -> RouterOf:
    """A router by any rule."""
    return lambda routing: Router.fit(conditions, embedder, routing, captions, 0, evidence)


class TestWeights:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_task_of_one_domain_goes_to_its_expert(self, router_of: RouterOf, kind: str) -> None:
        router = router_of(RoutingParams(kind=kind))  # type: ignore[arg-type]
        animals = router.weights([[f"a {name}", f"the small {name}"] for name in ANIMALS])
        tools = router.weights([[f"a {name}"] for name in TOOLS])
        assert animals["animals"] > 0.5 > tools["animals"]
        assert sum(animals.values()) == pytest.approx(1)

    def test_calibrated_is_surer_than_published(self, router: Router, embedder: LsaEmbedder) -> None:
        metadata = [[name] for name in ANIMALS]
        published = published_weights(class_distances(class_vectors(embedder, metadata), router.conditions))
        assert router.weights(metadata)["animals"] > published["animals"]

    def test_classes_without_a_known_word_are_left_out(self, router: Router) -> None:
        known = [["dog"], ["hammer"], ["cat"]]
        assert router.weights([*known, ["zyxgfq"], ["qqq", "vvv"]]) == pytest.approx(router.weights(known))
        assert router.weights([["zyxgfq"]]) == {"animals": 0.5, "tools": 0.5}
        assert router.weights([]) == {"animals": 0.5, "tools": 0.5}

    def test_the_temperature_is_inside_the_search(self, router: Router) -> None:
        """Neither certain nor indifferent: a caption without its telling words leaves a doubt, but seldom."""
        assert router.temperature is not None
        assert 0.01 < router.temperature < 10  # squared distances between unit vectors are 0 to 4
        assert 0.1 < router.weights([["red"]])["animals"] < 0.9
        assert router.weights([["dog"]])["animals"] > 0.8

    def test_an_expert_of_another_source_joins(
        self, router: Router, embedder: LsaEmbedder, captions: list[str]
    ) -> None:
        """A second source overlaps in its words: old conditions stay as they are, weights go by name."""
        joined = {**router.conditions, "zoo": embedder.encode(["lion", "lion fish"])}
        larger = Router.fit(joined, embedder, RoutingParams(), captions, random_seed=0)
        weights = larger.weights([["lion"]])
        assert max(weights, key=weights.__getitem__) == "zoo"
        assert list(weights) == ["animals", "tools", "zoo"]

    def test_the_same_seed_gives_the_same_temperature(
        self, router: Router, embedder: LsaEmbedder, captions: list[str]
    ) -> None:
        again = Router.fit(router.conditions, embedder, RoutingParams(), captions, random_seed=0)
        other = Router.fit(router.conditions, embedder, RoutingParams(), captions, random_seed=1)
        assert again.temperature == router.temperature != other.temperature

    @pytest.mark.parametrize("kind", ["calibrated", "published", "paper"])
    def test_a_text_by_itself_is_a_task_of_one_class(
        self, conditions: dict[str, np.ndarray], embedder: LsaEmbedder, captions: list[str], kind: str
    ) -> None:
        routing = RoutingParams(kind=kind, divisor=0.5, bandwidth=0.3)  # type: ignore[arg-type]
        router = Router.fit(conditions, embedder, routing, captions, random_seed=0)
        texts = ["a red dog", "zyxgfq", "hammer and saw", "red", "dog", "", *captions[:40]]
        found = router.text_weights(texts)
        assert list(found) == ["animals", "tools"]
        for number, text in enumerate(texts):
            assert {name: weights[number] for name, weights in found.items()} == pytest.approx(router.weights([[text]]))
        assert found["animals"][4] > 0.5 > found["animals"][2]
        assert found["animals"][1] == found["tools"][5] == 0.5

    def test_without_a_temperature(self, conditions: dict[str, np.ndarray], embedder: LsaEmbedder) -> None:
        for ask in (lambda router: router.weights([["dog"]]), lambda router: router.text_weights(["dog"])):
            with pytest.raises(ModeError, match="the router is not calibrated"):
                ask(Router(conditions, embedder, RoutingParams()))


def test_class_vectors_average_unit_vectors_and_normalise(embedder: LsaEmbedder) -> None:
    prompts = ["a red dog", "dog"]
    mean = embedder.encode(prompts).mean(axis=0)
    vectors = class_vectors(embedder, [prompts, ["hammer"], ["zyxgfq"]])
    np.testing.assert_allclose(vectors[0], mean / np.linalg.norm(mean), rtol=1e-5)
    np.testing.assert_allclose(vectors[1], embedder.encode(["hammer"])[0], rtol=1e-5)
    assert not vectors[2].any()


def test_class_vectors_of_more_prompts_than_a_block(embedder: LsaEmbedder) -> None:
    prompts = [["dog", "cat"], ["saw"] * 4095, ["hammer", "saw"]]
    vectors = class_vectors(embedder, prompts)
    np.testing.assert_allclose(vectors[1], embedder.encode(["saw"])[0], atol=1e-4)
    np.testing.assert_allclose(vectors[2], class_vectors(embedder, [["hammer", "saw"]])[0], atol=1e-6)


class TestMembers:
    def test_an_untrained_expert_is_stood_in_for_by_the_seed(self, router: Router) -> None:
        assert router.members(["seed", "dense", "tools"]) == {"animals": "seed", "tools": "tools"}

    def test_all_trained_needs_no_seed(self, router: Router) -> None:
        assert router.members(["tools", "animals"]) == {"animals": "animals", "tools": "tools"}

    def test_an_earlier_version_comes_before_the_seed(self, router: Router, tmp_path: Path) -> None:
        """The latest of those that are there; a saved router knows them, too."""
        replace(router, earlier={"animals": ["animals-v2", "animals-v1"]}).save(tmp_path / "router")
        saved = Router.load(tmp_path / "router")
        assert saved.members(["seed", "tools", "animals-v1"])["animals"] == "animals-v1"
        assert saved.members(["tools", "animals-v1", "animals-v2"])["animals"] == "animals-v2"
        assert saved.members(["seed", "tools"])["animals"] == "seed"
        assert saved.members(["tools", "animals", "animals-v2"])["animals"] == "animals"

    def test_earlier_versions_that_are_no_names_are_damage(self, router: Router, tmp_path: Path) -> None:
        router.save(tmp_path / "router")
        file = tmp_path / "router/ensemble.json"
        for earlier in ([], {"animals": "seed"}, {"animals": [1]}):
            file.write_text(json.dumps({**json.loads(file.read_text()), "earlier": earlier}))
            (tmp_path / "router/SHA256SUMS").unlink(missing_ok=True)
            with pytest.raises(ModeError, match="damaged ensemble: earlier versions of experts that are no names"):
                Router.load(tmp_path / "router")

    def test_neither_expert_nor_seed(self, router: Router) -> None:
        with pytest.raises(ModeError, match=r"no model for animals, nor 'seed'.*there are: dense, tools"):
            router.members(["dense", "tools"])


def test_combine_by_hand() -> None:
    scores = {"a": np.array([[1.0, 0.0]]), "b": np.array([[0.0, 2.0]])}
    np.testing.assert_allclose(combine(scores, {"a": 0.75, "b": 0.25}), [[0.75, 0.5]])
    np.testing.assert_allclose(combine({"a": scores["a"]}, {"a": 1.0, "b": 0.0}), scores["a"])


class TestFolder:
    @pytest.mark.parametrize("kind", KINDS)
    def test_round_trip(self, router_of: RouterOf, kind: str, tmp_path: Path) -> None:
        routing = RoutingParams(kind=kind, divisor=2.0, bandwidth=0.7)  # type: ignore[arg-type]
        saved = router_of(routing)
        saved.save(tmp_path / "ensemble")
        saved.save(tmp_path / "ensemble")  # replaces
        loaded = Router.load(tmp_path / "ensemble")
        metadata = [["a dog"], ["a saw", "one saw"]]
        assert loaded.weights(metadata) == pytest.approx(saved.weights(metadata))
        assert loaded.experts == saved.experts
        assert loaded.routing == routing
        assert (tmp_path / "ensemble/evidence.safetensors").is_file() == (kind == "evidence")

    def test_a_folder_from_before_evidence_is_read(self, router: Router, tmp_path: Path) -> None:
        router.save(tmp_path / "e")
        description = json.loads((tmp_path / "e/ensemble.json").read_text())
        del description["routing"]["evidence_captions"]
        (tmp_path / "e/ensemble.json").write_text(json.dumps(description))
        write_manifest(tmp_path / "e")
        assert Router.load(tmp_path / "e").weights([["dog"]]) == router.weights([["dog"]])

    @pytest.mark.parametrize("name", ["evidence.safetensors", "evidence.json"])
    def test_evidence_that_is_missing(self, by_evidence: Router, name: str, tmp_path: Path) -> None:
        by_evidence.save(tmp_path / "e")
        (tmp_path / "e" / name).unlink()
        with pytest.raises(ModeError, match=rf"no saved ensemble: {name} is missing \(`dvc repro ensemble`"):
            Router.load(tmp_path / "e")

    @pytest.mark.parametrize("wrong", ["an expert less", "dimensions", "empty", "no numbers", "too large"])
    def test_vectors_that_save_never_writes(self, by_evidence: Router, wrong: str, tmp_path: Path) -> None:
        assert by_evidence.evidence is not None
        by_evidence.save(tmp_path / "e")
        tensors = {name: np.array(each) for name, each in by_evidence.evidence.vectors.items()}
        if wrong == "an expert less":
            del tensors["tools"]
        elif wrong == "dimensions":
            tensors["tools"] = tensors["tools"][:, :-1].copy()
        elif wrong == "empty":
            tensors["tools"] = tensors["tools"][:0]
        else:
            tensors["tools"][0, 0] = np.nan if wrong == "no numbers" else 7
        save_file(tensors, tmp_path / "e/evidence.safetensors")
        write_manifest(tmp_path / "e")
        with pytest.raises(ModeError, match=r"damaged ensemble: .*tools"):
            Router.load(tmp_path / "e")

    @pytest.mark.parametrize(
        "wrong",
        [
            {"words": ["dog", "dog"], "counts": [[1, 1], [1, 1]]},
            {"words": [3], "counts": [[1], [1]]},
            {"counts": [[1]]},
            {"words": ["dog"], "counts": [[1], [10_000]]},
            {"words": ["dog"], "counts": [[-1], [0]]},
            {"sizes": [0, 300]},
            {"sizes": [300]},
            {"temperature": 0},
            {"temperature": "warm"},
            {"factors": [1]},
            {"factors": [1, -1]},
            {"factors": [1, float("nan")]},
        ],
    )
    def test_words_that_save_never_writes(self, by_evidence: Router, wrong: dict[str, object], tmp_path: Path) -> None:
        by_evidence.save(tmp_path / "e")
        path = tmp_path / "e/evidence.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
        write_manifest(tmp_path / "e")
        with pytest.raises(ModeError, match=r"damaged ensemble: "):
            Router.load(tmp_path / "e")

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (
                {"tools": np.zeros((2, 7), np.float32)},
                r"condition of expert 'tools': shape \(2, 7\), not \[centres, 8\]",
            ),
            ({"tools": np.zeros((0, 8), np.float32)}, r"condition of expert 'tools': shape \(0, 8\)"),
            ({"tools": np.zeros((2, 8), np.int64)}, "damaged ensemble: condition of expert 'tools': int64"),
            ({"tools": np.full((2, 8), np.nan, np.float32)}, "damaged ensemble: condition of expert 'tools': .*finite"),
        ],
    )
    def test_conditions_that_save_never_writes(
        self, router: Router, wrong: dict[str, np.ndarray], message: str, tmp_path: Path
    ) -> None:
        router.save(tmp_path / "e")
        save_file({**router.conditions, **wrong}, tmp_path / "e/conditions.safetensors")
        write_manifest(tmp_path / "e")
        with pytest.raises(ModeError, match=message):
            Router.load(tmp_path / "e")

    @pytest.mark.parametrize("temperature", ["warm", 0, -1.0, float("nan"), float("inf"), [0.1]])
    def test_temperatures_that_save_never_writes(self, router: Router, temperature: object, tmp_path: Path) -> None:
        router.save(tmp_path / "e")
        path = tmp_path / "e/ensemble.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": temperature}))
        write_manifest(tmp_path / "e")
        with pytest.raises(ModeError, match=r"damaged ensemble: temperature"):
            Router.load(tmp_path / "e")

    @pytest.mark.parametrize("shape", [(2, 8, 8), (2, 1, 8, 8)])
    def test_images_that_save_never_writes(self, router: Router, shape: tuple[int, ...], tmp_path: Path) -> None:
        replace(router, images={"tools": np.zeros(shape, np.uint8)}).save(tmp_path / "e")
        with pytest.raises(ModeError, match=r"damaged ensemble: images of expert 'tools': uint8"):
            Router.load(tmp_path / "e")

    def test_the_order_of_experts_stays(self, embedder: LsaEmbedder, captions: list[str], tmp_path: Path) -> None:
        """Safetensors sorts its names; the list in ensemble.json has the order."""
        names = ["z", "a", "m"]
        conditions = {name: embedder.encode([word]) for name, word in zip(names, ANIMALS, strict=False)}
        Router.fit(conditions, embedder, RoutingParams(), captions, random_seed=0).save(tmp_path / "e")
        assert list(Router.load(tmp_path / "e").experts) == names

    def test_missing_damaged_and_newer_folders(self, router: Router, tmp_path: Path) -> None:
        with pytest.raises(ModeError, match="no saved ensemble"):
            Router.load(tmp_path / "nowhere")
        router.save(tmp_path / "e")

        shutil.copytree(tmp_path / "e", tmp_path / "cut")
        (tmp_path / "cut" / "conditions.safetensors").write_bytes(b"\x10")
        with pytest.raises(ModeError, match=r"conditions.safetensors: damaged"):
            Router.load(tmp_path / "cut")
        (tmp_path / "cut" / "SHA256SUMS").unlink()  # as an older version wrote it
        with pytest.raises(ModeError, match="damaged ensemble"):
            Router.load(tmp_path / "cut")

        description = json.loads((tmp_path / "e" / "ensemble.json").read_text())
        (tmp_path / "e" / "ensemble.json").write_text(json.dumps({**description, "format": 99}))
        write_manifest(tmp_path / "e")
        with pytest.raises(ModeError, match="format 99"):
            Router.load(tmp_path / "e")
        (tmp_path / "e" / "ensemble.json").write_text("{")
        write_manifest(tmp_path / "e")
        with pytest.raises(ModeError, match="damaged ensemble"):
            Router.load(tmp_path / "e")


class TestEvidence:
    def test_words_that_both_know_go_where_most_captions_use_them(
        self, conditions: dict[str, np.ndarray], embedder: LsaEmbedder, captions: list[str]
    ) -> None:
        """An expert that comes later has no word of its own; the old ones know them all, but seldom use some."""
        later = [f"{name} old" for name in ("lion", "fish") for _ in range(60)]
        parts = {"animals": captions[1::2], "tools": captions[0::2], "zoo": later}
        evidence = {name: Captions(each, embedder.encode(each)) for name, each in parts.items()}
        joined = {**conditions, "zoo": embedder.encode(["lion old"])}
        task = [["a lion"], ["a fish"]]
        weigh = {
            kind: Router.fit(joined, embedder, RoutingParams(kind=kind), captions, 0, evidence).weights(task)["zoo"]  # type: ignore[arg-type]
            for kind in ("calibrated", "evidence")
        }
        assert weigh["evidence"] > weigh["calibrated"]

    def test_by_text(self, by_evidence: Router) -> None:
        texts = ["dog", "hammer", "zyxgfq"]
        found = by_evidence.text_weights(texts)
        np.testing.assert_allclose(found["animals"] + found["tools"], 1)
        assert found["animals"][0] > 0.5 > found["animals"][1]
        assert found["animals"][2] == 0.5
        assert by_evidence.weights([["dog"]]) == pytest.approx({name: each[0] for name, each in found.items()})
        assert by_evidence.routing.by_query

    def test_captions_that_say_nothing_are_not_kept(self, by_evidence: Router) -> None:
        assert by_evidence.evidence is not None
        assert by_evidence.evidence.sizes.tolist() == [300, 300]
        kept = by_evidence.evidence.vectors.values()
        assert [(len(each), each.dtype.name) for each in kept] == [(300, "float16"), (300, "float16")]

    def test_a_domain_whose_words_the_embedder_never_saw(
        self, conditions: dict[str, np.ndarray], embedder: LsaEmbedder, captions: list[str]
    ) -> None:
        """To the vectors its classes are their template; its expert's captions use the words."""
        names = ["avocado", "leek", "mango"]
        later = [f"{names[number % 3]} old" for number in range(60)]
        parts = {"animals": captions[1::2], "tools": captions[0::2], "grocery": later}
        evidence = {name: Captions(each, embedder.encode(each)) for name, each in parts.items()}
        joined = {**conditions, "grocery": embedder.encode(["small old"])}
        router = Router.fit(joined, embedder, RoutingParams(kind="evidence"), [], 0, evidence)
        task = [[name, f"a red {name}"] for name in names]
        blind = Router.fit(joined, embedder, RoutingParams(), captions, 0)
        assert router.weights(task)["grocery"] > 0.7 > blind.weights(task)["grocery"]
        assert router.weights([["mango"]])["grocery"] > 0.7  # no word that the embedder knows
        assert router.text_weights(["mango"])["grocery"][0] == pytest.approx(router.weights([["mango"]])["grocery"])

    def test_the_seed_decides(
        self, conditions: dict[str, np.ndarray], embedder: LsaEmbedder, evidence: dict[str, Captions]
    ) -> None:
        routing = RoutingParams(kind="evidence", calibration_captions=100)
        fitted = [Router.fit(conditions, embedder, routing, [], seed, evidence).evidence for seed in (0, 0, 1)]
        first, again, other = ((each.temperature, each.factors) for each in fitted if each is not None)
        assert first == again != other

    def test_bad_evidence(
        self, conditions: dict[str, np.ndarray], embedder: LsaEmbedder, evidence: dict[str, Captions]
    ) -> None:
        routing = RoutingParams(kind="evidence")
        with pytest.raises(ModeError, match="no captions of expert 'animals'"):
            Router.fit(conditions, embedder, routing, [], 0)
        short = {**evidence, "tools": Captions(["saw"], evidence["tools"].vectors)}
        with pytest.raises(ModeError, match=r"evidence of expert 'tools': 1 captions, vectors \[300, 8\]"):
            Router.fit(conditions, embedder, routing, [], 0, short)
        for captions in (["zyxgfq"], []):
            nothing = {**evidence, "tools": Captions(captions, np.zeros((len(captions), 8)))}
            with pytest.raises(ModeError, match=f"none of {len(captions)} training captions of expert 'tools'"):
                Router.fit(conditions, embedder, routing, [], 0, nothing)

    def test_a_router_that_was_not_fitted(self, by_evidence: Router) -> None:
        with pytest.raises(ModeError, match="not calibrated"):
            Router(by_evidence.conditions, by_evidence.embedder, by_evidence.routing).weights([["dog"]])


class TestBadInput:
    def test_no_expert(self, embedder: LsaEmbedder, captions: list[str]) -> None:
        with pytest.raises(ModeError, match="no expert"):
            Router.fit({}, embedder, RoutingParams(), captions, random_seed=0)

    @pytest.mark.parametrize("shape", [(0, 8), (3, 7), (8,)])
    def test_a_condition_of_another_shape(
        self, embedder: LsaEmbedder, captions: list[str], shape: tuple[int, ...]
    ) -> None:
        with pytest.raises(ModeError, match="condition of expert 'a': shape"):
            Router.fit({"a": np.zeros(shape, np.float32)}, embedder, RoutingParams(), captions, random_seed=0)

    @pytest.mark.parametrize("useless", [[], ["zyxgfq qqq"]])
    def test_no_caption_to_calibrate_on(self, router: Router, embedder: LsaEmbedder, useless: list[str]) -> None:
        with pytest.raises(ModeError, match=f"none of {len(useless)} training captions"):
            Router.fit(router.conditions, embedder, RoutingParams(), useless, random_seed=0)


def test_how_many_images_are_kept() -> None:
    assert images_to_keep(4, 32) == 512
    assert images_to_keep(4, 224) == 27  # 16 MiB / (4 x 3 x 224^2)
    assert images_to_keep(1000, 448) == 1
