"""What an evaluation keeps of each completion besides its scores: its answer, its length, whether it was cut off."""

from __future__ import annotations

import re
from typing import Any

import xxhash

from sluice.workers.rewards.math_reward import parse_number

LONGEST_ANSWER = 200
"""Characters; of a longer answer a digest is kept: answers are only compared."""


def evaluation_fields(completions: list[dict[str, Any]], *, answer: str) -> dict[str, Any]:
    """Return lists with one entry per completion (wire form): `answers` (text or None), `lengths` in tokens, `clipped`.

    answer: regular expression with a group, `answer` of the evaluation set.
    """
    return {
        "answers": [read_answer(c["text"], answer) for c in completions],
        "lengths": [len(c["token_ids"]) for c in completions],
        "clipped": [c["finish_reason"] == "length" for c in completions],
    }


def read_answer(text: str, pattern: str) -> str | None:
    """Return the first group of the first match, normalised so that equal answers are equal text; None without a match.

    A number is parsed as MathReward does: "42", " $42.0" and "42.00" are one answer. In other text only the spacing is
    normalised, and over `LONGEST_ANSWER` characters it is replaced by its digest.
    """
    found = re.search(pattern, text)
    if found is None or found.group(1) is None:
        return None
    number = parse_number(found.group(1))
    if number is not None:
        return repr(number + 0.0)  # -0.0 is 0.0
    text = " ".join(found.group(1).split())
    if len(text) > LONGEST_ANSWER:
        return f"xxh3:{xxhash.xxh3_128_hexdigest(text.encode())}"
    return text or None
