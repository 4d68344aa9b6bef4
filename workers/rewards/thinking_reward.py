"""Format: does the response think between <think> and </think>?"""

from __future__ import annotations

import re

_THOUGHT = re.compile(r"<\s*think\s*>(.*?)<\s*/\s*think\s*>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<\s*/?\s*think\s*>", re.IGNORECASE)


class ThinkingReward:
    """`full_reward` for any closed, non-blank thought; `partial_reward` for any think tag, open or close; else 0.0.

    Case and spaces inside the tags do not matter.
    """

    def __init__(self, partial_reward: float = 0.2, full_reward: float = 1.0) -> None:
        self.partial_reward = partial_reward
        self.full_reward = full_reward

    def __call__(self, prompt: object, response: str, target: object = None) -> float:
        if any(thought.group(1).strip() for thought in _THOUGHT.finditer(response)):
            return self.full_reward
        return self.partial_reward if _TAG.search(response) else 0.0
