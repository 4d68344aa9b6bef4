"""The policy store over both transports: exact bytes, the pointer last, and nothing unverified is ever served."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import redis
import torch
from builders import make_config

from sluice.common.config import EvalDataset, PolicyStoreConfig
from sluice.common.connections.broker import make_app
from sluice.common.connections.client import connect
from sluice.common.errors import DigestMismatch, PolicyError, PolicyNotFound
from sluice.common.ledger import evaluations as evaluation
from sluice.common.ledger.scripts import Scripts
from sluice.common.policies import transports as weights_transport
from sluice.common.policies.digest import tensor_digest, weights_digest
from sluice.common.policies.manifest import ManifestChain
from sluice.common.policies.retention import READER_S
from sluice.common.policies.store import PolicyStore
from sluice.common.policies.transports import CHUNK_BYTES
from sluice.common.run import Run
from sluice.common.serialization import encode
from sluice.trainer.publish import Publisher


@pytest.fixture(params=["directory", "redis"])
def transport(request):
    return request.param


@pytest.fixture
def store(client, keys, tmp_path, transport):
    return make_store(client, keys, tmp_path, transport)


def make_store(client, keys, tmp_path, transport, *, keep=2):
    config = make_config(policy_store={"transport": transport, "path": str(tmp_path), "keep": keep})
    return PolicyStore(client, keys, config.policy_store)


def weights(value, *, size=4):
    return {"w": torch.full((size, 2), float(value)), "b": torch.full((3,), value, dtype=torch.bfloat16)}


def publish(store, version, *, value=None, **options):
    options = {"step": version, "parent": version - 1, **options}
    return store.publish(version, weights(version if value is None else value), **options)


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        got = found[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
        assert got.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist(), name


def crash_before_the_pointer(store, version, tensors, monkeypatch):
    """Publish as a trainer does that dies after the bytes and the manifest are written."""

    class Died(Exception):
        pass

    def die(self, name, *args, **options):
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(Scripts, "__call__", die)
        with pytest.raises(Died):
            store.publish(version, tensors, step=version, parent=version - 1)


def stored_names(client, keys, tmp_path, transport):
    """Versions whose bytes are there."""
    if transport == "directory":
        return {int(path.stem.split("-")[1]) for path in Path(tmp_path).rglob("*-0*.*")}
    roots = [keys.tensors(kind, "") for kind in ("weights", "delta")]
    return {
        int(key.decode().removeprefix(root).split(":")[0])
        for root in roots
        for key in client.scan_iter(match=root + "*", count=1000)
    }


def damage(client, keys, tmp_path, transport, version, change):
    """Replace the stored bytes of a version."""
    if transport == "directory":
        (path,) = Path(tmp_path).rglob(f"*{version}.safetensors")
        path.write_bytes(change(path.read_bytes()))
    else:
        chunk = keys.tensors("weights", version, 0)
        client.set(chunk, change(client.get(chunk)))


# Round trip


def test_tensors_of_every_kind_come_back_bit_by_bit(store):
    generator = torch.Generator().manual_seed(7)
    tensors = {
        "fp32": torch.randn(17, 5, generator=generator),
        "bf16": torch.randn(33, generator=generator).to(torch.bfloat16),
        "fp16": torch.randn(3, 1, 2, generator=generator).half(),
        "int64": torch.tensor([2**62, -1]),
        "int32 buffer": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(3.25),
        "empty": torch.zeros(0, 4),
        "nan": torch.tensor([0x7FC00001, -0x80000000, 0x7F800000], dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32),
        "model.layers.0.é": torch.zeros(1),
    }
    written = store.publish(0, tensors, step=0, parent=-1)
    manifest, found = store.fetch(0)
    assert manifest == written
    assert_identical(found, tensors)
    assert (manifest.version, manifest.step, manifest.incarnation, manifest.parent) == (0, 0, 1, -1)
    assert manifest.num_bytes > sum(t.numel() * t.element_size() for t in tensors.values())
    assert manifest.tensors.keys() == tensors.keys()


def test_weights_larger_than_several_chunks_come_back(client, keys, store):
    tensors = {"w": torch.arange((CHUNK_BYTES * 2 + 12345) // 4, dtype=torch.int32)}
    store.publish(0, tensors, step=0, parent=-1)
    assert_identical(store.fetch(0)[1], tensors)


def test_fetched_tensors_are_private_memory(tmp_path, client, keys):
    store = make_store(client, keys, tmp_path, "directory")
    publish(store, 0)
    found = store.fetch(0)[1]
    (path,) = tmp_path.rglob("policy-*.safetensors")
    path.write_bytes(b"\xff" * path.stat().st_size)  # in place: what maps the file sees it
    assert_identical(found, weights(0))
    path.write_bytes(b"")  # of a mapped file, reading the lost pages would end the process
    assert_identical(found, weights(0))


def test_digests_tell_type_shape_and_bytes_apart():
    zeros = torch.zeros(4)
    others = [
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        torch.tensor([0.0, 0, 0, -0.0]),
        torch.zeros(8).half(),
    ]
    assert tensor_digest(zeros) == tensor_digest(torch.zeros(8)[::2])
    assert len({tensor_digest(t) for t in [zeros, *others]}) == 5


def test_two_processes_agree_on_the_digest_of_a_version(client, keys, tmp_path, transport, store):
    manifest = publish(store, 0)
    other = make_store(client, keys, tmp_path, transport)
    assert other.manifest(other.latest_version()) == manifest
    assert other.fetch(0)[0].digest == client.hget(keys.policy, "digest").decode()


# The pointer


def test_before_the_first_publication_there_is_no_version(store):
    assert store.latest_version() == -1
    with pytest.raises(PolicyNotFound, match="policy version 0 was never published in this run, or was removed"):
        store.fetch(0)


def test_a_crash_before_the_pointer_moves_leaves_the_old_version_served(store, monkeypatch):
    publish(store, 0)
    crash_before_the_pointer(store, 1, weights(1), monkeypatch)
    assert (store.latest_version(), store.manifest(store.latest_version()).version) == (0, 0)
    assert_identical(store.fetch(store.latest_version())[1], weights(0))


def test_the_same_version_can_be_published_again_after_such_a_crash(store, monkeypatch):
    publish(store, 0)
    crash_before_the_pointer(store, 1, weights(1, size=9), monkeypatch)
    publish(store, 1, value=7)
    assert store.manifest(store.latest_version()).version == 1
    assert_identical(store.fetch(1)[1], weights(7))


def test_a_crash_while_writing_leaves_no_file_behind_for_ever(client, keys, tmp_path):
    store = make_store(client, keys, tmp_path, "directory")
    publish(store, 0)
    leftover = tmp_path / keys.run / "policy-00000001.tmp99999"
    leftover.write_bytes(b"half of version 1")
    publish(store, 1)
    assert not leftover.exists()
    assert sorted(p.name for p in leftover.parent.iterdir()) == [f"policy-0000000{v}.safetensors" for v in (0, 1)]


def test_publishing_twice_because_the_reply_was_lost_is_harmless(store):
    assert publish(store, 0) == publish(store, 0)
    assert store.manifest(store.latest_version()).version == 0


@pytest.mark.parametrize("version", [0, 1, 2])
def test_versions_only_grow_and_a_served_version_is_never_overwritten(store, version):
    for v in (0, 1, 2):
        publish(store, v)
    with pytest.raises(PolicyError, match=f"policy version {version} was not published: version 2 is served already"):
        publish(store, version, value=50)
    assert store.latest_version() == 2
    assert_identical(store.fetch(version)[1], weights(version))


def test_equal_weights_do_not_make_an_older_version_publishable(store):
    publish(store, 0, value=5)
    publish(store, 1, value=5)
    with pytest.raises(PolicyError, match="version 1 is served already"):
        publish(store, 0, value=5)


def test_a_replaced_trainer_is_refused_and_damages_nothing(client, keys, store):
    publish(store, 0)
    client.hset(keys.run_record, "incarnation", 2)
    publish(store, 1, incarnation=2)
    for version in (1, 2):
        with pytest.raises(PolicyError, match="a newer trainer process owns this run; this one must stop"):
            publish(store, version, value=66, incarnation=1)
    assert store.latest_version() == 1
    assert_identical(store.fetch(1)[1], weights(1))
    with pytest.raises(PolicyNotFound):
        store.fetch(2)


def test_a_trainer_replaced_while_it_writes_does_not_move_the_pointer(client, keys, store, monkeypatch):
    publish(store, 0)
    call = Scripts.__call__

    def overtaken(self, name, *args, **options):
        client.hset(keys.run_record, "incarnation", 2)
        return call(self, name, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Scripts, "__call__", overtaken)
        with pytest.raises(PolicyError, match="a newer trainer process owns this run"):
            publish(store, 1)
    assert store.latest_version() == 0


def test_a_roll_back_goes_on_under_a_new_version_whose_parent_is_the_checkpoints(client, keys, store):
    for version in range(3):
        publish(store, version)
    store.announce(3, step=1, parent=1)
    assert store.latest_version() == 2
    store.publish(3, weights(3), step=1, parent=1, incarnation=2)
    lineage = {v.decode(): entry.decode().rpartition(":")[0] for v, entry in client.hgetall(keys.lineage).items()}
    assert lineage == {"0": "-1:0", "1": "0:1", "2": "1:2", "3": "1:1"}
    assert (store.manifest(store.latest_version()).parent, store.manifest(store.latest_version()).incarnation) == (1, 2)


def test_every_publication_is_told_to_those_who_listen(client, keys, store):
    publish(store, 0)
    publish(store, 1)
    events = [fields for _, fields in client.xrange(keys.events)]
    assert events == [{b"event": b"policy", b"version": b"0"}, {b"event": b"policy", b"version": b"1"}]


# Damage


def test_one_flipped_bit_is_found_and_the_tensor_named(client, keys, tmp_path, transport, store):
    publish(store, 0)

    def flip(data):
        return data[:-1] + bytes([data[-1] ^ 1])

    damage(client, keys, tmp_path, transport, 0, flip)
    with pytest.raises(DigestMismatch, match=r"policy version 0: tensor [wb] does not match its digest"):
        store.fetch(0)


@pytest.mark.parametrize("length", [0, 7, 60, -1])
def test_truncated_bytes_are_found(client, keys, tmp_path, transport, store, length):
    publish(store, 0)
    damage(client, keys, tmp_path, transport, 0, lambda data: data[:length])
    with pytest.raises(DigestMismatch, match="policy version 0"):
        store.fetch(0)


@pytest.mark.parametrize("is_held", [False, True])
def test_a_manifest_whose_digest_is_not_that_of_its_tensors_is_refused(client, keys, make, is_held):
    trainer, worker = make(), make()
    publish_drifting(trainer, [0])
    if is_held:
        worker.fetch(0)
    (manifest,) = publish_drifting(trainer, [1])
    wrong = replace(manifest, digest=weights_digest(drifting(2)))
    client.hset(keys.manifests, "1", encode(asdict(wrong)))
    with pytest.raises(DigestMismatch, match="version 1: the manifest's digest is not that of its tensors"):
        worker.fetch(1)


def test_garbage_in_place_of_the_weights_is_found(client, keys, tmp_path, transport, store):
    publish(store, 0)
    damage(client, keys, tmp_path, transport, 0, lambda data: b"\xff" * len(data))
    with pytest.raises(DigestMismatch, match=r"policy version 0 .* is damaged"):
        store.fetch(0)


def test_weights_of_another_version_are_not_taken_for_this_one(client, keys, tmp_path, transport, store):
    publish(store, 0)
    publish(store, 1)
    kept = []
    damage(client, keys, tmp_path, transport, 0, lambda data: kept.append(data) or data)
    damage(client, keys, tmp_path, transport, 1, lambda _: kept[0])
    with pytest.raises(DigestMismatch, match="policy version 1: tensor"):
        store.fetch(1)


def test_other_tensors_than_the_manifest_names_are_refused(client, keys, tmp_path, transport, store):
    publish(store, 0)
    rogue = make_store(client, keys, tmp_path, transport)
    rogue._transport.write(0, {**weights(0), "extra": torch.zeros(1)})
    with pytest.raises(DigestMismatch, match="policy version 0 holds other tensors than its manifest names"):
        store.fetch(0)


def test_a_missing_file_says_what_to_do(client, keys, tmp_path):
    store = make_store(client, keys, tmp_path, "directory")
    publish(store, 0)
    store._transport.delete(0)
    with pytest.raises(PolicyNotFound, match=r"is policy_store.path shared .* use policy_store.transport=redis"):
        store.fetch(0)


def test_a_missing_chunk_is_named(client, keys, tmp_path):
    store = make_store(client, keys, tmp_path, "redis")
    store.publish(0, {"w": torch.zeros(CHUNK_BYTES // 2)}, step=0, parent=-1)
    client.delete(keys.tensors("weights", 0, 1))
    with pytest.raises(PolicyNotFound, match="policy version 0: chunk 1 is missing in Redis"):
        store.fetch(0)
    client.delete(keys.tensors("weights", 0))
    with pytest.raises(PolicyNotFound, match="policy version 0 is not in Redis"):
        store.fetch(0)


# Garbage


def test_the_newest_versions_and_the_base_are_kept(client, keys, tmp_path, transport, store):
    for version in range(6):
        publish(store, version)
    assert stored_names(client, keys, tmp_path, transport) == {0, 4, 5}
    for version in (0, 4, 5):
        assert_identical(store.fetch(version)[1], weights(version))
    with pytest.raises(PolicyNotFound, match="policy version 3 was never published in this run, or was removed"):
        store.fetch(3)
    assert client.hlen(keys.lineage) == 6, "ages are told of versions whose weights are gone"


def test_a_version_that_an_evaluation_needs_is_kept_until_it_is_finished(client, keys, tmp_path, transport, store):
    dataset = EvalDataset.model_validate({"dataset": {"path": "x"}})
    publish(store, 0)
    publish(store, 1)
    evaluation.request(client, keys, dataset, version=1)
    for version in range(2, 6):
        publish(store, version)
    assert stored_names(client, keys, tmp_path, transport) == {0, 1, 4, 5}
    client.hdel(keys.evaluations, evaluation.evaluation_id(1, "heldout"))
    publish(store, 6)
    assert stored_names(client, keys, tmp_path, transport) == {0, 5, 6}


def test_runs_do_not_see_each_others_versions(client, keys, tmp_path, transport, store):
    other_keys = type(keys)(keys.run + "-b")
    other = make_store(client, other_keys, tmp_path, transport)
    publish(store, 0, value=1)
    publish(other, 0, value=2)
    assert_identical(store.fetch(0)[1], weights(1))
    assert_identical(other.fetch(0)[1], weights(2))
    for key in client.scan_iter(match=other_keys.root + "*"):
        client.unlink(key)


def test_fewer_than_two_kept_versions_are_refused():
    with pytest.raises(ValueError, match="keep"):
        PolicyStoreConfig(keep=1)


# Readers


def test_a_version_that_somebody_is_reading_is_not_collected(store, client, keys):
    publish(store, 0)
    publish(store, 1)
    with store._retention.reading(1):
        for version in (2, 3, 4):
            publish(store, version)
        assert store.fetch(1)[0].version == 1
        with pytest.raises(PolicyNotFound):
            store.fetch(2)
    publish(store, 5)
    with pytest.raises(PolicyNotFound):
        store.fetch(1)
    assert client.zcard(keys.readers) == 0


def test_a_reader_that_died_keeps_its_version_until_its_time_is_over(store, client, keys):
    publish(store, 0)
    publish(store, 1)
    seconds, _ = client.time()
    client.zadd(keys.readers, {"1|dead": (seconds + 100) * 1000})
    for version in (2, 3):
        publish(store, version)
    assert store.fetch(1)[0].version == 1
    client.zadd(keys.readers, {"1|dead": (seconds - 1) * 1000})
    publish(store, 4)
    with pytest.raises(PolicyNotFound):
        store.fetch(1)
    assert client.zcard(keys.readers) == 0


def test_a_long_fetch_stays_entered(store, client, keys, monkeypatch):
    publish(store, 0)
    now = time.monotonic()
    with store._retention.reading(0) as go_on:
        (entry,) = client.zrange(keys.readers, 0, -1)
        client.zadd(keys.readers, {entry: 1})
        go_on()
        assert client.zscore(keys.readers, entry) == 1, "said only so often"
        monkeypatch.setattr(time, "monotonic", lambda: now + READER_S / 2)
        go_on()
        assert client.zscore(keys.readers, entry) > 1


# Deltas


def drifting(version):
    """Weights of which every version changes a hundredth; `b` stays."""
    w = torch.zeros(4000, dtype=torch.bfloat16)
    for v in range(1, version + 1):
        w[v::97] += v
    return {"w": w, "b": torch.ones(300, dtype=torch.bfloat16)}


def publish_drifting(store, versions):
    return [store.publish(v, drifting(v), step=v, parent=v - 1) for v in versions]


@pytest.fixture
def make(client, keys, tmp_path, transport):
    """A store of a process of its own, with whole weights every 4 versions."""

    def make_one(client=client, **options):
        config = make_config(
            policy_store={"transport": transport, "path": str(tmp_path), "keep": 2, "full_every": 4, **options}
        )
        return PolicyStore(client, keys, config.policy_store)

    return make_one


def forms(manifests):
    """How each version is stored."""
    return ["whole " * (m.num_bytes > 0) + (f"delta on {m.base}" if m.base >= 0 else "") for m in manifests]


def test_versions_travel_as_deltas_with_whole_weights_in_between(make):
    manifests = publish_drifting(make(), range(6))
    assert forms(manifests) == [
        "whole ", "delta on 0", "delta on 1", "delta on 2", "whole delta on 3", "delta on 4"
    ]  # fmt: skip
    for manifest in manifests[1:]:
        assert 0 < manifest.payload_bytes == manifest.delta_bytes < manifests[0].payload_bytes / 10
        assert manifest.digest == weights_digest(drifting(manifest.version))


def test_a_worker_that_keeps_up_reads_the_deltas_only(make):
    trainer, worker = make(), make()
    publish_drifting(trainer, [0])
    worker.fetch(0)
    for version in range(1, 11):
        (manifest,) = publish_drifting(trainer, [version])
        assert_identical(worker.fetch(version)[1], drifting(version))
        assert worker.last_fetch_bytes == manifest.delta_bytes


def test_a_worker_that_missed_versions_catches_up_along_the_chain(make):
    trainer, worker = make(keep=9), make()
    publish_drifting(trainer, [0, 1])
    worker.fetch(1)
    manifests = publish_drifting(trainer, range(2, 8))
    assert_identical(worker.fetch(7)[1], drifting(7))
    assert worker.last_fetch_bytes == sum(m.delta_bytes for m in manifests)


def test_a_late_worker_begins_at_the_nearest_whole_version(make):
    manifests = publish_drifting(make(), range(7))
    worker = make()
    assert_identical(worker.fetch(6)[1], drifting(6))
    assert worker.last_fetch_bytes == manifests[4].num_bytes + manifests[5].delta_bytes + manifests[6].delta_bytes


def test_a_worker_may_go_back_and_fetch_the_same_version_again(make):
    publish_drifting(make(keep=9), range(7))
    worker = make()
    for version in (6, 5, 5, 2, 6):
        assert_identical(worker.fetch(version)[1], drifting(version))


def test_unchanged_tensors_are_shared_and_changed_ones_are_new(make):
    trainer, worker = make(), make()
    publish_drifting(trainer, [0, 1])
    before = worker.fetch(1)[1]
    publish_drifting(trainer, [2])
    after = worker.fetch(2)[1]
    assert after["b"] is before["b"]
    assert_identical(before, drifting(1))


def test_a_trainer_that_was_started_again_begins_with_whole_weights(make):
    publish_drifting(make(), [0, 1])
    assert forms(publish_drifting(make(), [2, 3])) == ["whole ", "delta on 2"]
    assert_identical(make().fetch(3)[1], drifting(3))


def test_weights_that_differ_too_much_travel_whole_and_deltas_go_on_from_there(make):
    trainer, worker = make(), make()
    publish_drifting(trainer, [0, 1])
    worker.fetch(1)
    jump = {name: tensor + 1 for name, tensor in drifting(1).items()}
    manifest = trainer.publish(2, jump, step=2, parent=1)
    assert forms([manifest]) == ["whole "]
    assert_identical(worker.fetch(2)[1], jump)
    nudged = {**jump, "w": jump["w"].clone().index_fill_(0, torch.tensor([7]), 3)}
    assert forms([trainer.publish(3, nudged, step=3, parent=2)]) == ["delta on 2"]
    assert_identical(worker.fetch(3)[1], nudged)


def test_deltas_can_be_turned_off(make):
    store = make(delta=False)
    assert forms(publish_drifting(store, range(3))) == ["whole "] * 3
    worker = make(delta=False)
    assert_identical(worker.fetch(2)[1], drifting(2))
    assert store._held is worker._held is None, "no memory for what is not used"


def test_a_worker_holds_whole_weights_where_deltas_may_follow(make):
    trainer, worker = make(), make()
    for version in range(3):
        trainer.publish(version, {"w": torch.full((64,), version + 0.1)}, step=version, parent=version - 1)
        assert_identical(worker.fetch(version)[1], {"w": torch.full((64,), version + 0.1)})
        assert worker._held is None, "fp32 weights differ everywhere: the next version comes whole too"
    manifests = [make().publish(3, drifting(3), step=3, parent=2)]
    worker.fetch(3)
    restarted = make()
    manifests += publish_drifting(restarted, [4])
    worker.fetch(4)
    manifests += publish_drifting(restarted, [5])
    assert forms(manifests) == ["whole ", "whole ", "delta on 4"], "a new trainer process begins with whole weights"
    assert_identical(worker.fetch(5)[1], drifting(5))
    assert worker.last_fetch_bytes == manifests[2].delta_bytes


def kill_trainer(redis_url, act, *, at):
    """Let a process of its own act as trainer, with a Redis client, until it calls `at` (class, method, so many calls)."""
    owner, name, num_calls = at
    pid = os.fork()
    if pid == 0:
        try:
            method, calls = getattr(owner, name), []

            def die(*args, **options):
                calls.append(args)
                if len(calls) == num_calls:
                    os.kill(os.getpid(), signal.SIGKILL)
                return method(*args, **options)

            act(connect(redis_url), lambda: setattr(owner, name, die))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("last", ["full", "delta", "mended"])
@pytest.mark.parametrize("is_complete", [False, True], ids=["half written", "without manifest"])
def test_what_killed_trainers_left_is_freed(
    client, keys, tmp_path, transport, make, redis_url, monkeypatch, last, is_complete
):
    monkeypatch.setattr(weights_transport, "CHUNK_BYTES", 64 if last == "delta" else 3000)  # several, of either kind
    publish_drifting(make(keep=9), [0, 1])
    half = (Path, "rename", 1) if transport == "directory" else (redis.Redis, "set", 3)
    at = (ManifestChain, "record", 1) if is_complete else half

    def act(own_client, arm):
        trainer = make(client=own_client, keep=9)
        if last != "full":
            publish_drifting(trainer, [2])
        if last == "mended":
            publish_drifting(trainer, [3])
        arm()
        if last == "mended":
            trainer.republish_full()
        publish_drifting(trainer, [2 if last == "full" else 3])

    kill_trainer(redis_url, act, at=at)
    before = stored_names(client, keys, tmp_path, transport)
    recorded = {int(v) for v in client.hkeys(keys.manifests)}
    assert before - recorded == ({"full": {2}, "delta": {3}, "mended": set()}[last])
    successor = make(keep=9)
    publish_drifting(successor, [4])
    assert stored_names(client, keys, tmp_path, transport) == recorded | {4}
    for version in recorded | {4}:
        assert_identical(make().fetch(version)[1], drifting(version))
    publish_drifting(make(), [5, 6])
    assert stored_names(client, keys, tmp_path, transport) == {0, 5, 6}, (
        "nor is anything left of a version that was mended"
    )


def test_a_version_without_manifest_is_not_freed_under_a_reader_nor_by_an_older_trainer(
    client, keys, tmp_path, transport, make
):
    publish_drifting(make(), [0, 1, 2])
    client.hdel(keys.manifests, "1", "2")
    make()._transport.write(9, drifting(9))  # by a trainer that is about to publish it
    with make()._retention.reading(2):
        publish_drifting(make(), [3])
    assert stored_names(client, keys, tmp_path, transport) == {0, 2, 3, 9}


def test_what_a_killed_trainer_left_of_a_version_goes_when_the_version_goes(client, keys, tmp_path):
    store = make_store(client, keys, tmp_path, "directory")
    publish(store, 0)
    publish(store, 1)
    leftover = tmp_path / keys.run / "policy-00000001.tmp99999"
    leftover.write_bytes(b"half of version 1, mended")
    for version in (2, 3):
        publish(store, version)
    assert not leftover.exists()


def test_versions_that_others_rest_on_are_kept(client, keys, tmp_path, transport, make):
    trainer = make()
    publish_drifting(trainer, range(4))
    assert stored_names(client, keys, tmp_path, transport) == {0, 1, 2, 3}
    publish_drifting(trainer, [4, 5])  # 4 is whole, so that 4 and 5 need no other
    assert stored_names(client, keys, tmp_path, transport) == {0, 4, 5}
    publish_drifting(trainer, [6, 7])
    with trainer._retention.reading(7):
        publish_drifting(trainer, range(8, 12))
        assert stored_names(client, keys, tmp_path, transport) == {0, *range(4, 12)}
        assert_identical(make().fetch(7)[1], drifting(7))
    publish_drifting(trainer, [12, 13])
    assert stored_names(client, keys, tmp_path, transport) == {0, 12, 13}
    assert {int(v) for v in client.hkeys(keys.manifests)} == {0, 12, 13}


def test_an_evaluated_version_keeps_what_it_rests_on(client, keys, tmp_path, transport, make):
    trainer = make()
    publish_drifting(trainer, range(6))
    evaluation.request(client, keys, EvalDataset.model_validate({"dataset": {"path": "x"}}), version=5)
    publish_drifting(trainer, range(6, 14))
    assert stored_names(client, keys, tmp_path, transport) == {0, 4, 5, 12, 13}
    assert_identical(make().fetch(5)[1], drifting(5))


def test_a_crash_between_the_delta_and_the_pointer_leaves_the_old_version_served(make, monkeypatch):
    trainer, worker = make(), make()
    publish_drifting(trainer, [0, 1])
    worker.fetch(1)
    crash_before_the_pointer(trainer, 2, drifting(2), monkeypatch)
    assert trainer.latest_version() == 1
    other = {**drifting(1), "w": drifting(1)["w"].clone().index_fill_(0, torch.tensor([5]), 9)}
    assert forms([make().publish(2, other, step=2, parent=1)]) == ["whole "], "a new process"
    assert_identical(worker.fetch(2)[1], other)


def test_a_base_that_redis_has_lost_is_not_built_upon(client, keys, make):
    trainer = make()
    publish_drifting(trainer, [0, 1])
    client.hdel(keys.manifests, "1")
    assert forms(publish_drifting(trainer, [2])) == ["whole "]
    assert_identical(make().fetch(2)[1], drifting(2))


def test_a_worker_that_holds_another_policy_of_the_same_number_is_not_misled(client, keys, make):
    trainer, worker = make(), make()
    publish_drifting(trainer, [0, 1])
    worker.fetch(1)
    client.hset(keys.policy, "version", 0)  # Redis was restarted without its last second
    again = make()
    other = {**drifting(0), "b": torch.zeros(300, dtype=torch.bfloat16)}
    again.publish(1, other, step=1, parent=0)
    nudged = {**other, "w": other["w"].clone().index_fill_(0, torch.tensor([7]), 3)}
    assert forms([again.publish(2, nudged, step=2, parent=1)]) == ["delta on 1"]
    assert_identical(worker.fetch(2)[1], nudged)


def lose_delta(client, keys, tmp_path, transport, version):
    if transport == "directory":
        (path,) = tmp_path.rglob(f"delta-*{version}.safetensors")
        path.unlink()
    else:
        client.delete(keys.tensors("delta", version))


def test_a_missing_link_is_got_around_by_whole_weights(client, keys, tmp_path, transport, make):
    trainer, worker = make(keep=9), make()
    publish_drifting(trainer, [0, 1, 2])
    worker.fetch(2)
    publish_drifting(trainer, [3, 4, 5])
    lose_delta(client, keys, tmp_path, transport, 3)
    assert_identical(worker.fetch(5)[1], drifting(5))


def damage_delta(client, keys, tmp_path, transport, version):
    if transport == "directory":
        (path,) = tmp_path.rglob(f"delta-*{version}.safetensors")
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[:-20] + bytes(20))
    else:
        data = client.get(keys.tensors("delta", version, 0))
        client.set(keys.tensors("delta", version, 0), data[:-20] + bytes(20))


@pytest.mark.parametrize("harm", [lose_delta, damage_delta])
def test_a_version_without_a_sound_delta_is_refused_and_written_whole_on_request(
    client, keys, tmp_path, transport, make, harm
):
    trainer, worker = make(), make()
    publish_drifting(trainer, [0, 1])
    worker.fetch(1)
    publish_drifting(trainer, [2])
    assert not trainer.is_full_requested()
    harm(client, keys, tmp_path, transport, 2)
    with pytest.raises(PolicyError, match="policy version 2"):
        worker.fetch(2)
    assert trainer.is_full_requested()
    trainer.republish_full()
    assert not trainer.is_full_requested()
    assert_identical(worker.fetch(2)[1], drifting(2))
    publish_drifting(trainer, [3, 4])
    assert_identical(make().fetch(4)[1], drifting(4))
    assert stored_names(client, keys, tmp_path, transport) == {0, 2, 3, 4}, "the mended version is one to begin at"


def test_publication_runs_beside_the_next_step(client, keys, make, redis_url):
    store, room = make(), threading.Event()

    def retry_while_disk_full(write):
        assert room.wait(10)
        write()

    run = Run(name=keys.run, keys=keys, config=make_config(), assets={}, folder="")
    app = make_app(keys.run, url=redis_url)
    publisher = Publisher(store, app, run, client, incarnation=1, retry_while_disk_full=retry_while_disk_full)
    publisher.publish(0, drifting(0), step=0, parent=-1, canary=[])
    assert (store.latest_version(), publisher.published) == (-1, -1), "publish has returned, and nothing is written yet"
    assert client.hget(keys.lineage, "0") == b"-1:0"
    room.set()
    publisher.publish(1, drifting(1), step=1, parent=0, canary=[])
    publisher.wait()
    assert store.latest_version() == publisher.published == 1
    metrics = publisher.metrics()
    assert metrics["policy/payload_bytes"] == store.manifest(1).delta_bytes
    assert 0 < metrics["policy/payload_share"] < 0.1
    publisher.close()
