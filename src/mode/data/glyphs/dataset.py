"""The built-in data set: pictures of characters with captions, and zero-shot tasks in a font that training never sees.

It needs no download, comes in any size, and its clusters and routing weights are things one can look at: chess pieces,
playing cards, alphabets, arrows.
"""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from mode.data.glyphs.drawing import TASK_FONTS, TRAINING_FONTS, draw
from mode.data.glyphs.families import FAMILIES, Family, name_of
from mode.errors import ModeError
from mode.files import add_to_tar, write_aside
from mode.parallel import cores, ordered_map
from mode.params import GlyphParams
from mode.progress import Progress

#: What a caption looks like: {n} is the character's name, {k} its kind, {i} and {p} the colours of ink and paper.
CAPTIONS = (
    "{n}",
    "{n}",
    "{n}",
    "a picture of {n}",
    "the symbol {n}",
    "drawing of {n}",
    "{n} icon",
    "clip art, {n}",
    "the character {n} printed large",
    "{n}, a {k}",
    "{k}: {n}",
    "{n} - {k} symbols and signs",
    "a {k} called {n}",
    "{n} in {i}",
    "{n} on {p} background",
    "{i} on {p}: {n}",
    "picture of the {k} {n} in {i} on {p}",
)

#: Captions of the web that say nothing about their picture; {d} is a number.
NOISE = (
    "click here to view image {d}",
    "img_{d}.jpg",
    "free shipping on orders over {d}",
    "page {d} of our photo gallery",
    "untitled document {d}",
    "download hd wallpaper {d}",
    "posted by admin, {d} comments",
    "loading, please wait",
)

#: Prompts of the tasks, in CLIP_benchmark's notation.
TASK_TEMPLATES = ("{c}", "a picture of {c}", "the symbol {c}", "{c}, a KIND")

#: Pictures drawn at once: large enough for numpy, small enough for the cache.
_BATCH = 256

# Independent streams of random numbers for training shards and tasks.
_TRAINING, _TASKS = 0, 1


def write_glyph_shards(
    params: GlyphParams,
    out: Path,
    random_seed: int,
    workers: int | None = None,
    families: Mapping[str, int] | None = None,
) -> None:
    """Write the training pairs as a folder of tars, `key.jpg` with `key.txt`.

    Every character that `params` and `families` leave of `FAMILIES` is as likely as any other. The bytes depend on
    these and on `random_seed` alone (and on the versions of the font and JPEG libraries).

    Args:
        params: numbers of pairs, sizes, shares of noise.
        out: folder to write, as a whole or not at all; replaced if it is there.
        random_seed: of all random choices.
        workers: processes; default one per core.
        families: as of a source in params.yaml; with them there are `pairs_of` pairs.

    Raises:
        ModeError: as `characters_of`.
    """
    kinds, pairs = characters_of(params, families), pairs_of(params, families)
    # What is drawn of other families is drawn with other random numbers.
    own = [] if families is None else [zlib.crc32(json.dumps(dict(families), sort_keys=True).encode())]
    shards = range(-(-pairs // params.shard_pairs))
    with write_aside(out) as folder, Progress("draw glyphs", total=pairs, unit="pairs") as bar:
        folder.mkdir()
        write = partial(
            _write_shard, kinds=kinds, total=pairs, params=params, folder=folder, seeds=[random_seed, _TRAINING, *own]
        )
        for written in ordered_map(write, shards, min(cores() if workers is None else workers, len(shards))):
            bar.update(written)


def characters_of(params: GlyphParams, families: Mapping[str, int] | None = None) -> dict[str, str]:
    """What is drawn: character -> its kind.

    Args:
        params: `per_family` of them.
        families: as of a source in params.yaml: family -> how many; `*` stands for those that are not named.

    Raises:
        ModeError: there is no such family, it has fewer characters, or none is left.

    >>> list(characters_of(GlyphParams(), {"*": 0, "dice": 2}))
    ['\u2680', '\u2681']
    """
    named = families or {}
    there = {family.name: len(family.characters) for family in FAMILIES}
    for name, count in named.items():
        if name != "*" and name not in there:
            raise ModeError(f"families: no family of characters is called '{name}'", f"there are: {', '.join(there)}")
        if count > there.get(name, count):
            raise ModeError(f"families: {name}: {count} characters, but it has {there[name]}")
    most = named.get("*", params.per_family)
    kinds = {character: family.kind for family in FAMILIES for character in family.first(named.get(family.name, most))}
    if not kinds:
        raise ModeError("families: no character is left", "name one that has some")
    return kinds


def pairs_of(params: GlyphParams, families: Mapping[str, int] | None = None) -> int:
    """How many pairs are drawn: of each character as many as when all are, `params.pairs` together."""
    return max(1, round(params.pairs * len(characters_of(params, families)) / len(characters_of(params))))


def write_glyph_tasks(params: GlyphParams, out: Path, random_seed: int, workers: int | None = None) -> None:
    """Write one zero-shot task per family into `out`, each a folder in CLIP_benchmark's webdataset layout.

    Drawn in DejaVu Sans Bold, which training never sees; `params.test_images` per class. Deterministic as the shards.
    """
    out.mkdir(parents=True, exist_ok=True)
    write = partial(_write_task, params=params, out=out, random_seed=random_seed)
    with Progress("draw tasks", total=len(FAMILIES), unit="tasks") as bar:
        for _ in ordered_map(write, range(len(FAMILIES)), cores() if workers is None else workers):
            bar.update(1)


def caption(character: str, kind: str, colours: tuple[str, str], params: GlyphParams, rng: np.random.Generator) -> str:
    """A caption as the web might have it: varied, at times with a word missing, at times about something else.

    Args:
        character: what the picture shows.
        kind: of the character, such as `chess piece`.
        colours: names of ink and paper.
    """
    if rng.random() < params.noise_share:
        return NOISE[rng.integers(len(NOISE))].format(d=rng.integers(1, 10_000))
    ink, paper = colours
    text = CAPTIONS[rng.integers(len(CAPTIONS))].format(n=name_of(character), k=kind, i=ink, p=paper)
    words = _with_articles(text).split()
    if len(words) > 1 and rng.random() < params.dropped_word_share:
        del words[rng.integers(len(words))]
    return " ".join(words)


def _with_articles(text: str) -> str:
    """`a arrow` becomes `an arrow`."""
    return re.sub(r"\ba (?=[aeio])", "an ", text)


def _write_shard(
    shard: int, kinds: Mapping[str, str], total: int, params: GlyphParams, folder: Path, seeds: list[int]
) -> int:
    """Draw one shard; its random numbers depend on its number only, so that shards can be drawn in any order."""
    rng = np.random.default_rng([*seeds, shard])
    alphabet = list(kinds)
    first = shard * params.shard_pairs
    count = min(params.shard_pairs, total - first)
    with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for start in range(first, first + count, _BATCH):
            numbers = range(start, min(start + _BATCH, first + count))
            characters = [alphabet[number] for number in rng.integers(len(alphabet), size=len(numbers))]
            jpegs, colours = draw(characters, TRAINING_FONTS, params.image_size, rng)
            for number, character, jpeg, ink_and_paper in zip(numbers, characters, jpegs, colours, strict=True):
                text = caption(character, kinds[character], ink_and_paper, params, rng)
                add_to_tar(tar, f"{number:08d}.jpg", jpeg)
                add_to_tar(tar, f"{number:08d}.txt", text.encode())
    return count


def _write_task(number: int, params: GlyphParams, out: Path, random_seed: int) -> None:
    family = FAMILIES[number]
    rng = np.random.default_rng([random_seed, _TASKS, number])
    characters = family.first(params.per_family)
    labels = np.repeat(np.arange(len(characters)), params.test_images)
    jpegs, _ = draw([characters[label] for label in labels], TASK_FONTS, params.image_size, rng)
    with write_aside(out / family.name) as folder:
        (folder / "test").mkdir(parents=True)
        with tarfile.open(folder / "test" / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, (label, jpeg) in enumerate(zip(labels, jpegs, strict=True)):
                add_to_tar(tar, f"{key:06d}.jpg", jpeg)
                add_to_tar(tar, f"{key:06d}.cls", str(label).encode())
        (folder / "test" / "nshards.txt").write_text("1", encoding="utf-8")
        (folder / "dataset_type.txt").write_text("classification", encoding="utf-8")
        lines = {"classnames": map(name_of, characters), "zeroshot_classification_templates": templates(family)}
        for name, each in lines.items():
            (folder / f"{name}.txt").write_text("\n".join(each) + "\n", encoding="utf-8")


def templates(family: Family) -> list[str]:
    """Prompts for the classes of a family; one names the kind, as CLIP's "a type of pet" does."""
    return [_with_articles(template.replace("KIND", family.kind)) for template in TASK_TEMPLATES]
