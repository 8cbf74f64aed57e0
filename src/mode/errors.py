"""The error a user caused and can mend."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text on one line without control characters: what data may hold must not move a terminal's cursor.

    Example:
        >>> printable("grün" + chr(10) + chr(27)) == "grün" + chr(92) + "n" + chr(92) + "x1b"
        True
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class ModeError(Exception):
    """What is wrong and where, in one line; `advice` says what to do.

    Commands print it without a traceback and exit with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(printable(f"{message} ({advice})" if advice else message))
