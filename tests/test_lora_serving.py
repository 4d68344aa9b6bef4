"""A rollout worker serves a LoRA adapter: merged, proved by digest and canary, and noticed where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import redis
import torch
from harness import SMALL, create_run, metrics_of, sluice, trainer, wait_for
from harness import workers as worker_per_queue
from test_policy_updates import serving
from test_worker_deaths import Fleet, make_fleet  # noqa: F401

from sluice.common.config import Config
from sluice.common.connections.client import connect
from sluice.common.models.causal_lm import load_pretrained
from sluice.common.models.logprobs import score_sequences
from sluice.common.monitoring.diagnosis import alarms
from sluice.common.policies.canary import mismatch_bound, random_sequences
from sluice.common.policies.manifest import Manifest
from sluice.common.policies.store import PolicyStore
from sluice.common.run import open_run
from sluice.common.types import SamplingParams
from sluice.scripts.launcher.redis_server import EmbeddedServer
from sluice.trainer.trained_policy import TrainedPolicy
from sluice.workers import policy_updates
from sluice.workers.engine import GenerationRequest

LORA = {"lora": {"rank": 2, "alpha": 4.0}}


def trained_policy(config: Config) -> TrainedPolicy:
    torch.manual_seed(0)
    return TrainedPolicy.of_run(load_pretrained(config.model.path), config)


def move(policy: TrainedPolicy, size: float, *, seed: int) -> None:
    """As training would: to an adapter with an effect of about this size."""
    assert policy.adapter is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in policy.adapter.weights().items():
            if ".lora_B." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * size)


def publish(store: PolicyStore, policy: TrainedPolicy, version: int) -> Manifest:
    canary = policy.score(random_sequences(policy.vocab_size))
    scale = policy.config.lora.scale if policy.config.lora else None
    weights = policy.snapshot(torch.float32)
    return store.publish(version, weights, step=version, parent=version - 1, canary=canary, adapter_scale=scale)


def request(pinned: int | None = None) -> GenerationRequest:
    return GenerationRequest(
        group_id="g",
        prompt_ids=np.array([5, 6, 7], np.int32),
        sampling=SamplingParams(n=4, max_tokens=12),
        pinned_version=pinned,
    )


@pytest.mark.parametrize("transport", ["directory", "redis"])
def test_a_worker_samples_from_the_adapter_and_proves_it(
    make_fleet: Callable[..., Fleet],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    client: redis.Redis,
    transport: str,
) -> None:
    fleet = make_fleet(trainer=LORA, policy_store={"transport": transport})
    store = PolicyStore(client, fleet.ledger.keys, fleet.config.policy_store)
    run, policy = open_run(client, fleet.ledger.keys.run), trained_policy(fleet.config)
    base = store.manifest(0)
    with serving(fleet, monkeypatch) as (role, heartbeat):
        role.start()
        for version in (1, 2):
            move(policy, 0.05, seed=version)
            manifest = publish(store, policy, version)
            wait_for(lambda: heartbeat().get("adapter_share"), timeout=15, what="the canary to be scored")
            wait_for(lambda: heartbeat()["version"] == version, timeout=15, what="the adapter to be served")  # noqa: B023
            adapter_bytes = sum(tensor.nbytes for tensor in policy.snapshot(torch.float32).values())
            assert adapter_bytes < manifest.payload_bytes < adapter_bytes + 8192 < base.num_bytes
            assert manifest.digest.startswith(heartbeat()["digest"])
            wait_for(lambda: heartbeat()["fetch_bytes"] == manifest.payload_bytes, timeout=15, what="what was read")  # noqa: B023
            assert heartbeat()["mismatch"] < 1e-5
            assert heartbeat()["adapter_share"] == pytest.approx([1.0, 0.0], abs=1e-3)
            assert alarms(client, run) == []
            completions = role.engine.generate(request())
            assert {completion.policy_versions[0][0] for completion in completions} == {version}
            sequences = [(request().prompt_ids, completion.token_ids) for completion in completions]
            with torch.no_grad():
                expected = score_sequences(policy.model.eval(), sequences, max_batch_tokens=1000)
            for completion, logprobs in zip(completions, expected, strict=True):
                np.testing.assert_allclose(completion.rollout_logprobs, logprobs, atol=1e-5)
        with role._policy.pinned(0):  # an evaluation of the base, whose weights were never written to
            assert role.engine.generate(request(pinned=0))[0].policy_versions[0][0] == 0
            assert role.engine.digest == base.digest


IGNORED: dict[str, Callable[..., Mapping[str, torch.Tensor]]] = {
    "the base": lambda base, adapter, scale: base,
    "the one before": lambda base, adapter, scale: IGNORED_BEFORE.setdefault(
        "first", merge(base, adapter, scale=scale)
    ),
    "another scale": lambda base, adapter, scale: merge(base, adapter, scale=scale / 4),
}
IGNORED_BEFORE: dict[str, Mapping[str, torch.Tensor]] = {}
merge = policy_updates.merge_adapter


@pytest.mark.parametrize("served", IGNORED)
def test_a_worker_that_serves_something_else_than_the_adapter_is_named_long_before_the_plain_bound(
    make_fleet: Callable[..., Fleet],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    client: redis.Redis,
    served: str,
) -> None:
    fleet = make_fleet(trainer=LORA)
    store = PolicyStore(client, fleet.ledger.keys, fleet.config.policy_store)
    run, policy = open_run(client, fleet.ledger.keys.run), trained_policy(fleet.config)
    IGNORED_BEFORE.clear()
    monkeypatch.setattr(
        policy_updates,
        "merge_adapter",
        lambda base, adapter, *, scale: IGNORED[served](base, adapter, scale),
    )
    with serving(fleet, monkeypatch) as (role, heartbeat):
        role.start()
        move(policy, 0.0, seed=1)
        publish(store, policy, 1)
        wait_for(lambda: heartbeat().get("version") == 1, timeout=15, what="the fresh adapter to be served")
        move(policy, 5e-5, seed=2)  # a first small step
        manifest = publish(store, policy, 2)
        wait_for(lambda: heartbeat().get("adapter_share"), timeout=15, what="the canary to be scored")
        assert manifest.digest.startswith(heartbeat()["digest"]), "the bytes have arrived"
        assert heartbeat()["mismatch"] < mismatch_bound("float32", "float32"), "the difference alone says nothing yet"
        (found,) = alarms(client, run)
        assert found.kind == "sampler_mismatch" and "of the LoRA adapter's effect" in found.text


def test_an_adapter_that_does_not_fit_is_reported_while_the_version_before_serves(
    make_fleet: Callable[..., Fleet],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    client: redis.Redis,
) -> None:
    fleet = make_fleet(trainer=LORA)
    store = PolicyStore(client, fleet.ledger.keys, fleet.config.policy_store)
    policy = trained_policy(fleet.config)
    with serving(fleet, monkeypatch) as (role, heartbeat):
        role.start()
        publish(store, policy, 1)
        wait_for(lambda: heartbeat().get("version") == 1, timeout=15, what="the adapter to be served")
        half = dict(list(policy.snapshot(torch.float32).items())[:1])
        store.publish(2, half, step=2, parent=1, adapter_scale=2.0)
        wait_for(lambda: heartbeat().get("alarm"), timeout=15, what="an alarm in the heartbeat")
        assert heartbeat()["alarm"].startswith("still serves version 1: not a LoRA adapter")
        publish(store, policy, 3)
        wait_for(
            lambda: heartbeat().get("version") == 3 and heartbeat()["alarm"] == "", timeout=15, what="the next good one"
        )


def test_a_run_with_an_adapter_is_on_policy_throughout_and_survives_its_trainers_death(
    tmp_path: Path, own_redis: EmbeddedServer
) -> None:
    steps = 10
    env = create_run(
        tmp_path,
        own_redis.url,
        **SMALL,
        replay_buffer__max_policy_age=0,
        trainer__num_steps=steps,
        trainer__lora={"rank": 4, "alpha": 16},
        trainer__learning_rate=5e-3,
        checkpoint__every_steps=2,
    )
    with worker_per_queue(tmp_path, env):
        with trainer(
            tmp_path, env, kill_at=("sluice.trainer.trained_policy:TrainedPolicy.optimize", "after", 4)
        ) as process:
            assert process.wait(180) == -9
        with trainer(tmp_path, env) as process:
            assert process.wait(180) == 0
    run_folder = tmp_path / "runs" / "roles"
    records = metrics_of(run_folder)
    assert records[-1]["step"] == steps
    for metrics in records:
        assert abs(metrics["off_policy/ratio_max"] - 1) < 1e-3 and abs(metrics["off_policy/ratio_mean"] - 1) < 1e-4
    shares = [metrics["off_policy/adapter_share"] for metrics in records if "off_policy/adapter_share" in metrics]
    assert shares and shares[-1] == pytest.approx(1.0, abs=0.01)
    newest = run_folder / "checkpoints" / f"step-{steps:08d}"
    assert {metrics["policy/payload_bytes"] for metrics in records[1:]} == {  # the first tells of version 0
        (newest / "model.safetensors").stat().st_size
    }
    state = json.loads((newest / "state.json").read_text())
    assert state["base_digest"] and state["version"] == steps + 2, "resumed at step 2 as v4: v3 was out already"
    client = connect(own_redis.url)
    parents = client.hmget(open_run(client, "roles").keys.lineage, ["4", "5"])
    client.close()
    assert [entry.split(b":")[:2] for entry in parents] == [[b"2", b"2"], [b"3", b"3"]], "v5 is v3 again, bit for bit"
    done = sluice("export", str(run_folder), str(tmp_path / "adapter"), "--adapter", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
