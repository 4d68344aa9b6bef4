"""A rollout worker and its policy: damaged bytes are refused and reported, and the newest good version is served."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fleet import ServedFleet
from harness import wait_for
from test_policy_store import damage

import sluice.workers.policy_updates
import sluice.workers.rollout
from sluice.common.errors import EngineError
from sluice.common.models.causal_lm import load_pretrained, load_weights, named_weights
from sluice.common.models.logprobs import score_sequences
from sluice.common.monitoring.diagnosis import alarms
from sluice.common.policies.canary import CanarySequence, random_sequences
from sluice.common.policies.manifest import Manifest
from sluice.common.run import open_run
from sluice.workers.engine.torch.kv_cache import SlotCache


@pytest.mark.parametrize(
    ("transport", "change"),
    [
        ("directory", lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]),
        ("redis", lambda data: data[: len(data) // 2]),
    ],
    ids=["flipped in the directory", "truncated in Redis"],
)
def test_damaged_weights_are_refused_and_reported_while_the_old_version_serves(
    serve_fleet: Callable[..., ServedFleet],
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
    change: Callable[[bytes], bytes],
) -> None:
    served = serve_fleet(policy_store={"transport": transport})
    served.role.start()
    served.until_serves(0)
    with monkeypatch.context() as patch:
        write = served.store._transport.write

        def write_and_damage(version: int, tensors: Any) -> int:
            num_bytes = write(version, tensors)
            damage(served.client, served.keys, served.fleet.folder, transport, version, change)
            return num_bytes

        patch.setattr(served.store._transport, "write", write_and_damage)
        served.publish(1)
    served.until_alarm("still serves version 0: policy version 1")
    assert served.versions() == {0}, "the old one serves"
    served.publish(2)
    served.until_serves(2)


def test_no_training_group_is_claimed_before_a_policy_is_served(
    serve_fleet: Callable[..., ServedFleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_fleet()
    [group_id] = served.fleet.admit(1)
    monkeypatch.setattr(sluice.workers.rollout, "FIRST_POLICY_WAIT_S", 0.1)
    served.role.generate(group_id)
    assert not served.client.hexists(served.keys.group(group_id), "n:rollout")
    served.role.start()
    served.until_serves(0)
    served.role.generate(group_id)
    assert served.fleet.has([group_id], "rollout") and served.fleet.field(group_id, "n:rollout") == "1"


def test_a_worker_that_is_told_to_stop_waits_for_no_first_policy(serve_fleet: Callable[..., ServedFleet]) -> None:
    served = serve_fleet()
    [group_id] = served.fleet.admit(1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.role.generate, group_id)
        assert not waiting.done()
        served.role.stop_soon()
        waiting.result(20)  # of the 600 s
    assert not served.client.hexists(served.keys.group(group_id), "n:rollout")


def test_a_late_worker_stages_the_newest_version_first(
    serve_fleet: Callable[..., ServedFleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_fleet()
    for version in (1, 2, 3):
        served.publish(version)
    staged, stage = [], served.engine.stage
    monkeypatch.setattr(
        served.engine, "stage", lambda version, *policy: (staged.append(version), stage(version, *policy))
    )
    served.role.start()
    served.until_serves(3)
    assert staged == [3]


def canary_of(path: str, tensors: dict[str, torch.Tensor]) -> list[CanarySequence]:
    """As a trainer with these weights scores it."""
    model = load_pretrained(path).eval()
    load_weights(model, tensors)
    sequences = random_sequences(model.config.vocab_size)
    with torch.no_grad():
        scored = score_sequences(model, sequences, max_batch_tokens=10_000)
    return [
        CanarySequence(prompt_ids=prompt, token_ids=tokens, logprobs=logprobs)
        for (prompt, tokens), logprobs in zip(sequences, scored, strict=True)
    ]


def test_every_policy_is_checked_against_the_trainers_canary(serve_fleet: Callable[..., ServedFleet]) -> None:
    served = serve_fleet()
    _, base = served.store.fetch(0)
    other = {name: tensor * 1.05 for name, tensor in base.items()}
    canaries = [canary_of(served.fleet.config.model.path, weights) for weights in (base, other)]
    served.role.start()
    served.publish(1, other, canary=canaries[1])
    served.until(lambda beat: beat.get("mismatch") is not None, "the canary of version 1 to be scored")
    assert served.heartbeat["mismatch"] < 1e-5
    assert served.alarm_kinds() == []
    served.publish(2, base, canary=canaries[1])  # as if the engine had kept version 1's head
    served.until(lambda beat: beat["mismatch"] is not None and beat["mismatch"] > 1e-3, "the mismatch of version 2")
    assert served.alarm_kinds() == ["sampler_mismatch"]
    served.publish(3, base, canary=canaries[0])
    served.until(
        lambda beat: beat["mismatch"] is not None and beat["mismatch"] < 1e-5, "the canary of version 3 to be scored"
    )
    assert served.alarm_kinds() == []


def test_an_evaluation_holds_its_version_while_training_groups_go_on_and_gives_it_up_after(
    serve_fleet: Callable[..., ServedFleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_fleet()
    served.publish(1)
    served.publish(2)
    served.role.start()
    served.until_serves(2)
    policy = served.role._policy
    monkeypatch.setattr(sluice.workers.policy_updates, "_HOLD_S", 60.0)
    with policy.pinned(1):
        assert served.versions(pinned_version=1) == {1}
        served.publish(3)
        with policy.pinned(1):
            assert served.versions(pinned_version=1) == {1}
        assert served.versions() == {1}, "training goes on by the version under evaluation"
    assert served.engine.version == 1, "the next group of the evaluation may follow"
    monkeypatch.setattr(sluice.workers.policy_updates, "_HOLD_S", 0.1)
    served.until_serves(3)


def test_a_worker_that_cannot_apply_a_delta_serves_the_old_version_until_the_trainer_writes_the_new_one_whole(
    serve_fleet: Callable[..., ServedFleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_fleet(rollout={"dtype": "bfloat16"})
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in served.store.fetch(0)[1].items()}

    def publish_nudged(version: int) -> Manifest:
        for name, tensor in weights.items():
            weights[name] = tensor.clone()
            weights[name].view(-1)[version::50] += 1
        return served.publish(version, dict(weights))

    publish_nudged(1)
    served.role.start()
    for version in (2, 3):
        manifest = publish_nudged(version)
        assert (manifest.num_bytes, manifest.base) == (0, version - 1)
        served.until_serves(version)
    served.until(lambda beat: beat["fetch_bytes"] == manifest.delta_bytes, "what was read to be told")
    assert served.heartbeat["fetch_s"] > 0 and served.heartbeat["last_pause_s"] > 0
    assert all(torch.equal(found, weights[name]) for name, found in named_weights(served.engine._model).items())

    with monkeypatch.context() as patch:
        patch.setattr(served.store._transport, "write", lambda *_: 99)  # what was written got lost
        publish_nudged(4)
    served.until_alarm("still serves version 3: policy version 4")
    assert served.store.is_full_requested()
    served.store.republish_full()
    served.until_serves(4)


def test_a_policy_that_the_engine_cannot_load_is_named_and_fails_who_is_pinned_to_it(
    serve_fleet: Callable[..., ServedFleet],
) -> None:
    served = serve_fleet()
    served.role.start()
    served.until_serves(0)
    served.publish(1, {"of_another_model": torch.zeros(3)})
    served.until_alarm("still serves version 0: policy version 1 was not loaded: ")
    with served.role._policy.pinned(1), pytest.raises(EngineError, match="policy version 1 was not loaded"):
        served.generate(pinned_version=1)
    served.publish(2)
    served.until_serves(2)


def test_a_completion_from_a_wrong_cache_raises_an_alarm(
    serve_fleet: Callable[..., ServedFleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_fleet()
    fill = SlotCache.fill

    def fill_with_zeros(self: SlotCache, prefilled: Any, **places: Any) -> None:
        for states in prefilled.layers:
            states.keys.zero_()
        fill(self, prefilled, **places)

    def generate_under(version: int) -> None:
        wait_for(lambda: served.engine.version == version, timeout=15, what="the version")
        served.role.generate(*served.fleet.admit(1))

    served.role.start()
    generate_under(0)
    served.until(lambda beat: beat.get("cache_mismatch") is not None, "a completion to be compared")
    assert served.heartbeat["cache_mismatch"] < 1e-4 and served.alarm_kinds() == []
    served.publish(1)
    monkeypatch.setattr(SlotCache, "fill", fill_with_zeros)
    generate_under(1)
    served.until(lambda beat: beat["cache_mismatch"] > 1e-2, "the wrong cache to be noticed")
    (found,) = alarms(served.client, open_run(served.client, served.keys.run))
    assert found.kind == "sampler_mismatch" and "its own fresh forward pass" in found.text
