"""Versioned weights: `publish(...)`, `latest()`, `fetch(version)`.

    publish: write weights or delta -> manifest (digest per tensor) -> move the pointer (one script) -> event
    fetch:   manifest -> verify its signature (`common/policies/signing.py`) -> tensors -> verify every digest; what cannot be
             verified is never served

Versions only grow. The manifest names (version, trainer step, incarnation, parent); the pointer lives in Redis, so all
roles agree on it whichever transport carries the bytes (`common/policies/transports.py`).

A version is stored whole, as a delta (`common/policies/delta.py`) upon the version published before it, its *base*, or as both:

    v0 whole <- v1 <- v2 ... <- v15 <- v16 delta and whole <- v17 ...        policy_store.full_every = 16

A process that fetched one of the last versions applies the deltas since; another begins at the nearest whole version. Whole
is the first version that a trainer process publishes, every `full_every`th, and each one that differs too much. A version
that is kept keeps what it rests on, down to a whole one. A reader that cannot verify a version asks for it whole, and the
trainer writes it so (`republish_full`): a damaged delta costs that version's time, not a dead chain.

Digests are those of the result: xxh3-128 per tensor; the manifest's own digest is the sha256 of all of them. `fetch`
computes both from the bytes in memory, so a worker that reports a manifest's digest has proved it.

A process that fetches a version is entered in `readers` meanwhile, and versions with readers are not collected. What a
trainer left that was killed before its manifest was written goes at the first publication of the next one.

Memory: whoever publishes holds the newest version, whoever fetches the one fetched last, unless it is fp32 and came whole
(the next one will too): one copy of the model in the published precision, and while a version is made a second one. Tensors
are shared between versions where they did not change, so nobody may write to what was published or fetched.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

import redis
import torch

from sluice.common.config import PolicyStoreConfig
from sluice.common.errors import DigestMismatch, PolicyError, PolicyNotFound
from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts
from sluice.common.policies import delta
from sluice.common.policies.canary import CanarySequence
from sluice.common.policies.digest import policy_digest, tensor_digest, weights_digest
from sluice.common.policies.manifest import Manifest, Policy
from sluice.common.policies.signing import Signer
from sluice.common.policies.transports import DirectoryTransport, RedisTransport, Transport
from sluice.common.run import process_name

log = logging.getLogger("sluice.policy_store")

READER_S = 120.0
"""A reader that says nothing for so long is taken for dead."""


class PolicyStore:
    """Publication and retrieval of policy versions, over either transport."""

    def __init__(
        self, client: redis.Redis, keys: Keys, config: PolicyStoreConfig, *, signer: Signer | None = None
    ) -> None:
        """signer: by default with the key of the environment, if there is one."""
        self._client = client
        self._keys = keys
        self._signer = signer or Signer.of_environment(keys.run)
        self._keep = config.keep
        self._full_every = config.full_every if config.delta else 1
        self._scripts = Scripts(client, keys)
        self._announced: dict[int, str] = {}
        self._held: Policy | None = None
        self._republished = -1
        self._has_swept = False
        self._known_bases: dict[int, int] = {}
        self.last_fetch_s = 0.0
        self.last_fetch_bytes = 0
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
        adapter_scale: float | None = None,
    ) -> Manifest:
        """Make a version the one to serve. `tensors` are on the CPU and never change from now on: they are held as a base.

        Raises PolicyError when a version as new is already served: versions only grow.
        """
        base, num_links = self._base_for(version) if adapter_scale is None else (None, 0)
        if base is None:
            digests, patches = {name: tensor_digest(tensor) for name, tensor in tensors.items()}, None
        else:
            digests, patches = delta.encode(tensors, base=base.tensors)
        self._refuse_outdated(version, policy_digest(digests), incarnation=incarnation)
        self._sweep(before=version)
        is_full = patches is None or num_links >= self._full_every
        manifest = Manifest(
            version=version,
            step=step,
            incarnation=incarnation,
            parent=parent,
            num_bytes=self._transport.write(version, tensors) if is_full else 0,
            digest=policy_digest(digests),
            tensors=digests,
            canary=[sequence.to_wire() for sequence in canary],
            base=base.manifest.version if base is not None and patches is not None else -1,
            delta_bytes=0 if patches is None else self._transport.write(version, patches, "delta"),
            adapter_scale=adapter_scale,
        )
        self._record(manifest)
        num_bytes = manifest.num_bytes + manifest.delta_bytes
        moved = self._scripts("publish", version, parent, step, incarnation, manifest.digest, num_bytes)
        if moved != 1:
            self._refuse_outdated(version, manifest.digest, incarnation=incarnation)
        if self._full_every > 1:
            self._held = Policy(manifest=manifest, tensors=tensors)
        self._collect_garbage()
        return manifest

    def _record(self, manifest: Manifest) -> None:
        self._scripts("write_record", "HSET", "manifests", manifest.version, manifest.to_signed_bytes(self._signer))
        self._known_bases[manifest.version] = manifest.base_version

    def _base_for(self, version: int) -> tuple[Policy | None, int]:
        """What this version can be a delta upon, and the versions that one consists of; (None, 0) = nothing."""
        held = self._held
        if held is None or held.manifest.version >= version:
            return None, 0
        try:
            if self.manifest(held.manifest.version).digest != held.manifest.digest:
                return None, 0
        except (
            PolicyError
        ):  # a Redis that lost it has lost all that would have been built upon it; or somebody replaced it
            return None, 0
        return held, 1 + len(self._base_chain(held.manifest.version))

    def _base_chain(self, version: int) -> list[int]:
        """The versions that this one rests on, down to a whole one."""
        found: list[int] = []
        while True:
            if version not in self._known_bases:
                try:
                    self._known_bases[version] = self.manifest(version).base_version
                except PolicyError:
                    return found
            version = self._known_bases[version]
            if version < 0:
                return found
            found.append(version)

    def is_full_requested(self) -> bool:
        """Whether a reader could not verify the version that this process published last; each version is mended once."""
        if self._held is None or self._held.manifest.version == self._republished:
            return False
        return self._client.get(self._keys("full_requested")) == b"%d" % self._held.manifest.version

    def republish_full(self) -> None:
        """Write the version that this process published last whole, beside any delta of it. Raises DiskFull."""
        assert self._held is not None
        manifest, tensors = self._held.manifest, self._held.tensors
        manifest = replace(manifest, num_bytes=self._transport.write(manifest.version, tensors))
        self._record(manifest)
        self._held = Policy(manifest=manifest, tensors=tensors)
        self._republished = manifest.version

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
        self._scripts("write_record", "HSET", "lineage", version, self._announced[version])

    def announce_again(self, *, incarnation: int) -> None:
        """Restore what this process announced, and its incarnation, in a Redis that has forgotten some of it."""
        for version, entry in self._announced.items():
            self._client.hsetnx(self._keys("lineage"), str(version), entry)
        if int(self._client.hget(self._keys("run"), "incarnation") or 0) < incarnation:
            self._client.hset(self._keys("run"), "incarnation", incarnation)

    def restore(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the bytes of a version published whole again where they were lost. Raises DigestMismatch for other bytes."""
        manifest = self.manifest(version)
        assert manifest.num_bytes, f"policy version {version} is a delta"
        try:
            with self._reading(version) as go_on:
                self._load(manifest, held=None, go_on=go_on)
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
        return self.served()[0]

    def served(self) -> tuple[int, str]:
        """Version and digest that the pointer names; (-1, "") before the first publication."""
        version, digest = self._client.hmget(self._keys("policy"), ["version", "digest"])
        return (-1, "") if version is None else (int(version), (digest or b"").decode())

    def manifest(self, version: int) -> Manifest:
        """Raises PolicyNotFound, SignatureRefused, DigestMismatch."""
        signed = self._client.hget(self._keys("manifests"), str(version))
        if signed is None:
            raise PolicyNotFound(f"policy version {version} was never published in this run, or was removed")
        return Manifest.from_signed_bytes(signed, self._signer, version=version)

    def fetch(self, version: int) -> tuple[Manifest, dict[str, torch.Tensor]]:
        """Verified tensors of a version, not to be written to. Raises PolicyNotFound, SignatureRefused, DigestMismatch."""
        began = time.monotonic()
        with self._reading(version) as go_on:
            manifest = self.manifest(version)
            held = self._held if self._held and self._held.manifest.version < version else None
            try:
                tensors, num_bytes = self._load_somehow(manifest, held=held, go_on=go_on)
            except PolicyError:
                self._scripts("write_record", "SET", "full_requested", version)
                raise
        has_deltas = manifest.base >= 0 or any(tensor.dtype != torch.float32 for tensor in tensors.values())
        self._held = Policy(manifest=manifest, tensors=tensors) if has_deltas and self._full_every > 1 else None
        self.last_fetch_s, self.last_fetch_bytes = time.monotonic() - began, num_bytes
        return manifest, tensors

    def _load_somehow(
        self, target: Manifest, *, held: Policy | None, go_on: Callable[[], None]
    ) -> tuple[dict[str, torch.Tensor], int]:
        """By the deltas since what is held; failing that, from whole weights."""
        if held is not None and target.base >= 0:
            try:
                return self._load(target, held=held, go_on=go_on)
            except PolicyError as error:
                log.warning("no way from version %d, reading whole weights: %s", held.manifest.version, error)
        return self._load(target, held=None, go_on=go_on)

    def _load(
        self, target: Manifest, *, held: Policy | None, go_on: Callable[[], None]
    ) -> tuple[dict[str, torch.Tensor], int]:
        """Verified tensors, and the bytes read."""
        first, *deltas = self._path(target, start=held.manifest if held else None)
        base, num_bytes = (held.tensors, 0) if held else self._transport.read(first.version, go_on=go_on)
        patches: dict[str, list[torch.Tensor]] = {name: [] for name in base}
        for manifest in deltas:
            tensors, size = self._transport.read(manifest.version, "delta", go_on=go_on)
            num_bytes += size
            for name, patch in tensors.items():
                patches.setdefault(name, []).append(patch)
        if patches.keys() != target.tensors.keys() or patches.keys() != base.keys():
            raise DigestMismatch(f"policy version {target.version} holds other tensors than its manifest names")
        found, digests = {}, {}
        for name, digest in target.tensors.items():
            # what was read is copied as it is verified: a mapped file's pages may be gone while an engine serves them
            if patches[name] or held is None:
                try:
                    found[name], digests[name] = delta.apply(base[name], patches[name])
                except DigestMismatch as error:
                    raise DigestMismatch(f"policy version {target.version}: tensor {name}: {error}") from None
            else:
                found[name], digests[name] = base[name], held.manifest.tensors[name]
            if digests[name] != digest:
                raise DigestMismatch(f"policy version {target.version}: tensor {name} does not match its digest")
            go_on()
        if policy_digest(digests) != target.digest:
            raise DigestMismatch(f"policy version {target.version}: the manifest's digest is not that of its tensors")
        return found, num_bytes

    def _path(self, target: Manifest, *, start: Manifest | None) -> list[Manifest]:
        """From `start` (none = the nearest whole version) to `target`, both included. Raises PolicyNotFound."""
        path = [target]
        while path[-1].num_bytes == 0 if start is None else path[-1].version > start.version:
            if path[-1].base < 0:
                raise PolicyNotFound(f"policy version {path[-1].version} is stored whole, not as a delta")
            path.append(self.manifest(path[-1].base))
        if start is not None and path[-1].digest != start.digest:
            raise PolicyNotFound(
                f"the chain of policy version {target.version} does not lead to version {start.version}"
            )
        return path[::-1]

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

    def _sweep(self, *, before: int) -> None:
        """Once per process, before its first bytes: free what no manifest names. A version that is not older may be being
        written by a trainer that has replaced this one."""
        if not self._has_swept:
            wanted = {*(int(v) for v in self._client.hkeys(self._keys("manifests"))), *self._readers()}
            self._transport.sweep(lambda version: version < before and version not in wanted)
            self._has_swept = True

    def _collect_garbage(self) -> None:
        """Keep the newest `keep` versions, the base model (the reference), those that an evaluation or a reader needs, and
        what all of these rest on."""
        stored = sorted(int(v) for v in self._client.hkeys(self._keys("manifests")))
        needed = {0, *(int(v) for v in self._client.hvals(self._keys("evaluations"))), *self._readers()}
        needed |= {*stored[-self._keep :]}
        needed |= {foundation for version in needed.intersection(stored) for foundation in self._base_chain(version)}
        for version in stored:
            if version not in needed:
                self._transport.delete(version)
                self._client.hdel(self._keys("manifests"), str(version))
                self._known_bases.pop(version, None)


def store_folder(config: PolicyStoreConfig, run: str) -> Path:
    """Where the directory transport of a run keeps its files."""
    if config.path:
        return Path(config.path) / run
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    return base / f"sluice-{os.getuid()}" / run
