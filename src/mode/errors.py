"""The error a user caused and can mend."""

from __future__ import annotations


class ModeError(Exception):
    """What is wrong and where, in one line; `advice` says what to do.

    Commands print it without a traceback and exit with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(f"{message} ({advice})" if advice else message)
