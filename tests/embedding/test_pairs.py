"""Vectors of images, and of captions and images together: against open_clip itself, with bad images, interrupted."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from mode.checksums import identity_of
from mode.columns import Rows
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import build_manifest
from mode.data.shards.reading import ImageFiles, Located
from mode.embedding.base import StoredEmbedder, embed_index
from mode.embedding.open_clip import OpenClipEmbedder
from mode.embedding.pairs import PairEncoder, count_unseen, encode_images
from mode.errors import ModeError
from mode.files import add_to_tar
from mode.params import IndexParams, SourceParams, View

#: Captions of each image: of one, of several.
CAPTIONS = [["a dog"], ["the red cat", "a cat"], ["a small blue shoe"], ["dog on grass", "dog runs", "a dog"], ["shoe"]]
#: Rows of a block: the captions of one image are in two of them.
BLOCK = 5


def picture(number: int) -> Image.Image:
    """Of another size and mode each: wide, tall, grey, with a palette, of the model's own size."""
    random = np.random.default_rng(number)
    sizes, modes = [(20, 31), (40, 18), (16, 24), (33, 17), (16, 16)], ["RGB", "RGB", "L", "P", "RGBA"]
    pixels = random.integers(0, 255, (*sizes[number][::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(modes[number])


def make_index(root: Path, bad: tuple[int, ...] = ()) -> PairIndex:
    """An index of a tar of five images and eight pairs; images in `bad` are cut off."""
    import json

    (root / "shards").mkdir(parents=True)
    with tarfile.open(root / "shards/0.tar", "w") as tar:
        for number, captions in enumerate(CAPTIONS):
            stream = io.BytesIO()
            picture(number).save(stream, "PNG")
            content = stream.getvalue()
            add_to_tar(tar, f"{number}.png", content[:100] if number in bad else content)
            add_to_tar(tar, f"{number}.json", json.dumps({"texts": captions}).encode())
    manifest = build_manifest(SourceParams(shards="shards"), root)
    build_index(manifest, root, root / "index", IndexParams(check_images=False))
    return PairIndex.load(root / "index")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    make_index(folder)
    return folder


def stored(model_folder: Path, folder: Path, view: View) -> StoredEmbedder:
    OpenClipEmbedder.open(str(model_folder), view=view, device="cpu", batch_size=2).save(folder)
    return StoredEmbedder.at(folder, device="cpu", batch_size=2)


def embed(encoder: PairEncoder, out: Path) -> np.ndarray:
    index, origin = PairIndex.load(encoder.index), {"index": str(encoder.content)}
    return embed_index(encoder.stored.open(), index, out, BLOCK, encode=encoder, origin=origin, numbered=True)


def plain(model_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of all pairs' captions and images, by open_clip alone and one by one."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{model_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_folder}")
    model.eval()
    pairs = [(number, caption) for number, captions in enumerate(CAPTIONS) for caption in captions]
    with torch.no_grad():
        texts = model.encode_text(tokenizer([caption for _, caption in pairs]), normalize=True)
        images = [
            model.encode_image(transform(picture(number).convert("RGB"))[None], normalize=True) for number, _ in pairs
        ]
    return texts.numpy(), torch.cat(images).numpy()


@pytest.mark.parametrize("view", ["image", "both"])
def test_equals_plain_open_clip(model_folder: Path, root: Path, tmp_path: Path, view: View) -> None:
    texts, images = plain(model_folder)
    encoder = PairEncoder(
        stored(model_folder, tmp_path / "e", view), root / "index", root, identity_of(root / "index"), 2
    )
    vectors = embed(encoder, tmp_path / "v.npy")
    whole = images if view == "image" else np.hstack([texts, images]) / np.sqrt(2)
    np.testing.assert_allclose(vectors, whole, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=2e-3)
    assert vectors.shape == (8, encoder.stored.open().dimensions)
    assert count_unseen(tmp_path / "v.npy", vectors, PairIndex.load(root / "index")) == 0


class Counting(ImageFiles):
    """Remembers the rows that it reads."""

    rows: tuple[int, ...] = ()

    def locate(self, rows: Rows) -> Located:
        self.rows = (*self.rows, *np.asarray(rows).tolist())
        return super().locate(rows)


def test_an_image_of_several_captions_is_read_once(model_folder: Path, root: Path) -> None:
    index = PairIndex.load(root / "index")
    files, embedder = Counting(index, root), OpenClipEmbedder.open(str(model_folder), view="image", device="cpu")
    vectors = encode_images(embedder, index, files, 0, len(index))
    assert files.rows == (0, 1, 3, 4, 7)
    assert np.array_equal(vectors[1], vectors[2])
    assert np.array_equal(
        encode_images(embedder, index, files, 5, 8)[0], vectors[4]
    )  # begins inside an image's captions


@pytest.mark.parametrize("view", ["image", "both"])
def test_a_bad_image_has_no_vector_and_is_counted(model_folder: Path, tmp_path: Path, view: View) -> None:
    """The others are what they would be without it; of its pairs the captions stay."""
    index = make_index(tmp_path / "bad", bad=(1, 3))
    make_index(tmp_path / "good")
    kept = stored(model_folder, tmp_path / "e", view)
    bad, good = (
        embed(
            PairEncoder(kept, tmp_path / name / "index", tmp_path / name, identity_of(tmp_path / name / "index")),
            tmp_path / f"{name}.npy",
        )
        for name in ("bad", "good")
    )
    half = 0 if view == "image" else 8
    rows = [1, 2, 4, 5, 6]
    assert not bad[rows, half:].any()
    assert np.array_equal(bad[:, :half], good[:, :half])
    np.testing.assert_allclose(np.delete(bad, rows, axis=0), np.delete(good, rows, axis=0), atol=1e-3)
    assert count_unseen(tmp_path / "bad.npy", bad, index) == 2


def test_images_none_of_which_can_be_decoded(model_folder: Path, tmp_path: Path) -> None:
    index = make_index(tmp_path, bad=(0, 1, 2, 3, 4))
    encoder = PairEncoder(
        stored(model_folder, tmp_path / "e", "image"), tmp_path / "index", tmp_path, identity_of(tmp_path / "index")
    )
    vectors = embed(encoder, tmp_path / "v.npy")
    with pytest.raises(ModeError, match=r"v.npy: none of 5 images can be decoded"):
        count_unseen(tmp_path / "v.npy", vectors, index)


class Stopped:
    """Encodes one block and is then interrupted."""

    def __init__(self, encoder: PairEncoder, blocks: int = 1) -> None:
        self._encoder, self._left = encoder, blocks

    def __call__(self, block: tuple[int, list[str]]) -> np.ndarray:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        return self._encoder(block)


def test_goes_on_where_it_was_interrupted_unless_the_images_changed(
    model_folder: Path, root: Path, tmp_path: Path
) -> None:
    kept = stored(model_folder, tmp_path / "e", "both")
    encoder = PairEncoder(kept, root / "index", root, identity_of(root / "index"))
    whole, out = embed(encoder, tmp_path / "whole.npy"), tmp_path / "v.npy"
    index = PairIndex.load(root / "index")

    def begin() -> None:
        with pytest.raises(KeyboardInterrupt):
            embed_index(
                kept.open(), index, out, BLOCK, encode=Stopped(encoder), origin={"index": str(encoder.content)},
                numbered=True,
            )  # fmt: skip

    begin()
    rest = Stopped(encoder)  # one more block is all it needs
    again = embed_index(
        kept.open(), index, out, BLOCK, encode=rest, origin={"index": str(encoder.content)}, numbered=True
    )
    assert np.array_equal(again, whole)
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()

    out.unlink()
    begin()
    with pytest.raises(KeyboardInterrupt):  # the same captions, other images: from the beginning
        embed_index(kept.open(), index, out, BLOCK, encode=Stopped(encoder), origin={"index": "x"}, numbered=True)


def test_another_index_on_a_worker_is_refused(model_folder: Path, root: Path, tmp_path: Path) -> None:
    encoder = PairEncoder(stored(model_folder, tmp_path / "e", "image"), root / "index", root, "0" * 64)
    with pytest.raises(ModeError, match="another index on a worker"):
        encoder((0, ["a dog"]))
