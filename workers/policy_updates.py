"""Which policy one engine serves: fetched and verified beside generation, staged, and checked against its canary.

    policy thread:  event "policy" --> fetch --> verify --> engine.stage --> swapped in --> engine.score(canary)
    pinned groups:  enter the gate of their version --> staged, if it is not --> generate --> leave
    any group:      its shortest completion, once per version --> engine.score --> the same logprobs as when it was sampled?

Invariants:
* the newest version is staged unless pinned groups are inside the gate, or were a moment ago: an evaluation's groups follow
  one another closely, and its version is not given up between two of them;
* whoever stages holds one lock, so that no older choice replaces a newer one;
* what cannot be verified is never staged: the served version stays, and the heartbeat says so;
* of a LoRA adapter the engine gets the merged weights (`common/models/lora.py`), as of any policy: inference costs nothing extra,
  and no engine needs to know. Its digest is that of the adapter as fetched; the canary shows whether the engine computes
  with it.
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
from sluice.common.errors import EngineError, PolicyError
from sluice.common.keys import Keys
from sluice.common.models.lora import merge_adapter
from sluice.common.policies.canary import CanarySequence, adapter_share, mean_difference
from sluice.common.policies.manifest import Manifest, Policy
from sluice.common.policies.store import PolicyStore
from sluice.common.types import Completion
from sluice.workers.engine import Engine, GenerationRequest

log = logging.getLogger("sluice.rollout")

_SOON_S = 0.1
"""While a swap is awaited, or the newest version held back, the thread looks again so soon."""
_HOLD_S = 0.5
"""So long after the last pinned group has left, its version is still held for the next one."""


class ServedPolicy:
    """Keeps one engine at the newest policy, or at the one that evaluation groups are pinned to."""

    def __init__(self, client: redis.Redis, keys: Keys, config: PolicyStoreConfig, engine: Engine) -> None:
        self.alarm = ""
        "why the newest version is not served; empty = it is, or is on its way"
        self.mismatch: float | None = None
        "of the newest canary scored, in nats"
        self.cache_mismatch: float | None = None
        "between a completion as it was sampled, from cached keys and values, and as it is scored afresh, in nats"
        self.adapter_share: tuple[float, float] | None = None
        "how much of a LoRA adapter's effect the newest canary shows, and the standard error of that"
        self._base: Policy | None = None
        self._compared = -1
        self._client, self._keys, self._config, self._engine = client, keys, config, engine
        self._store = PolicyStore(client, keys, config)
        self._gate = _VersionGate()
        self._staging = threading.Lock()
        self._staged = -1, ""
        self._unchecked: Manifest | None = None
        self._checking = threading.Lock()
        self._stop = threading.Event()

    def follow(self) -> None:
        """Serve every newest version from now on."""
        threading.Thread(target=self._follow, name="policy", daemon=True).start()

    @contextmanager
    def pinned(self, version: int) -> Iterator[None]:
        """While inside, the engine serves this version or is about to. Raises PolicyError."""
        with self._gate.at(version):
            with self._staging:
                if self._staged[0] != version:
                    self._stage(version)
            yield
            self._check()

    def compare(self, request: GenerationRequest, completions: list[Completion]) -> None:
        """Once per version: is a completion sampled from what the cache should hold? The canary does not see the cache.

        Only what was sampled plainly (temperature 1, nothing cut) can be scored the same way.
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
        """For the heartbeat."""
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
        events = self._keys("events")
        newest = self._client.xrevrange(events, count=1)
        last_event = newest[0][0] if newest else b"0"
        while not self._stop.is_set():
            try:
                self._stage_newest()
                self._check()
                is_restless = self._unchecked is not None or self._gate.is_held
                block_s = _SOON_S if is_restless else BLOCK_S
                reply = self._client.xread({events: last_event}, block=int(block_s * 1000), count=100)
                last_event = reply[0][1][-1][0] if reply else last_event
            except (PolicyError, redis.RedisError, OSError) as error:
                self.alarm = f"still serves version {self._engine.version}: {error}"
                log.error("%s", self.alarm)
                self._stop.wait(1.0)

    def _stage_newest(self) -> None:
        version, digest = self._store.served()
        with self._staging:
            # of the same number, yet another policy: a Redis that lost the first one's publication
            is_newer = version > self._staged[0] or (version == self._staged[0] and digest != self._staged[1])
            if is_newer and not self._gate.is_held:
                self._stage(version)
                self.alarm = ""

    def _stage(self, version: int) -> None:
        manifest, tensors = self._store.fetch(version)
        if manifest.adapter_scale is not None:
            tensors = merge_adapter(self._base_tensors(), tensors, scale=manifest.adapter_scale)
        self._engine.stage(version, manifest.digest, tensors)
        self._staged = version, manifest.digest
        self._unchecked, self.mismatch, self.adapter_share = manifest, None, None

    def _base_tensors(self) -> Mapping[str, torch.Tensor]:
        """Version 0, which all adapters are upon: fetched with the first of them, and held from then on."""
        if self._base is None:
            store = PolicyStore(self._client, self._keys, self._config)  # of its own: what was fetched last is told of
            manifest, tensors = store.fetch(0)
            self._base = Policy(manifest=manifest, tensors=tensors)
        return self._base.tensors

    def _check(self) -> None:
        """Score the canary of the staged policy, once it is served; or say that the engine refuses it."""
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
        canary = [CanarySequence(**wire) for wire in manifest.canary]
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


class _VersionGate:
    """Lets groups of one policy version in at a time: those of another wait until the last one is out."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._version = -1
        self._inside = 0
        self._left_at = -math.inf

    @property
    def is_held(self) -> bool:
        """Whether somebody is inside, or was a moment ago."""
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
