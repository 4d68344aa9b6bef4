"""Which policy one engine serves: fetched and verified beside generation, staged, and checked against its canary.

    policy thread:  event "policy" --> fetch --> verify --> engine.stage --> swapped in --> engine.score(canary)
    pinned groups:  enter the gate of their version --> stage it, if it is not --> generate --> leave
    any group:      its shortest completion, once per version --> engine.score --> the same logprobs as when it was sampled?

Invariants:
* the newest version is staged unless pinned groups are inside the gate, or were a moment ago: an evaluation's groups follow
  one another closely, and its version is not replaced between two of them;
* staging holds one lock, so that no older choice replaces a newer one;
* what cannot be verified is never staged: the served version stays, and the heartbeat reports it;
* for a LoRA adapter the engine gets the merged weights (`common/models/lora.py`), as for any policy: inference costs nothing
  extra, and no engine knows of adapters. Its digest is that of the adapter as fetched; the canary shows whether the
  engine computes with it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import redis
import torch

from sluice.common.config import PolicyStoreConfig
from sluice.common.connections.client import BLOCK_S
from sluice.common.errors import DigestMismatch, EngineError, SluiceError
from sluice.common.keys import Keys
from sluice.common.models.lora import merge_adapter
from sluice.common.monitoring.metric_stream import last_entry, wait_for_publication
from sluice.common.policies.canary import CanarySequence, adapter_share, mean_difference
from sluice.common.policies.manifest import Manifest
from sluice.common.policies.reader import PolicyReader
from sluice.common.types import Completion
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.serving import Engine

log = logging.getLogger("sluice.rollout")

_SOON_S = 0.1
"""Poll period while a swap is awaited, or the newest version held back."""
_HOLD_S = 0.5
"""After the last pinned group has left, its version is held this long for the next one."""


class ServedPolicy:
    """Keeps one engine on the newest policy, or on the one that evaluation groups are pinned to."""

    def __init__(self, client: redis.Redis, keys: Keys, config: PolicyStoreConfig, engine: Engine) -> None:
        self.alarm = ""
        "why the newest version is not served; empty = it is, or will be"
        self.mismatch: float | None = None
        "mean difference of the newest canary scored, in nats"
        self.cache_mismatch: float | None = None
        "mean difference between a completion as sampled, from cached keys and values, and as scored afresh, in nats"
        self.adapter_share: tuple[float, float] | None = None
        "share of a LoRA adapter's effect that the newest canary shows, and its standard error"
        self._base: Mapping[str, torch.Tensor] | None = None
        "version 0, the base of all adapters: fetched with the first of them, and held from then on"
        self._compared = -1
        self._client, self._keys, self._config, self._engine = client, keys, config, engine
        self._store = PolicyReader(client, keys, config)
        self._gate = _VersionGate()
        self._staging = threading.Lock()
        self._staged = -1
        "the version that the engine was given last"
        self._newest = -1, ""
        "the newest that it was given which is not pinned, as the pointer named it"
        self._unchecked: Manifest | None = None
        self._checking = threading.Lock()
        self._stop = threading.Event()

    def follow(self) -> None:
        """Start the thread that stages every newest version."""
        threading.Thread(target=self._follow, name="policy", daemon=True).start()

    @contextmanager
    def pinned(self, version: int) -> Iterator[None]:
        """Keep the engine on this version while inside. Raises PolicyError."""
        with self._gate.at(version):
            with self._staging:
                if self._staged != version:
                    self._stage(version)
            yield
            self._check()

    def compare(self, request: GenerationRequest, completions: list[Completion]) -> None:
        """Check, once per version, that a completion was sampled from what the cache should hold: a canary does not read it.

        Only a completion sampled at temperature 1 without truncation can be scored the same way.
        """
        sampling, shortest = request.sampling, min(completions, key=lambda completion: len(completion.token_ids))
        version = shortest.policy_versions[0][0]
        is_plain = sampling.temperature == sampling.top_p == 1 and not (
            sampling.top_k or sampling.min_p or sampling.min_tokens
        )
        if not is_plain or len(shortest.policy_versions) > 1 or version in (self._compared, -1):
            return
        self._compared = version
        try:
            served, logprobs = self._engine.score([(request.prompt_ids, shortest.token_ids)])
        except EngineError as error:
            log.warning("group %s was not compared: %s", request.group_id, error)
            return
        if served == version:
            self.cache_mismatch = mean_difference([shortest.rollout_logprobs], logprobs)

    def stats(self) -> dict[str, Any]:
        """Return stats for the heartbeat."""
        return {
            "alarm": self.alarm,
            "mismatch": self.mismatch,
            "cache_mismatch": self.cache_mismatch,
            "adapter_share": self.adapter_share,
            "fetch_s": round(self._store.last_fetch_s, 4),
            "fetch_bytes": self._store.last_fetch_bytes,
        }

    def close(self) -> None:
        self._stop.set()

    def _follow(self) -> None:
        seen, trouble, num_failed = "", "", 0
        while not self._stop.is_set():
            try:
                seen = seen or last_entry(self._client, self._keys, "publications")
                self._stage_newest()
                self._check()
                num_failed = 0
                if self.alarm == trouble:
                    self.alarm = trouble = ""
                is_restless = self._unchecked is not None or self._gate.is_held
                block_s = _SOON_S if is_restless else BLOCK_S
                seen = wait_for_publication(self._client, self._keys, after=seen, timeout_s=block_s)
            except (
                Exception
            ) as error:  # whatever is in Redis: without this thread the worker would serve this version for ever
                num_failed += 1
                if num_failed == 1:  # the pointer moves a moment before it is confirmed
                    self._stop.wait(_SOON_S)
                    continue
                trouble = f"still serves version {self._engine.version}: {_in_words(error)}"
                if trouble != self.alarm:
                    log.error("%s", trouble, exc_info=not isinstance(error, (SluiceError, redis.RedisError, OSError)))
                self.alarm = trouble
                self._stop.wait(1.0)

    def _stage_newest(self) -> None:
        pointer = version, digest = self._store.served()
        with self._staging:
            is_staged = pointer == self._newest and self._staged == version
            # an older one: Redis has lost a publication, or was made to
            if is_staged or version < max(self._newest[0], 0) or self._gate.is_held:
                return
            # Versions only grow, so a signed one that is newer is the trainer's. The first one of this process may be old, and
            # where Redis has lost a publication the same number may be another policy: these the trainer must confirm.
            if pointer != self._newest and not version > self._newest[0] >= 0:
                self._store.check_confirmed(version, digest)
            self._stage(version, digest=digest)
            self._newest = pointer
            self.alarm = ""

    def _stage(self, version: int, *, digest: str = "") -> None:
        manifest, tensors = self._store.fetch(version)
        if digest not in ("", manifest.digest):
            raise DigestMismatch(f"the pointer names policy version {version} with another digest than its manifest")
        if manifest.adapter_scale is not None:
            if self._base is None:
                # a reader of its own: `stats` reports the last fetch of the other
                _, self._base = PolicyReader(self._client, self._keys, self._config).fetch(0)
            tensors = merge_adapter(self._base, tensors, scale=manifest.adapter_scale)
        self._engine.stage(version, manifest.digest, tensors)
        self._staged = version
        self._unchecked, self.mismatch, self.adapter_share = manifest, None, None

    def _check(self) -> None:
        """Score the canary of the staged policy once it is served, or report that the engine refuses it."""
        if self._checking.acquire(blocking=False):
            try:
                manifest = self._unchecked
                if manifest is not None and self._is_checked(manifest) and self._unchecked is manifest:
                    self._unchecked = None
            finally:
                self._checking.release()

    def _is_checked(self, manifest: Manifest) -> bool:
        refused = self._engine.refused
        if refused is not None and refused[0] == manifest.version:
            self.alarm = (
                f"still serves version {self._engine.version}: policy version {refused[0]} was not loaded: {refused[1]}"
            )
            return True
        if self._engine.version != manifest.version:
            return False
        canary = [CanarySequence.from_wire(wire) for wire in manifest.canary]
        try:
            version, logprobs = self._engine.score([(s.prompt_ids, s.token_ids) for s in canary])
        except EngineError as error:
            log.warning("the canary of policy version %d was not scored: %s", manifest.version, error)
        else:
            if version != manifest.version:
                return False
            self.mismatch = mean_difference([s.logprobs for s in canary], logprobs) if canary else None
            self.adapter_share = adapter_share(canary, logprobs)
        return True


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, (SluiceError, redis.RedisError, OSError)) else repr(error)[:300]


class _VersionGate:
    """Admits groups of one policy version at a time: those of another wait until the last one has left."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._version = -1
        self._inside = 0
        self._left_at = -math.inf

    @property
    def is_held(self) -> bool:
        """Whether a group is inside, or was a moment ago."""
        return self._inside > 0 or time.monotonic() < self._left_at + _HOLD_S

    @contextmanager
    def at(self, version: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._inside == 0 or self._version == version)
            self._version = version
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._left_at = time.monotonic()
                self._changed.notify_all()
