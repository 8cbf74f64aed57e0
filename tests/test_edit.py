from pathlib import Path

import pytest
import yaml

from mode.edit import add_arrival, add_source, add_updates, remove_expert, set_values
from mode.errors import ModeError

TEXT = (Path(__file__).parent.parent / "params.yaml").read_text()


def test_a_new_source_adds_lines_and_changes_none() -> None:
    text, experts = add_source(TEXT, "food", "shards/food", experts=2)
    assert experts == ["expert-4", "expert-5"]
    old, new = TEXT.splitlines(), text.splitlines()
    assert [line for line in new if line in old] == [line for line in old if line in new]
    assert not set(old) - set(new)
    content = yaml.safe_load(text)
    assert content["sources"]["food"] == {"shards": "shards/food", "fine": 32, "coarse": 2}
    assert content["experts"]["expert-5"] == {"source": "food", "cluster": 1}


def test_what_is_added_stands_in_its_section_and_ahead_of_the_next_ones_comment() -> None:
    old = TEXT.replace("shards: glyphs\n", "shards: /data\n\n# The built-in data.\n")
    text, _ = add_arrival(old, "base")
    text, _ = add_updates(text, "expert-2")
    sources = (
        "    shards: /data\n  base-2:\n    shards: /data\n    continues: base\n\n# The built-in data.\n\nglyphs:\n"
    )
    assert sources in text
    updates = text[text.index("\nupdates:") : text.index("\nseed:")].splitlines()
    assert updates[2].startswith("  expert-2-v2: {continues: expert-2, ")
    assert updates[3:] == [
        "",
        "# What every model goes on from: one that is trained here, or a CLIP that is there (`mode params seed`).",
    ]


@pytest.mark.parametrize("comment", ["", "# The built-in data.\n"])
def test_removing_what_was_added_gives_the_old_file(comment: str) -> None:
    old = TEXT.replace("\nglyphs:\n", f"\n{comment}glyphs:\n")
    text, experts = add_source(old, "food", "shards/food", experts=1)
    assert text != old
    assert remove_expert(text, experts[0]) == old


def test_a_source_stays_while_another_expert_needs_it() -> None:
    text, experts = add_source(TEXT, "food", "shards/food", experts=2)
    assert "food" in yaml.safe_load(remove_expert(text, experts[0]))["sources"]
    assert "base" in yaml.safe_load(remove_expert(TEXT, "expert-0"))["sources"]


def test_bad_names_are_refused() -> None:
    with pytest.raises(ModeError, match="source 'base' is there already"):
        add_source(TEXT, "base", "x")
    with pytest.raises(ModeError, match=r"expert-9.*there are: expert-0"):
        remove_expert(TEXT, "expert-9")
    with pytest.raises(ModeError, match=r"sources.No way"):
        add_source(TEXT, "No way", "x")


def test_an_arrival_is_read_as_the_source_that_it_continues() -> None:
    text = set_values(TEXT, {"sources.base.shards": "tars", "sources.base.fine": 32, "sources.base.checksum": True})
    first, name = add_arrival(text, "base")
    second, other = add_arrival(first, "base")
    assert (name, other) == ("base-2", "base-3")
    sources = yaml.safe_load(second)["sources"]
    assert sources["base-2"] == {"shards": "tars", "checksum": True, "continues": "base"}
    assert sources["base"] == yaml.safe_load(text)["sources"]["base"]
    assert [line for line in text.splitlines() if "#" in line] == [line for line in second.splitlines() if "#" in line]
    with pytest.raises(ModeError, match="can arrive in them"):
        add_arrival(TEXT, "base")


def test_an_update_for_each_arrival_that_the_expert_has_not_seen() -> None:
    text = set_values(TEXT, {"sources.base.shards": "tars", "experts.expert-2.lr": 0.5})
    with pytest.raises(ModeError, match=r"expert-2: there are no pairs that it has not seen \(`mode arrivals base`"):
        add_updates(text, "expert-2")
    text, _ = add_arrival(add_arrival(text, "base")[0], "base")
    text, added = add_updates(text, "expert-2")
    assert added == ["expert-2-v2", "expert-2-v3"]
    text, _ = add_arrival(text, "base")
    text, more = add_updates(text, "expert-2-v2")  # any name of the expert
    assert more == ["expert-2-v4"]
    common = {"cluster": 2, "replays": "base", "lr": 0.5}
    assert yaml.safe_load(text)["updates"] == {
        "expert-2-v2": {"continues": "expert-2", "source": "base-2", **common},
        "expert-2-v3": {"continues": "expert-2-v2", "source": "base-3", **common},
        "expert-2-v4": {"continues": "expert-2-v3", "source": "base-4", **common},
    }
    with pytest.raises(
        ModeError, match=r"^expert-2-v4: there are no pairs that it has not seen \(`dvc repro` trains it if"
    ):
        add_updates(text, "expert-2")  # entered twice
    with pytest.raises(ModeError, match="no expert is called 'expert-9'"):
        add_updates(text, "expert-9")
    with pytest.raises(ModeError, match="expert-2-v4 goes on from expert-2-v3"):
        remove_expert(text, "expert-2-v3")
    assert list(yaml.safe_load(remove_expert(text, "expert-2-v4"))["updates"]) == ["expert-2-v2", "expert-2-v3"]


def test_a_source_goes_with_those_that_continue_it() -> None:
    text, (expert,) = add_source(TEXT, "food", "shards/food", experts=1)
    text, _ = add_arrival(text, "food")
    assert "food-2" in yaml.safe_load(text)["sources"]
    assert list(yaml.safe_load(remove_expert(text, expert))["sources"]) == ["base"]
