"""The book is what definitions and results say, and nothing else."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mode.cli import main
from mode.errors import ModeError
from mode.experiments.book import html_page, markdown, open_book, write_book
from mode.paths import Paths
from tests.experiments.conftest import COMMIT, lines_of, make_project, save
from tests.reporting.test_page import Page

REPOSITORY = Paths(Path(__file__).parent.parent.parent)


def tables(text: str) -> list[list[list[str]]]:
    """Tables of Markdown: lines of cells, the first the heads."""
    found = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    return [[line.strip("| ").split(" | ") for line in part.splitlines() if "---" not in line] for part in found]


def everything(paths: Paths) -> dict[str, bytes]:
    files = [paths.book, paths.book_page, *sorted(paths.book_figures.iterdir())]
    return {str(path.relative_to(paths.root)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A project with its book, over the figure of a former one."""
    project = make_project(tmp_path_factory.mktemp("book"))
    project.book_figures.mkdir(parents=True)
    (project.book_figures / "former.svg").write_text("")
    assert write_book(project) == [project.book, project.book_figures, project.book_page]
    return project


def text_of(project: Paths) -> str:
    """The Markdown without its figures, which take long to draw."""
    return markdown(open_book(project), (), Path("figures"))


def test_the_book_has_every_figure(written: Paths) -> None:
    text = written.book.read_text()
    overview, retrieval, of_retrieval, length, of_length = tables(text)
    assert [line[1:] for line in overview[1:]] == [
        ["Table 4", "MoDE-4 better than dense", "+2.00", "better (one seed)", "holds"],
        ["Table 4", "MoDE-4 better than dense (flickr image recall@1)", "+1.00", "undecided (one seed)", "undecided"],
        ["–", "MoDE 1x better than dense 1x", "-2.99", "worse", "does not hold"],
        ["–", "MoDE 8x better than dense 8x", "+2.01", "better", "holds"],
        ["–", "MoDE 8x against dense 1x", "+12.01", "better", "–"],
    ]
    assert overview[1][0] == "[Retrieval](#experiment-retrieval)"
    assert retrieval[1:] == [
        ["dense", "50.0", "25.0", "1 k, 1.00×", "1 G, 1.00×", "1 min 40 s, 1.00×", "1", "1"],
        ["MoDE-4", "52.0", "26.0", "1.5 k, 1.50×", "1.5 G, 1.50×", "2 min 30 s, 1.50×", "4", "1"],
    ]
    assert of_retrieval[1][2:] == [
        *("+2.00", "2.00 to 2.00", "better (one seed)", "holds", "43.1 against 41.4"),
        "1 seed × 2 tasks; interval over tasks alone",
    ]
    assert length[2] == ["MoDE 1x", "47.1 ± 0.1", "1.5 k, 1.50×", "1.5 G, 1.50×", "2 min 30 s, 1.50×", "4", "3"]
    assert length[3] == ["dense 8x", "60.1 ± 0.1", "8 k, 8.00×", "8 G, 8.00×", "13 min 20 s, 8.00×", "1", "3"]
    assert of_length[2] == [
        *("MoDE 8x minus dense 8x", "+2.01", "2.00 to 2.02", "better", "holds", "0.01", "3 seeds × 2 tasks")
    ]
    # Of one seed there is no deviation, and nothing was known before of lengths: no column is empty.
    assert {"the paper", "sd over seeds"} - set(of_retrieval[0]) == {"sd over seeds"}
    assert {"known before", "sd over seeds"} - set(of_length[0]) == {"known before"}
    for sentence in (
        "MoDE-4 better than dense: the paper's ordering holds here, as far as one seed tells (+2.00 points,",
        "MoDE 1x better than dense 1x: the expected ordering does not hold here (-2.99 points,",
        "whether the paper's ordering holds here is undecided",
        "- command: `mode experiment length`",
        f"- commit of the pipeline: `{COMMIT}`",
        "- random seeds: 0, 1, 2",
        "Once is the demo's training.",
        "- `mode experiment waiting`: Number of experts (Figure 3). Does accuracy grow with n?",
    ):
        assert sentence in text


def test_figures_are_there_and_linked_and_no_others(written: Paths) -> None:
    linked = re.findall(r"\]\((\S+\.svg)\)", written.book.read_text())
    assert linked == [
        f"figures/paper/{name}{end}.svg" for name in ("retrieval", "length") for end in ("", "-differences")
    ]
    for link in linked:
        assert ET.parse(written.book.parent / link).getroot().tag.endswith("svg")
    assert len(list(written.book_figures.iterdir())) == len(linked)


def test_the_page_says_the_same_and_loads_nothing(written: Paths) -> None:
    text = written.book_page.read_text()
    page = Page(text)
    assert all(address.startswith(("data:image/svg+xml;base64,", "#experiment-")) for address in page.loaded)
    assert {address[1:] for address in page.loaded if address.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    pictures = [address for address in page.loaded if address.startswith("data:")]
    assert len(pictures) == len(set(pictures)) == 8  # two of each experiment, for a light and a dark page
    for cell in ("+12.01", "50.1 ± 0.1", "better (one seed)", "MoDE 8x minus dense 8x", COMMIT):
        assert cell in text
    assert 'title="1500.0">1.5 k, 1.50×' in text  # to sort by


def test_the_command_writes_the_same_bytes_of_the_same_results(
    written: Paths, project: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project.root)
    with pytest.raises(SystemExit, match="0"):
        main(["book"])
    assert capsys.readouterr().out == "wrote docs/paper.md\nwrote docs/figures/paper\nwrote reports/paper.html\n"
    assert everything(project) == everything(written)


def test_times_of_several_machines_are_not_set_beside_each_other(project: Paths) -> None:
    assert "| training time |" in text_of(project)
    frame = lines_of("retrieval", ["m"], [0], recall=True)
    frame.loc[frame["arm"] == "dense", "device"] = "NVIDIA H100"
    save(project.experiment_results, frame)
    frame = lines_of("length", ["x1", "x8"], [0, 1, 2])
    frame.loc[frame["run"] == "x8", "device"] = "NVIDIA H100"
    save(project.experiment_results, frame)
    text = text_of(project)
    assert "training time" not in text
    assert "training FLOPs" in text
    assert "2 cores; NVIDIA H100" in text


def test_missing_seeds_and_figures_are_told(project: Paths) -> None:
    frame = lines_of("length", ["x1", "x8"], [0, 1])
    gone = (frame["arm"] == "ensemble") & (frame["task"] == "chess") & (frame["random_seed"] == 1)
    save(project.experiment_results, frame[~(gone & (frame["run"] == "x8"))])
    text = text_of(project)
    assert "- Without results as yet: random seed 2." in text
    assert "- MoDE 8x, zero-shot: 1 task left out that not every random seed has." in text
    assert "2 seeds × 2 tasks; 1 without a pair; 1 dropped, which one row alone has" in text


def test_a_book_without_results_lists_what_may_be_run(project: Paths) -> None:
    for path in project.experiment_results.iterdir():
        path.unlink()
    write_book(project)
    assert "No experiment has results yet." in project.book.read_text()
    assert project.book.read_text().count("- `mode experiment ") == 3
    Page(project.book_page.read_text())


def test_words_of_a_definition_are_text(project: Paths) -> None:
    evil = "<script>alert(1)</script> | {{ x }}"
    file = project.experiments / "retrieval.yaml"
    text = file.read_text().replace("title: Retrieval", f"title: '{evil}'").replace("MoDE-4", f"'{evil}'")
    file.write_text(text + f"note: '{evil}'\n")
    book = open_book(project)
    text = text_of(project)
    assert "<script>" not in text
    assert all(len(line) == len(table[0]) for table in tables(text.replace(r"\|", "")) for line in table)
    page = html_page(book, {}, {})
    Page(page)
    assert evil not in page
    assert page.count("<script>") == 1  # its own


@pytest.mark.parametrize("name", ["length.parquet", "length.json", "length.yaml"])
def test_a_damaged_file_is_one_line_and_nothing_is_written(
    project: Paths, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project.experiments if name.endswith("yaml") else project.experiment_results
    (folder / name).write_bytes(b"\x00\xff: [")
    monkeypatch.chdir(project.root)
    with pytest.raises(SystemExit, match="1"):
        main(["book"])
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert name in error
    assert not project.book.exists()
    assert not project.book_page.exists()


def test_results_of_no_experiment_and_names_that_are_none_are_refused(project: Paths) -> None:
    (project.experiments / "length.yaml").rename(project.experiments / "long.yaml")
    with pytest.raises(ModeError, match=r"length\.parquet: no experiment is called 'length'"):
        open_book(project)
    (project.experiments / "long.yaml").rename(project.experiments / "A b.yaml")
    with pytest.raises(ModeError, match=r"A b\.yaml: no name for an experiment"):
        open_book(project)


def test_a_project_without_definitions_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModeError, match="no experiment is defined there"):
        write_book(Paths(tmp_path))


@pytest.mark.skipif(not list(REPOSITORY.experiment_results.glob("*.parquet")), reason="no results yet")
def test_the_book_of_this_repository_is_what_the_command_writes(tmp_path: Path) -> None:
    """So nobody edits it: what is to be said stands in a definition's note, and figures come from results."""
    copy = Paths(tmp_path)
    copy.experiments.symlink_to(REPOSITORY.experiments, target_is_directory=True)
    write_book(copy)
    assert REPOSITORY.book.read_text(encoding="utf-8") == copy.book.read_text(encoding="utf-8"), "run `mode book`"
    drawn = {path.name for path in copy.book_figures.iterdir()}
    assert {path.name for path in REPOSITORY.book_figures.iterdir()} == drawn
