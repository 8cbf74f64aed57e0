"""What several stages read of a project."""

from __future__ import annotations

from pathlib import Path

import pytest

from mode.data.shards.account import FileReport, IndexReport
from mode.errors import ModeError
from mode.params import parse_params
from mode.stages.project import Counted, Project, counted


@pytest.fixture
def project(tmp_path: Path) -> Project:
    content = {"sources": {"base": {"shards": "shards"}}, "experts": {}, "model": {"name": "ViT-B-32"}}
    return Project(tmp_path, parse_params(content))


def test_what_an_index_has_counted(project: Project) -> None:
    assert counted(project, "base") is None
    project.index("base").mkdir(parents=True)
    files = [
        FileReport("a.tar", images=2, pairs=3, bad={"empty-caption": 1}, read_bytes=9),
        FileReport("b.tar", images=1, pairs=1, bad={"empty-caption": 1}, read_bytes=9, filtered={"width > 9": 4}),
    ]
    IndexReport(files).save(project.index("base"))
    assert counted(project, "base") == Counted(3, 4, {"empty-caption": 2, "width > 9": 4})


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"images": 3, "pairs": 2, "bad": {}}', '{"images": "3", "pairs": 4, "bad": {}}',
     '{"images": 0, "pairs": 0, "bad": {}}', '{"images": 3, "pairs": 4, "bad": {"a": "b"}}',
     '{"images": 3, "pairs": 4, "bad": 1}', "\xff", "[" * 100_000],
)  # fmt: skip
def test_a_damaged_report_is_one_line(project: Project, content: str) -> None:
    project.index("base").mkdir(parents=True)
    (project.index("base") / "report.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModeError, match=r"report\.json: not the report of an index \(index the source again\)$"):
        counted(project, "base")
