"""Text of a row, a completion or a user's code as a terminal may show it.

A terminal acts on control characters: they clear its screen, write its clipboard, rename its window or hide text. Everything that
such a terminal would not show as itself is escaped, the same in a terminal, a pipe and a log file.
"""

from __future__ import annotations

import logging
import traceback
import unicodedata
from functools import cache
from typing import Any

_HIDDEN = {"Cc", "Cs", "Zl", "Zp"}
"""Categories of control characters, lone surrogates, line and paragraph separators."""
_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
"""Bidirectional classes of characters that change the order in which others are shown."""


@cache
def _shown(character: str) -> str:
    if character in "\n\t":
        return character
    is_hidden = unicodedata.category(character) in _HIDDEN or unicodedata.bidirectional(character) in _TURNS
    return character.encode("unicode_escape").decode() if is_hidden else character


def printable(text: str) -> str:
    r"""Return the text with every control character but newline and tab escaped.

    >>> printable("say \x1b[2J")
    'say \\x1b[2J'
    """
    return text if text.isprintable() else "".join(map(_shown, text))


class _EscapedRecord(logging.LogRecord):
    """A log record whose message and traceback are printable."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0]:  # a formatter takes the text that is already there
            self.exc_text = printable("".join(traceback.format_exception(*self.exc_info)).rstrip("\n"))

    def getMessage(self) -> str:
        return printable(super().getMessage())


def escape_log_records() -> None:
    """Escape what every logger of this process writes from now on: messages quote rows, completions and users' errors."""
    logging.setLogRecordFactory(_EscapedRecord)
