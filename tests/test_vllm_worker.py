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
from harness import tiny_folder, wait_for
from test_worker_deaths import Fleet, make_fleet  # noqa: F401

from sluice.common.models.causal_lm import load_pretrained, load_weights
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
    make_fleet: Callable[..., Fleet],  # noqa: F811
) -> None:
    fleet = make_fleet(
        rollout={"engine": "vllm", "concurrency": 4, "kv_cache_mib": 64},
        lease={"running_s": 6.0, "queued_s": 3.0, "max_attempts": 3},
    )
    store = PolicyStore(fleet.ledger.client, fleet.ledger.keys, fleet.config.policy_store)
    heartbeats = lambda: read_heartbeats(fleet.ledger.client, fleet.ledger.keys).values()  # noqa: E731
    with fleet.odd("rollout", patch=PATCH) as process:
        wait_for(
            lambda: any(heartbeat["version"] == 0 for heartbeat in heartbeats()),
            timeout=60,
            what="a worker that serves",
        )
        first = fleet.admit(4)
        fleet.tick_until(lambda: fleet.has(first, "rollout"), timeout=30, what="groups of version 0")
        _, tensors = store.fetch(0)
        rng = torch.Generator().manual_seed(1)
        changed = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=rng) for name, tensor in tensors.items()}
        manifest = store.publish(1, changed, step=1, parent=0)
        wait_for(
            lambda: any(heartbeat["version"] == 1 for heartbeat in heartbeats()), timeout=30, what="the new policy"
        )
        assert {heartbeat["digest"] for heartbeat in heartbeats()} == {manifest.digest[:12]}
        second = fleet.admit(4)
        fleet.tick_until(lambda: fleet.has(second, "rollout"), timeout=30, what="groups of version 1")
        adapter = {
            f"{PREFIX}{name.removesuffix('.weight')}.lora_{side}.weight": 0.1 * torch.randn(shape, generator=rng)
            for name, tensor in tensors.items()
            if name.endswith("_proj.weight")
            for side, shape in (("A", (4, tensor.shape[1])), ("B", (tensor.shape[0], 4)))
        }
        manifest = store.publish(2, adapter, step=2, parent=1, adapter_scale=2.0)
        wait_for(
            lambda: any(heartbeat["version"] == 2 for heartbeat in heartbeats()), timeout=30, what="the LoRA adapter"
        )
        assert {heartbeat["digest"] for heartbeat in heartbeats()} == {manifest.digest[:12]}
        third = fleet.admit(4)
        fleet.tick_until(lambda: fleet.has(third, "rollout"), timeout=30, what="groups of version 2")
        merged = merge_adapter(tensors, adapter, scale=2.0)
        for version, weights, group_ids in ((0, tensors, first), (1, changed, second), (2, merged, third)):
            for group_id in group_ids:
                assert_generated_by(fleet, group_id, version=version, weights=weights)

        (fleet.folder / "die").touch()
        [last] = fleet.admit(1)
        assert process.wait(60) == HUNG_EXIT_CODE
        assert (
            "illegal memory access" in fleet.field(last, "n:rollout") + (fleet.folder / "odd-rollout.log").read_text()
        )
    (fleet.folder / "die").unlink()
    counters = fleet.ledger.counters()
    assert counters.holds and counters.dead == {} and counters.in_flight == 13


def assert_generated_by(fleet: Fleet, group_id: str, *, version: int, weights: dict[str, Any]) -> None:
    """The stored completions carry the version, and the logprobs of its weights."""
    parts = {name: fleet.ledger.client.hget(fleet.ledger.keys.group(group_id), name) for name in ("task", "rollout")}
    task, rollout = Task.from_wire(decode(parts["task"])), decode(parts["rollout"])
    model = load_pretrained(str(tiny_folder(3) / "model"))
    load_weights(model, weights)
    for wire in rollout["completions"]:
        completion = Completion.from_wire(wire)
        assert completion.policy_versions == ((version, len(completion.token_ids)),)
        ids = torch.from_numpy(np.concatenate([task.prompt_ids, completion.token_ids])).long()
        with torch.no_grad():
            rows = model(ids[None]).logits[0, len(task.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = rows.gather(1, ids[len(task.prompt_ids) :, None])[:, 0].numpy()
        np.testing.assert_allclose(completion.rollout_logprobs, expected, atol=2e-4)
