"""vLLM behind the engine contract, on CUDA or its CPU build: one thread steps it, task threads wait for their groups.

    task threads --generate()--> pending --admit------> in vLLM --last token--> future
    any thread   --stage()-----> staged  --swap-------> version
    any thread   --score()-----> scoring --admit, first--> in vLLM -----------> future

A pass of the loop: drop what was cancelled, swap the policy if one is staged and may be served, admit what fits, one step.

Invariants, besides those of `serving`:
* a swap happens between two steps of a synchronous engine: nothing is paused, drained or restarted for it, and every
  sequence's tokens are known to be before or after it;
* a cached block serves only requests that were admitted after the newest swap and before the next (the salt counts
  swaps, because versions may come back); sequences without a token at a swap are admitted again;
* running sequences keep their blocks over a swap, or get them computed again, or finish before it, as `in_flight` sets;
* at most `max_sequences` are in vLLM, or one larger group; what does not fit into KV memory waits there;
* a step or a load that raises ends the engine (scheduler, weights or device are in an unknown state): what runs gets
  EngineError, what waits EngineClosed, and `progress_at` falls to -inf, at which a worker process ends itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from sluice.common.config import Config
from sluice.common.errors import EngineClosed, EngineError
from sluice.common.models.assets import ModelAssets
from sluice.common.types import Completion
from sluice.workers.engine import GenerationRequest, ScoredSequence
from sluice.workers.engine.serving import Engine, Scoring, SequenceGroup, fail, version_spans
from sluice.workers.engine.validation import check_request, check_sequences
from sluice.workers.engine.vllm.core import Finished, VllmCore, is_temperature

log = logging.getLogger(__name__)

_START_S = 1800.0
"Bound on loading vLLM; compiling a large model for CUDA takes minutes."
_DEAD_HOLD_S = 60.0
"A dead engine holds callers this long, so that their groups do not race through the queue until the process has ended."
_PRIORITY_S = 10.0
"Seconds of waiting that one step of priority is worth."


@dataclass(eq=False, kw_only=True, slots=True)
class _RunningSequence:
    """One completion that is in vLLM."""

    group: SequenceGroup
    index: int
    "index in the group"
    version_starts: list[tuple[int, int]]
    "(policy version, number of tokens from which on it samples)"


class VllmEngine(Engine):
    """Decodes in vLLM, built and stepped by a thread of its own."""

    def __init__(self, config: Config, assets: ModelAssets) -> None:
        """Load vLLM, which takes seconds to minutes. Raises ConfigError, or what vLLM raises."""
        super().__init__(in_flight=config.rollout.in_flight)
        self._max_sequences = config.rollout.max_sequences
        self._max_model_len = config.rollout.max_model_len or config.trainer.seq_len
        self._finished_tokens = 0
        self._has_nan = False
        "the served policy has left NaN in the cache"
        self._sequences: dict[str, _RunningSequence] = {}
        self._num_tokens: list[tuple[SequenceGroup, int]] = []
        "of each of them, after the last step"
        self._scored: dict[str, tuple[Scoring, int]] = {}
        self._is_dead = False
        started: Future[VllmCore] = Future()
        # vLLM is built by the thread that steps it: OpenMP and CUDA keep settings per thread
        self._thread = threading.Thread(target=self._run, args=(config, assets, started), name="vllm", daemon=True)
        self._thread.start()
        self._core = started.result(_START_S)

    def generate(self, request: GenerationRequest) -> list[Completion]:
        """Submit the request and wait; refused at once: what could never run, and what vLLM would refuse or silently change."""
        check_request(
            request,
            max_model_len=self._max_model_len,
            vocab_size=self._core.vocab_size,
            has_tokenizer=self._core.has_tokenizer,
        )
        temperature = request.sampling.temperature
        if temperature and not is_temperature(temperature):
            found = f"vLLM samples at temperature 0 or 0.01 to 2.0, found {temperature}"
            raise EngineError(f"group {request.group_id}: {found}")
        return self._wait_for(SequenceGroup(request=request))

    def score(self, sequences: Sequence[ScoredSequence]) -> tuple[int, list[NDArray[np.float32]]]:
        """Score ahead of all completions, afresh by the serving weights, without cached blocks."""
        check_sequences(sequences, max_model_len=self._core.max_model_len - 1, vocab_size=self._core.vocab_size)
        if self.version < 0:
            raise EngineError("cannot score: the engine serves no policy yet")
        return self._wait_for_score(sequences)

    def _count_sequences(self) -> int:
        return len(self._sequences)

    def _running_tokens(self) -> list[tuple[SequenceGroup, int]]:
        return self._num_tokens

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
                self.progress_at = time.monotonic()
                self._pass()
        except Exception as error:  # any error of a model, a kernel or the device
            self._die(error)
        else:
            self._core.close()
        finally:
            with self._condition:  # `close` may have missed scores submitted meanwhile
                self._release_waiting(self._last_error or "the engine was closed")
            self._sequences, self._scored = {}, {}

    def _pass(self) -> None:
        # Between two steps nothing runs in vLLM: sequences, weights and the queue can be changed here.
        self._drop_cancelled()
        self._swap()
        self._admit()
        if not self._core.is_busy:
            self._num_tokens = []
            self._wait_for_news()
            return
        # One step samples a token of every running sequence, and prefills admitted ones and scores.
        started = time.monotonic()
        for finished in self._core.step():
            if finished.request_id in self._scored:
                self._take_score(finished)
            else:
                self._take_completion(finished)
        self._num_tokens = [(one.group, self._core.num_tokens(name)) for name, one in self._sequences.items()]
        self._generated_tokens = self._finished_tokens + sum(num_tokens for _, num_tokens in self._num_tokens)
        self._busy_s += time.monotonic() - started

    def _drop_cancelled(self) -> None:
        dropped = self._take_cancelled()
        for request_id in [request_id for request_id, sequence in self._sequences.items() if sequence.group in dropped]:
            self._finished_tokens += self._core.num_tokens(request_id)
            self._core.abort(request_id)
            del self._sequences[request_id]

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        problem = self._core.mismatch(tensors)
        if problem is None:
            self._core.load(tensors)
        return problem

    def _continue_running(self) -> None:
        for request_id, sequence in list(self._sequences.items()):
            if num_tokens := self._core.num_tokens(request_id):
                sequence.version_starts.append((self.version, num_tokens))
            else:  # it starts again: it may have found, or computed, blocks of the previous policy
                del self._sequences[request_id]
                self._core.abort(request_id)
                self._start(sequence.group, sequence.index)
        # Blocks of the old policy serve no new request (the salt has changed); NaN would reach one through masked positions.
        if self._has_nan:
            self._core.clear_cache()
            self._has_nan = False
        elif self._in_flight == "recompute" or not self._sequences:
            self._core.drop_cache(of_running=self._in_flight == "recompute")

    def _must_not_swap(self) -> bool:
        return bool(self._scored) or super()._must_not_swap()

    def _admit(self) -> None:
        """Pass vLLM the scores that are asked for, and pending groups, in order, up to `max_sequences` sequences."""
        admitted: list[SequenceGroup] = []
        with self._condition:
            scores, self._scoring = self._scoring, []
            num_sequences = len(self._sequences)
            for group in sorted(filter(self._may_serve, self._pending), key=_urgency):
                if num_sequences and num_sequences + group.size > self._max_sequences:
                    break
                num_sequences += group.size
                admitted.append(group)
            self._start_running(admitted)
        for scoring in scores:
            for index, (prompt, tokens) in enumerate(scoring.sequences):
                joined = np.concatenate([prompt, tokens]).astype(np.int32)
                self._scored[self._core.add_score(joined, salt=self._salt)] = scoring, index
            if not scoring.sequences:
                scoring.future.set_result((self.version, []))
        for group in admitted:
            try:
                for index in range(group.size):
                    self._start(group, index)
            except ValueError as error:  # refused by vLLM; its sequences that have started leave with the next pass
                group.fail(EngineError, str(error))

    def _start(self, group: SequenceGroup, index: int) -> None:
        sampling = group.request.sampling
        seed = xxhash.xxh3_64_intdigest(f"{sampling.seed}/{index}".encode()) >> 1  # a signed 64-bit number
        request_id = self._core.add(group.request.prompt_ids, sampling=sampling, seed=seed, salt=self._salt)
        self._sequences[request_id] = _RunningSequence(group=group, index=index, version_starts=[(self.version, 0)])

    @property
    def _salt(self) -> str:
        return str(self._num_updates)

    def _take_completion(self, finished: Finished) -> None:
        sequence = self._sequences.pop(finished.request_id)
        group = sequence.group
        self._finished_tokens += len(finished.token_ids)
        problem = None
        if finished.reason not in ("stop", "length"):
            problem = f"vLLM ended a completion with {finished.reason!r}"
        elif len(finished.logprobs) != len(finished.token_ids) or not np.isfinite(finished.logprobs).all():
            problem = f"policy version {sequence.version_starts[-1][0]} gives logprobs that are not finite"
            self._has_nan = True
        if problem is not None:  # its other sequences leave with the next pass
            with self._condition:
                group.fail(EngineError, problem)
            return
        completion = Completion(
            token_ids=finished.token_ids,
            rollout_logprobs=finished.logprobs,
            policy_versions=version_spans(sequence.version_starts, end=len(finished.token_ids)),
            finish_reason="stop" if finished.reason == "stop" else "length",
        )
        self._complete(group, sequence.index, completion)

    def _take_score(self, finished: Finished) -> None:
        scoring, index = self._scored.pop(finished.request_id)
        prompt, _ = scoring.sequences[index]
        scoring.logprobs[index] = finished.prompt_logprobs[len(prompt) - 1 :]
        if len(scoring.logprobs) == len(scoring.sequences) and not scoring.future.done():
            scoring.future.set_result((self.version, [scoring.logprobs[i] for i in range(len(scoring.sequences))]))

    def _die(self, error: Exception) -> None:
        self._last_error = f"the engine is dead: {type(error).__name__}: {error}"
        log.critical("%s", self._last_error, exc_info=error)
        with self._condition:
            self._is_dead = True
            self.progress_at = -np.inf
            self._fail_running(error)
            self._release_waiting(self._last_error)
            self._pending = []

    # With the condition held.

    def _release_waiting(self, why: str) -> None:
        super()._release_waiting(why)
        for scoring, _ in list(self._scored.values()):
            fail(scoring.future, EngineClosed(f"score: {why}"))

    def _check_open(self, what: str) -> None:
        if self._is_dead:
            self._condition.wait_for(lambda: self._is_closed, timeout=_DEAD_HOLD_S)
            raise EngineClosed(f"{what}: {self._last_error}")
        super()._check_open(what)


def _urgency(group: SequenceGroup) -> float:
    """Return the rank of a waiting group, lowest first."""
    return group.arrived_at - _PRIORITY_S * group.request.priority
