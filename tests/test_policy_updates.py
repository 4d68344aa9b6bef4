"""A rollout worker and its policy: damaged bytes are refused and reported, and the newest good version is served."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import redis
import torch
from harness import tiny_folder, wait_for
from test_policy_store import damage
from test_worker_deaths import Fleet, make_fleet  # noqa: F401

import sluice.workers.policy_updates
from sluice.common.errors import EngineError
from sluice.common.models.causal_lm import load_pretrained, load_weights, named_weights
from sluice.common.models.logprobs import completion_logprobs, pad_sequences
from sluice.common.monitoring.diagnosis import alarms
from sluice.common.monitoring.heartbeats import read_heartbeats
from sluice.common.policies.canary import CanarySequence, random_sequences
from sluice.common.policies.manifest import Manifest
from sluice.common.policies.store import PolicyStore
from sluice.common.run import open_run
from sluice.common.types import SamplingParams
from sluice.workers.context import Context
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.torch.kv_cache import SlotCache
from sluice.workers.rollout import RolloutRole

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
    with serving(fleet, monkeypatch) as (role, send_heartbeat):
        role.start()
        wait_for(lambda: send_heartbeat().get("version") == 0, timeout=15, what="version 0 to be served")

        with monkeypatch.context() as patch:
            write = store._transport.write

            def write_and_damage(version: int, tensors: Any) -> int:
                num_bytes = write(version, tensors)
                damage(client, keys, folder, transport, version, CHANGES[how])
                return num_bytes

            patch.setattr(store._transport, "write", write_and_damage)
            publish(store, 1)
        wait_for(lambda: send_heartbeat().get("alarm"), timeout=15, what="an alarm in the heartbeat")
        assert send_heartbeat()["alarm"].startswith("still serves version 0: policy version 1")
        request = GenerationRequest(
            group_id="t0",
            prompt_ids=np.array([5, 6], np.int32),
            sampling=SamplingParams(n=1, max_tokens=2),
            min_version=0,
            pinned_version=None,
        )
        assert role.engine.generate(request)[0].policy_versions[0][0] == 0, "the old one serves"

        publish(store, 2)
        wait_for(lambda: send_heartbeat().get("version") == 2, timeout=15, what="the next good version to be served")
        assert send_heartbeat()["alarm"] == ""
        assert store.manifest(2).digest.startswith(send_heartbeat()["digest"])


def test_a_late_worker_stages_the_newest_version_first(
    make_fleet: Callable[..., Fleet],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    client: redis.Redis,
) -> None:
    fleet = make_fleet()
    store = PolicyStore(client, fleet.ledger.keys, fleet.config.policy_store)
    for version in (1, 2, 3):
        publish(store, version)
    with serving(fleet, monkeypatch) as (role, send_heartbeat):
        staged = []
        stage = role.engine.stage

        def record(version: int, digest: str, tensors: Any) -> None:
            staged.append(version)
            stage(version, digest, tensors)

        monkeypatch.setattr(role.engine, "stage", record)
        role.start()
        wait_for(lambda: send_heartbeat().get("version") == 3, timeout=15, what="the newest version to be served")
        assert staged == [3]


def canary_of(tensors: dict[str, torch.Tensor]) -> list[CanarySequence]:
    """As a trainer with these weights scores it."""
    model = load_pretrained(str(tiny_folder() / "model")).eval()
    load_weights(model, tensors)
    sequences = random_sequences(model.config.vocab_size)
    padded = pad_sequences([prompt for prompt, _ in sequences], [tokens for _, tokens in sequences])
    with torch.no_grad():
        logprobs, _ = completion_logprobs(model, *padded)
    return [
        CanarySequence(prompt_ids=prompt, token_ids=tokens, logprobs=row.numpy())
        for (prompt, tokens), row in zip(sequences, logprobs, strict=True)
    ]


def test_every_policy_is_checked_against_the_trainers_canary(
    make_fleet: Callable[..., Fleet],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    client: redis.Redis,
) -> None:
    fleet = make_fleet()
    store = PolicyStore(client, fleet.ledger.keys, fleet.config.policy_store)
    _, base = store.fetch(0)
    other = {name: tensor * 1.05 for name, tensor in base.items()}
    run = open_run(client, fleet.ledger.keys.run)
    with serving(fleet, monkeypatch) as (role, send_heartbeat):
        role.start()
        store.publish(1, other, step=1, parent=0, canary=canary_of(other))
        wait_for(
            lambda: send_heartbeat().get("mismatch") is not None,
            timeout=15,
            what="the canary of version 1 to be scored",
        )
        assert send_heartbeat()["mismatch"] < 1e-5
        assert alarms(client, run) == []
        store.publish(2, base, step=2, parent=1, canary=canary_of(other))  # as if the engine had kept version 1's head
        wait_for(lambda: send_heartbeat().get("mismatch", 0) > 1e-3, timeout=15, what="the mismatch of version 2")
        assert [alarm.kind for alarm in alarms(client, run)] == ["sampler_mismatch"]
        store.publish(3, base, step=3, parent=2, canary=canary_of(base))
        wait_for(lambda: send_heartbeat()["mismatch"] < 1e-5, timeout=15, what="the canary of version 3 to be scored")
        assert alarms(client, run) == []


def test_an_evaluation_holds_its_version_while_training_groups_go_on_and_gives_it_up_after(
    make_fleet: Callable[..., Fleet],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    client: redis.Redis,
) -> None:
    fleet = make_fleet()
    store = PolicyStore(client, fleet.ledger.keys, fleet.config.policy_store)
    publish(store, 1)
    publish(store, 2)

    def request(pinned: int | None) -> GenerationRequest:
        return GenerationRequest(
            group_id=f"g{pinned}",
            prompt_ids=np.array([5, 6], np.int32),
            sampling=SamplingParams(n=1, max_tokens=2),
            pinned_version=pinned,
        )

    def versions_of(pinned: int | None) -> set[int]:
        return {version for version, _ in role.engine.generate(request(pinned))[0].policy_versions}

    with serving(fleet, monkeypatch) as (role, _):
        role.start()
        wait_for(lambda: role.engine.version == 2, timeout=15, what="the newest version")
        monkeypatch.setattr(sluice.workers.policy_updates, "_HOLD_S", 60.0)
        with role._policy.pinned(1):
            assert versions_of(1) == {1}
            publish(store, 3)
            with role._policy.pinned(1):
                assert versions_of(1) == {1}
            assert versions_of(None) == {1}, "training goes on by the version under evaluation"
        assert role.engine.version == 1, "the next group of the evaluation may follow"
        monkeypatch.setattr(sluice.workers.policy_updates, "_HOLD_S", 0.1)
        wait_for(lambda: role.engine.version == 3, timeout=15, what="the newest version after the evaluation")


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
    with serving(fleet, monkeypatch) as (role, send_heartbeat):
        role.start()
        for version in (2, 3):
            manifest = publish_nudged(version)
            assert (manifest.num_bytes, manifest.base) == (0, version - 1)
            wait_for(lambda: send_heartbeat().get("version") == version, timeout=15, what="the delta to be served")  # noqa: B023
            assert manifest.digest.startswith(send_heartbeat()["digest"])
        wait_for(
            lambda: send_heartbeat()["fetch_bytes"] == manifest.delta_bytes, timeout=15, what="what was read to be told"
        )
        assert send_heartbeat()["fetch_s"] > 0 and send_heartbeat()["last_pause_s"] > 0
        assert all(torch.equal(found, weights[name]) for name, found in named_weights(role.engine._model).items())

        with monkeypatch.context() as patch:
            patch.setattr(store._transport, "write", lambda *_: 99)  # what was written got lost
            publish_nudged(4)
        wait_for(lambda: send_heartbeat().get("alarm"), timeout=15, what="an alarm in the heartbeat")
        assert send_heartbeat()["alarm"].startswith("still serves version 3: policy version 4")
        assert store.is_full_requested()
        store.republish_full()
        wait_for(lambda: send_heartbeat().get("version") == 4, timeout=15, what="the whole version to be served")
        assert send_heartbeat()["alarm"] == "" and store.manifest(4).digest.startswith(send_heartbeat()["digest"])


def test_a_policy_that_the_engine_cannot_load_is_named_and_fails_who_is_pinned_to_it(
    make_fleet: Callable[..., Fleet],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    client: redis.Redis,
) -> None:
    fleet = make_fleet()
    store = PolicyStore(client, fleet.ledger.keys, fleet.config.policy_store)
    _, base = store.fetch(0)
    request = GenerationRequest(
        group_id="e0", prompt_ids=np.array([5], np.int32), sampling=SamplingParams(n=1, max_tokens=1), pinned_version=1
    )
    with serving(fleet, monkeypatch) as (role, send_heartbeat):
        role.start()
        wait_for(lambda: role.engine.version == 0, timeout=15, what="the base version")
        store.publish(1, {"of_another_model": torch.zeros(3)}, step=1, parent=0)
        wait_for(lambda: send_heartbeat().get("alarm"), timeout=15, what="an alarm in the heartbeat")
        assert send_heartbeat()["alarm"].startswith("still serves version 0: policy version 1 was not loaded: ")
        with role._policy.pinned(1), pytest.raises(EngineError, match="policy version 1 was not loaded"):
            role.engine.generate(request)
        store.publish(2, base, step=2, parent=1)
        wait_for(lambda: role.engine.version == 2, timeout=15, what="the next good version")
        wait_for(lambda: send_heartbeat()["alarm"] == "", timeout=15, what="the alarm to end")


def test_a_completion_from_a_wrong_cache_raises_an_alarm(
    make_fleet: Callable[..., Fleet],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    client: redis.Redis,
) -> None:
    fleet = make_fleet()
    store = PolicyStore(client, fleet.ledger.keys, fleet.config.policy_store)
    run = open_run(client, fleet.ledger.keys.run)
    fill = SlotCache.fill

    def fill_with_zeros(self: SlotCache, prefilled: Any, **places: Any) -> None:
        for states in prefilled.layers:
            states.keys.zero_()
        fill(self, prefilled, **places)

    with serving(fleet, monkeypatch) as (role, send_heartbeat):
        role.start()
        for version, is_right in enumerate([True, False]):
            if not is_right:
                publish(store, version)
                monkeypatch.setattr(SlotCache, "fill", fill_with_zeros)
            wait_for(lambda: role.engine.version == version, timeout=15, what="the version")  # noqa: B023
            [group_id] = fleet.admit(1)
            role.generate(group_id)
            wait_for(
                lambda: send_heartbeat().get("cache_mismatch") is not None,
                timeout=15,
                what="a completion to be compared",
            )
            if is_right:
                assert send_heartbeat()["cache_mismatch"] < 1e-4 and alarms(client, run) == []
        wait_for(lambda: send_heartbeat()["cache_mismatch"] > 1e-2, timeout=15, what="the wrong cache to be noticed")
        (found,) = alarms(client, run)
        assert found.kind == "sampler_mismatch" and "its own fresh forward pass" in found.text
