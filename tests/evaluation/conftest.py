"""Tiny tasks in CLIP_benchmark's layout and tiny models that tell some images apart."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mode.clip.model import Clip, build_model
from mode.params import ImageParams, ModelParams

CLASSES = ("red", "green", "blue", "dark grey", "white", "yellow")
COLOURS = ((200, 30, 30), (30, 180, 40), (40, 50, 200), (60, 60, 60), (240, 240, 240), (220, 210, 30))
TEMPLATES = ("a photo of {c}", "{c}", "the colour {c} on paper")
WORDS = ("a photo of the colour on paper", *CLASSES, "small large square spot left right two three")

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None},
    "text_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 1},
}


def draw(colour: Sequence[int], seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """A noisy picture mostly of one colour, with a spot."""
    random = np.random.default_rng(seed)
    pixels = random.normal(colour, 25, size=(size[1], size[0], 3))
    left, top = random.integers(0, 20, 2)
    pixels[top : top + 12, left : left + 12] = random.integers(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, {"jpg": "jpeg"}.get(kind, kind), **({"lossless": True} if kind == "webp" else {}))
    return stream.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


class TaskFolders:
    """Writes tasks under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def classification(
        self,
        name: str,
        labels: Sequence[int],
        *,
        classes: Sequence[str] = CLASSES,
        templates: Sequence[str] = TEMPLATES,
        shards: int = 1,
        seed: int = 0,
    ) -> Path:
        """One picture per label, of four formats in turn, its label before or after it."""
        folder = self.root / name
        samples = []
        for number, label in enumerate(labels):
            kind = ("jpg", "png", "webp", "jpeg")[number % 4]
            picture = encode(draw(COLOURS[label % len(COLOURS)], 1000 * seed + number), kind)
            members = [(f"s{number:05d}.{kind}", picture), (f"s{number:05d}.cls", str(label).encode())]
            samples.append(members if number % 2 else members[::-1])
        for shard in range(shards):
            part = samples[shard::shards]
            write_tar(folder / "test" / f"{shard}.tar", [member for sample in part for member in sample])
        (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
        (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
        return folder

    def retrieval(self, name: str, images: int, *, seed: int = 0) -> Path:
        """Pictures with 1 to 4 captions each, all of them different; most say the colour."""
        folder = self.root / name
        members = []
        for number, texts in enumerate(_captions(images, seed)):
            picture = draw(COLOURS[number % len(COLOURS)], 5000 + 1000 * seed + number)
            members += [(f"{number:05d}.png", encode(picture, "png")), (f"{number:05d}.txt", "\n".join(texts).encode())]
        write_tar(folder / "test" / "0.tar", members)
        (folder / "test" / "nshards.txt").write_text("1")
        (folder / "dataset_type.txt").write_text("retrieval\n")
        return folder


def _captions(images: int, seed: int) -> list[list[str]]:
    random = np.random.default_rng(seed)
    vocabulary = " ".join(WORDS).split()
    seen: set[str] = set()
    captions = []
    for number in range(images):
        own: list[str] = []
        count = random.integers(1, 5)
        while len(own) < count:
            caption = " ".join([CLASSES[number % len(CLASSES)], *random.choice(vocabulary, 3)])
            if caption not in seen:
                seen.add(caption)
                own.append(caption)
        captions.append(own)
    return captions


def make_clip(seed: int, size: int = 32, steps: int = 25) -> Clip:
    """A model after a few steps on coloured pictures: it tells some colours apart, and confuses others."""
    image = ImageParams(size=size)
    clip = build_model(ModelParams(config=CONFIG, tokenizer="words"), image, WORDS, seed)
    mean, std = torch.tensor(image.mean).view(3, 1, 1), torch.tensor(image.std).view(3, 1, 1)
    optimizer = torch.optim.AdamW(clip.model.parameters(), lr=3e-3)
    with torch.random.fork_rng(devices=[]):
        for step in range(steps):
            labels = [(step + number) % 6 for number in range(12)]
            pictures = [draw(COLOURS[label], 9000 + 12 * step + n, (size, size)) for n, label in enumerate(labels)]
            pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
            images = clip.model.encode_image((pixels / 255 - mean) / std, normalize=True)
            captions = [TEMPLATES[n % 3].format(c=CLASSES[label]) for n, label in enumerate(labels)]
            texts = clip.model.encode_text(clip.tokenizer(captions), normalize=True)
            same = torch.tensor([[float(a == b) for b in labels] for a in labels])
            loss = torch.nn.functional.cross_entropy(10 * images @ texts.T, same / same.sum(dim=1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    clip.model.eval()
    return clip


@pytest.fixture
def folders(tmp_path: Path) -> TaskFolders:
    return TaskFolders(tmp_path / "tasks")


@pytest.fixture(scope="session")
def clips() -> dict[str, Clip]:
    """Three tiny models of different skill."""
    return {"seed": make_clip(3), "expert-0": make_clip(1), "expert-1": make_clip(2)}
