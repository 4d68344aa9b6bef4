"""Publication beside training: the snapshot is taken in the trainer's thread, all else happens in another.

    trainer thread:    snapshot --> announce in the lineage --> next step ...
    publisher thread:  encode --> write --> move the pointer --> evaluations --> message dataset.fill

One publication at a time: a new one waits for the previous one, and raises its error.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import redis
import torch
from celery import Celery
from torch import Tensor

from sluice.common.config import EvalDataset
from sluice.common.connections.broker import send
from sluice.common.errors import ConfigError, PolicyError
from sluice.common.ledger import evaluations as evaluation
from sluice.common.models.causal_lm import kept_dtype, load_pretrained, named_weights
from sluice.common.policies.canary import CanarySequence
from sluice.common.policies.store import PolicyStore
from sluice.common.run import Run
from sluice.trainer.heartbeat import DiskRetry

log = logging.getLogger("sluice.trainer")


class Publisher:
    """Publishes versions in order, overlapped with training."""

    def __init__(
        self,
        store: PolicyStore,
        app: Celery,
        run: Run,
        client: redis.Redis,
        *,
        incarnation: int,
        retry_while_disk_full: DiskRetry,
    ) -> None:
        self.store, self._app, self._run, self._client = store, app, run, client
        self._incarnation, self._retry_while_disk_full = incarnation, retry_while_disk_full
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")
        self._running: Future[None] | None = None
        self._metrics = {"time/publish": 0.0}
        self.published = -1
        "newest version that this process has published"
        self._is_base_lost = False
        self.digest = ""
        "its digest"

    def publish(
        self,
        version: int,
        tensors: dict[str, Tensor],
        *,
        step: int,
        parent: int,
        canary: list[CanarySequence],
        evaluate: tuple[EvalDataset, ...] = (),
    ) -> None:
        """Begin to publish a version; return when the previous one is published and this one is in the lineage."""
        self.wait()
        self.store.announce(version, step=step, parent=parent)
        lora = self._run.config.trainer.lora

        # Bytes first, the pointer last: the store moves it when the version can be read completely.
        def write() -> None:
            manifest = self.store.publish(
                version,
                tensors,
                step=step,
                parent=parent,
                incarnation=self._incarnation,
                canary=canary,
                adapter_scale=lora.scale if lora and version > 0 else None,
            )
            self.digest = manifest.digest
            full_bytes = sum(tensor.nbytes for tensor in tensors.values())
            self._metrics["policy/payload_bytes"] = float(manifest.payload_bytes)
            self._metrics["policy/payload_share"] = manifest.payload_bytes / full_bytes

        self._running = self._thread.submit(self._publish, version, write, evaluate)

    def wait(self) -> None:
        """Wait until the running publication is complete. Raises what it raised."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def announce_again(self) -> None:
        """Enter what this process has announced once more: Redis came back with an older state."""
        self.store.announce_again(incarnation=self._incarnation)

    def republish_full(self) -> None:
        """Write again what a reader could not verify and asked for: the newest version in full, or the base that was lost."""
        if self._running is not None and not self._running.done():
            return
        if self.store.pop_base_request():
            self._restore_base()
        elif self.store.is_full_requested():
            self._retry_while_disk_full(self.store.republish_full)

    def _restore_base(self) -> None:
        """Write version 0 again, from the model of the config; where that is another one now, say so once."""
        if not self._is_base_lost:
            config = self._run.config
            try:
                model = load_pretrained(config.model.path, revision=config.model.revision)
                model.requires_grad_(False)
                dtype = getattr(torch, config.rollout.dtype)
                base = {name: weight.to(kept_dtype(weight, dtype)) for name, weight in named_weights(model).items()}
                self._retry_while_disk_full(lambda: self.store.restore(0, base))
                log.warning("the base policy was lost, and is written again")
            except (ConfigError, PolicyError) as error:
                self._is_base_lost = True
                log.error("the base policy is lost, and cannot be written again: %s", error)

    def metrics(self) -> dict[str, float]:
        """Return seconds of the newest publication, and what a reader with the previous version downloads: bytes, and share."""
        return dict(self._metrics)

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _publish(self, version: int, write: Callable[[], None], evaluate: tuple[EvalDataset, ...]) -> None:
        started = time.monotonic()
        self._retry_while_disk_full(write)
        self.published = version

        # Evaluations are requested once their version can be fetched; it is kept until they are finished. The dataset role may
        # admit again: the credits of the groups that this version was trained on are free.
        for dataset in evaluate:
            evaluation.request(self._client, self._run.keys, dataset, version=version)
        send(self._app, "dataset.fill", "dataset")
        if evaluate:
            send(self._app, "dataset.evaluate", "dataset")
        self._metrics["time/publish"] = time.monotonic() - started
