"""The policy store over both transports: exact bytes, the pointer last, and nothing unverified is ever served."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import redis
import safetensors.torch
import torch
from builders import make_config

from sluice.common.config import EvalDataset
from sluice.common.connections.broker import make_app
from sluice.common.connections.client import connect
from sluice.common.errors import ConfigError, DigestMismatch, PolicyError, PolicyNotFound
from sluice.common.keys import Keys
from sluice.common.ledger import evaluations as evaluation
from sluice.common.policies import transports
from sluice.common.policies.digest import tensor_digest, weights_digest
from sluice.common.policies.manifest import ManifestChain
from sluice.common.policies.retention import READER_S
from sluice.common.policies.store import PolicyStore
from sluice.common.policies.transports import CHUNK_BYTES
from sluice.common.run import Run
from sluice.common.serialization import encode
from sluice.trainer.publish import Publisher


class Place(NamedTuple):
    """Where the versions of one run are stored."""

    client: redis.Redis
    keys: Keys
    folder: Path
    transport: str

    def open(self, *, client: redis.Redis | None = None, **options: Any) -> PolicyStore:
        """The store as a process of its own opens it, with full weights every 4 versions."""
        settings = {"transport": self.transport, "path": str(self.folder), "keep": 2, "full_every": 4, **options}
        return PolicyStore(client or self.client, self.keys, make_config(policy_store=settings).policy_store)

    def stored(self) -> set[int]:
        """Versions whose bytes are there."""
        if self.transport == "directory":
            return {int(path.stem.split("-")[1]) for path in self.folder.rglob("*-0*.*")}
        return {
            int(key.decode().removeprefix(root).split(":")[0])
            for root in (self.keys.tensors(kind, "") for kind in ("weights", "delta"))
            for key in self.client.scan_iter(match=root + "*", count=1000)
        }

    def recorded(self) -> set[int]:
        """Versions that have a manifest."""
        return {int(version) for version in self.client.hkeys(self.keys.manifests)}


@pytest.fixture(params=["directory", "redis"])
def place(client, keys, tmp_path, request):
    return Place(client, keys, tmp_path, request.param)


@pytest.fixture
def in_folder(client, keys, tmp_path):
    return Place(client, keys, tmp_path, "directory")


@pytest.fixture
def store(place):
    return place.open()


def weights(value, *, size=4):
    return {"w": torch.full((size, 2), float(value)), "b": torch.full((3,), value, dtype=torch.bfloat16)}


def publish(store, version, *, value=None, **options):
    options = {"step": version, "parent": version - 1, **options}
    return store.publish(version, weights(version if value is None else value), **options)


def drifting(version, **others):
    """Weights of which every version changes a hundredth; `b` stays."""
    w = torch.zeros(4000, dtype=torch.bfloat16)
    for v in range(1, version + 1):
        w[v::97] += v
    return {"w": w, "b": torch.ones(300, dtype=torch.bfloat16), **others}


def nudged(tensors, value=3):
    """The same weights but for one element."""
    return {**tensors, "w": tensors["w"].clone().index_fill_(0, torch.tensor([7]), value)}


def publish_drifting(store, versions):
    return [store.publish(v, drifting(v), step=v, parent=v - 1) for v in versions]


def forms(manifests):
    """How each version is stored."""
    return ["full " * (m.num_bytes > 0) + (f"delta on {m.base}" if m.base >= 0 else "") for m in manifests]


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        got = found[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def crash_before_the_pointer(store, version, tensors):
    """Publish as a trainer does that dies after the bytes and the manifest are written."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(store, "_scripts", Mock(side_effect=InterruptedError))
        store.publish(version, tensors, step=version, parent=version - 1)


def damage(client, keys, folder, transport, version, change, *, kind="weights"):
    """Replace the stored bytes of a version; a change to none loses them."""
    if transport == "directory":
        (path,) = folder.rglob(f"{'policy' if kind == 'weights' else kind}-*{version}.safetensors")
        data = change(path.read_bytes())
        path.unlink()
        if data is not None:
            path.write_bytes(data)
    else:
        chunk = keys.tensors(kind, version, 0)
        data = change(client.get(chunk))
        _ = client.delete(chunk) if data is None else client.set(chunk, data)


# Round trip


def test_tensors_of_every_kind_come_back_bit_by_bit_in_any_process(place, store):
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
        "several chunks": torch.arange((CHUNK_BYTES * 2 + 12345) // 4, dtype=torch.int32),
    }
    written = store.publish(0, tensors, step=0, parent=-1)
    for reader in (store, place.open()):
        manifest, found = reader.fetch(reader.latest_version())
        assert manifest == written
        assert_identical(found, tensors)
    assert (manifest.version, manifest.step, manifest.incarnation, manifest.parent) == (0, 0, 1, -1)
    assert manifest.num_bytes > sum(t.numel() * t.element_size() for t in tensors.values())
    assert manifest.tensors.keys() == tensors.keys()
    assert manifest.digest == place.client.hget(place.keys.policy, "digest").decode()


def test_fetched_tensors_are_private_memory(in_folder):
    store = in_folder.open()
    publish(store, 0)
    found = store.fetch(0)[1]
    (path,) = in_folder.folder.rglob("policy-*.safetensors")
    path.write_bytes(b"\xff" * path.stat().st_size)  # in place: what maps the file sees it
    assert_identical(found, weights(0))
    path.write_bytes(b"")  # of a mapped file, reading the lost pages would end the process
    assert_identical(found, weights(0))


def test_digests_tell_type_shape_and_bytes_apart():
    zeros, negative = torch.zeros(4), torch.tensor([0.0, 0, 0, -0.0])
    others = [torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), negative, torch.zeros(8).half()]
    assert tensor_digest(zeros) == tensor_digest(torch.zeros(8)[::2])
    assert len({tensor_digest(t) for t in [zeros, *others]}) == 5


# The pointer


def test_runs_do_not_see_each_others_versions(place, store):
    other_keys = Keys(place.keys.run + "-b")
    other = place._replace(keys=other_keys).open()
    publish(store, 0, value=1)
    assert other.latest_version() == -1
    with pytest.raises(PolicyNotFound, match="policy version 0 was never published in this run, or was removed"):
        other.fetch(0)
    publish(other, 0, value=2)
    assert_identical(store.fetch(0)[1], weights(1))
    assert_identical(other.fetch(0)[1], weights(2))
    for key in place.client.scan_iter(match=other_keys.root + "*"):
        place.client.unlink(key)


def test_a_crash_before_the_pointer_moves_leaves_the_old_version_served(place):
    trainer, worker = place.open(), place.open()
    publish_drifting(trainer, [0, 1])
    for version, again, form in ((2, trainer, "delta on 1"), (3, place.open(), "full ")):
        served = worker.fetch(version - 1)[1]
        for tensors in (weights(1, size=9), nudged(served, 9)):  # in full, and as a delta
            crash_before_the_pointer(trainer, version, tensors)
            assert trainer.latest_version() == version - 1
            assert_identical(place.open().fetch(version - 1)[1], drifting(version - 1))
        assert forms([again.publish(version, drifting(version), step=version, parent=version - 1)]) == [form]
        assert_identical(worker.fetch(version)[1], drifting(version))


def test_what_a_crash_while_writing_leaves_goes_with_its_version(in_folder):
    store = in_folder.open()
    publish(store, 0)
    leftover = in_folder.folder / in_folder.keys.run / "policy-00000001.tmp99999"
    leftover.write_bytes(b"half of version 1")
    publish(store, 1)
    assert sorted(p.name for p in leftover.parent.iterdir()) == [f"policy-0000000{v}.safetensors" for v in (0, 1)]
    leftover.write_bytes(b"half of version 1, republished")
    publish(store, 2)
    publish(store, 3)
    assert not leftover.exists()


def test_versions_only_grow_and_a_served_version_is_never_overwritten(store):
    manifests = [publish(store, version) for version in range(3)]
    assert publish(store, 2) == manifests[2], "once more, because the reply was lost, is harmless"
    for version in range(3):
        with pytest.raises(PolicyError, match=f"policy version {version} was not published: version 2 is served"):
            publish(store, version, value=50)
        assert_identical(store.fetch(version)[1], weights(version))
    publish(store, 3, value=2)
    with pytest.raises(PolicyError, match="version 3 is served already"):
        publish(store, 2)  # equal weights do not make an older version publishable
    assert store.latest_version() == 3


def test_a_replaced_trainer_is_refused_and_damages_nothing(place, store, monkeypatch):
    publish(store, 0)
    move_pointer = store._scripts

    def overtaken(*args):
        place.client.hset(place.keys.run_record, "incarnation", 2)
        return move_pointer(*args)

    with monkeypatch.context() as patch, pytest.raises(PolicyError, match="a newer trainer process owns this run"):
        patch.setattr(store, "_scripts", overtaken)
        publish(store, 1)
    assert store.latest_version() == 0, "nor does one that is replaced while it writes move the pointer"
    publish(store, 1, incarnation=2)
    for version in (1, 2):
        with pytest.raises(PolicyError, match="a newer trainer process owns this run; this one must stop"):
            publish(store, version, value=66, incarnation=1)
    assert store.latest_version() == 1
    assert_identical(store.fetch(1)[1], weights(1))
    with pytest.raises(PolicyNotFound):
        store.fetch(2)


def test_a_roll_back_goes_on_under_a_new_version_whose_parent_is_the_checkpoints(client, keys, store):
    for version in range(3):
        publish(store, version)
    store.announce(3, step=1, parent=1)
    assert store.latest_version() == 2
    manifest = publish(store, 3, step=1, parent=1, incarnation=2)
    lineage = {v.decode(): entry.decode().rpartition(":")[0] for v, entry in client.hgetall(keys.lineage).items()}
    assert lineage == {"0": "-1:0", "1": "0:1", "2": "1:2", "3": "1:1"}
    assert store.manifest(store.latest_version()) == manifest
    assert (manifest.parent, manifest.incarnation) == (1, 2)
    publications = [fields for _, fields in client.xrange(keys.publications)]
    assert publications == [{b"version": b"%d" % version} for version in range(4)]


# Damage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda data: data[:-1] + bytes([data[-1] ^ 1]), "0: tensor [wb] does not match", id="one bit"),
        pytest.param(lambda data: b"\xff" * len(data), "0 .* is damaged", id="garbage"),
        pytest.param(lambda _: safetensors.torch.save(weights(1)), "0: tensor", id="another version"),
        *(pytest.param(lambda data, n=n: data[:n], "0", id=f"cut at {n}") for n in (0, 7, 60, -1)),
    ],
)
def test_damaged_bytes_are_found(place, store, change, message):
    publish(store, 0)
    damage(*place, 0, change)
    with pytest.raises(DigestMismatch, match=f"policy version {message}"):
        store.fetch(0)


@pytest.mark.parametrize("is_held", [False, True])
def test_a_manifest_whose_digest_is_not_that_of_its_tensors_is_refused(place, is_held):
    trainer, worker = place.open(), place.open()
    publish_drifting(trainer, [0])
    if is_held:
        worker.fetch(0)
    (manifest,) = publish_drifting(trainer, [1])
    wrong = replace(manifest, digest=weights_digest(drifting(2)))
    place.client.hset(place.keys.manifests, "1", encode(asdict(wrong)))
    with pytest.raises(DigestMismatch, match="version 1: the manifest's digest is not that of its tensors"):
        worker.fetch(1)


def test_other_tensors_than_the_manifest_names_are_refused(place, store):
    publish(store, 0)
    place.open()._transport.write(0, {**weights(0), "extra": torch.zeros(1)})
    with pytest.raises(DigestMismatch, match="policy version 0 holds other tensors than its manifest names"):
        store.fetch(0)


def test_a_folder_of_all_users_is_used_only_where_it_is_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(transports, "everyones_folder", lambda: tmp_path)
    config, ours = make_config().policy_store, tmp_path / f"sluice-{os.getuid()}"
    tensors, elsewhere = weights(1.0), tmp_path / "elsewhere"
    elsewhere.mkdir()

    def refused(words):
        for use in (
            lambda: transports.store_folder(config, "r"),
            lambda: opened.write(0, tensors),
            lambda: opened.read(0, renew=bool),
        ):
            with pytest.raises(ConfigError, match=words):
                use()

    opened = transports.open_transport(None, Keys("r"), config)
    opened.write(0, tensors)
    assert [path.stat().st_mode & 0o777 for path in (ours, ours / "r")] == [0o700, 0o700]
    assert torch.equal(opened.read(0, renew=bool)[0]["w"], tensors["w"])
    for path in (ours, ours / "r"):
        path.chmod(0o777)
        refused(
            rf"{path} may be written to by others \(mode 777\). Remove it, or name another folder with policy_store.path"
        )
        path.chmod(0o700)
        path.rename(elsewhere / "moved")
        path.symlink_to(elsewhere / "moved")
        refused(f"{path} is a link")
        path.unlink()
        path.write_text("")
        refused(f"{path} is not a folder")
        path.unlink()
        (elsewhere / "moved").rename(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 12345)
        (tmp_path / "sluice-12345").mkdir(mode=0o700)
        with pytest.raises(ConfigError, match="sluice-12345 belongs to user"):
            transports.store_folder(config, "r")
    assert torch.equal(opened.read(0, renew=bool)[0]["w"], tensors["w"])


def test_missing_bytes_are_named_with_what_to_do(client, keys, in_folder):
    store = in_folder.open()
    publish(store, 0)
    store._transport.delete(0)
    with pytest.raises(PolicyNotFound, match=r"is policy_store.path shared .* use policy_store.transport=redis"):
        store.fetch(0)
    store = in_folder._replace(transport="redis").open()
    store.publish(1, {"w": torch.zeros(CHUNK_BYTES // 2)}, step=1, parent=0)
    for missing, message in (((1, 1), "version 1: chunk 1 is missing in Redis"), ((1,), "version 1 is not in Redis")):
        client.delete(keys.tensors("weights", *missing))
        with pytest.raises(PolicyNotFound, match=f"policy {message}"):
            store.fetch(1)


# Garbage


def test_the_newest_versions_and_the_base_are_kept(place, store):
    for version in range(6):
        publish(store, version)
    assert place.stored() == {0, 4, 5}
    for version in (0, 4, 5):
        assert_identical(store.fetch(version)[1], weights(version))
    with pytest.raises(PolicyNotFound, match="policy version 3 was never published in this run, or was removed"):
        store.fetch(3)
    assert place.client.hlen(place.keys.lineage) == 6, "ages are told of versions whose weights are gone"


# Readers


def test_a_version_that_is_read_is_kept_until_its_reader_ends_or_its_time_is_over(store, client, keys):
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

    seconds, _ = client.time()
    client.zadd(keys.readers, {"5|dead": (seconds + 100) * 1000})
    publish(store, 6)
    publish(store, 7)
    assert store.fetch(5)[0].version == 5
    client.zadd(keys.readers, {"5|dead": (seconds - 1) * 1000})
    publish(store, 8)
    with pytest.raises(PolicyNotFound):
        store.fetch(5)
    assert client.zcard(keys.readers) == 0


def test_a_long_fetch_stays_entered(store, client, keys, monkeypatch):
    publish(store, 0)
    now = time.monotonic()
    with store._retention.reading(0) as renew:
        (entry,) = client.zrange(keys.readers, 0, -1)
        client.zadd(keys.readers, {entry: 1})
        renew()
        assert client.zscore(keys.readers, entry) == 1, "said only so often"
        monkeypatch.setattr(time, "monotonic", lambda: now + READER_S / 2)
        renew()
        assert client.zscore(keys.readers, entry) > 1


# Deltas


def test_versions_travel_as_deltas_with_full_weights_in_between_and_a_worker_reads_no_more_than_it_needs(place):
    trainer, worker, manifests, before = place.open(), place.open(), [], None
    for version in range(11):
        manifests += publish_drifting(trainer, [version])
        found = worker.fetch(version)[1]
        assert_identical(found, drifting(version))
        assert worker.last_fetch_bytes == manifests[-1].payload_bytes
        if before:
            assert found["b"] is before["b"], "unchanged tensors are shared"
            assert_identical(before, drifting(version - 1))
        before = found
    assert forms(manifests[:6]) == [
        "full ", "delta on 0", "delta on 1", "delta on 2", "full delta on 3", "delta on 4"
    ]  # fmt: skip
    for manifest in manifests[1:]:
        assert 0 < manifest.payload_bytes == manifest.delta_bytes < manifests[0].payload_bytes / 10
        assert manifest.digest == weights_digest(drifting(manifest.version))
    late = place.open()
    assert_identical(late.fetch(10)[1], drifting(10))
    assert late.last_fetch_bytes == manifests[8].num_bytes + manifests[9].delta_bytes + manifests[10].delta_bytes


def test_a_worker_that_missed_versions_catches_up_along_the_chain_and_may_go_back(place):
    trainer, worker = place.open(keep=9), place.open()
    publish_drifting(trainer, [0, 1])
    worker.fetch(1)
    manifests = publish_drifting(trainer, range(2, 8))
    assert_identical(worker.fetch(7)[1], drifting(7))
    assert worker.last_fetch_bytes == sum(m.delta_bytes for m in manifests)
    for version in (6, 5, 5, 2, 6):
        assert_identical(worker.fetch(version)[1], drifting(version))


def test_weights_that_differ_too_much_travel_in_full_and_deltas_go_on_from_there(place):
    trainer, worker = place.open(), place.open()
    publish_drifting(trainer, [0, 1])
    worker.fetch(1)
    jump = {name: tensor + 1 for name, tensor in drifting(1).items()}
    for version, tensors, form in ((2, jump, "full "), (3, nudged(jump), "delta on 2")):
        assert forms([trainer.publish(version, tensors, step=version, parent=version - 1)]) == [form]
        assert_identical(worker.fetch(version)[1], tensors)


def test_deltas_can_be_turned_off(place):
    store, worker = place.open(delta=False), place.open(delta=False)
    assert forms(publish_drifting(store, range(3))) == ["full "] * 3
    assert_identical(worker.fetch(2)[1], drifting(2))
    assert store._held is worker._held is None, "no memory for what is not used"


def test_a_worker_holds_full_weights_where_deltas_may_follow(place):
    trainer, worker = place.open(), place.open()
    for version in range(3):
        tensors = {"w": torch.full((64,), version + 0.1)}
        trainer.publish(version, tensors, step=version, parent=version - 1)
        assert_identical(worker.fetch(version)[1], tensors)
        assert worker._held is None, "fp32 weights differ everywhere: the next version is stored in full too"
    manifests = publish_drifting(place.open(), [3])
    worker.fetch(3)
    restarted = place.open()
    manifests += publish_drifting(restarted, [4])
    worker.fetch(4)
    manifests += publish_drifting(restarted, [5])
    assert forms(manifests) == ["full ", "full ", "delta on 4"], "a new trainer process begins with full weights"
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


@pytest.mark.parametrize("last", ["full", "delta", "republished"])
@pytest.mark.parametrize("is_complete", [False, True], ids=["half written", "without manifest"])
def test_what_killed_trainers_left_is_freed(place, redis_url, monkeypatch, last, is_complete):
    monkeypatch.setattr(transports, "CHUNK_BYTES", 64 if last == "delta" else 3000)  # several, of either kind
    publish_drifting(place.open(keep=9), [0, 1])
    half = (Path, "rename", 1) if place.transport == "directory" else (redis.Redis, "set", 3)

    def act(own_client, arm):
        trainer = place.open(client=own_client, keep=9)
        if last != "full":
            publish_drifting(trainer, [2])
        if last == "republished":
            publish_drifting(trainer, [3])
        arm()
        if last == "republished":
            trainer.republish_full()
        publish_drifting(trainer, [2 if last == "full" else 3])

    kill_trainer(redis_url, act, at=(ManifestChain, "record", 1) if is_complete else half)
    recorded = place.recorded()
    assert place.stored() - recorded == {"full": {2}, "delta": {3}, "republished": set()}[last]
    publish_drifting(place.open(keep=9), [4])
    assert place.stored() == recorded | {4}
    for version in recorded | {4}:
        assert_identical(place.open().fetch(version)[1], drifting(version))
    publish_drifting(place.open(), [5, 6])
    assert place.stored() == {0, 5, 6}, "nor is anything left of a version that was republished"


def test_a_version_without_manifest_is_not_freed_under_a_reader_nor_by_an_older_trainer(place):
    publish_drifting(place.open(), [0, 1, 2])
    place.client.hdel(place.keys.manifests, "1", "2")
    place.open()._transport.write(9, drifting(9))  # by a trainer that is about to publish it
    with place.open()._retention.reading(2):
        publish_drifting(place.open(), [3])
    assert place.stored() == {0, 2, 3, 9}


def test_versions_that_others_rest_on_are_kept(place):
    trainer = place.open()
    publish_drifting(trainer, range(4))
    assert place.stored() == {0, 1, 2, 3}
    publish_drifting(trainer, [4, 5])  # 4 is stored in full, so that 4 and 5 need no other
    assert place.stored() == {0, 4, 5}
    publish_drifting(trainer, [6, 7])
    with trainer._retention.reading(7):
        publish_drifting(trainer, range(8, 12))
        assert place.stored() == {0, *range(4, 12)}
        assert_identical(place.open().fetch(7)[1], drifting(7))
    publish_drifting(trainer, [12, 13])
    assert place.stored() == place.recorded() == {0, 12, 13}


def test_a_version_that_an_evaluation_needs_is_kept_with_its_bases_until_it_is_finished(place):
    trainer = place.open()
    publish_drifting(trainer, range(6))
    dataset = EvalDataset.model_validate({"dataset": {"path": "x"}})
    evaluation.request(place.client, place.keys, dataset, version=5)
    publish_drifting(trainer, range(6, 14))
    assert place.stored() == {0, 4, 5, 12, 13}
    assert_identical(place.open().fetch(5)[1], drifting(5))
    place.client.hdel(place.keys.evaluations, evaluation.evaluation_id(5, "heldout"))
    publish_drifting(trainer, [14])
    assert place.stored() == {0, 12, 13, 14}


def test_a_base_that_redis_has_lost_is_not_built_upon(place):
    trainer = place.open()
    publish_drifting(trainer, [0, 1])
    place.client.hdel(place.keys.manifests, "1")
    assert forms(publish_drifting(trainer, [2])) == ["full "]
    assert_identical(place.open().fetch(2)[1], drifting(2))


def test_a_worker_that_holds_another_policy_of_the_same_number_is_not_misled(place):
    trainer, worker = place.open(), place.open()
    publish_drifting(trainer, [0, 1])
    worker.fetch(1)
    place.client.hset(place.keys.policy, "version", 0)  # Redis was restarted without its last second
    again = place.open()
    other = drifting(0, b=torch.zeros(300, dtype=torch.bfloat16))
    again.publish(1, other, step=1, parent=0)
    assert forms([again.publish(2, nudged(other), step=2, parent=1)]) == ["delta on 1"]
    assert_identical(worker.fetch(2)[1], nudged(other))


@pytest.mark.parametrize("harm", [lambda data: None, lambda data: data[:-20] + bytes(20)], ids=["lost", "damaged"])
def test_a_version_without_a_sound_delta_is_refused_and_republished_in_full_on_request(place, harm):
    trainer, worker = place.open(), place.open()
    publish_drifting(trainer, [0, 1])
    worker.fetch(1)
    publish_drifting(trainer, [2])
    assert not trainer.is_full_requested()
    damage(*place, 2, harm, kind="delta")
    with pytest.raises(PolicyError, match="policy version 2"):
        worker.fetch(2)
    assert trainer.is_full_requested()
    trainer.republish_full()
    assert not trainer.is_full_requested()
    assert_identical(worker.fetch(2)[1], drifting(2))
    publish_drifting(trainer, [3, 4])
    assert_identical(place.open().fetch(4)[1], drifting(4))
    assert place.stored() == {0, 2, 3, 4}, "the republished version is one to begin at"
    damage(*place, 3, harm, kind="delta")
    assert forms(publish_drifting(trainer, [5, 6])) == ["delta on 4", "full delta on 5"]
    assert_identical(worker.fetch(6)[1], drifting(6))  # full weights go round a missing link


def test_publication_runs_beside_the_next_step(client, keys, place, redis_url):
    store, room = place.open(), threading.Event()

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
