"""The embedded engine: continuous batching over any transformers causal LM that `probe` finds exact, on CPU or CUDA.

    task threads --generate()--> pending --admit--> running --last token--> future
    any thread   --stage()-----> staged  --swap---> version

One thread owns the model and the batch. A pass of its loop: drop what was cancelled, swap the policy if one is staged
and may be served, admit what fits (every few passes), decode one token for every running sequence.

Invariants, besides those of `serving`:
* admission is by priority, as `scheduler` defines it, among the requests that the served version may serve; one that waits
  for another version delays no other, one that waits for room delays all behind it;
* nothing computed by an older version serves a request admitted later: no cache is shared by requests. Running
  sequences keep theirs, get it recomputed, or finish before the swap, as `in_flight` sets;
* a failure costs the running requests, never the pending ones nor the loop.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from sluice.common.errors import EngineError
from sluice.common.models.causal_lm import adopt_weights
from sluice.common.models.logprobs import score_sequences
from sluice.common.models.probe import LOADED
from sluice.common.types import Completion
from sluice.workers.engine import GenerationRequest, ScoredSequence
from sluice.workers.engine.serving import Engine, SequenceGroup, fail
from sluice.workers.engine.torch.kv_cache import bytes_per_token
from sluice.workers.engine.torch.probe import check_decoding
from sluice.workers.engine.torch.running_batch import RunningBatch
from sluice.workers.engine.torch.scheduler import PREFILL_TOKENS, schedule
from sluice.workers.engine.validation import check_request, check_sequences

log = logging.getLogger(__name__)

_ADMISSION_PERIOD = 4
"Decode steps between admissions: a prefill pass costs about a step at any size, so a few arrivals share one."


class TorchEngine(Engine):
    """Decodes on its own thread, with the model in this process.

    model: in eval mode on its device, owned by the engine from then on; its weights may be random. One that the engine does not
    decode exactly raises ConfigError.
    max_sequences: sequences decoded together; a request with more completions runs alone.
    max_model_len: bound on prompt + max_tokens.
    in_flight: running sequences at a policy swap continue with their cache ("keep"), with one recomputed by the new policy
    ("recompute"), or finish first while nothing is admitted ("drain").
    kv_cache_bytes: bound on the keys and values of running sequences, each counted at the length that the longest of them
    may reach (a prefill pass briefly needs its own besides); none = no bound but max_sequences.
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
        super().__init__(in_flight=in_flight)
        check_decoding(model, max_model_len=max_model_len, bound=LOADED)
        self._model = model
        self._has_tokenizer = decode is not None
        self._max_positions = None if kv_cache_bytes is None else kv_cache_bytes // bytes_per_token(model)
        self._vocab_size: int = model.config.get_text_config().vocab_size
        self._max_sequences = max_sequences
        self._max_model_len = max_model_len
        self._new_batch = functools.partial(
            RunningBatch,
            model,
            eos_token_ids=eos_token_ids,
            max_sequences=max_sequences,
            max_model_len=max_model_len,
            max_positions=self._max_positions,
            decode=decode,
        )
        self._batch = self._new_batch()
        self._num_passes = 0
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self._thread.start()

    def generate(self, request: GenerationRequest) -> list[Completion]:
        """Submit the request and wait; what the batch cannot run is refused at once."""
        check_request(
            request,
            max_model_len=self._max_model_len,
            vocab_size=self._vocab_size,
            max_positions=self._max_positions,
            has_tokenizer=self._has_tokenizer,
        )
        return self._wait_for(SequenceGroup(request=request))

    def score(self, sequences: Sequence[ScoredSequence]) -> tuple[int, list[NDArray[np.float32]]]:
        """Score between two decode steps, before anything is admitted; a staged policy that may be served is swapped in first."""
        check_sequences(sequences, max_model_len=self._max_model_len, vocab_size=self._vocab_size)
        return self._wait_for_score(sequences)

    def _count_sequences(self) -> int:
        return len(self._batch.sequences)

    def _running_tokens(self) -> list[tuple[SequenceGroup, int]]:
        return self._batch.num_tokens()

    # The engine thread.

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while not self._is_closed:
                self.progress_at = time.monotonic()
                try:
                    self._pass()
                except Exception as error:  # any error of a model, a kernel or the device
                    self._fail_step(error)
        finally:
            self._release_all()

    def _pass(self) -> None:
        # Cancelled groups leave first: under "drain" they must not hold back the swap.
        self._drop_cancelled()
        # Between two steps the weights can be exchanged: every token is sampled wholly before or wholly after a swap.
        self._swap()
        # A canary is scored by the version just swapped in, before any group is admitted under it.
        self._score_waiting()
        # Prefill and decode count as busy; swaps and scores count as pause.
        started = time.monotonic()
        self._num_passes += 1
        if self._num_passes % _ADMISSION_PERIOD == 0 or self._is_rather_empty():
            self._admit()
        # With nothing to decode the thread sleeps; `stage`, `generate`, `score`, `cancel` and `close` wake it.
        if self._batch.sequences:
            self._step()
            self._busy_s += time.monotonic() - started
        else:
            self._wait_for_news()

    def _drop_cancelled(self) -> None:
        if dropped := self._take_cancelled():
            self._batch.discard(dropped)

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        try:
            adopt_weights(self._model, tensors)  # checks names and shapes before the first weight changes
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _continue_running(self) -> None:
        self._batch.start_version(self.version)
        if self._in_flight == "recompute":
            for _ in self._batch.recompute():
                self.progress_at = time.monotonic()

    def _score_waiting(self) -> None:
        with self._condition:
            waiting, self._scoring = self._scoring, []
        for scoring in waiting:
            if self.version < 0:
                scoring.future.set_exception(EngineError("nothing can be scored: no policy is served yet"))
                continue
            started = time.monotonic()
            try:
                scored = score_sequences(self._model, scoring.sequences, max_batch_tokens=PREFILL_TOKENS)
            except Exception as error:  # any error of a model, a kernel or the device; generation continues
                fail(scoring.future, EngineError(f"scoring failed: {type(error).__name__}: {error}"), cause=error)
            else:
                self._update_pause_s += time.monotonic() - started  # before the caller of `score` can read it
                scoring.future.set_result((self.version, scored))
            self.progress_at = time.monotonic()

    def _admit(self) -> None:
        """Start pending requests that fit, in one prefill pass."""
        # Scheduled and marked as running under one lock: `cancel` finds every group in exactly one of the two lists.
        with self._condition:
            admitted = schedule(
                [group for group in self._pending if self._may_serve(group)],
                num_rows=len(self._batch.sequences),
                longest=self._batch.longest,
                max_sequences=self._max_sequences,
                max_positions=self._max_positions,
            )
            self._start_running(admitted)
        # The prefill runs without the lock, so that task threads can submit meanwhile.
        if admitted:
            self._batch.admit(admitted, version=self.version)

    def _is_rather_empty(self) -> bool:
        """Return whether more would start than runs: a prefill pass now costs less than decoding this few rows meanwhile."""
        num_rows = len(self._batch.sequences)
        return 2 * num_rows <= self._max_sequences and sum(group.size for group in self._pending) >= num_rows

    def _step(self) -> None:
        # Counted before the step, which removes what it finishes; a step that raises has generated nothing.
        num_tokens = len(self._batch.sequences)
        finished = self._batch.step()
        self._generated_tokens += num_tokens
        # A group resolves with its last completion; the others wait in it.
        for sequence, completion in finished:
            self._complete(sequence.group, sequence.index, completion)

    def _fail_step(self, error: Exception) -> None:
        self._last_error = f"engine step failed: {type(error).__name__}: {error}"
        log.exception("%s", self._last_error)
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed step
        self._batch = self._new_batch()
        with self._condition:
            self._fail_running(error)
