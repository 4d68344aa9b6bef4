"""The policy store over both transports: exact bytes, the pointer last, and nothing unverified is ever served."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from builders import make_config

from common import evaluation
from common.config import EvalDataset, PolicyStoreConfig
from common.digest import tensor_digest
from common.errors import DigestMismatch, PolicyError, PolicyNotFound
from common.policy_store import READER_S, PolicyStore
from common.scripts import Scripts
from common.weights_transport import CHUNK_BYTES


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
        return {int(path.stem.split("-")[1]) for path in Path(tmp_path).rglob("*.safetensors")}
    root = keys("weights", "")
    return {
        int(key.decode().removeprefix(root).split(":")[0]) for key in client.scan_iter(match=root + "*", count=1000)
    }


def damage(client, keys, tmp_path, transport, version, change):
    """Replace the stored bytes of a version."""
    if transport == "directory":
        (path,) = Path(tmp_path).rglob(f"*{version}.safetensors")
        path.write_bytes(change(path.read_bytes()))
    else:
        chunk = keys("weights", version, 0)
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


def test_fetched_tensors_may_be_written_to_without_changing_the_store(store):
    publish(store, 0)
    store.fetch(0)[1]["w"].fill_(99)
    assert_identical(store.fetch(0)[1], weights(0))


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
    assert other.latest() == manifest
    assert other.fetch(0)[0].digest == client.hget(keys("policy"), "digest").decode()


# The pointer


def test_before_the_first_publication_there_is_no_version(store):
    assert store.latest() is None
    assert store.latest_version() == -1
    with pytest.raises(PolicyNotFound, match="policy version 0 was never published in this run, or was removed"):
        store.fetch(0)


def test_a_crash_before_the_pointer_moves_leaves_the_old_version_served(store, monkeypatch):
    publish(store, 0)
    crash_before_the_pointer(store, 1, weights(1), monkeypatch)
    assert (store.latest_version(), store.latest().version) == (0, 0)
    assert_identical(store.fetch(store.latest_version())[1], weights(0))


def test_the_same_version_can_be_published_again_after_such_a_crash(store, monkeypatch):
    publish(store, 0)
    crash_before_the_pointer(store, 1, weights(1, size=9), monkeypatch)
    publish(store, 1, value=7)
    assert store.latest().version == 1
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
    assert store.latest().version == 0


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
    client.hset(keys("run"), "incarnation", 2)
    publish(store, 1, incarnation=2)
    for version in (1, 2):
        with pytest.raises(PolicyError, match="a newer trainer process has taken this run over; this one must stop"):
            publish(store, version, value=66, incarnation=1)
    assert store.latest_version() == 1
    assert_identical(store.fetch(1)[1], weights(1))
    with pytest.raises(PolicyNotFound):
        store.fetch(2)


def test_a_trainer_replaced_while_it_writes_does_not_move_the_pointer(client, keys, store, monkeypatch):
    publish(store, 0)
    call = Scripts.__call__

    def overtaken(self, name, *args, **options):
        client.hset(keys("run"), "incarnation", 2)
        return call(self, name, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Scripts, "__call__", overtaken)
        with pytest.raises(PolicyError, match="a newer trainer process has taken this run over"):
            publish(store, 1)
    assert store.latest_version() == 0


def test_a_roll_back_goes_on_under_a_new_version_whose_parent_is_the_checkpoints(client, keys, store):
    for version in range(3):
        publish(store, version)
    store.announce(3, step=1, parent=1)
    assert store.latest_version() == 2
    store.publish(3, weights(3), step=1, parent=1, incarnation=2)
    lineage = {v.decode(): entry.decode().rpartition(":")[0] for v, entry in client.hgetall(keys("lineage")).items()}
    assert lineage == {"0": "-1:0", "1": "0:1", "2": "1:2", "3": "1:1"}
    assert (store.latest().parent, store.latest().incarnation) == (1, 2)


def test_every_publication_is_told_to_those_who_listen(client, keys, store):
    publish(store, 0)
    publish(store, 1)
    events = [fields for _, fields in client.xrange(keys("events"))]
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
    client.delete(keys("weights", 0, 1))
    with pytest.raises(PolicyNotFound, match="policy version 0: chunk 1 is missing in Redis"):
        store.fetch(0)
    client.delete(keys("weights", 0))
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
    assert client.hlen(keys("lineage")) == 6, "ages are told of versions whose weights are gone"


def test_a_version_that_an_evaluation_needs_is_kept_until_it_is_finished(client, keys, tmp_path, transport, store):
    dataset = EvalDataset.model_validate({"dataset": {"path": "x"}})
    publish(store, 0)
    publish(store, 1)
    evaluation.request(client, keys, dataset, version=1)
    for version in range(2, 6):
        publish(store, version)
    assert stored_names(client, keys, tmp_path, transport) == {0, 1, 4, 5}
    client.hdel(keys("evaluations"), evaluation.evaluation_id(1, "heldout"))
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
    with store._reading(1):
        for version in (2, 3, 4):
            publish(store, version)
        assert store.fetch(1)[0].version == 1
        with pytest.raises(PolicyNotFound):
            store.fetch(2)
    publish(store, 5)
    with pytest.raises(PolicyNotFound):
        store.fetch(1)
    assert client.zcard(keys("readers")) == 0


def test_a_reader_that_died_keeps_its_version_until_its_time_is_over(store, client, keys):
    publish(store, 0)
    publish(store, 1)
    seconds, _ = client.time()
    client.zadd(keys("readers"), {"1|dead": (seconds + 100) * 1000})
    for version in (2, 3):
        publish(store, version)
    assert store.fetch(1)[0].version == 1
    client.zadd(keys("readers"), {"1|dead": (seconds - 1) * 1000})
    publish(store, 4)
    with pytest.raises(PolicyNotFound):
        store.fetch(1)
    assert client.zcard(keys("readers")) == 0


def test_a_long_fetch_stays_entered(store, client, keys, monkeypatch):
    publish(store, 0)
    now = time.monotonic()
    with store._reading(0) as go_on:
        (entry,) = client.zrange(keys("readers"), 0, -1)
        client.zadd(keys("readers"), {entry: 1})
        go_on()
        assert client.zscore(keys("readers"), entry) == 1, "said only so often"
        monkeypatch.setattr(time, "monotonic", lambda: now + READER_S / 2)
        go_on()
        assert client.zscore(keys("readers"), entry) > 1
