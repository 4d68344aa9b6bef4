"""vLLM behind the engine contract, on CUDA or its CPU build: one thread steps it, task threads wait for their groups.

    task threads --generate()--> pending --hand over--> in vLLM --last token--> future
    anyone       --stage()-----> staged  --swap-------> version
    anyone       --score()-----> scoring --hand over, first--> in vLLM ------> future

A pass of the loop: drop what was cancelled, swap the policy if one is staged and may be, hand over what fits, one step.

Invariants, besides those of `serving`:
* a swap happens between two steps of a synchronous engine: nothing is paused, drained or restarted for it, and every
  sequence's tokens are known to be before or after it;
* a cached block serves only requests that were handed over after the newest swap and before the next (the salt counts
  swaps, because versions may come back); sequences without a token at a swap are handed over anew;
* running sequences keep their blocks over a swap, or get them computed again, or finish before it, as `in_flight` says;
* at most `max_sequences` are in vLLM, or one larger group; what does not fit into KV memory waits there;
* a step or a load that raises ends the engine (scheduler, weights or device are in an unknown state): what runs gets
  EngineError, what waits EngineClosed, and `progress_at` falls to -inf, for which a worker process ends itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import xxhash
from numpy.typing import NDArray

from sluice.common.config import Config
from sluice.common.errors import EngineClosed, EngineError
from sluice.common.models.assets import ModelAssets
from sluice.common.types import Completion
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.serving import ServingEngine, fail
from sluice.workers.engine.validation import check_request
from sluice.workers.engine.vllm.core import Finished, VllmCore
from sluice.workers.engine.vllm.requests import RunningSequence, Score, SequenceGroup, check_temperature, completion_of

log = logging.getLogger(__name__)

_START_S = 1800.0
"Bound on loading vLLM; compiling a large model for CUDA takes minutes."
_DEAD_HOLD_S = 60.0
"A dead engine keeps callers for so long, so that their groups do not race through the queue until the process has ended."


class VllmEngine(ServingEngine[SequenceGroup]):
    """Implements `sluice.workers.engine.Engine`; serves nothing before the first `stage`."""

    def __init__(self, config: Config, assets: ModelAssets) -> None:
        """Loads vLLM, which takes seconds to minutes. Raises ConfigError, or whatever vLLM raises."""
        super().__init__(in_flight=config.rollout.in_flight)
        self._max_sequences = config.rollout.max_sequences
        self._max_model_len = config.rollout.max_model_len or config.trainer.seq_len
        self._finished_tokens = 0
        self._has_nan = False
        "the served policy has left NaN in the cache"
        self._rows: dict[str, RunningSequence] = {}
        self._scored: dict[str, tuple[Score, int]] = {}
        self._scoring: list[Score] = []
        self._is_dead = False
        started: Future[VllmCore] = Future()
        # vLLM is built by the thread that steps it: OpenMP and CUDA keep settings per thread
        self._thread = threading.Thread(target=self._run, args=(config, assets, started), name="vllm", daemon=True)
        self._thread.start()
        self._core = started.result(_START_S)

    def generate(self, request: GenerationRequest) -> list[Completion]:
        """`sampling.n` completions in order; blocks. Raises EngineError, or EngineClosed when it was not served."""
        check_request(
            request,
            max_model_len=self._max_model_len,
            vocab_size=self._core.vocab_size,
            has_tokenizer=self._core.has_tokenizer,
        )
        check_temperature(request)
        return self._wait_for(SequenceGroup(request=request))

    def score(
        self, sequences: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]]
    ) -> tuple[int, list[NDArray[np.float32]]]:
        """Version served, and its logprobs [T] at temperature 1 of each (prompt_ids [P], token_ids [T]); goes first.

        Computed anew by the serving weights, without cached blocks. Raises EngineError.
        """
        joined = [np.concatenate([prompt, tokens]).astype(np.int32) for prompt, tokens in sequences]
        longest = max(map(len, joined), default=0)
        if longest >= self._core.max_model_len or not all(len(prompt) for prompt, _ in sequences):
            limit = self._core.max_model_len - 1
            raise EngineError(
                f"cannot score: every sequence needs a prompt and at most {limit} tokens, found {longest}"
            )
        score = Score(sequences=joined)
        with self._condition:
            self._check_open("score")
            if self._version < 0:
                raise EngineError("cannot score: the engine serves no policy yet")
            self._scoring.append(score)
            self._wake()
        version, logprobs = score.future.result()
        return version, [logprobs[i][len(prompt) - 1 :] for i, (prompt, _) in enumerate(sequences)]

    def _count_sequences(self) -> int:
        return len(self._rows)

    # The engine thread.

    def _run(self, config: Config, assets: ModelAssets, started: Future[VllmCore]) -> None:
        try:
            self._core = VllmCore(config, assets)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(self._core)
        try:
            while not self._is_closed:
                self._progress_at = time.monotonic()
                self._pass()
        except Exception as error:  # whatever a model, a kernel or the device may raise
            self._die(error)
        else:
            self._core.close()
        finally:
            with self._condition:  # scores that were handed over while `close` looked are nobody else's
                self._release_waiting(self._last_error or "the engine was closed")
            self._rows, self._scored = {}, {}

    def _pass(self) -> None:
        self._drop_cancelled()
        self._swap()
        self._hand_over()
        if not self._core.is_busy:
            self._wait_for_news()
            return
        started = time.monotonic()
        for finished in self._core.step():
            if finished.request_id in self._scored:
                self._take_score(finished)
            else:
                self._take_completion(finished)
        self._generated_tokens = self._finished_tokens + sum(map(self._core.num_tokens, self._rows))
        self._busy_s += time.monotonic() - started

    def _drop_cancelled(self) -> None:
        dropped = self._take_cancelled()
        for request_id in [name for name, row in self._rows.items() if row.group in dropped]:
            self._finished_tokens += self._core.num_tokens(request_id)
            self._core.abort(request_id)
            del self._rows[request_id]

    def _swap(self) -> None:
        """Load the staged policy, if it may be."""
        policy = self._take_staged()
        if policy is None:
            return
        if problem := self._core.mismatch(policy.tensors):
            self._refuse(policy, problem)
            return
        started = time.monotonic()
        self._core.load(policy.tensors)
        self._serve(policy)
        for request_id, row in list(self._rows.items()):
            if num_tokens := self._core.num_tokens(request_id):
                row.version_starts.append((policy.version, num_tokens))
            else:  # it may have found, or computed, blocks of the policy before
                del self._rows[request_id]
                self._core.abort(request_id)
                self._start(row.group, row.index)
        if self._has_nan:
            self._core.clear_cache()
            self._has_nan = False
        elif self._in_flight == "recompute" or not self._rows:
            self._core.drop_cache(of_running=self._in_flight == "recompute")
        self._count_pause(since=started)

    def _must_not_swap(self) -> bool:
        return bool(self._scored) or super()._must_not_swap()

    def _hand_over(self) -> None:
        """Give vLLM the scores that are asked for, and pending groups, in order, up to `max_sequences` sequences."""
        admitted: list[SequenceGroup] = []
        with self._condition:
            scores, self._scoring = self._scoring, []
            num_sequences = len(self._rows)
            for group in sorted(filter(self._may_serve, self._pending), key=lambda group: group.urgency):
                if num_sequences and num_sequences + group.size > self._max_sequences:
                    break
                num_sequences += group.size
                admitted.append(group)
            self._start_running(admitted)
        for score in scores:
            for index, sequence in enumerate(score.sequences):
                self._scored[self._core.add_score(sequence, salt=self._salt)] = score, index
            if not score.sequences:
                score.future.set_result((self._version, {}))
        for group in admitted:
            try:
                for index in range(group.size):
                    self._start(group, index)
            except ValueError as error:  # refused by vLLM; what of it has started leaves with the next pass
                group.fail(EngineError, str(error))

    def _start(self, group: SequenceGroup, index: int) -> None:
        sampling = group.request.sampling
        seed = xxhash.xxh3_64_intdigest(f"{sampling.seed}/{index}".encode()) >> 1  # a signed 64-bit number
        request_id = self._core.add(group.request.prompt_ids, sampling=sampling, seed=seed, salt=self._salt)
        self._rows[request_id] = RunningSequence(group=group, index=index, version_starts=[(self._version, 0)])

    @property
    def _salt(self) -> str:
        return str(self._num_updates)

    def _take_completion(self, finished: Finished) -> None:
        row = self._rows.pop(finished.request_id)
        group = row.group
        self._finished_tokens += len(finished.token_ids)
        problem = None
        if finished.reason not in ("stop", "length"):
            problem = f"vLLM ended a completion with {finished.reason!r}"
        elif len(finished.logprobs) != len(finished.token_ids) or not np.isfinite(finished.logprobs).all():
            problem = f"policy version {row.version_starts[-1][0]} gives logprobs that are not finite"
            self._has_nan = True
        if problem is not None:  # its other sequences leave with the next pass
            with self._condition:
                group.fail(EngineError, problem)
            return
        group.completions[row.index] = completion_of(row, finished)
        if group.is_complete:
            self._finish(group)

    def _take_score(self, finished: Finished) -> None:
        score, index = self._scored.pop(finished.request_id)
        score.logprobs[index] = finished.prompt_logprobs
        if len(score.logprobs) == len(score.sequences) and not score.future.done():
            score.future.set_result((self._version, score.logprobs))

    def _die(self, error: Exception) -> None:
        self._last_error = f"the engine is dead: {type(error).__name__}: {error}"
        log.critical("%s", self._last_error, exc_info=error)
        with self._condition:
            self._is_dead = True
            self._progress_at = -np.inf
            self._fail_running(error)
            self._release_waiting(self._last_error)
            self._pending = []

    # With the condition held.

    def _release_scores(self, why: str) -> None:
        for score in (*self._scoring, *(score for score, _ in list(self._scored.values()))):
            fail(score.future, EngineClosed(f"score: {why}"))

    def _check_open(self, what: str) -> None:
        if self._is_dead:
            self._condition.wait_for(lambda: self._is_closed, timeout=_DEAD_HOLD_S)
            raise EngineClosed(f"{what}: {self._last_error}")
        super()._check_open(what)
