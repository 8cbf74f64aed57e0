"""Merging experts: parameters by hand, statistics against a direct computation, the exported folder in open_clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from peft.utils.merge_utils import ties
from PIL import Image

from mode.clip.lora import delta_layers
from mode.clip.model import Clip, build_model, folded, load_model, load_models
from mode.embedding.lsa import LsaEmbedder
from mode.ensemble.merge import (
    Merge,
    combine_deltas,
    draw_images,
    estimate_statistics,
    even_batches,
    merge_models,
    statistics_layers,
)
from mode.ensemble.model import Ensemble
from mode.ensemble.router import Router
from mode.errors import ModeError
from mode.params import ImageParams, ModelParams, RoutingParams
from tests.adapters import write_adapter, write_base

CAPTIONS = ["red king", "white queen", "black rook", "ace of hearts", "two of spades", "ten of clubs"] * 3
TEXT = {"context_length": 8, "width": 16, "heads": 2, "layers": 1}
RESNET = {"embed_dim": 16, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8}, "text_cfg": TEXT}
VIT = {**RESNET, "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8}}
CLASSES = ["red king", "ace of hearts", "ten of clubs"]


def clip_of(config: dict[str, object], seed: int) -> Clip:
    return build_model(ModelParams(config=config, tokenizer="words"), ImageParams(size=32), CAPTIONS, seed)


@pytest.fixture(scope="module")
def resnets() -> dict[str, Clip]:
    return {"expert-0": clip_of(RESNET, 0), "expert-1": clip_of(RESNET, 1)}


@pytest.fixture(scope="module")
def router() -> Router:
    embedder = LsaEmbedder.fit(CAPTIONS, 4, 0)
    conditions = {"expert-0": embedder.encode(CAPTIONS[:3]), "expert-1": embedder.encode(CAPTIONS[3:6])}
    return Router.fit(conditions, embedder, RoutingParams(), CAPTIONS, 0)


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 3, 32, 32), dtype=np.uint8)


def pictures(count: int) -> list[np.ndarray]:
    return list(pixels(count).transpose(0, 2, 3, 1))


def test_parameters_are_the_weighted_mean(resnets: dict[str, Clip]) -> None:
    merged = merge_models(resnets, {"expert-0": 0.75, "expert-1": 0.25}, [torch.randn(8, 3, 32, 32)])
    first, second = (dict(clip.model.named_parameters()) for clip in resnets.values())
    for name, parameter in merged.model.named_parameters():
        torch.testing.assert_close(parameter, 0.75 * first[name] + 0.25 * second[name])
    assert not merged.model.training


def test_a_model_merged_with_itself_is_itself() -> None:
    clip = clip_of(VIT, 3)
    merged = merge_models({"a": clip, "b": clip}, {"a": 0.3, "b": 0.7}, [])
    batch = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(merged.model.encode_image(batch), clip.model.eval().encode_image(batch))


def test_statistics_are_those_of_the_images(resnets: dict[str, Clip]) -> None:
    """The first layer sees the images through one convolution: its statistics can be computed directly."""
    clip = clip_of(RESNET, 4)
    batches = [torch.randn(24, 3, 32, 32) + 1, torch.randn(24, 3, 32, 32)]
    momentum = statistics_layers(clip.model)[0].momentum
    estimate_statistics(clip.model, [*batches, torch.randn(1, 3, 32, 32)])  # one image alone has no variance
    seen = [clip.model.visual.conv1(batch) for batch in batches]
    mean = torch.stack([each.mean(dim=(0, 2, 3)) for each in seen]).mean(dim=0)
    variance = torch.stack([each.var(dim=(0, 2, 3)) for each in seen]).mean(dim=0)
    torch.testing.assert_close(clip.model.visual.bn1.running_mean, mean)
    torch.testing.assert_close(clip.model.visual.bn1.running_var, variance)
    layers = statistics_layers(clip.model)
    assert all(layer.momentum == momentum and not layer.training for layer in layers)


def test_without_images_a_resnet_cannot_be_merged_but_a_vit_can(router: Router, resnets: dict[str, Clip]) -> None:
    with pytest.raises(ModeError, match="statistics need images"):
        Ensemble(router, resnets, "cpu").adapt(CLASSES, merge="weights")
    vits = Ensemble(router, {"expert-0": clip_of(VIT, 0), "expert-1": clip_of(VIT, 1)}, "cpu")
    assert vits.adapt(CLASSES, merge="weights")(pictures(2)).shape == (2, 3)


def test_a_merged_task_is_one_open_clip_model(router: Router, resnets: dict[str, Clip], tmp_path: Path) -> None:
    ensemble = Ensemble(router, resnets, "cpu")
    task = ensemble.adapt(CLASSES, merge="weights", images=pictures(40))
    assert list(task.clips) == ["merged"]
    assert task.weights == ensemble.adapt(CLASSES).weights
    task.save(tmp_path / "merged")
    network, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'merged'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'merged'}")
    batch = torch.stack([transform(Image.fromarray(picture)) for picture in pictures(3)])
    with torch.no_grad():
        images = network.eval().encode_image(batch, normalize=True)
        texts = network.encode_text(tokenizer(CLASSES), normalize=True)
    expected = (network.logit_scale.exp() * images @ texts.T).softmax(dim=1)
    torch.testing.assert_close(task(pictures(3)), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ModeError, match="no single model"):
        ensemble.adapt(CLASSES).save(tmp_path / "several")


def test_the_kept_images_are_used_by_weight_and_survive_the_folder(
    router: Router, resnets: dict[str, Clip], tmp_path: Path
) -> None:
    kept = {"expert-0": pixels(20, 1), "expert-1": pixels(20, 2)}
    with_images = Router(router.conditions, router.embedder, router.routing, router.temperature, kept)
    with_images.save(tmp_path / "ensemble")
    loaded = Router.load(tmp_path / "ensemble")
    task = Ensemble(loaded, resnets, "cpu").adapt(CLASSES, merge="weights")
    drawn = draw_images(kept, task.weights).numpy().transpose(0, 2, 3, 1)
    given = Ensemble(router, resnets, "cpu").adapt(CLASSES, merge="weights", images=list(drawn))
    torch.testing.assert_close(task.scores(pictures(3)), given.scores(pictures(3)))


def test_images_are_drawn_in_proportion_and_evenly_mixed() -> None:
    kept = {"a": np.full((8, 3, 1, 1), 1, np.uint8), "b": np.full((8, 3, 1, 1), 2, np.uint8)}
    assert draw_images(kept, {"a": 0.5, "b": 0.5})[:, 0, 0, 0].tolist() == [1, 2] * 4
    assert sorted(draw_images(kept, {"a": 0.75, "b": 0.25})[:, 0, 0, 0].tolist()) == [1] * 6 + [2] * 2
    assert draw_images(kept, {"a": 1.0, "b": 0.0})[:, 0, 0, 0].tolist() == [1] * 8
    assert len(draw_images({}, {"a": 1.0})) == 0


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (64, [64]), (65, [33, 32]), (129, [43, 43, 43])])
def test_batches_are_even(count: int, sizes: list[int]) -> None:
    """No last batch of one image, whose variance is undefined."""
    images = torch.arange(count)
    batches = even_batches(images, 64)
    assert [len(batch) for batch in batches] == sizes
    assert [value for batch in batches for value in batch.tolist()] == images.tolist()
    assert [len(batch) for batch in even_batches(images, 1)][:1] == [len(b) for b in even_batches(images, 32)][:1]


def test_one_image_is_too_few(router: Router, resnets: dict[str, Clip]) -> None:
    with pytest.raises(ModeError, match="statistics need images"):
        Ensemble(router, resnets, "cpu").adapt(CLASSES, merge="weights", images=pictures(1))
    task = Ensemble(router, resnets, "cpu", batch_size=16).adapt(CLASSES, merge="weights", images=pictures(33))
    assert bool(torch.isfinite(task(pictures(2))).all())


class TestAdapters:
    """Experts that are adapters of one base."""

    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        root = tmp_path_factory.mktemp("adapters")
        base = write_base(root / "seed", ModelParams(config=VIT, tokenizer="words"), captions=CAPTIONS)
        for number in range(3):
            # Not all adapt the same layers.
            write_adapter(root / f"expert-{number}", base, number, targets=["*.attn", "*.mlp.*"][: 2 - number % 2])
        return {path.name: path for path in sorted(root.iterdir())}

    @pytest.fixture
    def adapters(self, folders: dict[str, Path]) -> dict[str, Clip]:
        return load_models({name: folder for name, folder in folders.items() if name != "seed"})

    WEIGHTS = {"expert-0": 0.5, "expert-1": 0.3, "expert-2": 0.2}  # noqa: RUF012

    def test_the_weighted_sum_of_deltas_is_the_mean_of_the_folded_models(self, adapters: dict[str, Clip]) -> None:
        merged = merge_models(adapters, self.WEIGHTS, [])
        assert merged.adapter is None
        whole = {name: folded(clip).model.state_dict() for name, clip in adapters.items()}
        averaged = merge_models({name: folded(clip) for name, clip in adapters.items()}, self.WEIGHTS, [])
        assert list(merged.model.state_dict()) == list(averaged.model.state_dict())
        for key, tensor in merged.model.state_dict().items():
            expected = sum(weight * whole[name][key].double() for name, weight in self.WEIGHTS.items())
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(averaged.model.state_dict()[key], tensor, rtol=1e-5, atol=1e-6)

    def test_what_is_not_adapted_stays_the_bases_bit_by_bit(
        self, adapters: dict[str, Clip], folders: dict[str, Path]
    ) -> None:
        base = load_model(folders["seed"]).model.state_dict()
        merged = merge_models(adapters, self.WEIGHTS, []).model.state_dict()
        adapted = {key for clip in adapters.values() for key in delta_layers(clip.model)} | {"logit_scale"}
        assert {key for key in base if not torch.equal(base[key], merged[key])} == adapted

    def test_one_alone_is_folded(self, adapters: dict[str, Clip]) -> None:
        only = {"expert-0": adapters["expert-0"]}
        expected = folded(only["expert-0"]).model.state_dict()
        for key, tensor in merge_models(only, {"expert-0": 1.0}, []).model.state_dict().items():
            torch.testing.assert_close(tensor, expected[key])

    def test_the_seed_may_stand_in_and_others_may_be_whole(
        self, adapters: dict[str, Clip], folders: dict[str, Path]
    ) -> None:
        clips = {"expert-0": adapters["expert-0"], "seed": load_model(folders["seed"])}
        merged = merge_models(clips, {"expert-0": 0.25, "seed": 0.75}, []).model.state_dict()
        for key, tensor in folded(clips["expert-0"]).model.state_dict().items():
            expected = 0.25 * tensor + 0.75 * clips["seed"].model.state_dict()[key]
            torch.testing.assert_close(merged[key], expected)
        with pytest.raises(ModeError, match="'ties' combines changes of one base, but these experts are not all"):
            merge_models(clips, {"expert-0": 0.25, "seed": 0.75}, [], "ties")

    @pytest.mark.parametrize("how", ["ties", "dare"])
    def test_thinned_deltas_are_added_to_the_base(
        self, adapters: dict[str, Clip], folders: dict[str, Path], how: Merge
    ) -> None:
        """Most numbers of a weight stay the base's; twice the same; the exported folder is a whole model."""
        first = merge_models(adapters, self.WEIGHTS, [], how, density=0.1).model.state_dict()
        again = merge_models(adapters, self.WEIGHTS, [], how, density=0.1).model.state_dict()
        assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
        key = "visual.transformer.resblocks.0.attn.in_proj_weight"
        same = first[key] == load_model(folders["seed"]).model.state_dict()[key]
        assert 0.7 <= same.float().mean() <= 0.95

    def test_a_task_is_merged_by_each(self, router: Router, folders: dict[str, Path], tmp_path: Path) -> None:
        ensemble = Ensemble(router, load_models({name: folders[name] for name in router.experts}), "cpu")
        scores = {how: ensemble.adapt(CLASSES, merge=how).scores(pictures(2)) for how in ("weights", "ties", "dare")}
        assert all(bool(torch.isfinite(each).all()) for each in scores.values())
        torch.testing.assert_close(
            ensemble.adapt(CLASSES, merge="ties", density=0.2).scores(pictures(2)), scores["ties"]
        )
        with pytest.raises(ModeError, match="density is only used to merge by ties or dare"):
            ensemble.adapt(CLASSES, merge="weights", density=0.5)
        for density in (0.0, 1.0, float("nan"), -1.0):
            with pytest.raises(ModeError, match="is no share of numbers to keep"):
                ensemble.adapt(CLASSES, merge="dare", density=density)
        # The folder of a task of one expert is a model by itself, and no adapter without its base.
        ensemble.adapt(CLASSES, top_k=1).save(tmp_path / "alone/task")
        assert load_model(tmp_path / "alone/task").adapter is None

    def test_batch_norm_keeps_the_statistics_of_the_base(self, router: Router, tmp_path: Path) -> None:
        """No image is needed, and what is merged is what was folded."""
        base = write_base(tmp_path / "seed", ModelParams(config=RESNET, tokenizer="words"), captions=CAPTIONS)
        for number, name in enumerate(router.experts):
            write_adapter(tmp_path / name, base, number)
        ensemble = Ensemble(router, load_models({name: tmp_path / name for name in router.experts}), "cpu")
        task = ensemble.adapt(CLASSES, merge="weights")
        whole = {name: folded(clip).model.state_dict() for name, clip in ensemble.clips.items()}
        for key, tensor in task.clips["merged"].model.state_dict().items():
            expected = sum(weight * whole[name][key] for name, weight in task.weights.items())
            torch.testing.assert_close(tensor, expected.to(tensor.dtype), rtol=1e-5, atol=1e-6)

    def test_whole_experts_have_no_deltas_to_thin_out(self, router: Router) -> None:
        ensemble = Ensemble(router, {"expert-0": clip_of(VIT, 0), "expert-1": clip_of(VIT, 1)}, "cpu")
        with pytest.raises(ModeError, match="'dare' combines changes of one base"):
            ensemble.adapt(CLASSES, merge="dare")


class TestCombinedDeltas:
    """Sums of changes of one weight, worked out by hand and against peft's functions."""

    def test_ties_by_hand(self) -> None:
        """Half of each is kept: [4, 0, -3, 0] and [0, 2, 5, 0]; the third's sign goes to the larger weighted sum."""
        first, second = torch.tensor([4.0, 1.0, -3.0, 0.5]), torch.tensor([0.1, 2.0, 5.0, -0.2])
        assert combine_deltas([first, second], [0.5, 0.5], "ties", 0.5).tolist() == [4, 2, 5, 0]
        assert combine_deltas([first, second], [0.75, 0.25], "ties", 0.5).tolist() == [4, 2, -3, 0]

    def test_one_is_only_thinned_out(self) -> None:
        delta = torch.tensor([4.0, 1.0, -3.0, 0.5])
        assert combine_deltas([delta], [1.0], "ties", 0.5).tolist() == [4, 0, -3, 0]
        thinned = combine_deltas([delta], [1.0], "dare", 0.5)
        assert set(thinned.tolist()) <= {0.0, *(2 * delta).tolist()}

    def test_with_equal_weights_ties_is_pefts(self) -> None:
        torch.manual_seed(0)
        deltas = [torch.randn(20, 30) for _ in range(4)]
        theirs = ties(deltas, torch.ones(4), density=0.3)
        torch.testing.assert_close(combine_deltas(deltas, [0.25] * 4, "ties", 0.3), theirs)

    def test_a_delta_of_next_to_no_weight_matters_next_to_nothing(self) -> None:
        torch.manual_seed(0)
        deltas = [torch.randn(20, 30) for _ in range(2)]
        alone = combine_deltas(deltas[:1], [1.0], "ties", 0.3)
        both = combine_deltas(deltas, [1 - 1e-6, 1e-6], "ties", 0.3)
        kept = alone != 0
        torch.testing.assert_close(both[kept], alone[kept], rtol=1e-4, atol=1e-4)

    def test_dare_is_the_weighted_sum_on_average(self) -> None:
        torch.manual_seed(0)
        deltas, weights = [torch.randn(6), torch.randn(6)], [0.7, 0.3]
        drawn = torch.stack([combine_deltas(deltas, weights, "dare", 0.5) for _ in range(4000)])
        torch.testing.assert_close(drawn.mean(dim=0), combine_deltas(deltas, weights), rtol=0, atol=0.1)
