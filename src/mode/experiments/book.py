"""The book: every experiment with its tables, figures, command and commit, from definitions and results alone."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mode.errors import ModeError
from mode.experiments import wording
from mode.experiments.chapter import Chapter, work_out
from mode.experiments.definition import Experiment, load_experiment
from mode.experiments.drawing import differences_figure, experiment_figure
from mode.experiments.findings import read_findings
from mode.experiments.wording import Cell, Sheet
from mode.files import write_aside
from mode.paths import Paths
from mode.reporting.plots import svg, theme
from mode.reporting.rendering import data_url, render
from mode.results import natural

#: What a figure shows, by the end of its file's name.
FIGURES = {
    "": "Means over tasks and random seeds; bars are the standard deviation over random seeds.",
    "-differences": "What one row has more than another, paired by random seed and task, with the 95% interval.",
}


class Book(NamedTuple):
    """All experiments, those of the paper first.

    Attributes:
        chapters: those with results.
        waiting: definitions without, by name.
    """

    chapters: list[Chapter]
    waiting: dict[str, Experiment]


def open_book(paths: Paths) -> Book:
    """Read definitions and results, and work out what came of them.

    Raises:
        ModeError: there is no definition, or a file is damaged, not what it should be, or left over.
    """
    definitions = {path.stem: load_experiment(path) for path in sorted(paths.experiments.glob("*.yaml"))}
    if not definitions:
        raise ModeError(f"{paths.experiments}: no experiment is defined there", "docs/experiments.md says how")
    results = {path.stem: path for path in sorted(paths.experiment_results.glob("*.parquet"))}
    for name, path in results.items():
        if name not in definitions:
            raise ModeError(f"{path}: no experiment is called '{name}'", "remove it, or write its definition")
    order = sorted(definitions, key=lambda name: _place(name, definitions[name]))
    chapters = [work_out(name, definitions[name], read_findings(results[name])) for name in order if name in results]
    return Book(chapters, {name: definitions[name] for name in order if name not in results})


def write_book(paths: Paths) -> list[Path]:
    """Write `docs/paper.md` with its figures, and the page; returns the three paths. Raises as `open_book`.

    Everything is worked out and drawn before anything is written. The folder of figures is replaced as a whole.
    """
    book = open_book(paths)
    # On white, for a reader of Markdown may have a dark page.
    day, night = _drawn(book.chapters, dark=False, background="white"), _drawn(book.chapters, dark=True)
    text = markdown(book, list(day), paths.book_figures.relative_to(paths.book.parent))
    page = html_page(book, day, night)
    with write_aside(paths.book_figures) as folder:
        folder.mkdir()
        for name, drawing in day.items():
            (folder / f"{name}.svg").write_text(drawing, encoding="utf-8")
    for path, content in ((paths.book, text), (paths.book_page, page)):
        with write_aside(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return [paths.book, paths.book_figures, paths.book_page]


def markdown(book: Book, drawn: Collection[str], folder: Path) -> str:
    """The book as Markdown (`templates/paper.md`).

    Args:
        book: the experiments.
        drawn: names of the figures that there are, see `FIGURES`.
        folder: where they lie, as links have it.
    """
    text = render(
        "paper.md",
        book=book,
        wording=wording,
        inline=_inline,
        code=_code,
        table=_markdown_table,
        drawn=drawn,
        folder=folder.as_posix(),
        captions=FIGURES,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"  # what a section lacks leaves no gap


def html_page(book: Book, day: Mapping[str, str], night: Mapping[str, str]) -> str:
    """The book as one page that loads nothing (`templates/paper.html`).

    Args:
        book: the experiments.
        day, night: SVG text of the figures by name, for a light and for a dark page.
    """
    return render(
        "paper.html",
        title="The experiments",
        book=book,
        wording=wording,
        captions=FIGURES,
        drawings={name: (data_url(day[name]), data_url(night[name])) for name in day},
    )


def _drawn(chapters: Sequence[Chapter], dark: bool, background: str = "none") -> dict[str, str]:
    """SVG text of every figure that there is something to draw for, by the name of its file."""
    with theme(dark):
        figures = {
            f"{chapter.name}{end}": figure
            for chapter in chapters
            for end, figure in (("", experiment_figure(chapter)), ("-differences", differences_figure(chapter.claims)))
        }
        return {name: svg(figure, background) for name, figure in figures.items() if figure is not None}


def _place(name: str, definition: Experiment) -> tuple[bool, list[tuple[int, int | str]]]:
    """Where an experiment stands: those of the paper first, in the order of its items."""
    return not definition.item, natural(f"{definition.item or ''} {name}")


def _markdown_table(sheet: Sheet) -> str:
    """A table; lines without their line break at the end."""
    lines = [[_cell(cell) for cell in line] for line in sheet.lines]
    heads, rule = [_inline(head) for head in sheet.heads], ["---"] * len(sheet.heads)
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rule, *lines])


def _cell(cell: Cell) -> str:
    text = _inline(cell.text).replace("|", r"\|")
    return f"[{text}](#{cell.link})" if cell.link else text


def _inline(text: str) -> str:
    """Text on one line without markup of HTML; Markdown in it stays what it is."""
    return html.escape(" ".join(text.split()), quote=False)


def _code(text: str) -> str:
    """Text on one line for between backticks."""
    return " ".join(text.split()).replace("`", "'")
