from pathlib import Path

import pytest
import yaml

from mode.edit import add_source, remove_expert
from mode.errors import ModeError
from mode.params import load_params

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


def test_removing_what_was_added_gives_the_old_file(tmp_path: Path) -> None:
    text, experts = add_source(TEXT, "food", "shards/food", experts=1)
    removed = remove_expert(text, experts[0])
    (tmp_path / "old.yaml").write_text(TEXT)
    (tmp_path / "new.yaml").write_text(removed)
    assert load_params(tmp_path / "new.yaml") == load_params(tmp_path / "old.yaml")


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
