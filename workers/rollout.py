"""The `rollout` and `eval` queues: groups in, completions out, through one engine per process.

    Celery thread:  claim --> engine.generate (waits) --> store --> messages for reward and reference
    policy thread:  event "policy" --> fetch --> verify --> engine.stage        (rollout: always the newest)
    eval worker:    stages the version that the group is pinned to; groups of another version wait at the gate

SIGTERM: no new messages; what does not finish within lease.shutdown_grace_s is handed back and generated elsewhere.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import redis
from celery import Celery, signals

from common.assets import ModelAssets
from common.config import Config
from common.connection import BLOCK_S
from common.errors import PolicyError
from common.ledger import Claim
from common.policy_store import PolicyStore
from common.serialization import decode, encode
from common.types import Completion, Task, oldest_version
from workers.context import Context, CooperativePool, Result
from workers.engine import Engine, GenerationRequest, check_engine

log = logging.getLogger("sluice.rollout")

_FIELDS = ("task", "min_version", "pinned")


def prepare(app: Celery, queues: str) -> tuple[Any, int]:
    """Register the tasks of `rollout`, `eval` or `rollout,eval` and load the engine; returns pool and concurrency."""
    role, *others = queues.split(",")
    context = Context.open(app, role)
    host = RolloutRole(context, evaluates=role == "eval" or bool(others))
    app.task(host.generate, name="rollout.generate")
    signals.worker_ready.connect(lambda **_: host.start(), weak=False)
    signals.worker_shutting_down.connect(lambda **_: host.stop_soon(), weak=False)
    signals.worker_shutdown.connect(lambda **_: host.close(), weak=False)
    CooperativePool.cancel = staticmethod(host.engine.close)
    return CooperativePool, context.run.config.rollout.concurrency


def make_engine(config: Config, assets: ModelAssets) -> Engine:
    """The engine that the config names, without weights. Raises ConfigError."""
    check_engine(config.rollout.engine)
    if config.rollout.engine == "vllm":
        return _make_vllm(config, assets)
    import torch

    from common.model import build_model
    from workers.engine.torch_engine import TorchEngine

    torch.set_num_threads(1)  # two OpenMP threads under load are slower than one; scale by processes
    rollout, tokenizer = config.rollout, assets.tokenizer()
    return TorchEngine(
        build_model(assets, dtype=rollout.dtype, device=rollout.device),
        eos_token_ids=assets.eos_token_ids,
        max_sequences=rollout.max_sequences,
        max_model_len=rollout.max_model_len or config.trainer.seq_len,
        in_flight=rollout.in_flight,
        kv_cache_bytes=None if rollout.kv_cache_mib is None else rollout.kv_cache_mib * 2**20,
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)),
    )


def _make_vllm(config: Config, assets: ModelAssets) -> Engine:
    from workers.engine.vllm_core import check_config
    from workers.engine.vllm_engine import VllmEngine

    check_config(config)
    return VllmEngine(config, assets)


class RolloutRole:
    """One engine, fed by task threads and kept at the newest policy."""

    def __init__(self, context: Context, *, evaluates: bool = False) -> None:
        self.context = context
        self._evaluates = evaluates
        assets = ModelAssets.from_wire(context.run.assets)
        self._eos = frozenset(assets.eos_token_ids)
        self._tokenizer = assets.tokenizer()
        self._store = PolicyStore(context.client, context.run.keys, context.run.config.policy_store)
        self.engine = make_engine(context.run.config, assets)
        self._gate = VersionGate()
        self._stop = threading.Event()
        self._alarm = ""
        context.progress_age_s = lambda: time.monotonic() - self.engine.progress_at
        context.facts = self._facts
        context.busy_s = lambda: self.engine.stats().busy_s

    def start(self) -> None:
        """The worker is connected: follow the policy, renew leases, beat."""
        self.context.start_heart()
        if self.context.role == "rollout":
            threading.Thread(target=self._follow_policy, name="policy", daemon=True).start()

    def generate(self, group_id: str) -> None:
        """Task: the rollout part of a group."""
        self.context.perform(group_id, "rollout", self._generate, fields=_FIELDS)

    def _generate(self, claim: Claim) -> Result:
        task = Task.from_wire(decode(claim.fields["task"] or b""))
        pinned = claim.fields["pinned"]
        request = GenerationRequest(
            group_id=claim.group_id,
            prompt_ids=task.prompt_ids,
            sampling=task.sampling,
            min_version=int(claim.fields["min_version"] or 0),
            pinned_version=None if pinned is None else int(pinned),
        )
        if request.pinned_version is None:
            completions = self.engine.generate(request)
        else:
            with self._gate.at(request.pinned_version) as is_first:
                if is_first and self.engine.version != request.pinned_version:
                    self._stage(request.pinned_version)
                completions = self.engine.generate(request)
        wire = [self._with_text(completion).to_wire() for completion in completions]
        return Result(
            payload=encode({"completions": wire, "worker": self.context.process}),
            version=oldest_version(completions),
            num_tokens=sum(len(completion.token_ids) for completion in completions),
        )

    def _with_text(self, completion: Completion) -> Completion:
        ids = [token for token in completion.token_ids.tolist() if token not in self._eos]
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return replace(completion, text=str(text))

    def _stage(self, version: int) -> None:
        manifest, tensors = self._store.fetch(version)
        self.engine.stage(version, manifest.digest, tensors)

    def _follow_policy(self) -> None:
        """Stage every newest version; a version that cannot be verified is reported and the old one stays."""
        client, events = self.context.client, self.context.run.keys("events")
        newest = client.xrevrange(events, count=1)
        last_event = newest[0][0] if newest else b"0"
        staged = (-1, "")
        while not self._stop.is_set():
            try:
                served = self._store.served()
                # of the same number, yet another policy: a Redis that lost the first one's publication
                if served[0] > staged[0] or (served[0] == staged[0] and served[1] != staged[1]):
                    self._stage(served[0])
                    staged, self._alarm = served, ""
                reply = client.xread({events: last_event}, block=int(BLOCK_S * 1000), count=100)
                last_event = reply[0][1][-1][0] if reply else last_event
            except (PolicyError, redis.RedisError, OSError) as error:
                self._alarm = f"still serves version {self.engine.version}: {error}"
                log.error("%s", self._alarm)
                self._stop.wait(1.0)

    def _facts(self) -> dict[str, Any]:
        stats = self.engine.stats()
        return {
            "version": self.engine.version,
            "digest": self.engine.digest[:12],
            "evaluates": self._evaluates,
            "alarm": self._alarm,
            "generated_tokens": stats.generated_tokens,
            "sequences": stats.running_sequences,
            "updates": stats.num_updates,
            "update_pause_s": round(stats.update_pause_s, 4),
            "last_pause_s": round(stats.last_pause_s, 4),
            "fetch_s": round(self._store.last_fetch_s, 4),
            "fetch_bytes": self._store.last_fetch_bytes,
        }

    def stop_soon(self) -> None:
        """SIGTERM: what is not finished after the grace period goes back to the queue."""
        timer = threading.Timer(self.context.run.config.lease.shutdown_grace_s, self.engine.close)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        self._stop.set()
        self.engine.close()
        self.context.close()


class VersionGate:
    """Lets groups of one policy version in at a time: those of another wait until the last one is out."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._version = -1
        self._inside = 0

    @contextmanager
    def at(self, version: int) -> Iterator[bool]:
        """Be inside with a version; yields whether this thread is the first of it."""
        with self._changed:
            self._changed.wait_for(lambda: self._inside == 0 or self._version == version)
            is_first = self._inside == 0
            self._version = version
            self._inside += 1
        try:
            yield is_first
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()
