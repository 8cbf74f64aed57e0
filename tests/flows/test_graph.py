"""DVC's graph as the flows see it."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flows.graph import experts_of, first, in_order, make_pipeline, read, results, stage_of, upto
from mode.errors import ModeError
from tests.waiting import LONG

DIAMOND = make_pipeline({"report": ["a", "b"], "a": ["seed"], "b": ["seed"], "seed": []})


def test_order_follows_needs_and_keeps_the_given_order_among_equals() -> None:
    assert in_order(DIAMOND) == ["seed", "a", "b", "report"]


def test_upto_keeps_what_the_target_needs_directly_or_not() -> None:
    assert in_order(upto(DIAMOND, ["b"])) == ["seed", "b"]
    assert set(upto(DIAMOND, ["report"])) == set(DIAMOND)


def test_unknown_target_is_named_with_those_there_are() -> None:
    with pytest.raises(ModeError, match=r"no stage is called 'c'.*seed, a, b, report"):
        upto(DIAMOND, ["c"])


def test_empty_pipeline() -> None:
    assert in_order(make_pipeline({})) == []


@given(st.lists(st.sets(st.integers(0, 7)), min_size=8, max_size=8))
def test_every_stage_comes_after_what_it_needs(found: list[set[int]]) -> None:
    edges = {str(stage): [str(need) for need in needs if need < stage] for stage, needs in enumerate(found)}
    order = in_order(make_pipeline(dict(reversed(edges.items()))))
    assert sorted(order) == sorted(edges)
    assert all(order.index(need) < order.index(stage) for stage, needs in edges.items() for need in needs)


def test_some_stages_first_with_what_they_need() -> None:
    needs = {"data": [], "seed": ["data"], "dense": ["seed"], "a": ["seed"], "b": ["seed"], "c": ["seed"]}
    pipeline = make_pipeline({**needs, "x": ["a", "b"]})
    assert in_order(first(pipeline, ["c", "a", "unknown"])) == ["data", "seed", "c", "a", "dense", "b", "x"]
    assert first(pipeline, ["c"]).edges == pipeline.edges
    assert in_order(first(pipeline, [])) == in_order(pipeline)
    # Also where the others could begin earlier.
    needs = {"data": [], "vectors": ["data"], "clusters": ["vectors"], "dense": ["data"], "a": ["clusters"]}
    assert in_order(first(make_pipeline(needs), ["a"])) == ["data", "vectors", "clusters", "a", "dense"]


def test_stages_of_a_project_in_the_order_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # as a worker does: DVC's addresses are relative
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], check=True)
    expert = {"foreach": "${experts}", "do": {"cmd": "touch ${key}", "deps": ["seed"], "outs": ["${key}"]}}
    stages = {"expert": expert, "seed": {"cmd": "touch seed", "outs": ["seed"]}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    (tmp_path / "params.yaml").write_text("experts: {expert-2: {}, expert-10: {}, expert-1: {}}")
    pipeline, stale = read(tmp_path)
    assert experts_of(pipeline) == ["expert-2", "expert-10", "expert-1"]
    assert in_order(pipeline)[0] == "seed"
    assert stale == set(pipeline)


def test_an_update_has_a_stage_of_its_own() -> None:
    pipeline = make_pipeline({"seed": [], "expert@expert-0": ["seed"], "update@expert-0-v2": ["expert@expert-0"]})
    assert experts_of(pipeline) == ["expert-0", "expert-0-v2"]
    assert stage_of(pipeline, "expert-0") == "expert@expert-0"
    assert stage_of(pipeline, "expert-0-v2") == "update@expert-0-v2"
    assert stage_of(pipeline, "expert-9") == "expert@expert-9"


def test_stages_that_need_each_other_are_refused(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "dvc.yaml").write_text("stages: {a: {cmd: a, deps: [b], outs: [a]}, b: {cmd: b, deps: [a], outs: [b]}}")
    with pytest.raises(ModeError, match=r"DVC: .*both a dependency and an output"):
        read(tmp_path)


def test_a_list_of_locks_that_a_killed_dvc_left_torn_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def dvc(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert dvc("init", "--no-scm", "-q").returncode == 0
    (tmp_path / "dvc.yaml").write_text("stages: {a: {cmd: touch a, outs: [a]}}")
    torn = tmp_path / ".dvc/tmp/rwlock"
    torn.write_text("")
    assert "rwlock" in dvc("repro").stderr
    pipeline, stale = read(tmp_path)
    assert list(pipeline) == ["a"]
    assert stale == {"a"}
    assert dvc("repro").returncode == 0

    torn.write_text('{"write": {}, "read": {}}')
    read(tmp_path)
    assert torn.is_file()


LOCK = """\
schema: '2.0'
stages:
  seed:
    cmd: train
    outs:
    - path: models/seed
      md5: 0123456789abcdef0123456789abcdef.dir
"""


@pytest.mark.parametrize("cut", ["  see", "  seed:", "    cmd", "    - path: models/seed\n      md"])
def test_outputs_are_read_again_where_dvc_has_written_half_of_its_file(tmp_path: Path, cut: str) -> None:
    half = LOCK[: LOCK.index(cut) + len(cut)]
    (tmp_path / "dvc.lock").write_text(half)
    with pytest.raises(ModeError, match=r"dvc\.lock: damaged: no list of stages \(.*\)$"):
        results(tmp_path, patience=0)
    with ThreadPoolExecutor() as pool:
        read_again = pool.submit(results, tmp_path, LONG)
        (tmp_path / "whole").write_text(LOCK)
        (tmp_path / "whole").replace(tmp_path / "dvc.lock")  # at once: an empty file has no stages, and is one to read
        outs = [{"path": "models/seed", "md5": "0123456789abcdef0123456789abcdef.dir"}]
        assert read_again.result() == {"seed": outs}


def test_a_project_without_results_has_none(tmp_path: Path) -> None:
    assert results(tmp_path) == {}
    (tmp_path / "dvc.lock").write_text("")  # DVC is about to write it
    assert results(tmp_path) == {}
