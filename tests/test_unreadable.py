"""What cannot be read in Redis is ignored and named by every process that reads it, and ends none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch
from builders import make_config, publish_policy
from fleet import ServedFleet
from harness import wait_for
from test_status import screen

from sluice.common.config import PolicyStoreConfig
from sluice.common.errors import DigestMismatch, PolicyError, PolicyNotFound
from sluice.common.keys import Keys
from sluice.common.monitoring.autoscale import read_loads, read_scales
from sluice.common.monitoring.diagnosis import diagnose
from sluice.common.monitoring.heartbeats import is_readable, read_heartbeats, send_heartbeat
from sluice.common.policies.lineage import policy_ages, read_lineage
from sluice.common.policies.manifest import Manifest
from sluice.common.policies.reader import PolicyReader
from sluice.common.policies.signing import Signer
from sluice.common.policies.store import PolicyStore
from sluice.common.run import RunRecord, create_run
from sluice.common.serialization import encode
from sluice.dashboard.prometheus import exposition
from sluice.dashboard.run_state import collect_status
from sluice.trainer.step_metrics import FlowMeter

BIG = 10**400
WRONG: list[Any] = ["x", "", b"\xff", -1, 1.5, True, None, [], [1], {}, {"a": 1}, BIG, float("nan"), float("inf")]
NOT_JSON = [b"", b"{", b"[]", b"5", b'"x"', b"null", b"\xff\xfe", b"[" * 50_000, b'{"up_s": 1}', b"x" * 2_000_000]
FITS = {
    "role": (str,), "alarm": (str,), "host": (str,), "device": (str,), "digest": (str,), "stopped_by": (str,),
    "pid": (int,), "step": (int,), "version": (int,), "running": (int,), "done": (int,),
    "up_s": (int, float), "idle_fraction": (int, float), "waiting_s": (int, float), "tokens_per_s": (int, float),
    "mismatch": (int, float, type(None)), "cache_mismatch": (int, float, type(None)),
    "adapter_share": (type(None),), "evaluates": (bool,),
}  # fmt: skip
"""Stat of a heartbeat -> its types."""


def _wrong_heartbeats() -> list[bytes]:
    stats = [{"role": "rollout", name: v} for name, types in FITS.items() for v in WRONG if type(v) not in types]
    stats += [{"role": "rollout", name: v} for name in ("version", "up_s", "mismatch") for v in (BIG, float("nan"))]
    stats += [{"role": "rollout", "adapter_share": v} for v in ([1], [1, 2, 3], ["a", "b"], [1, float("inf")])]
    return [*NOT_JSON, *(json.dumps(one).encode() for one in stats if b"\xff" not in one.values())]


def test_heartbeats_that_cannot_be_read_are_named_and_counted_by_every_reader(
    client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    run = create_run(client, keys.run, make_config(), assets={}, folder=str(tmp_path))
    RunRecord(client, keys).set_status("running")
    wrong = _wrong_heartbeats()
    for i, record in enumerate(wrong):
        send_heartbeat(client, keys, f"rollout@here:{i}", {"role": "rollout"})
        client.set(keys.process(f"rollout@here:{i}"), record)
    client.zadd(keys.processes, {b"\xff@\xfe": 1e308, "reward@list:1": 1.0})
    client.rpush(keys.process("reward@list:1"), "x")
    send_heartbeat(
        client, keys, "rollout@sound:1", {"role": "rollout", "idle_fraction": 0.5, "done": 3, "own": {"a": [1]}}
    )
    client.hset(keys.autoscale, mapping={"rollout": "{", "reward": '{"desired": "many"}'})

    heartbeats = read_heartbeats(client, keys)
    assert [name for name, stats in heartbeats.items() if is_readable(stats)] == ["rollout@sound:1"]
    assert len(heartbeats) == len(wrong) + 1
    status = collect_status(client, run)
    named = [text for text in status["alarms"] if "its heartbeat cannot be read: " in text]
    assert len(named) == len(wrong)
    assert any("version: Input should be a valid integer" in text for text in named)
    assert f'sluice_alarm{{kind="alarm",run="{keys.run}"}} {len(wrong)}.0'.encode() in exposition(client, [run])
    assert "its heartbeat cannot be read" in screen(status)
    assert diagnose(client, run).text.startswith("0 workers on `dataset`"), "garbage hides no cause"
    loads = read_loads(client, run)
    assert (loads["rollout"].done, loads["rollout"].busy) == ({"rollout@sound:1": 3}, 0.5)
    assert read_scales(client, keys) == {}
    assert FlowMeter(client, run).metrics(step_s=1.0)["idle_fraction/rollout"] == 0.5


@pytest.fixture
def manifest(client: redis.Redis, keys: Keys) -> Manifest:
    """Version 1, a delta on version 0, with a canary."""
    row = {"prompt_ids": np.array([1], np.int32), "token_ids": np.array([2], np.int32)}
    return Manifest(
        version=1, step=1, incarnation=1, parent=0, num_bytes=0, digest="d", tensors={"w": "x"}, base=0, delta_bytes=8,
        canary=[{**row, "logprobs": np.array([-1.0], np.float32), "base_logprobs": None}],
    )  # fmt: skip


def test_a_manifest_of_another_form_is_refused_and_every_chain_ends(
    client: redis.Redis, keys: Keys, manifest: Manifest
) -> None:
    (row,) = manifest.canary
    wrong: list[Any] = [{}, [], 5, None, "x", {**asdict(manifest), "more": 1}]
    wrong += [
        {**asdict(manifest), name: v} for name in ("step", "num_bytes", "delta_bytes") for v in ("1", -1, 1.5, None, [])
    ]
    wrong += [{**asdict(manifest), name: v} for name in ("base", "parent") for v in (1, 2, "0", None, {})]
    wrong += [{**asdict(manifest), "version": v} for v in (2, -1, "1", None, {})]
    wrong += [{**asdict(manifest), "tensors": v} for v in ([], {"w": 1}, None, "x")]
    wrong += [{**asdict(manifest), "digest": v} for v in (5, None, [])]
    wrong += [{**asdict(manifest), "adapter_scale": v} for v in ("1", [], float("nan"), float("inf"))]
    wrong += [{**asdict(manifest), "canary": v} for v in (5, [5], [{}], [{**row, "x": 1}], [{**row, "token_ids": [2]}])]
    wrong += [
        {**asdict(manifest), "canary": [{**row, name: np.array(v, dtype)}]}
        for name, v, dtype in [
            ("logprobs", [1, 2], "float32"), ("logprobs", [1], "int32"), ("prompt_ids", [[1]], "int32"),
                ("base_logprobs", [], "float32"),
        ]
    ]  # fmt: skip
    signer, reader = Signer(keys.run, None), PolicyReader(client, keys, PolicyStoreConfig(transport="redis"))
    assert Manifest.from_signed_bytes(encode(asdict(manifest)), signer, version=1) == manifest
    for record in wrong:
        with pytest.raises(DigestMismatch, match="the manifest of policy version 1"):
            Manifest.from_signed_bytes(encode(record), signer, version=1)
        client.hset(keys.manifests, "1", encode(record))
        with pytest.raises(PolicyError):
            reader.fetch(1)


def test_sizes_versions_and_lineage_that_cannot_be_read_cost_neither_memory_nor_the_trainer(
    client: redis.Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    store = PolicyStore(client, keys, PolicyStoreConfig(transport="redis", keep=2, delta=False))
    tensors = {"w": torch.arange(8.0)}
    store.publish(0, tensors, step=0, parent=-1)
    for size in (b"x", b"", b"-5", b"9" * 15, b"9" * 5000, b"1_0", b" 8"):
        client.set(keys.tensors("weights", 0), size)
        with pytest.raises((DigestMismatch, PolicyNotFound)):
            PolicyReader(client, keys, PolicyStoreConfig(transport="redis")).fetch(0)
    client.hset(keys.manifests, mapping={"x": "y", "1e5": "", b"\xff": ""})
    client.zadd(keys.readers, {"x|reader": 9e15, b"\xff": 9e15})
    client.hset(keys.evaluations, "e", "soon")
    client.hset(keys.lineage, mapping={"7": "x", "8": "8:1", "x": "0:1", "9": "", "10": b"\xff:\xfe:d"})
    client.set(keys.tensors("weights", "x"), 5)
    client.set(keys.tensors("delta", 3), b"9" * 15)
    client.set(keys.tensors("delta", 3, 0), b"left by a killed trainer")
    again = PolicyStore(client, keys, PolicyStoreConfig(transport="redis", keep=2, delta=False))
    for version in (11, 12, 13):
        again.publish(version, tensors, step=version, parent=0)
    assert not list(client.scan_iter(match=keys.tensors("delta", 3) + "*"))
    assert not list(client.scan_iter(match=keys.tensors("weights", 11) + "*"))
    assert caplog.text.count(f"{keys.manifests} holds what cannot be read, and is ignored: b'1e5'") == 1
    assert set(read_lineage(client, keys)) == {0, 11, 12, 13}
    assert policy_ages(client, keys, [11], current=13) == [24]
    with pytest.raises(PolicyNotFound, match="8 is not in the lineage"):
        policy_ages(client, keys, [8], current=13)


def test_the_policy_thread_survives_what_it_cannot_read_and_says_so(
    serve_fleet: Callable[..., ServedFleet], manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_fleet(policy_store={"transport": "redis"})
    client, keys = served.client, served.keys
    served.role.start()
    served.until_serves(0)
    number = 0

    def harm(words: str, change: Callable[[int], Any]) -> None:
        """Break something, wait for the alarm, and publish a sound version."""
        nonlocal number
        number += 1
        change(number)
        wait_for(lambda: words in served.heartbeat.get("alarm", ""), timeout=10, what=f"an alarm with {words!r}")
        assert served.heartbeat["alarm"].startswith("still serves version ")
        client.delete(keys.policy)
        number += 1
        served.publish(number)
        served.until_serves(number)

    def forged(record: bytes) -> Callable[[int], Any]:
        return lambda version: (
            client.hset(keys.manifests, str(version), record),
            publish_policy(client, keys, version),
        )

    for field, value in (("version", "x"), ("version", "9" * 5000), ("version", b"\xff"), ("digest", b"\x00\xff")):
        harm("the policy pointer cannot be read", lambda _, f=field, v=value: client.hset(keys.policy, f, v))
    harm("WRONGTYPE", lambda _: (client.delete(keys.policy), client.set(keys.policy, "x")))
    harm("is damaged", forged(b"SL\x01\xc1"))
    harm("is damaged", forged(encode({**asdict(manifest), "version": number + 1, "canary": [{"prompt_ids": 5}]})))
    own = number + 1
    harm("which are not older", forged(encode({**asdict(manifest), "version": own, "base": own})))

    def publish_without_size(version: int) -> None:
        write = served.store._transport.write
        with monkeypatch.context() as patch:
            patch.setattr(served.store._transport, "write", lambda version, *more: (
                write(version, *more), client.set(keys.tensors("weights", version), "x"))[0])  # fmt: skip
            served.publish(version)

    def publish_what_breaks_the_engine(version: int) -> None:
        stage = served.engine.stage
        served.engine.stage = lambda asked, *more: 1 / (asked - version) and stage(asked, *more)
        served.publish(version)

    harm("the size of policy version", publish_without_size)
    harm("division by zero", publish_what_breaks_the_engine)


def test_an_operators_order_that_cannot_be_read_is_obeyed_and_shown(
    client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    run = create_run(client, keys.run, make_config(), assets={}, folder=str(tmp_path))
    for wrong in NOT_JSON[1:]:  # an empty text is no order
        client.hset(keys.run_record, "paused", wrong)
        assert RunRecord(client, keys).held() == ({"who": "unreadable", "at": 0.0}, None)
    assert "paused by unreadable" in str(diagnose(client, run))
