"""A real rollout worker with rollout.engine=vllm: it generates, takes a new policy, and ends itself when its engine dies.

Runs where vLLM is importable: `scripts/test_vllm`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from fleet import Fleet
from harness import wait_for

from sluice.common.models.causal_lm import load_pretrained, load_weights
from sluice.common.models.logprobs import score_sequences
from sluice.common.models.lora import PREFIX, merge_adapter
from sluice.common.monitoring.heartbeats import read_heartbeats
from sluice.common.policies.store import PolicyStore
from sluice.common.serialization import decode
from sluice.common.types import Completion, Task
from sluice.workers.context import HUNG_EXIT_CODE

PATCH = """
from pathlib import Path
from sluice.workers.engine.vllm.core import VllmCore
step = VllmCore.step
def odd(self):
    if Path("die").exists():
        raise RuntimeError("an illegal memory access, say")
    return step(self)
VllmCore.step = odd
"""


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: scripts/test_vllm runs it")
def test_a_vllm_worker_generates_follows_the_policy_and_ends_when_its_engine_dies(
    make_fleet: Callable[..., Fleet],
) -> None:
    fleet = make_fleet(
        rollout={"engine": "vllm", "concurrency": 4, "kv_cache_mib": 64},
        lease={"running_s": 6.0, "queued_s": 3.0, "max_attempts": 3},
    )
    store = PolicyStore(fleet.ledger.client, fleet.ledger.keys, fleet.config.policy_store)

    def groups_of(version: int) -> list[str]:
        """Groups that the worker generates when it serves a version."""
        served = store.manifest(version).digest[:12]
        heartbeats = lambda: read_heartbeats(fleet.ledger.client, fleet.ledger.keys).values()  # noqa: E731
        wait_for(lambda: any(beat["digest"] == served for beat in heartbeats()), timeout=60, what="the policy")
        assert {beat["version"] for beat in heartbeats()} == {version}
        group_ids = fleet.admit(4)
        fleet.tick_until(lambda: fleet.has(group_ids, "rollout"), timeout=30, what=f"groups of version {version}")
        return group_ids

    with fleet.odd("rollout", patch=PATCH) as process:
        first = groups_of(0)
        _, tensors = store.fetch(0)
        rng = torch.Generator().manual_seed(1)
        changed = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=rng) for name, tensor in tensors.items()}
        store.publish(1, changed, step=1, parent=0)
        second = groups_of(1)
        adapter = {
            f"{PREFIX}{name.removesuffix('.weight')}.lora_{side}.weight": 0.1 * torch.randn(shape, generator=rng)
            for name, tensor in tensors.items()
            if name.endswith("_proj.weight")
            for side, shape in (("A", (4, tensor.shape[1])), ("B", (tensor.shape[0], 4)))
        }
        store.publish(2, adapter, step=2, parent=1, adapter_scale=2.0)
        third = groups_of(2)
        merged = merge_adapter(tensors, adapter, scale=2.0)
        for version, weights, group_ids in ((0, tensors, first), (1, changed, second), (2, merged, third)):
            for group_id in group_ids:
                assert_generated_by(fleet, group_id, version=version, weights=weights)

        (fleet.folder / "die").touch()
        [last] = fleet.admit(1)
        assert process.wait(60) == HUNG_EXIT_CODE
        said = fleet.field(last, "n:rollout") + (fleet.folder / "odd-rollout.log").read_text()
        assert "illegal memory access" in said
    (fleet.folder / "die").unlink()
    counters = fleet.ledger.counters()
    assert counters.holds and counters.dead == {} and counters.in_flight == 13


def assert_generated_by(fleet: Fleet, group_id: str, *, version: int, weights: dict[str, Any]) -> None:
    """The stored completions carry the version, and the logprobs of its weights."""
    parts = {name: fleet.ledger.client.hget(fleet.ledger.keys.group(group_id), name) for name in ("task", "rollout")}
    task, rollout = Task.from_wire(decode(parts["task"])), decode(parts["rollout"])
    completions = [Completion.from_wire(wire) for wire in rollout["completions"]]
    model = load_pretrained(fleet.config.model.path)
    load_weights(model, weights)
    with torch.no_grad():
        pairs = [(task.prompt_ids, completion.token_ids) for completion in completions]
        expected = score_sequences(model, pairs, max_batch_tokens=1000)
    for completion, logprobs in zip(completions, expected, strict=True):
        assert completion.policy_versions == ((version, len(completion.token_ids)),)
        np.testing.assert_allclose(completion.rollout_logprobs, logprobs, atol=2e-4)
