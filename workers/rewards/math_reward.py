"""Numeric correctness: 1 for the right number in <answer> tags, partial credit for naming it elsewhere."""

from __future__ import annotations

import math
import re

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_DECORATION = re.compile(r"[$,\s]")


class MathReward:
    """Compares the first `<answer>...</answer>` of a response with a numeric target.

    1. The target, stripped of `$`, commas and whitespace, must be a finite number, else 0.0.
    2. The first answer, stripped the same way, within `tolerance` of it (exclusive): 1.0.
    3. The target's digits anywhere outside the answers, also inside a longer number: `partial_credit`.
    4. Otherwise 0.0.

    Tags are case-sensitive; only the first answer counts, so that listing guesses does not pay.
    """

    def __init__(self, tolerance: float = 1e-6, partial_credit: float = 0.1) -> None:
        self.tolerance = tolerance
        self.partial_credit = partial_credit

    def __call__(self, prompt: object, response: str, target: object) -> float:
        expected = parse_number(target)
        if expected is None:
            return 0.0
        first = _ANSWER.search(response)
        answer = parse_number(first.group(1)) if first else None
        if answer is not None and abs(expected - answer) < self.tolerance:
            return 1.0
        digits = str(int(expected)) if expected.is_integer() else str(expected)
        return self.partial_credit if digits in _ANSWER.sub("", response) else 0.0


def parse_number(text: object) -> float | None:
    """Return a finite number, or None."""
    try:
        number = float(_DECORATION.sub("", str(text)))
    except ValueError:
        return None
    return number if math.isfinite(number) else None
