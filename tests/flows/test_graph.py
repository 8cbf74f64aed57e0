"""DVC's graph as the flows see it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.graph import Graph, read
from mode.errors import ModeError

DIAMOND = {"report": ["a", "b"], "a": ["seed"], "b": ["seed"], "seed": []}


def test_order_follows_needs_and_keeps_the_given_order_among_equals() -> None:
    assert list(Graph.of(DIAMOND).needs) == ["seed", "a", "b", "report"]


def test_before_is_transitive() -> None:
    assert Graph.of(DIAMOND).before("report") == {"a", "b", "seed"}
    assert Graph.of(DIAMOND).before("seed") == set()


def test_upto_keeps_what_the_target_needs() -> None:
    assert list(Graph.of(DIAMOND).upto(["b"]).needs) == ["seed", "b"]


def test_only_keeps_needs_among_the_chosen() -> None:
    part = Graph.of(DIAMOND).only(["a", "report"])
    assert part.needs == {"a": frozenset(), "report": frozenset({"a"})}


def test_unknown_target_is_named_with_those_there_are() -> None:
    with pytest.raises(ModeError, match=r"no stage is called 'c'.*seed, a, b, report"):
        Graph.of(DIAMOND).upto(["c"])


def test_empty_pipeline() -> None:
    assert Graph.of({}).needs == {}


def test_circle_is_refused() -> None:
    with pytest.raises(ModeError, match="a, b"):
        Graph.of({"a": ["b"], "b": ["a"], "c": []})


@given(st.lists(st.sets(st.integers(0, 7)), min_size=8, max_size=8))
def test_every_stage_comes_after_what_it_needs(found: list[set[int]]) -> None:
    edges = {str(stage): [str(need) for need in needs if need < stage] for stage, needs in enumerate(found)}
    order = list(Graph.of(dict(reversed(edges.items()))).needs)
    assert sorted(order) == sorted(edges)
    assert all(order.index(need) < order.index(stage) for stage, needs in edges.items() for need in needs)


def test_some_stages_first_with_what_they_need() -> None:
    pipeline = Graph.of(
        {"data": [], "seed": ["data"], "dense": ["seed"], "a": ["seed"], "b": ["seed"], "c": ["seed"], "x": ["a", "b"]}
    )
    assert list(pipeline.first(["c", "a", "unknown"]).needs) == ["data", "seed", "c", "a", "dense", "b", "x"]
    assert pipeline.first(["c"]).needs == pipeline.needs
    # Also where the others could begin earlier.
    deep = Graph.of({"data": [], "vectors": ["data"], "clusters": ["vectors"], "dense": ["data"], "a": ["clusters"]})
    assert list(deep.first(["a"]).needs) == ["data", "vectors", "clusters", "a", "dense"]
    assert list(pipeline.first([]).needs) == list(pipeline.needs)


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
    assert list(pipeline.needs) == ["a"]
    assert stale == {"a"}
    assert dvc("repro").returncode == 0

    torn.write_text('{"write": {}, "read": {}}')
    read(tmp_path)
    assert torn.is_file()
