"""What docs/guide.md says of other programs and of params.yaml."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import open_clip_train.params

from mode.params import explanations

GUIDE = Path(__file__).parents[1] / "docs/guide.md"
#: torchrun's.
NOT_ITS = {"--nproc_per_node", "--nnodes"}


def test_arguments_of_open_clip_and_the_keys_in_their_place_exist() -> None:
    section = GUIDE.read_text(encoding="utf-8").partition("### Coming from open_clip_train\n")[2].partition("\n### ")[0]
    rows = [line.split("|")[1:4] for line in section.splitlines() if line.startswith("| ")][1:]
    parser = Path(open_clip_train.params.__file__).read_text(encoding="utf-8")
    theirs = set(re.findall(r"""["'](--[a-z0-9-]+)["']""", parser))
    named = set(re.findall(r"--[a-z][a-z0-9_-]+", section)) - NOT_ITS
    assert len(named) > 40
    assert named <= theirs
    known = [key for key, _ in explanations()]
    keys = [key for _, ours, _ in rows for key in re.findall(r"`([^`]+)`", ours)]
    assert len(keys) > 30
    assert [key for key in keys if not any(fnmatchcase(key, each) for each in known)] == []
