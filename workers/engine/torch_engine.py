"""The embedded engine: continuous batching over any full-attention transformers causal LM, on CPU or CUDA.

    task threads --generate()--> pending --admit--> running --last token--> future
    anyone       --stage()-----> staged  --swap---> version

One thread owns the model and the batch. A pass of its loop: drop what was cancelled, swap the policy if one is staged
and may be, admit what fits (every few passes), decode one token for every running row.

Invariants:
* every request is resolved exactly once: with its completions, an EngineError, or EngineClosed;
* admission is by priority, as `admission` says, among the requests that the served version may serve; one that waits for
  another version holds nobody up, one that waits for room holds up all behind it;
* nothing computed by an older version serves a request admitted later: there is no cache between requests. Running rows
  keep theirs, get it recomputed, or finish before the swap, as `in_flight` says;
* requests pinned to the served version run to their end before a swap: it waits for those running and those pending;
* a failure costs the running requests, never the pending ones nor the loop.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from common.errors import EngineClosed, EngineError
from common.logprobs import score_sequences
from common.model import adopt_weights
from common.types import Completion
from workers.engine import EngineStats, GenerationRequest, StagedPolicy
from workers.engine.admission import PREFILL_TOKENS, choose
from workers.engine.batch import RunningBatch
from workers.engine.kv_cache import bytes_per_token
from workers.engine.limits import check_model, check_request, check_sequences
from workers.engine.row import Group

log = logging.getLogger(__name__)

_IDLE_PASS_S = 1.0
"An idle loop passes this often, so that `progress_at` tells idle from hung."
_JOIN_S = 10.0
"`close` waits so long for the step in progress; a hung device must not hang the shutdown."
_ADMISSION_PERIOD = 4
"Decode steps between admissions: a prefill pass costs about a step whatever its size, so a few arrivals share one."


@dataclass(eq=False, kw_only=True, slots=True)
class _Scoring:
    sequences: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]]
    future: Future[tuple[int, list[NDArray[np.float32]]]] = field(default_factory=Future)


class TorchEngine:
    """Implements `workers.engine.Engine`; serves nothing before the first `stage`.

    model: in eval mode on its device, owned by the engine from now on; its weights may be uninitialised.
    max_sequences: rows decoded together; a request with more completions runs alone.
    max_model_len: bound on prompt + max_tokens.
    in_flight: running rows at a policy swap go on with their cache ("keep"), with one recomputed by the new policy
    ("recompute"), or finish first while nothing is admitted ("drain").
    kv_cache_bytes: bound on the keys and values of running rows, each counted at the length that the longest of them may
    reach (a prefill pass needs its own beside them for a moment); none = no bound but max_sequences.
    decode: text of token ids, for requests with stop texts; none = those are refused.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int],
        max_sequences: int,
        max_model_len: int,
        in_flight: Literal["keep", "recompute", "drain"] = "keep",
        kv_cache_bytes: int | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        check_model(model, max_model_len=max_model_len)
        self._model = model
        self._decode = decode
        self._max_positions = None if kv_cache_bytes is None else kv_cache_bytes // bytes_per_token(model)
        self._eos_token_ids = tuple(eos_token_ids)
        self._max_sequences = max_sequences
        self._max_model_len = max_model_len
        self._in_flight = in_flight
        self._batch = self._new_batch()
        self._version, self._digest = -1, ""
        self._progress_at = time.monotonic()
        self._last_error: str | None = None
        self._refused: tuple[int, str] | None = None
        self._num_passes = self._generated_tokens = self._num_updates = 0
        self._busy_s = self._update_pause_s = self._last_pause_s = 0.0
        self._condition = threading.Condition()  # guards all below
        self._pending: list[Group] = []
        self._running: list[Group] = []
        self._scorings: list[_Scoring] = []
        self._staged: StagedPolicy | None = None
        self._has_news = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self._thread.start()

    @property
    def version(self) -> int:
        """The policy version that produces the next token; -1 before the first policy."""
        return self._version

    @property
    def digest(self) -> str:
        """Digest of the served policy."""
        return self._digest

    @property
    def progress_at(self) -> float:
        """`time.monotonic()` of the loop's last pass."""
        return self._progress_at

    @property
    def refused(self) -> tuple[int, str] | None:
        """The policy version staged last that could not be loaded, and why; none once another was."""
        return self._refused

    @property
    def last_error(self) -> str | None:
        """The last failure of a step or of a policy swap, for people; none = there was none."""
        return self._last_error

    def generate(self, request: GenerationRequest) -> list[Completion]:
        """`sampling.n` completions in order; blocks. Raises EngineError, or EngineClosed when it was not served."""
        check_request(
            request,
            max_model_len=self._max_model_len,
            vocab_size=self._model.config.get_text_config().vocab_size,
            max_positions=self._max_positions,
            has_tokenizer=self._decode is not None,
        )
        group = Group(request=request)
        with self._condition:
            if self._is_closed:
                raise EngineClosed(f"group {request.group_id}: the engine is closed")
            if self._refused is not None and request.pinned_version == self._refused[0]:
                raise EngineError(f"group {request.group_id}: {self._last_error}")
            self._pending.append(group)
            self._wake()
        return group.future.result()

    def stage(self, version: int, digest: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Serve this policy from the next decode step on that may swap; returns at once. Replaces one staged before.

        Versions may go back (evaluation); the served one drops what was staged. A policy that cannot be loaded is reported
        in `last_error` and the log, and the served one stays.
        """
        with self._condition:
            is_served = (version, digest) == (self._version, self._digest)
            self._staged = None if is_served else StagedPolicy(version=version, digest=digest, tensors=tensors)
            self._wake()

    def cancel(self, group_id: str) -> None:
        """Give up a group, if it is here: its `generate` raises EngineClosed, its rows leave at the next step."""
        with self._condition:
            for group in (*self._pending, *self._running):
                if group.request.group_id == group_id:
                    self._resolve(group, EngineClosed(f"group {group_id} was cancelled"))
            self._wake()

    def score(
        self, sequences: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]]
    ) -> tuple[int, list[NDArray[np.float32]]]:
        """The served version, and its logprobs [T] at temperature 1 of each (prompt_ids [P], token_ids [T]); blocks.

        Computed between two decode steps, before anything is admitted; a policy staged before is swapped in first, where
        it may be. Raises EngineError (also where no policy is served yet), EngineClosed.
        """
        vocab_size = self._model.config.get_text_config().vocab_size
        check_sequences(sequences, max_model_len=self._max_model_len, vocab_size=vocab_size)
        scoring = _Scoring(sequences=sequences)
        with self._condition:
            if self._is_closed:
                raise EngineClosed("the engine is closed")
            self._scorings.append(scoring)
            self._wake()
        return scoring.future.result()

    def stats(self) -> EngineStats:
        """Counters since the engine started."""
        return EngineStats(
            generated_tokens=self._generated_tokens,
            running_sequences=len(self._batch.rows),
            waiting_requests=len(self._pending),
            busy_s=self._busy_s,
            num_updates=self._num_updates,
            update_pause_s=self._update_pause_s,
            last_pause_s=self._last_pause_s,
        )

    def close(self) -> None:
        """Release everyone inside with EngineClosed, and stop after the step in progress. Idempotent."""
        self._release_all()
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            log.warning(
                "the engine's step has not ended within %.0f s; its thread is left to the process exit", _JOIN_S
            )

    def _new_batch(self) -> RunningBatch:
        return RunningBatch(
            self._model,
            eos_token_ids=self._eos_token_ids,
            max_sequences=self._max_sequences,
            max_model_len=self._max_model_len,
            max_positions=self._max_positions,
            decode=self._decode,
        )

    # The engine thread.

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while not self._is_closed:
                self._progress_at = time.monotonic()
                try:
                    self._pass()
                except Exception as error:  # whatever a model, a kernel or the device may raise
                    self._fail_running(error)
        finally:
            self._release_all()

    def _pass(self) -> None:
        self._drop_cancelled()
        self._swap()
        self._score_waiting()
        started = time.monotonic()
        self._num_passes += 1
        if self._num_passes % _ADMISSION_PERIOD == 0 or self._is_rather_empty():
            self._admit()
        if self._batch.rows:
            self._step()
            self._busy_s += time.monotonic() - started
        else:
            self._wait_for_news()

    def _drop_cancelled(self) -> None:
        with self._condition:
            dropped = {group for group in self._running if group.future.done()}
            self._pending = [group for group in self._pending if not group.future.done()]
            self._running = [group for group in self._running if group not in dropped]
        if dropped:
            self._batch.discard(dropped)

    def _swap(self) -> None:
        """Load the staged policy, if it need not wait for running or pinned requests."""
        with self._condition:
            policy = self._staged
            if policy is None or self._must_not_swap():
                return
            self._staged = None
        started = time.monotonic()
        try:
            adopt_weights(self._model, policy.tensors)
        except Exception as error:
            self._refuse(policy.version, f"{type(error).__name__}: {error}")
            return
        self._version, self._digest, self._refused = policy.version, policy.digest, None
        self._num_updates += 1
        self._batch.mark(policy.version)
        if self._in_flight == "recompute":
            for _ in self._batch.recompute():
                self._progress_at = time.monotonic()
        self._last_pause_s = time.monotonic() - started
        self._update_pause_s += self._last_pause_s

    def _refuse(self, version: int, why: str) -> None:
        self._last_error = f"policy version {version} was not loaded: {why}"
        log.warning("%s; serving version %d", self._last_error, self._version)
        with self._condition:
            self._refused = version, why
            for group in self._pending:
                if group.request.pinned_version == version:
                    self._resolve(group, EngineError(f"group {group.request.group_id}: {self._last_error}"))

    def _score_waiting(self) -> None:
        with self._condition:
            waiting, self._scorings = self._scorings, []
        for scoring in waiting:
            if self._version < 0:
                scoring.future.set_exception(EngineError("nothing can be scored: no policy is served yet"))
                continue
            started = time.monotonic()
            try:
                scored = score_sequences(self._model, scoring.sequences, max_batch_tokens=PREFILL_TOKENS)
            except Exception as error:  # whatever a model, a kernel or the device may raise; generation goes on
                failure = EngineError(f"scoring failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                scoring.future.set_exception(failure)
            else:
                self._update_pause_s += time.monotonic() - started  # before who waits for the result can ask
                scoring.future.set_result((self._version, scored))
            self._progress_at = time.monotonic()

    def _must_not_swap(self) -> bool:
        if self._in_flight == "drain" and self._running:
            return True
        return any(group.request.pinned_version == self._version for group in (*self._pending, *self._running))

    def _admit(self) -> None:
        """Start pending requests that fit, in one prefill pass."""
        with self._condition:
            admitted = choose(
                [group for group in self._pending if self._may_serve(group)],
                num_rows=len(self._batch.rows),
                longest=self._batch.longest,
                max_sequences=self._max_sequences,
                max_positions=self._max_positions,
            )
            self._running += admitted
            self._pending = [group for group in self._pending if group not in admitted]
        if admitted:
            self._batch.admit(admitted, version=self._version)

    def _is_rather_empty(self) -> bool:
        """More would start than runs: a prefill pass now costs less than decoding so few rows meanwhile."""
        num_rows = len(self._batch.rows)
        return 2 * num_rows <= self._max_sequences and sum(group.size for group in self._pending) >= num_rows

    def _may_serve(self, group: Group) -> bool:
        if self._version < 0:
            return False
        if group.request.pinned_version is not None:
            return group.request.pinned_version == self._version
        is_draining = self._in_flight == "drain" and self._staged is not None
        return self._version >= group.request.min_version and not is_draining

    def _step(self) -> None:
        num_tokens = len(self._batch.rows)
        finished = self._batch.step()
        self._generated_tokens += num_tokens
        for row, completion in finished:
            row.group.completions[row.index] = completion
            if row.group.is_complete:
                with self._condition:
                    self._running.remove(row.group)
                    self._resolve(row.group, [row.group.completions[i] for i in range(row.group.size)])

    def _fail_running(self, error: Exception) -> None:
        self._last_error = f"engine step failed: {type(error).__name__}: {error}"
        log.exception("%s", self._last_error)
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed step
        self._batch = self._new_batch()
        with self._condition:
            for group in self._running:
                failure = EngineError(f"group {group.request.group_id}: {self._last_error}")
                failure.__cause__ = error
                self._resolve(group, failure)
            self._running = []

    def _release_all(self) -> None:
        with self._condition:
            self._is_closed = True
            for scoring in self._scorings:
                scoring.future.set_exception(EngineClosed("nothing was scored: the engine was closed"))
            self._scorings = []
            for group in (*self._pending, *self._running):
                self._resolve(group, EngineClosed(f"group {group.request.group_id}: the engine was closed"))
            self._wake()

    def _wait_for_news(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._has_news, timeout=_IDLE_PASS_S)
            self._has_news = False

    # With the condition held.

    def _wake(self) -> None:
        self._has_news = True
        self._condition.notify_all()

    @staticmethod
    def _resolve(group: Group, outcome: list[Completion] | EngineError) -> None:
        if group.future.done():
            return
        if isinstance(outcome, EngineError):
            group.future.set_exception(outcome)
        else:
            group.future.set_result(outcome)
