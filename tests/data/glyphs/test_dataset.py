from __future__ import annotations

import io
import tarfile
import unicodedata
from collections import Counter
from itertools import chain
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mode.data.glyphs.dataset import (
    NOISE,
    caption,
    characters_of,
    pairs_of,
    templates,
    write_glyph_shards,
    write_glyph_tasks,
)
from mode.data.glyphs.drawing import TASK_FONTS, TRAINING_FONTS, _font_folder, draw, fonts_with
from mode.data.glyphs.families import FAMILIES, name_of
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import build_manifest
from mode.errors import ModeError
from mode.params import GlyphParams, IndexParams, SourceParams

SMALL = GlyphParams(pairs=53, shard_pairs=20, test_images=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def members(folder: Path) -> list[tuple[str, bytes]]:
    """Name and content of every member of the tars."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [(member.name, file.read()) for member in tar if (file := tar.extractfile(member))]
    return found


def test_families_are_tasks_of_6_to_20_classes_and_share_no_character() -> None:
    for family in FAMILIES:
        assert 6 <= len(family.characters) <= 20, family.name
        assert len(set(map(name_of, family.characters))) == len(family.characters), family.name
    every = Counter(chain.from_iterable(family.characters for family in FAMILIES))
    assert max(every.values()) == 1
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) >= 50
    assert len(every) > 900


def test_fonts_lie_where_matplotlib_says() -> None:
    assert _font_folder() == Path(matplotlib.get_data_path()) / "fonts/ttf"


def test_fonts_have_every_character_and_draw_something() -> None:
    assert not set(TASK_FONTS) & set(TRAINING_FONTS)
    rng = np.random.default_rng(0)
    for family in FAMILIES:
        for character in family.characters:
            assert fonts_with(character, TASK_FONTS), (family.name, name_of(character))
            assert fonts_with(character, TRAINING_FONTS), (family.name, name_of(character))
    characters = [character for family in FAMILIES for character in family.characters[:2]]
    for jpeg in draw(characters, TASK_FONTS, 32, rng)[0]:
        pixels = np.asarray(Image.open(io.BytesIO(jpeg)).convert("L"), float)
        border = np.concatenate([pixels[:3].ravel(), pixels[-3:].ravel()])
        middle = pixels[8:24, 8:24]
        assert np.abs(middle - np.median(border)).max() > 50, "ink stands out from paper"


def test_shards_depend_on_the_seed_alone(tmp_path: Path) -> None:
    write_glyph_shards(SMALL, tmp_path / "a", random_seed=3, workers=1)
    write_glyph_shards(SMALL, tmp_path / "b", random_seed=3, workers=2)
    write_glyph_shards(SMALL, tmp_path / "c", random_seed=4, workers=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert list(contents(tmp_path / "a")) == list(contents(tmp_path / "c"))
    assert not set(contents(tmp_path / "a").values()) & set(contents(tmp_path / "c").values())


def test_a_source_may_have_some_families_alone(tmp_path: Path) -> None:
    clean = SMALL.model_copy(update={"per_family": 4, "noise_share": 0.0, "dropped_word_share": 0.0})
    known, of_all = {"*": 0, "dice": 4, "chess": 2}, 4 * len(FAMILIES)
    assert [*characters_of(clean, known)] == [*"♔♕", *"⚀⚁⚂⚃"]
    assert len(characters_of(clean, {"chess": 0, "dice": 6})) == of_all - 4 + 2
    many = clean.model_copy(update={"pairs": 10 * of_all})
    assert (pairs_of(many), pairs_of(many, known)) == (10 * of_all, 60)
    write_glyph_shards(many, tmp_path / "known", random_seed=3, workers=1, families=known)
    texts = [text.decode() for name, text in members(tmp_path / "known") if name.endswith(".txt")]
    assert len(texts) == 60
    assert all("chess" in text or "die" in text for text in texts)
    assert not any(word in text for text in texts for word in ("rook", "die face-6"))


def test_another_draw_of_the_same_characters_has_other_pictures(tmp_path: Path) -> None:
    for name, families in {"all": None, "again": {"*": 4}, "once more": {"*": 4}}.items():
        write_glyph_shards(SMALL.model_copy(update={"per_family": 4}), tmp_path / name, 3, workers=1, families=families)
    assert contents(tmp_path / "again") == contents(tmp_path / "once more")
    assert not {*members(tmp_path / "all")} & {*members(tmp_path / "again")}


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ({"ches": 4}, "no family of characters is called 'ches' (there are: chess, dice"),
        ({"dice": 7}, "dice: 7 characters, but it has 6"),
        ({"*": 0, "dice": 0}, "no character is left"),
    ],
)
def test_families_that_are_none_are_refused(tmp_path: Path, families: dict[str, int], message: str) -> None:
    with pytest.raises(ModeError) as refused:
        write_glyph_shards(SMALL, tmp_path / "a", 0, workers=1, families=families)
    assert message in str(refused.value)
    assert not (tmp_path / "a").exists()


def test_shards_are_pairs(tmp_path: Path) -> None:
    write_glyph_shards(SMALL, tmp_path / "glyphs", random_seed=0, workers=1)
    manifest = build_manifest(SourceParams(shards="glyphs"), tmp_path)
    report = build_index(manifest, tmp_path, tmp_path / "index", IndexParams())
    assert [file.pairs for file in report.files] == [20, 20, 13]
    assert report.bad == 0
    index = PairIndex.load(tmp_path / "index")
    shard = (tmp_path / index.path(0)).read_bytes()
    picture = Image.open(io.BytesIO(shard[index.offset[0] :][: index.length[0]]))
    assert (picture.size, picture.mode) == ((32, 32), "RGB")


def test_writing_again_replaces(tmp_path: Path) -> None:
    write_glyph_shards(SMALL, tmp_path / "glyphs", random_seed=0, workers=1)
    write_glyph_shards(GlyphParams(pairs=3, shard_pairs=20), tmp_path / "glyphs", random_seed=0, workers=1)
    assert sorted(contents(tmp_path / "glyphs")) == ["00000.tar"]


def captions(params: GlyphParams, count: int = 2000) -> list[str]:
    rng = np.random.default_rng(0)
    return [caption("♔", "chess piece", ("red", "white"), params, rng) for _ in range(count)]


def test_captions_name_character_kind_and_colours() -> None:
    clean = captions(GlyphParams(noise_share=0.0, dropped_word_share=0.0))
    assert all("white chess king" in text for text in clean)
    assert len(set(clean)) >= 12
    assert any("chess piece" in text for text in clean)
    assert any("red" in text for text in clean)
    assert not any("  " in text or "{" in text for text in clean)


def test_shares_of_noise_and_dropped_words() -> None:
    starts = tuple(template.split("{")[0] for template in NOISE)
    noise = sum(text.startswith(starts) for text in captions(GlyphParams(noise_share=0.1))) / 2000
    assert abs(noise - 0.1) < 0.04
    whole = set(captions(GlyphParams(noise_share=0.0, dropped_word_share=0.0)))
    texts = captions(GlyphParams(noise_share=0.0, dropped_word_share=0.2))
    assert abs(sum(text not in whole for text in texts) / 2000 - 0.2) < 0.05
    assert all(text.startswith(starts) for text in captions(GlyphParams(noise_share=1.0), 50))


def test_tasks_are_in_clip_benchmarks_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_glyph_tasks(SMALL, tmp_path / "tasks", random_seed=0, workers=1)
    assert sorted(path.name for path in (tmp_path / "tasks").iterdir()) == sorted(family.name for family in FAMILIES)
    chess = tmp_path / "tasks" / "chess"
    assert (chess / "classnames.txt").read_text().splitlines()[:2] == ["white chess king", "white chess queen"]
    assert (chess / "dataset_type.txt").read_text() == "classification"
    assert (chess / "test" / "nshards.txt").read_text() == "1"
    prompts = (chess / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert prompts[0] == "{c}"
    assert all("{c}" in prompt for prompt in prompts)
    with tarfile.open(chess / "test" / "0.tar") as tar:
        names = tar.getnames()
        labels = [int(tar.extractfile(name).read()) for name in names if name.endswith(".cls")]  # type: ignore[union-attr]
    assert names[:4] == ["000000.jpg", "000000.cls", "000001.jpg", "000001.cls"]
    assert labels == np.repeat(np.arange(12), 2).tolist()
    monkeypatch.setattr("mode.data.glyphs.dataset.FAMILIES", FAMILIES[:2])
    write_glyph_tasks(SMALL, tmp_path / "again", random_seed=0, workers=1)
    assert contents(tmp_path / "again" / "chess") == contents(chess)


def test_a_before_a_vowel() -> None:
    arrows = next(family for family in FAMILIES if family.kind == "arrow")
    assert templates(arrows)[-1] == "{c}, an arrow"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_class_names_are_unicodes(family: object) -> None:
    for character in family.characters:  # type: ignore[attr-defined]
        assert name_of(character) == unicodedata.name(character).lower()
