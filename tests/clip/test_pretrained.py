"""Somebody else's model becomes the seed: a folder, a checkpoint of open_clip's trainings, a hub's cache."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from mode.clip.folder import CONFIG, WEIGHTS
from mode.clip.model import Clip, build_model, load_model, save_model, write_model_files
from mode.clip.pretrained import given_card, open_seed
from mode.errors import ModeError
from mode.params import ImageParams, ModelParams, SeedParams

CAPTIONS = ["a red thing", "a blue thing", "two green things"]


def seed_of(name: str, weights: str | None = None) -> SeedParams:
    return SeedParams.model_validate({"from": "pretrained", "name": name, "weights": weights})


@pytest.fixture
def theirs(vit: ModelParams) -> Clip:
    """A model with a mean, a deviation and a resize mode of its own, as SigLIP's are."""
    image = ImageParams(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.5), resize_mode="squash")
    return build_model(vit, image, CAPTIONS, random_seed=3)


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A configuration file of CLIP's own kind, with its tokenizer, and weights that fit it."""
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    return tmp_path, build_model(ModelParams(config=config), ImageParams(size=32), None, 4).model.state_dict()


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_folder_brings_weights_tokenizer_and_preprocessing(theirs: Clip, tmp_path: Path) -> None:
    save_model(tmp_path / "theirs", theirs, {"name": "dense", "total": {"samples_seen": 9}})
    for name in ("local-dir:theirs", "theirs", str(tmp_path / "theirs")):
        clip, origin = open_seed(seed_of(name), tmp_path)
        assert same(clip.model.state_dict(), theirs.model.state_dict())
        assert clip.tokenizer(CAPTIONS).tolist() == theirs.tokenizer(CAPTIONS).tolist()
        kept = {key: clip.preprocess_cfg[key] for key in ("size", "mean", "std", "resize_mode")}
        assert kept == {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5], "resize_mode": "squash"}
        assert (origin.name, origin.weights, len(origin.sha256)) == (name, WEIGHTS, 64)
    card = given_card(clip, origin)
    assert (card["cost"], card["total"]["samples_seen"], card["origin"]["sha256"]) == ("given", 0, origin.sha256)


def test_what_is_made_of_it_is_a_model_folder_like_any_other(theirs: Clip, tmp_path: Path) -> None:
    save_model(tmp_path / "theirs", theirs, {})
    clip, origin = open_seed(seed_of("theirs"), tmp_path)
    write_model_files(tmp_path / "seed", clip, given_card(clip, origin))
    again = load_model(tmp_path / "seed")
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(again.model.encode_image(images), theirs.model.eval().encode_image(images))
    network, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'seed'}")
    assert same(network.state_dict(), theirs.model.state_dict())
    assert transform.transforms[-1].mean == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("kind", ["safetensors", "state_dict", "checkpoint", "parallel"])
def test_weights_of_a_file(plain: tuple[Path, dict[str, torch.Tensor]], kind: str) -> None:
    """As safetensors, as a state dict, and as open_clip's trainings keep it, of one process and of several."""
    root, weights = plain
    if kind == "safetensors":
        save_file(weights, root / "w.safetensors")
    elif kind == "state_dict":
        torch.save(weights, root / "w.pt")
    else:
        prefix = "module." if kind == "parallel" else ""
        content = {"epoch": 3, "name": "run", "state_dict": {prefix + name: each for name, each in weights.items()}}
        torch.save(content, root / "w.pt")
    file = "w.safetensors" if kind == "safetensors" else "w.pt"
    clip, origin = open_seed(seed_of("tiny.json", file), root)
    assert same(clip.model.state_dict(), weights)
    assert (origin.weights, clip.preprocess_cfg["size"]) == (file, 32)
    assert clip.tokenizer(["a dog"]).shape == (1, 8)


def test_a_file_says_nothing_of_images_and_params_may(plain: tuple[Path, dict[str, torch.Tensor]]) -> None:
    root, weights = plain
    save_file(weights, root / "w.safetensors")
    image = ImageParams(mean=(0.5, 0.5, 0.5), resize_mode="squash")
    clip, _ = open_seed(seed_of("tiny.json", "w.safetensors"), root, image)
    assert (clip.preprocess_cfg["mean"], clip.preprocess_cfg["resize_mode"]) == ((0.5, 0.5, 0.5), "squash")
    with pytest.raises(ModeError, match=r"image\.size is 48, but the seed tiny\.json was made for 32"):
        open_seed(seed_of("tiny.json", "w.safetensors"), root, ImageParams(size=48))


@pytest.mark.parametrize(
    ("key", "value"),
    [("size", 48), ("mean", (0.1, 0.5, 0.5)), ("interpolation", "bilinear"), ("resize_mode", "shortest")],
)
def test_params_must_not_contradict_the_seed(theirs: Clip, tmp_path: Path, key: str, value: Any) -> None:
    save_model(tmp_path / "theirs", theirs, {})
    with pytest.raises(ModeError, match=rf"image\.{key} is .*, but the seed theirs was made for") as caught:
        open_seed(seed_of("theirs"), tmp_path, ImageParams(**{key: value}))
    assert "\n" not in str(caught.value)


def bad_weights(weights: dict[str, torch.Tensor], path: Path, fault: str) -> None:
    """A file with one thing wrong with it."""
    changed = dict(weights)
    if fault == "missing":
        del changed["visual.proj"], changed["ln_final.bias"]
    elif fault == "unexpected":
        changed["extra.weight"] = torch.zeros(2)
    elif fault == "wider":
        changed["visual.proj"] = torch.zeros(16, 9)
    elif fault == "other size":
        changed["visual.positional_embedding"] = torch.zeros(10, 16)
    elif fault == "nan":
        changed["text_projection"] = weights["text_projection"].clone().fill_(float("nan"))
    save_file(changed, path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-1_000])
    if fault == "no weights":
        path.write_bytes(b"hello")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"lacks .*visual\.proj"),
        ("unexpected", r"has beyond it extra\.weight"),
        ("wider", r"size mismatch for visual\.proj"),
        ("other size", r"visual\.positional_embedding is \[10, 16\], not \[5, 16\]"),
        ("nan", "not finite in text_projection"),
        ("truncated", r"w\.safetensors: cannot be read as weights"),
        ("no weights", r"w\.safetensors: cannot be read as weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    plain: tuple[Path, dict[str, torch.Tensor]], fault: str, message: str
) -> None:
    root, weights = plain
    bad_weights(weights, root / "w.safetensors", fault)
    with pytest.raises(ModeError, match=message) as caught:
        open_seed(seed_of("tiny.json", "w.safetensors"), root)
    assert "\n" not in str(caught.value)


class _Trap:
    """What a pickle can do."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["torch", "plain pickle", "program"])
def test_a_file_with_code_runs_nothing(plain: tuple[Path, dict[str, torch.Tensor]], kind: str) -> None:
    root, weights = plain
    sprung = root / "sprung"
    if kind == "torch":
        torch.save({"state_dict": weights, "more": _Trap(str(sprung))}, root / "w.pt")
    elif kind == "plain pickle":
        (root / "w.pt").write_bytes(pickle.dumps(_Trap(str(sprung))))
    else:
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(root / "w.pt"))  # type: ignore[no-untyped-call]
    with pytest.raises(
        ModeError, match="a program and not weights" if kind == "program" else "cannot be read as weights"
    ):
        open_seed(seed_of("tiny.json", "w.pt"), root)
    assert not sprung.exists()


def test_a_model_larger_than_its_weights_is_refused_before_it_is_made(theirs: Clip, tmp_path: Path) -> None:
    save_model(tmp_path / "theirs", theirs, {})
    content = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    content["model_cfg"]["text_cfg"]["width"] = 16_384
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(content))
    (tmp_path / "theirs" / "SHA256SUMS").unlink(missing_ok=True)
    with pytest.raises(ModeError, match="describes a model of"):
        open_seed(seed_of("theirs"), tmp_path)


def test_a_tokenizer_with_more_ids_than_the_tower_knows_is_refused(theirs: Clip, tmp_path: Path) -> None:
    save_model(tmp_path / "theirs", theirs, {})
    more = build_model(
        ModelParams(config=theirs.model_cfg, tokenizer="words"),
        ImageParams(size=32),
        [" ".join(map(str, range(90)))],
        0,
    )
    save_model(tmp_path / "more", more, {})
    shutil.copy(tmp_path / "more/tokenizer.json", tmp_path / "theirs/tokenizer.json")
    with pytest.raises(ModeError, match=r"tokenizer has \d+ ids, but its text tower knows \d+"):
        open_seed(seed_of("theirs"), tmp_path)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("nowhere", None, "is no folder, and an architecture alone has no weights"),
        ("local-dir:nowhere", None, "not a model folder"),
        ("ViT-B-16", None, "is no folder"),
        ("ViT-nope", "openai", r"seed\.name: open_clip knows no model"),
        ("ViT-B-32", "laion99", "open_clip has no weights 'laion99' of ViT-B-32 .*openai"),
        ("ViT-B-32", "no/such.pt", r"no/such\.pt: no such file"),
        ("hf-hub:../evil", None, "no name on a hub"),
        ("coca_ViT-B-32", "laion2b_s13b_b90k", "a CoCa model"),
    ],
)
def test_seeds_that_are_not_there(
    tmp_path: Path, name: str, weights: str | None, message: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModeError, match=message) as caught:
        open_seed(seed_of(name, weights), tmp_path)
    assert "\n" not in str(caught.value)


def test_models_that_are_trained_otherwise_are_refused_by_name(theirs: Clip, tmp_path: Path) -> None:
    for part, name in (
        ({"multimodal_cfg": {}}, "CoCa"),
        ({"vision_cfg": {"timm_model_name": "naflexvit_base_patch16_map"}}, "NaFlex"),
    ):
        save_model(tmp_path / "theirs", theirs, {})
        content = json.loads((tmp_path / "theirs" / CONFIG).read_text())
        content["model_cfg"] |= part
        (tmp_path / "theirs" / CONFIG).write_text(json.dumps(content))
        with pytest.raises(ModeError, match=f"a {name} model"):
            open_seed(seed_of("theirs"), tmp_path)


def in_cache(home: Path, repository: str, files: Path) -> None:
    """Lay files where the hub's client keeps what it has fetched."""
    kept = home / "hub" / f"models--{repository.replace('/', '--')}"
    shutil.copytree(files, kept / "snapshots/abc")
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("abc")


OPEN = """
import sys; from pathlib import Path
from mode.clip.pretrained import open_seed; from mode.errors import ModeError; from mode.params import SeedParams
for name, _, weights in (each.partition("|") for each in sys.argv[1:]):
    seed = SeedParams.model_validate({"from": "pretrained", "name": name, "weights": weights or None})
    try: clip, origin = open_seed(seed, Path())
    except ModeError as error: print(error); continue
    print(origin.licence, origin.weights, clip.preprocess_cfg["resize_mode"], clip.tokenizer(["a red thing"]).tolist())
"""


def test_a_hubs_model_comes_from_the_cache_with_its_licence(theirs: Clip, tmp_path: Path) -> None:
    """In a process of its own: the cache's place is read when the hub's client is imported."""
    write_model_files(tmp_path / "files", theirs, {})
    (tmp_path / "files/README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    in_cache(tmp_path / "home", "someone/their-model", tmp_path / "files")
    names = ["hf-hub:someone/their-model", "hf-hub:someone/other-model", "ViT-B-32|laion2b_s34b_b79k"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", OPEN, *names], capture_output=True, text=True, env=environment)
    there, missing, tag = done.stdout.splitlines()
    assert there == f"mit {WEIGHTS} squash {theirs.tokenizer(['a red thing']).tolist()}"
    assert missing.startswith("hf-hub:someone/other-model: the model cannot be fetched, and the cache has nothing: ")
    assert tag.startswith("ViT-B-32:laion2b_s34b_b79k: the weights cannot be fetched, and the cache has nothing: ")
    assert "`mode get-model` makes a folder of it" in missing


def test_weights_of_a_tag_get_the_activation_that_they_were_trained_with(tmp_path: Path, monkeypatch: Any) -> None:
    """`ViT-B-32` has GELU; OpenAI's weights of it need QuickGELU, without which they are silently far worse."""
    from mode.clip import pretrained

    monkeypatch.setattr(pretrained, "download_pretrained_from_hf", lambda *_, **__: str(tmp_path / "w.safetensors"))
    monkeypatch.setattr(pretrained, "_licence_of", lambda _: None)
    found = pretrained._of_tag("ViT-B-32", "openai", open_clip.get_model_config("ViT-B-32"))
    assert found.model_cfg["quick_gelu"] is True
    found = pretrained._of_tag("ViT-B-32", "laion2b_s34b_b79k", open_clip.get_model_config("ViT-B-32"))
    assert "quick_gelu" not in found.model_cfg


def test_bfloat16_weights_are_read_as_float32(plain: tuple[Path, dict[str, torch.Tensor]]) -> None:
    root, weights = plain
    save_file({name: each.bfloat16() for name, each in weights.items()}, root / "w.safetensors")
    clip, _ = open_seed(seed_of("tiny.json", "w.safetensors"), root)
    assert {each.dtype for each in clip.model.parameters()} == {torch.float32}
    assert load_file(root / "w.safetensors")["visual.proj"].dtype == torch.bfloat16
