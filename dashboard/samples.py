"""Trained groups for display."""

from __future__ import annotations

from typing import Any

import redis
from rich.console import Group, RenderableType
from rich.text import Text

from sluice.common.keys import Keys
from sluice.common.monitoring.metric_stream import newest_samples
from sluice.dashboard.terminal import table


def read_samples(client: redis.Redis, keys: Keys, *, count: int, step: int | None = None) -> list[dict[str, Any]]:
    """Return the newest kept groups, newest first, as plain data without tokens; of one trainer step where that is given."""
    newest = newest_samples(client, keys, count=count if step is None else None)
    hidden = {"token_ids", "rollout_logprobs", "policy_logprobs"}  # JSON cannot express them
    return [
        {**sample, "completions": [{name: c[name] for name in c if name not in hidden} for c in sample["completions"]]}
        for sample in newest
        if step is None or sample["step"] == step
    ][:count]


def by_function(completion: dict[str, Any]) -> dict[str, Any]:
    """Return the rewards of a completion by function, and what the functions logged beside them."""
    return {**completion["rewards"], **completion.get("extra", {})}


def render_sample(sample: dict[str, Any]) -> RenderableType:
    """Render one group as a table."""
    head = Text(
        f"step {sample['step']}  group {sample['group']}  policy version {sample['version']}  target {sample['target']}",
        style="bold",
    )
    rows = [
        {
            "reward": str(completion["reward"]),
            "advantage": f"{completion['advantage']:+.3f}",
            "by function": " ".join(f"{name}={value}" for name, value in by_function(completion).items()),
            "tokens": completion["tokens"],
            "end": completion["finish_reason"],
            "completion": completion["text"],
        }
        for completion in sample["completions"]
    ]
    return Group(head, Text(str(sample["prompt"])), table(rows))
