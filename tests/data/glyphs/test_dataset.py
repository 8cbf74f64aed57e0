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

from mode.data.glyphs.dataset import NOISE, caption, templates, write_glyph_shards, write_glyph_tasks
from mode.data.glyphs.drawing import TASK_FONTS, TRAINING_FONTS, _font_folder, draw, fonts_with
from mode.data.glyphs.families import FAMILIES, name_of
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import build_manifest
from mode.params import GlyphParams, IndexParams, SourceParams

SMALL = GlyphParams(pairs=53, shard_pairs=20, test_images=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
