"""The error a user caused and can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


def printable(text: str) -> str:
    """Text on one line without control characters: what data may hold must not move a terminal's cursor.

    Example:
        >>> printable("grün" + chr(10) + chr(27)) == "grün" + chr(92) + "n" + chr(92) + "x1b"
        True
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def first_fault(error: ValidationError) -> str:
    """The first thing that pydantic has found wrong: its place, if it has one, and what is wrong there."""
    fault = error.errors()[0]
    place = ".".join(map(str, fault["loc"]))
    return ": ".join(filter(None, (place, fault["msg"].removeprefix("Value error, "))))


def in_one_line(error: BaseException, longest: int = 300) -> str:
    """What a library's exception says, on one line and not longer than that; its type's name if it says nothing.

    Example:
        >>> in_one_line(ValueError("bad header," + chr(10) + "   no array"))
        'bad header, no array'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]}..."


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, where libraries go on with traces; its type's name if it is empty.

    Example:
        >>> first_line(RuntimeError("CUDA error" + chr(10) + "Compile with ...")), first_line(KeyError())
        ('CUDA error', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ModeError(Exception):
    """What is wrong and where, in one line; `advice` says what to do.

    Commands print it without a traceback and exit with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(printable(f"{message} ({advice})" if advice else message))


def exit_code_of(program: Callable[[], int | None]) -> int:
    """Run a program to its end: its own exit code, 0 if it gives none.

    After a `ModeError`, whose line goes to standard error, it is that error's.
    """
    try:
        return program() or 0
    except ModeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
