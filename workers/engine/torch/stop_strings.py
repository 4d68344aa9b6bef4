"""Stop texts: whether the newest token of a completion completes one. The engine's only use of a tokenizer.

A stop text need not end at a token's end, and its characters may be spread over many tokens, so the last tokens are decoded
together. A text that was complete before `min_tokens` ends nothing later: the newest token has to complete one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_CONTEXT_TOKENS = 8
"Decoded beside the tokens that may hold the stop text: a decoder may treat the first ones of a text differently."


class StopStrings:
    """The stop texts of one row, and the end of its completion."""

    def __init__(self, stop: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self._stop = tuple(stop)
        self._decode = decode
        self._window = max(len(text.encode()) for text in stop) + _CONTEXT_TOKENS  # a token holds at least one byte
        self._tail: list[int] = []

    def completed_by(self, token: int) -> bool:
        """Whether the completion, with this token appended, has just come to a stop text."""
        before = self._tail[-self._window :]
        self._tail = [*before, token]
        text = self._decode(self._tail)
        found = [stop for stop in self._stop if stop in text]
        if not found:
            return False
        earlier = self._decode(before) if before else ""
        return any(text.count(stop) > earlier.count(stop) for stop in found)
