"""Where rates come from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mode.errors import ModeError
from mode.planning.rates import Measured, Rates, load_rates, sourced

REPOSITORY = Path(__file__).parents[2]
ADVICE = " (docs/scaling.md explains each rate)"


def test_the_later_layer_wins_and_each_rate_says_where_it_is_from() -> None:
    found = sourced(
        ("measured here", {"image_bytes": 1.0, "caption_bytes": 2.0}), ("mine.yaml", {"caption_bytes": 3.0})
    )
    assert (found.rates.image_bytes, found.rates.caption_bytes) == (1.0, 3.0)
    assert found.rates.captions_per_image == 1.0
    assert {name: found.sources[name] for name in ("image_bytes", "caption_bytes", "captions_per_image")} == {
        "image_bytes": "measured here",
        "caption_bytes": "mine.yaml",
        "captions_per_image": "docs/scaling.md: assumed",
    }


@pytest.mark.parametrize("text", ["image_bytes: 30000\nlsa_words: 12.5\n", '{"image_bytes": 30000, "lsa_words": 12.5}'])
def test_a_file_is_yaml_or_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "rates").write_text(text)
    assert load_rates(tmp_path / "rates") == {"image_bytes": 30_000.0, "lsa_words": 12.5}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("image_bytes: many", "image_bytes: Input should be a valid number, not 'many'"),
        ("image_bytes: '3'", "image_bytes: Input should be a valid number, not '3'"),
        ("image_bytes: true", "image_bytes: Input should be a valid number, not True"),
        ("image_bytes: -1", "image_bytes: Input should be greater than 0, not -1"),
        ("image_bytes: 0", "image_bytes: Input should be greater than 0, not 0"),
        ("image_bytes: .nan", "image_bytes: Input should be a finite number, not nan"),
        ("image_bytes: .inf", "image_bytes: Input should be a finite number, not inf"),
        ("training_share_of_peak: 1.5", "training_share_of_peak: Input should be less than or equal to 1, not 1.5"),
        ("picture_bytes: 3", "picture_bytes: no such rate"),
        ("3: 3", "3: no such rate"),
        ("[1, 2]", "keys and numbers are wanted, such as `image_bytes: 30000`"),
        ("", "keys and numbers are wanted, such as `image_bytes: 30000`"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text(text)
    with pytest.raises(ModeError) as refused:
        load_rates(path)
    assert str(refused.value) == f"{path}: {fault}{ADVICE}"


def test_no_file_and_no_yaml_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rates.yaml"
    with pytest.raises(ModeError, match="no such file"):
        load_rates(path)
    path.write_text("a: [")
    with pytest.raises(ModeError) as refused:
        load_rates(path)
    assert "\n" not in str(refused.value)
    assert "neither YAML nor JSON" in str(refused.value)


def test_no_code_is_run_from_a_file(tmp_path: Path) -> None:
    path, ran = tmp_path / "rates.yaml", tmp_path / "ran"
    path.write_text(f"image_bytes: !!python/object/apply:pathlib.Path.touch [{ran}]")
    with pytest.raises(ModeError, match="neither YAML nor JSON"):
        load_rates(path)
    assert not ran.exists()


def test_measurements_come_back_as_they_were_kept(tmp_path: Path) -> None:
    path = tmp_path / ".mode" / "rates.json"
    assert Measured.load(path) is None
    measured = Measured("cpu", 2e9, {"image_bytes": 5.0, "training_samples_per_second": 300.0})
    measured.save(path)
    assert Measured.load(path) == measured


def test_a_measured_training_counts_for_its_device_alone_and_by_the_models_operations() -> None:
    measured = Measured("h100", 2e9, {"image_bytes": 5.0, "training_samples_per_second": 300.0})
    assert measured.of("h100", 2e9) == measured.values
    assert measured.of("h100", 6e9) == {"image_bytes": 5.0, "training_samples_per_second": 100.0}
    assert measured.of("a100", 2e9) == {"image_bytes": 5.0}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"device": "cpu", "flops_per_pair": 1}',
        '{"device": 3, "flops_per_pair": 1, "rates": {}}',
        '{"device": "cpu", "flops_per_pair": "many", "rates": {}}',
        '{"device": "cpu", "flops_per_pair": 0, "rates": {}}',
        '{"device": "cpu", "flops_per_pair": NaN, "rates": {}}',
        '{"device": "cpu", "flops_per_pair": 1, "rates": []}',
        '{"device": "cpu", "flops_per_pair": 1, "rates": {"image_bytes": NaN}}',
        '{"device": "cpu", "flops_per_pair": 1, "rates": {"unknown": 1}}',
    ],
)
def test_damaged_measurements_are_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rates.json"
    path.write_text(content)
    with pytest.raises(ModeError) as refused:
        Measured.load(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_document_has_every_rate_with_its_default() -> None:
    text = (REPOSITORY / "docs/scaling.md").read_text(encoding="utf-8")
    rows = {
        cells[0].strip("` "): cells[1].strip()
        for line in text.splitlines()
        if line.startswith("| `") and len(cells := line.strip("| ").split(" | ")) == 3
    }
    defaults = Rates().model_dump()
    assert rows.keys() == defaults.keys()
    for name, value in defaults.items():
        shown = rows[name].replace(",", "")
        assert shown == "–" if value is None else float(shown) == value, name


def test_every_rate_is_explained() -> None:
    assert all(field.description for field in Rates.model_fields.values())
    json.dumps(Rates.model_json_schema())  # the sources are data, too
