"""Publication beside training: a snapshot is taken in line, written, announced and followed up in a thread.

    trainer thread:    snapshot --> announce in the lineage --> next step ...
    publisher thread:  encode --> write --> move the pointer --> evaluations --> message dataset.fill

One publication at a time: a new one waits for the one before it, and raises what went wrong there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import redis
from celery import Celery
from torch import Tensor

from sluice.common.config import EvalDataset
from sluice.common.connections.broker import send
from sluice.common.ledger import evaluations as evaluation
from sluice.common.policies.canary import CanarySequence
from sluice.common.policies.store import PolicyStore
from sluice.common.run import Run


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
        retry_while_disk_full: Callable[[Callable[[], None]], None],
    ) -> None:
        """`retry_while_disk_full` runs what writes to a disk, again and again while that is full."""
        self._store = store
        self._retry_while_disk_full = retry_while_disk_full
        self._app = app
        self._run = run
        self._client = client
        self._incarnation = incarnation
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")
        self._running: Future[None] | None = None
        self.last_publish_s = 0.0
        self._payload: dict[str, float] = {}
        self.published = -1
        "newest version that this process has published"
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
        """Begin to publish a version; returns when the one before it is out and this one is in the lineage."""
        self.wait()
        self._store.announce(version, step=step, parent=parent)
        self._running = self._thread.submit(self._publish, version, tensors, step, parent, canary, evaluate)

    def wait(self) -> None:
        """Until the running publication is out. Raises what it raised."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def republish_full(self) -> None:
        """Write the newest version whole where a reader could not verify its delta, and asked."""
        if (self._running is None or self._running.done()) and self._store.is_full_requested():
            self._retry_while_disk_full(self._store.republish_full)

    def metrics(self) -> dict[str, float]:
        """Of the newest publication: seconds, and what a reader downloads who has the version before, in bytes and of all."""
        return {"time/publish": self.last_publish_s, **self._payload}

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _publish(
        self,
        version: int,
        tensors: dict[str, Tensor],
        step: int,
        parent: int,
        canary: list[CanarySequence],
        evaluate: tuple[EvalDataset, ...],
    ) -> None:
        started = time.monotonic()

        lora = self._run.config.trainer.lora

        def write() -> None:
            manifest = self._store.publish(
                version,
                tensors,
                step=step,
                parent=parent,
                incarnation=self._incarnation,
                canary=canary,
                adapter_scale=lora.scale if lora and version > 0 else None,
            )
            self.digest = manifest.digest
            whole_bytes = sum(tensor.nbytes for tensor in tensors.values())
            self._payload = {
                "policy/payload_bytes": float(manifest.payload_bytes),
                "policy/payload_share": manifest.payload_bytes / whole_bytes,
            }

        self._retry_while_disk_full(write)
        self.published = version
        for dataset in evaluate:
            evaluation.request(self._client, self._run.keys, dataset, version=version)
        send(self._app, "dataset.fill", "dataset")
        if evaluate:
            send(self._app, "dataset.evaluate", "dataset")
        self.last_publish_s = time.monotonic() - started
