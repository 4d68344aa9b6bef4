"""The `reference` queue: logprobs of finished completions under the frozen base model (policy version 0).

Task threads submit their groups to one model; the thread that finds it free computes all that wait, in one batch. Nothing
is sent to this queue when trainer.loss.kl_beta is 0.

The model is loaded at the first group, before that is claimed: while the base policy is away (it is published after the workers
may have started, and a trainer writes one that was lost again), nothing is claimed, and no attempt is spent.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch
from celery import Celery, signals
from numpy.typing import NDArray

from sluice.common.connections.broker import send_stage
from sluice.common.errors import PolicyError
from sluice.common.ledger.ledger import Claim
from sluice.common.models.assets import ModelAssets
from sluice.common.models.causal_lm import build_model, device_name, load_weights
from sluice.common.models.logprobs import score_sequences
from sluice.common.models.packing import enable_packing
from sluice.common.models.truncation import Truncation
from sluice.common.pipeline import stage_on
from sluice.common.policies.reader import PolicyReader
from sluice.common.serialization import decode, encode
from sluice.common.types import SamplingParams
from sluice.workers.context import Context, Result
from sluice.workers.engine import ScoredSequence

log = logging.getLogger("sluice.reference")

BASE_WAIT_S = 600.0
"""Longest wait for the base policy. A group that was not claimed meanwhile stays pending, and the reaper sends it again."""
BASE_RETRY_S = 0.5
_Waiting = tuple[SamplingParams, list[ScoredSequence], Future[list[NDArray[np.float32]]]]


def prepare(app: Celery, role: str) -> Context:
    """Register the task of this queue."""
    context = Context.open(app, role)
    host = ReferenceRole(context)
    app.task(host.score, name=stage_on(role).celery_task)
    signals.worker_ready.connect(lambda **_: context.start_heartbeat(), weak=False)
    signals.worker_shutting_down.connect(lambda **_: host.stop(), weak=False)
    signals.worker_shutdown.connect(lambda **_: context.close(), weak=False)
    return context


class ReferenceRole:
    """One frozen model, shared by the task threads."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._config = context.run.config
        self._model: ReferenceModel | None = None
        self._stopping = threading.Event()
        self._alarm = ""
        context.stats = lambda: {"device": device_name(self._config.reference.device), "alarm": self._alarm}
        context.busy_s = lambda: self._model.busy_s if self._model else 0.0
        self._loading = threading.Lock()

    def score(self, group_id: str) -> None:
        """Run the reference stage of a group (Celery task)."""
        if model := self._wait_for_model():
            work = partial(self._score, model)
            self.context.run_stage(group_id, "reference", work, fields=("task", "rollout"))
        elif self._stopping.is_set():
            send_stage(self.context.app, group_id, "reference")

    def stop(self) -> None:
        self._stopping.set()

    def _score(self, model: ReferenceModel, claim: Claim) -> Result:
        task = decode(claim.fields["task"] or b"")
        prompt_ids, sampling = task["prompt_ids"], SamplingParams.from_wire(task["sampling"])
        completions = [c["token_ids"] for c in decode(claim.fields["rollout"] or b"")["completions"]]
        logprobs = model.forward([(prompt_ids, token_ids) for token_ids in completions], sampling=sampling.distribution)
        return Result(payload=encode(logprobs))

    def _wait_for_model(self) -> ReferenceModel | None:
        """Return the model, loaded by the first thread that needs it; None when told to stop, or after BASE_WAIT_S."""
        deadline = time.monotonic() + BASE_WAIT_S
        while time.monotonic() < deadline and not self._stopping.is_set():
            with self._loading:
                try:
                    self._model = self._model or self._load()
                    self._alarm = ""
                    return self._model
                except (PolicyError, OSError) as error:
                    if not self._alarm:
                        log.error("waiting for the base policy: %s", error)
                    self._alarm = f"waits for the base policy: {error}"
                    self._stopping.wait(BASE_RETRY_S)
        return None

    def _load(self) -> ReferenceModel:
        """Load the base policy. Raises PolicyError."""
        torch.set_num_threads(1)
        config = self._config
        _, tensors = PolicyReader(self.context.client, self.context.run.keys, config.policy_store).fetch(0)
        assets = ModelAssets.from_wire(self.context.run.assets)
        model = build_model(assets, dtype=config.reference.dtype, device=config.reference.device)
        load_weights(model, tensors)
        if reason := enable_packing(model, longest=config.trainer.seq_len):
            log.warning("batches are padded: %s", reason)
        return ReferenceModel(
            model, end_token_ids=assets.eos_token_ids, max_batch_tokens=config.reference.max_batch_tokens
        )


class ReferenceModel:
    """`forward` from many threads, computed in common batches of sequences with equal sampling."""

    def __init__(self, model: torch.nn.Module, *, max_batch_tokens: int, end_token_ids: tuple[int, ...] = ()) -> None:
        self._model = model
        self._end_token_ids = end_token_ids
        self._max_batch_tokens = max_batch_tokens
        self._waiting: list[_Waiting] = []
        self.busy_s = 0.0
        self._queue_lock = threading.Lock()
        self._model_lock = threading.Lock()

    def forward(self, sequences: list[ScoredSequence], *, sampling: SamplingParams) -> list[NDArray[np.float32]]:
        """Return ref_logprobs, float32 [T] each, of (prompt_ids [P], token_ids [T]) sampled with `sampling`."""
        future: Future[list[NDArray[np.float32]]] = Future()
        with self._queue_lock:
            self._waiting.append((sampling, sequences, future))
        with self._model_lock:
            if not future.done():
                self._compute_waiting()
        return future.result()

    def _compute_waiting(self) -> None:
        with self._queue_lock:
            waiting, self._waiting = self._waiting, []
        for sampling in dict.fromkeys(sampling for sampling, _, _ in waiting):
            self._compute([one for one in waiting if one[0] == sampling], sampling)

    @torch.no_grad()
    def _compute(self, waiting: list[_Waiting], sampling: SamplingParams) -> None:
        """Resolve the calls that wait with this sampling, in one batch."""
        started = time.monotonic()
        try:
            scored = score_sequences(
                self._model,
                [sequence for _, sequences, _ in waiting for sequence in sequences],
                temperature=sampling.temperature,
                truncation=Truncation.of(sampling, end_token_ids=self._end_token_ids),
                max_batch_tokens=self._max_batch_tokens,
            )
        except Exception as error:
            for _, _, future in waiting:
                future.set_exception(error)
            return
        self.busy_s += time.monotonic() - started
        results = iter(scored)
        for _, sequences, future in waiting:
            future.set_result([next(results) for _ in sequences])
