"""Versioned weights: `publish(...)`, `latest()`, `fetch(version)`.

    publish: write all tensors -> manifest (digest per tensor) -> move the pointer (one script) -> event
    fetch:   manifest -> tensors -> verify every digest; what cannot be verified is never served

Versions only grow. The manifest names (version, trainer step, incarnation, parent); the pointer lives in Redis, so all
roles agree on it whichever transport carries the bytes:

* DirectoryTransport: one safetensors file per version, written under a temporary name and renamed.
* RedisTransport: the same bytes in 2 MiB chunks (larger ones are 2-7x slower), for machines without a shared folder.

Digests are xxh3-128 per tensor; the manifest's own digest is the sha256 of all of them.

A process that fetches a version is entered in `readers` meanwhile, and versions with readers are not collected.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

import redis
import safetensors
import safetensors.torch
import torch
import xxhash

from common.canary import CanarySequence
from common.config import PolicyStoreConfig
from common.disk import needing_room
from common.errors import DigestMismatch, PolicyError, PolicyNotFound
from common.keys import Keys
from common.run import process_name
from common.scripts import Scripts
from common.serialization import decode, encode

CHUNK_BYTES = 2 * 1024 * 1024
READER_S = 120.0
"""A reader that says nothing for so long is taken for dead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What one policy version is."""

    version: int
    step: int
    "trainer step that made it; 0 is the base model"
    incarnation: int
    "of the trainer process, growing by one with each start"
    parent: int
    "version it was trained from; -1 for the base model"
    num_bytes: int
    digest: str
    "sha256 over names and digests of all tensors"
    tensors: dict[str, str]
    "name -> xxh3-128"
    canary: list[dict[str, Any]] = field(default_factory=list)
    "CanarySequence each: what a sampler that serves this version must reproduce"


class Transport(Protocol):
    """Carries the bytes of a version."""

    def write(self, version: int, tensors: Mapping[str, torch.Tensor]) -> int:
        """Store all tensors of a version, replacing leftovers of a crash. Returns bytes. Raises DiskFull."""

    def read(self, version: int, *, go_on: Callable[[], None]) -> dict[str, torch.Tensor]:
        """All tensors, unverified; calls `go_on` between pieces. Raises PolicyNotFound, DigestMismatch."""

    def delete(self, version: int) -> None:
        """Free a version; nothing happens if there is none."""


class DirectoryTransport:
    """One safetensors file per version in a folder that trainer and workers share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, version: int, tensors: Mapping[str, torch.Tensor]) -> int:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(version)
        for leftover in self._folder.glob(f"{path.stem}.tmp*"):  # of a trainer killed while it wrote this version
            leftover.unlink(missing_ok=True)
        temporary = path.with_suffix(f".tmp{os.getpid()}")
        with needing_room(self._folder, what=f"policy version {version}"):
            try:
                safetensors.torch.save_file(dict(tensors), temporary)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        temporary.rename(path)
        return path.stat().st_size

    def read(self, version: int, *, go_on: Callable[[], None]) -> dict[str, torch.Tensor]:
        path = self._path(version)
        try:
            # mapped; a file that is deleted or replaced meanwhile stays readable
            return safetensors.torch.load_file(path)
        except FileNotFoundError:
            raise PolicyNotFound(
                f"policy version {version} is not at {path}: is policy_store.path shared with the trainer's machine? "
                "If not, use policy_store.transport=redis"
            ) from None
        except safetensors.SafetensorError as error:
            raise DigestMismatch(f"policy version {version} at {path} is damaged: {error}") from None

    def delete(self, version: int) -> None:
        self._path(version).unlink(missing_ok=True)

    def _path(self, version: int) -> Path:
        return self._folder / f"policy-{version:08d}.safetensors"


class RedisTransport:
    """The safetensors bytes of a version in chunks under `weights:<version>:<i>`."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys

    def write(self, version: int, tensors: Mapping[str, torch.Tensor]) -> int:
        data = memoryview(safetensors.torch.save(dict(tensors)))
        for i, start in enumerate(range(0, len(data), CHUNK_BYTES)):
            self._client.set(self._keys("weights", version, i), data[start : start + CHUNK_BYTES])
        self._client.set(self._keys("weights", version), len(data))
        return len(data)

    def read(self, version: int, *, go_on: Callable[[], None]) -> dict[str, torch.Tensor]:
        size = self._client.get(self._keys("weights", version))
        if size is None:
            raise PolicyNotFound(
                f"policy version {version} is not in Redis: it was removed, or never completely written"
            )
        data = bytearray(int(size))
        for i, start in enumerate(range(0, len(data), CHUNK_BYTES)):
            chunk = self._client.get(self._keys("weights", version, i))
            if chunk is None:
                raise PolicyNotFound(f"policy version {version}: chunk {i} is missing in Redis")
            if len(chunk) != min(CHUNK_BYTES, len(data) - start):
                raise DigestMismatch(f"policy version {version}: chunk {i} in Redis has {len(chunk)} bytes")
            data[start : start + len(chunk)] = chunk
            go_on()
        try:
            return safetensors.torch.load(bytes(data))
        except safetensors.SafetensorError as error:
            raise DigestMismatch(f"policy version {version} in Redis is damaged: {error}") from None

    def delete(self, version: int) -> None:
        size = self._client.get(self._keys("weights", version))
        if size is not None:
            chunks = [self._keys("weights", version, i) for i in range(-(-int(size) // CHUNK_BYTES))]
            self._client.unlink(self._keys("weights", version), *chunks)


class PolicyStore:
    """Publication and retrieval of policy versions, over either transport."""

    def __init__(self, client: redis.Redis, keys: Keys, config: PolicyStoreConfig) -> None:
        self._client = client
        self._keys = keys
        self._keep = config.keep
        self._scripts = Scripts(client, keys)
        self._announced: dict[int, str] = {}
        self._transport: Transport
        if config.transport == "redis":
            self._transport = RedisTransport(client, keys)
        else:
            self._transport = DirectoryTransport(store_folder(config, keys.run))

    def publish(
        self,
        version: int,
        tensors: Mapping[str, torch.Tensor],
        *,
        step: int,
        parent: int,
        incarnation: int = 1,
        canary: Sequence[CanarySequence] = (),
    ) -> Manifest:
        """Make a version the one to serve. `tensors` are on the CPU and do not change meanwhile.

        Raises PolicyError when a version as new is already served: versions only grow.
        """
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        self._refuse_outdated(version, policy_digest(digests), incarnation=incarnation)
        num_bytes = self._transport.write(version, tensors)
        manifest = Manifest(
            version=version,
            step=step,
            incarnation=incarnation,
            parent=parent,
            num_bytes=num_bytes,
            digest=policy_digest(digests),
            tensors=digests,
            canary=[sequence.to_wire() for sequence in canary],
        )
        self._scripts("small", "HSET", "manifests", version, encode(asdict(manifest)))
        moved = self._scripts("publish", version, parent, step, incarnation, manifest.digest, num_bytes)
        if moved != 1:
            self._refuse_outdated(version, manifest.digest, incarnation=incarnation)
        self._collect_garbage()
        return manifest

    def _refuse_outdated(self, version: int, digest: str, *, incarnation: int) -> None:
        """Asked before anything is written as well, so that a trainer that was replaced cannot damage a served version."""
        newest = int(self._client.hget(self._keys("run"), "incarnation") or 0)
        if incarnation < newest:
            raise PolicyError("a newer trainer process has taken this run over; this one must stop")
        served = self.latest_version()
        is_same = served == version and self._client.hget(self._keys("policy"), "digest") == digest.encode()
        if served >= version and not is_same:
            raise PolicyError(f"policy version {version} was not published: version {served} is served already")

    def announce(self, version: int, *, step: int, parent: int) -> None:
        """Enter a version into the lineage before its bytes are written, so that ages can be told while they travel."""
        self._announced[version] = f"{parent}:{step}"
        self._scripts("small", "HSET", "lineage", version, self._announced[version])

    def announce_again(self, *, incarnation: int) -> None:
        """Restore what this process announced, and its incarnation, in a Redis that has forgotten some of it."""
        for version, entry in self._announced.items():
            self._client.hsetnx(self._keys("lineage"), str(version), entry)
        if int(self._client.hget(self._keys("run"), "incarnation") or 0) < incarnation:
            self._client.hset(self._keys("run"), "incarnation", incarnation)

    def restore(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the bytes of a published version again where they were lost. Raises DigestMismatch for other bytes."""
        manifest = self.manifest(version)
        try:
            self.fetch(version)
        except PolicyError:
            if weights_digest(tensors) != manifest.digest:
                text = f"policy version {version} is lost, and these weights are not it: was model.path changed?"
                raise DigestMismatch(text) from None
            self._transport.write(version, tensors)

    def latest(self) -> Manifest | None:
        """The manifest that the pointer names; none before the first publication."""
        version = self._client.hget(self._keys("policy"), "version")
        return None if version is None else self.manifest(int(version))

    def latest_version(self) -> int:
        """The version that the pointer names; -1 before the first publication."""
        version = self._client.hget(self._keys("policy"), "version")
        return -1 if version is None else int(version)

    def served(self) -> tuple[int, str]:
        """Version and digest that the pointer names; (-1, "") before the first publication."""
        version, digest = self._client.hmget(self._keys("policy"), ["version", "digest"])
        return (-1, "") if version is None else (int(version), (digest or b"").decode())

    def manifest(self, version: int) -> Manifest:
        """Raises PolicyNotFound."""
        wire = self._client.hget(self._keys("manifests"), str(version))
        if wire is None:
            raise PolicyNotFound(f"policy version {version} was never published in this run, or was removed")
        return Manifest(**decode(wire))

    def fetch(self, version: int) -> tuple[Manifest, dict[str, torch.Tensor]]:
        """Verified tensors of a version. Raises PolicyNotFound, DigestMismatch."""
        with self._reading(version) as go_on:
            manifest = self.manifest(version)
            tensors = self._transport.read(version, go_on=go_on)
        if tensors.keys() != manifest.tensors.keys():
            raise DigestMismatch(f"policy version {version} holds other tensors than its manifest names")
        for name, tensor in tensors.items():
            if tensor_digest(tensor) != manifest.tensors[name]:
                raise DigestMismatch(f"policy version {version}: tensor {name} does not match its digest")
        return manifest, tensors

    @contextmanager
    def _reading(self, version: int) -> Iterator[Callable[[], None]]:
        """Be a reader of a version; calling what this yields keeps it so."""
        entry = f"{version}|{process_name('reader')}/{token_hex(3)}"
        said_at = -math.inf

        def say() -> None:
            nonlocal said_at
            if time.monotonic() - said_at > READER_S / 4:
                self._scripts("reader", entry, round(READER_S * 1000))
                said_at = time.monotonic()

        say()
        try:
            yield say
        finally:
            self._scripts("reader", entry, 0)

    def _readers(self) -> set[int]:
        """Versions that somebody is fetching."""
        seconds, microseconds = self._client.time()
        now_ms = seconds * 1000 + microseconds // 1000
        self._client.zremrangebyscore(self._keys("readers"), "-inf", now_ms)
        return {int(entry.partition(b"|")[0]) for entry in self._client.zrange(self._keys("readers"), 0, -1)}

    def _collect_garbage(self) -> None:
        """Keep the newest `keep` versions, the base version (the reference), and those that an evaluation or a reader needs."""
        versions = sorted(int(v) for v in self._client.hkeys(self._keys("manifests")))
        needed = {0, *(int(v) for v in self._client.hvals(self._keys("evaluations"))), *self._readers()}
        for version in versions[: -self._keep]:
            if version not in needed:
                self._transport.delete(version)
                self._client.hdel(self._keys("manifests"), str(version))


def store_folder(config: PolicyStoreConfig, run: str) -> Path:
    """Where the directory transport of a run keeps its files."""
    if config.path:
        return Path(config.path) / run
    memory = Path("/dev/shm")
    base = memory if memory.is_dir() else Path(tempfile.gettempdir())
    return base / f"sluice-{os.getuid()}" / run


def tensor_digest(tensor: torch.Tensor) -> str:
    """xxh3-128 of dtype, shape and bytes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    digest = xxhash.xxh3_128(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(flat.numpy().data)
    return digest.hexdigest()


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """The digest that a manifest of these tensors would name."""
    return policy_digest({name: tensor_digest(tensor) for name, tensor in tensors.items()})


def policy_digest(digests: Mapping[str, str]) -> str:
    """Digest of a whole policy, from those of its tensors."""
    return hashlib.sha256("".join(f"{name}={digests[name]};" for name in sorted(digests)).encode()).hexdigest()
