"""A rollout worker and its policy: damaged bytes are refused and reported, and the newest good version is served."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import redis
from harness import wait_for
from test_policy_store import damage
from test_worker_deaths import Fleet, make_fleet  # noqa: F401

from common.metrics import read_heartbeats
from common.policy_store import PolicyStore
from common.types import SamplingParams
from workers.context import Context
from workers.engine import GenerationRequest
from workers.rollout import RolloutRole

CHANGES = {
    "flipped": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "truncated": lambda data: data[: len(data) // 2],
}


@contextmanager
def serving(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The rollout role in this process, as a worker runs it; yields it with what its heartbeat says."""
    for name, value in fleet.env.items():
        monkeypatch.setenv(name, value)
    role = RolloutRole(Context.open(fleet.app, "rollout"))
    keys = fleet.ledger.keys
    try:
        yield role, lambda: read_heartbeats(fleet.ledger.client, keys).get(f"{role.context.process}", {})
    finally:
        role.close()


def publish(store: PolicyStore, version: int) -> None:
    _, tensors = store.fetch(0)
    changed = {name: tensor + 0.001 * version for name, tensor in tensors.items()}
    store.publish(version, changed, step=version, parent=version - 1)


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("transport", ["directory", "redis"])
def test_damaged_weights_are_refused_and_reported_while_the_old_version_serves(
    make_fleet: Callable[..., Fleet],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    client: redis.Redis,
    transport: str,
    how: str,
) -> None:
    fleet = make_fleet(policy_store={"transport": transport})
    keys, folder = fleet.ledger.keys, fleet.folder
    store = PolicyStore(client, keys, fleet.config.policy_store)
    with serving(fleet, monkeypatch) as (role, beat):
        role.start()
        wait_for(lambda: beat().get("version") == 0, timeout=15, what="version 0 to be served")

        with monkeypatch.context() as patch:
            write = store._transport.write

            def write_and_damage(version: int, tensors: Any) -> int:
                num_bytes = write(version, tensors)
                damage(client, keys, folder, transport, version, CHANGES[how])
                return num_bytes

            patch.setattr(store._transport, "write", write_and_damage)
            publish(store, 1)
        wait_for(lambda: beat().get("alarm"), timeout=15, what="an alarm in the heartbeat")
        assert beat()["alarm"].startswith("still serves version 0: policy version 1")
        request = GenerationRequest(
            group_id="t0",
            prompt_ids=np.array([5, 6], np.int32),
            sampling=SamplingParams(n=1, max_tokens=2),
            min_version=0,
            pinned_version=None,
        )
        assert role.engine.generate(request)[0].policy_versions[0][0] == 0, "the old one serves"

        publish(store, 2)
        wait_for(lambda: beat().get("version") == 2, timeout=15, what="the next good version to be served")
        assert beat()["alarm"] == ""
        assert store.manifest(2).digest.startswith(beat()["digest"])


def test_a_late_worker_stages_the_newest_version_first(
    make_fleet: Callable[..., Fleet],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    client: redis.Redis,
) -> None:
    fleet = make_fleet()
    store = PolicyStore(client, fleet.ledger.keys, fleet.config.policy_store)
    for version in (1, 2, 3):
        publish(store, version)
    with serving(fleet, monkeypatch) as (role, beat):
        staged = []
        stage = role.engine.stage

        def record(version: int, digest: str, tensors: Any) -> None:
            staged.append(version)
            stage(version, digest, tensors)

        monkeypatch.setattr(role.engine, "stage", record)
        role.start()
        wait_for(lambda: beat().get("version") == 3, timeout=15, what="the newest version to be served")
        assert staged == [3]
