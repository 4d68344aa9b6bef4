"""A rollout worker serves a LoRA adapter: merged, proved by digest and canary, and noticed where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from fleet import ServedFleet
from harness import SMALL, create_run, metrics_of, sluice, trainer, wait_for
from harness import workers as worker_per_queue
from served import assert_close, request

from sluice.common.config import Config
from sluice.common.connections.client import connect
from sluice.common.keys import Keys
from sluice.common.models.causal_lm import load_pretrained
from sluice.common.models.logprobs import score_sequences
from sluice.common.monitoring.diagnosis import alarms
from sluice.common.monitoring.heartbeats import read_heartbeats
from sluice.common.policies.canary import mismatch_bound, random_sequences
from sluice.common.policies.manifest import Manifest
from sluice.common.run import open_run
from sluice.scripts.launcher.redis_server import EmbeddedServer
from sluice.trainer.trained_policy import TrainedPolicy
from sluice.workers import policy_updates

LORA = {"lora": {"rank": 2, "alpha": 4.0}}
merge = policy_updates.merge_adapter


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


def publish(served: ServedFleet, policy: TrainedPolicy, version: int) -> Manifest:
    canary = policy.score(random_sequences(policy.vocab_size))
    return served.publish(version, policy.snapshot(torch.float32), canary=canary, adapter_scale=2.0)


@pytest.mark.parametrize("transport", ["directory", "redis"])
def test_a_worker_samples_from_the_adapter_and_proves_it(
    serve_fleet: Callable[..., ServedFleet], transport: str
) -> None:
    served = serve_fleet(trainer=LORA, policy_store={"transport": transport})
    policy, base = trained_policy(served.fleet.config), served.store.manifest(0)
    served.role.start()
    for version in (1, 2):
        move(policy, 0.05, seed=version)
        manifest = publish(served, policy, version)
        served.until_serves(version)
        served.until(lambda beat: beat.get("adapter_share"), "the canary to be scored")
        adapter_bytes = sum(tensor.nbytes for tensor in policy.snapshot(torch.float32).values())
        assert adapter_bytes < manifest.payload_bytes < adapter_bytes + 8192 < base.num_bytes
        beat = served.heartbeat
        assert beat["fetch_bytes"] == manifest.payload_bytes
        assert beat["mismatch"] < 1e-5
        assert beat["adapter_share"] == pytest.approx([1.0, 0.0], abs=1e-3)
        assert served.alarm_kinds() == []
        completions = served.generate(n=4, max_tokens=12)
        assert {completion.policy_versions[0][0] for completion in completions} == {version}
        sequences = [(request([5, 6, 7]).prompt_ids, completion.token_ids) for completion in completions]
        with torch.no_grad():
            expected = score_sequences(policy.model.eval(), sequences, max_batch_tokens=1000)
        for completion, logprobs in zip(completions, expected, strict=True):
            assert_close(completion.rollout_logprobs, logprobs)
    with served.role._policy.pinned(0):  # an evaluation of the base, whose weights were never written to
        assert served.versions(pinned_version=0) == {0}
        assert served.engine.digest == base.digest


@pytest.mark.parametrize("how", ["the base", "the one before", "another scale"])
def test_a_worker_that_serves_something_else_than_the_adapter_is_named_long_before_the_plain_bound(
    serve_fleet: Callable[..., ServedFleet], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    merged: list[Mapping[str, torch.Tensor]] = []

    def merge_otherwise(
        base: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor], *, scale: float
    ) -> object:
        merged.append(merge(base, adapter, scale=scale / 4 if how == "another scale" else scale))
        return {"the base": base, "the one before": merged[0], "another scale": merged[-1]}[how]

    monkeypatch.setattr(policy_updates, "merge_adapter", merge_otherwise)
    served = serve_fleet(trainer=LORA)
    policy = trained_policy(served.fleet.config)
    served.role.start()
    move(policy, 0.0, seed=1)
    publish(served, policy, 1)
    served.until_serves(1)
    move(policy, 5e-5, seed=2)  # a first small step
    publish(served, policy, 2)
    served.until_serves(2)  # the bytes have arrived
    served.until(lambda beat: beat.get("adapter_share"), "the canary to be scored")
    assert served.heartbeat["mismatch"] < mismatch_bound("float32", "float32"), "the difference alone says nothing yet"
    (found,) = alarms(served.client, open_run(served.client, served.keys.run))
    assert found.kind == "sampler_mismatch" and "of the LoRA adapter's effect" in found.text


def test_an_adapter_that_does_not_fit_is_reported_while_the_version_before_serves(
    serve_fleet: Callable[..., ServedFleet],
) -> None:
    served = serve_fleet(trainer=LORA)
    policy = trained_policy(served.fleet.config)
    served.role.start()
    publish(served, policy, 1)
    served.until_serves(1)
    half = dict(list(policy.snapshot(torch.float32).items())[:1])
    served.publish(2, half, adapter_scale=2.0)
    served.until_alarm("still serves version 1: not a LoRA adapter")
    publish(served, policy, 3)
    served.until_serves(3)


def served_share(url: str) -> float | None:
    """How much of the adapter's effect the rollout worker of the run `roles` serves, once it has measured it."""
    with closing(connect(url)) as client:
        beats = read_heartbeats(client, Keys("roles"))
    return next((stats["adapter_share"][0] for stats in beats.values() if stats.get("adapter_share")), None)


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
        place = ("sluice.trainer.trained_policy:TrainedPolicy.optimize", "after", 4)
        with trainer(tmp_path, env, kill_at=place) as process:
            assert process.wait(180) == -9
        with trainer(tmp_path, env) as process:
            assert process.wait(180) == 0
        share = wait_for(
            partial(served_share, own_redis.url), timeout=30, what="the last version's canary to be scored"
        )
        assert share == pytest.approx(1.0, abs=0.01)
    run_folder = tmp_path / "runs" / "roles"
    records = metrics_of(run_folder)
    assert records[-1]["step"] == steps
    for metrics in records:
        assert abs(metrics["off_policy/ratio_max"] - 1) < 1e-3 and abs(metrics["off_policy/ratio_mean"] - 1) < 1e-4
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
