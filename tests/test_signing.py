"""Signed policies: what somebody without the run's key has published is served by nobody who has it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import redis
import torch
from builders import for_each, make_config
from fleet import ServedFleet

from sluice.common.config import PolicyStoreConfig
from sluice.common.connections.secrets import secret
from sluice.common.errors import ConfigError, DigestMismatch, SignatureRefused
from sluice.common.keys import Keys
from sluice.common.monitoring.diagnosis import alarms
from sluice.common.policies import signing
from sluice.common.policies import store as store_module
from sluice.common.policies.manifest import Manifest
from sluice.common.policies.signing import Signer, make_key, unsigned_bytes
from sluice.common.policies.store import PolicyStore
from sluice.common.run import create_run, open_run
from sluice.common.serialization import encode
from sluice.scripts.launcher.roles import key_environment, trainer_role, worker_role

KEY, OTHER_KEY = "k" * 32, "o" * 32


@pytest.fixture
def make(client: redis.Redis, keys: Keys, tmp_path: Path) -> Callable[[str | None], PolicyStore]:
    config = PolicyStoreConfig(transport="redis")
    return lambda key: PolicyStore(client, keys, config, signer=Signer(keys.run, key))


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {"w": torch.randn(64, generator=torch.Generator().manual_seed(seed))}


def publish(store: PolicyStore, version: int, *, seed: int | None = None) -> Manifest:
    return store.publish(version, weights(version if seed is None else seed), step=version, parent=version - 1)


@for_each(
    ("forger", "message"),
    [(None, "is not signed, and this process has"), (OTHER_KEY, "is not signed with this process'")],
)
def test_who_has_the_key_serves_its_trainers_policies_only(
    make: Callable[..., PolicyStore], forger: str | None, message: str
) -> None:
    trainer, worker = make(KEY), make(KEY)
    first = trainer.latest_version() + 1
    for version in range(first, first + 3):
        publish(trainer, version)
        assert worker.fetch(version)[0].version == version
    publish(make(forger), first + 3, seed=666)  # sound in itself: manifest, digests, pointer and event
    with pytest.raises(SignatureRefused, match=f"policy version {first + 3} {message}"):
        worker.fetch(first + 3)
    manifest, tensors = worker.fetch(first + 2)
    assert manifest.version == first + 2
    assert torch.equal(tensors["w"], weights(first + 2)["w"])
    assert make(None).fetch(first + 3)[0].version == first + 3, "who has no key asks for no signature"


def test_every_field_is_signed(client: redis.Redis, keys: Keys, make: Callable[..., PolicyStore]) -> None:
    manifest = publish(make(KEY), 0)
    signed = client.hget(keys.manifests, "0")
    head = signed[: -len(unsigned_bytes(signed))]
    other = {
        **{field.name: getattr(manifest, field.name) for field in fields(Manifest)},
        "digest": "0" * 64,
        "tensors": {**manifest.tensors, "x": "0"},
        "canary": [{"prompt_ids": [1]}],
        "adapter_scale": 2.0,
    }
    for name, value in other.items():
        changed = replace(manifest, **{name: value + 1 if isinstance(value, int) else value})
        client.hset(keys.manifests, "0", head + encode(asdict(changed)))
        with pytest.raises(SignatureRefused):
            make(KEY).fetch(0)


def test_a_signed_manifest_is_of_one_version_and_one_run(
    client: redis.Redis, keys: Keys, make: Callable[..., PolicyStore]
) -> None:
    trainer = make(KEY)
    publish(trainer, 0)
    client.set(keys.full_requested, 0)
    trainer.republish_full()
    assert make(KEY).fetch(0)[0].version == 0, "a version that is republished is signed as well"
    signed = client.hget(keys.manifests, "0")
    client.hset(keys.manifests, "7", signed)
    with pytest.raises(DigestMismatch, match="the manifest of policy version 7 is that of version 0"):
        make(KEY).fetch(7)
    with pytest.raises(SignatureRefused):
        Manifest.from_signed_bytes(signed, Signer("another-run", KEY), version=0)


def test_a_manifest_of_a_deleted_run_is_not_that_of_another_of_the_same_name(
    client: redis.Redis, keys: Keys, make: Callable[..., PolicyStore], tmp_path: Path
) -> None:
    create_run(client, keys.run, make_config(), assets={}, folder=str(tmp_path))
    publish(make(KEY), 0)
    signed, pointer = client.hget(keys.manifests, "0"), client.hgetall(keys.policy)
    assert make(KEY).fetch(0)[0].version == 0
    client.delete(keys.run_record)
    create_run(client, keys.run, make_config(), assets={}, folder=str(tmp_path))
    client.hset(keys.manifests, "0", signed)
    client.hset(keys.policy, mapping=pointer)
    with pytest.raises(SignatureRefused, match="version 0 is signed for another run of this name"):
        make(KEY).fetch(0)
    with pytest.raises(SignatureRefused, match="does not confirm"):
        make(KEY).check_confirmed(*make(KEY).served())


def test_a_worker_that_starts_serves_no_older_policy_than_the_trainer_confirms(
    serve_fleet: Callable[..., ServedFleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_RUN_KEY", KEY)
    served = serve_fleet()
    client, keys = served.client, served.keys
    served.publish(1)
    older = client.hgetall(keys.policy)
    served.publish(2)
    newer = client.hgetall(keys.policy)
    for confirmed in (newer[b"confirmed"], b"", b"x", b"1:", b"9" * 30 + b":" + b"0" * 64):
        client.hset(keys.policy, mapping={**older, b"confirmed": confirmed})
        with pytest.raises(
            SignatureRefused, match="the pointer names policy version 1, which the trainer does not confirm"
        ):
            served.store.check_confirmed(*served.store.served())
    served.role.start()  # as restarted after somebody has moved the pointer back
    served.until_alarm(
        "still serves version -1: the pointer names policy version 1, which the trainer does not confirm"
    )
    with monkeypatch.context() as patch:
        patch.setattr(signing, "MAX_UNCONFIRMED_S", -1.0)
        client.hset(keys.policy, mapping=older)
        words = "the trainer last confirmed policy version 1"
        served.until(lambda beat: words in beat.get("alarm", ""), "a confirmation that is too old to be refused")
        assert served.engine.version == -1
    client.hset(keys.policy, mapping=newer)
    served.until_serves(2)
    client.hset(keys.policy, mapping=older)
    served.publish(3)
    served.until_serves(3)
    client.hset(keys.policy, mapping=newer)
    assert served.versions() == {3}, "a running worker never goes back"

    client.hdel(keys.policy, "confirmed")
    served.store.confirm(client)
    assert not client.hexists(keys.policy, "confirmed"), "it is not due yet"
    monkeypatch.setattr(store_module, "CONFIRM_S", 0.0)
    served.store.confirm(client)
    with pytest.raises(SignatureRefused):
        served.store.check_confirmed(*served.store.served())
    served.store.check_confirmed(3, served.store.manifest(3).digest)


@for_each("signed", [b"", b"SL+", b"SL+" + b"x" * 31, b"\x00" * 40, b"SL\x01\xc1", b"SL\x01\x90"])
def test_garbage_is_refused_with_or_without_a_key(signed: bytes) -> None:
    with pytest.raises((SignatureRefused, DigestMismatch)):
        Manifest.from_signed_bytes(signed, Signer("r", KEY), version=0)
    with pytest.raises(DigestMismatch, match="the manifest of policy version 0 is damaged"):
        Manifest.from_signed_bytes(signed, Signer("r", None), version=0)


def test_a_rollout_worker_goes_on_with_the_last_policy_of_its_trainer(
    serve_fleet: Callable[..., ServedFleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_RUN_KEY", KEY)
    served = serve_fleet()
    client, keys, config = served.client, served.keys, served.fleet.config
    served.publish(1)
    served.role.start()
    served.until_serves(1)
    forged = {name: tensor + 1.0 for name, tensor in served.store.fetch(1)[1].items()}
    PolicyStore(client, keys, config.policy_store, signer=Signer(keys.run, None)).publish(2, forged, step=2, parent=1)
    served.until_alarm("still serves version 1: policy version 2 is not signed")
    assert any("is not signed" in alarm.text for alarm in alarms(client, open_run(client, keys.run)))
    assert served.engine.version == 1
    served.publish(3)
    served.until_serves(3)
    for key in client.scan_iter(keys.root + "*"):
        assert KEY.encode() not in (client.dump(key) or b""), key
    assert KEY not in json.dumps(config.model_dump(mode="json"))


def test_reward_workers_and_the_dashboard_have_no_key(tmp_path: Path) -> None:
    config, file = make_config(), tmp_path / "run.key"
    assert key_environment(trainer_role(config), file) == {"SLUICE_RUN_KEY_FILE": str(file)}
    for queue in ("rollout", "rollout,eval", "reference", "eval"):
        assert key_environment(worker_role(config, queue, 0), file) == {"SLUICE_RUN_KEY_FILE": str(file)}
    for queue in ("reward", "dataset"):
        assert key_environment(worker_role(config, queue, 0), file) == {"SLUICE_RUN_KEY": "", "SLUICE_RUN_KEY_FILE": ""}


def test_keys_come_from_the_environment_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "key"
    make_key(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(file.read_text().strip()) == 64
    for name in ("SLUICE_RUN_KEY", "SLUICE_RUN_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert secret("SLUICE_RUN_KEY") is None
    monkeypatch.setenv("SLUICE_RUN_KEY_FILE", str(file))
    assert secret("SLUICE_RUN_KEY") == file.read_text().strip()
    monkeypatch.setenv("SLUICE_RUN_KEY", "")
    assert secret("SLUICE_RUN_KEY") == file.read_text().strip(), "an empty variable is none"
    monkeypatch.setenv("SLUICE_RUN_KEY", KEY)
    with pytest.raises(ConfigError, match="are both set"):
        secret("SLUICE_RUN_KEY")
    monkeypatch.delenv("SLUICE_RUN_KEY")
    file.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        secret("SLUICE_RUN_KEY")
    os.remove(file)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        secret("SLUICE_RUN_KEY")
    with pytest.raises(ConfigError, match="SLUICE_RUN_KEY has 5 characters: use 32"):
        Signer("run", "short")
