"""A rollout worker and its policy: damaged bytes are refused and reported, and the newest good version is served."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import redis
import torch
from harness import wait_for
from test_policy_store import damage
from test_worker_deaths import Fleet, make_fleet  # noqa: F401

from common.metrics import read_heartbeats
from common.model import named_weights
from common.policy_store import Manifest, PolicyStore
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


def test_a_worker_that_cannot_apply_a_delta_serves_the_old_version_until_the_trainer_writes_the_new_one_whole(
    make_fleet: Callable[..., Fleet],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    client: redis.Redis,
) -> None:
    fleet = make_fleet(rollout={"dtype": "bfloat16"})
    store = PolicyStore(client, fleet.ledger.keys, fleet.config.policy_store)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in store.fetch(0)[1].items()}

    def publish_nudged(version: int) -> Manifest:
        for name, tensor in weights.items():
            weights[name] = tensor.clone()
            weights[name].view(-1)[version::50] += 1
        return store.publish(version, dict(weights), step=version, parent=version - 1)

    publish_nudged(1)
    with serving(fleet, monkeypatch) as (role, beat):
        role.start()
        for version in (2, 3):
            manifest = publish_nudged(version)
            assert (manifest.num_bytes, manifest.base) == (0, version - 1)
            wait_for(lambda: beat().get("version") == version, timeout=15, what="the delta to be served")  # noqa: B023
            assert manifest.digest.startswith(beat()["digest"])
        wait_for(lambda: beat()["fetch_bytes"] == manifest.delta_bytes, timeout=15, what="what was read to be told")
        assert beat()["fetch_s"] > 0 and beat()["last_pause_s"] > 0
        assert all(torch.equal(found, weights[name]) for name, found in named_weights(role.engine._model).items())

        with monkeypatch.context() as patch:
            patch.setattr(store._transport, "write", lambda *_: 99)  # what was written got lost
            publish_nudged(4)
        wait_for(lambda: beat().get("alarm"), timeout=15, what="an alarm in the heartbeat")
        assert beat()["alarm"].startswith("still serves version 3: policy version 4")
        assert store.is_wanted_whole()
        store.mend()
        wait_for(lambda: beat().get("version") == 4, timeout=15, what="the whole version to be served")
        assert beat()["alarm"] == "" and store.manifest(4).digest.startswith(beat()["digest"])
