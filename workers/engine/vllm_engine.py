"""vLLM behind the engine contract, on CUDA or its CPU build: one thread steps it, task threads wait for their groups.

    task threads --generate()--> pending --hand over--> in vLLM --last token--> future
    anyone       --stage()-----> staged  --swap-------> version
    anyone       --score()-----> scoring --hand over, first--> in vLLM ------> future

A pass of the loop: drop what was cancelled, swap the policy if one is staged and may be, hand over what fits, one step.

Invariants:
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
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray

from common.assets import ModelAssets
from common.config import Config
from common.errors import EngineClosed, EngineError
from common.types import Completion
from workers.engine import EngineStats, GenerationRequest, StagedPolicy
from workers.engine.limits import check_request
from workers.engine.vllm_core import Finished, VllmCore
from workers.engine.vllm_requests import Group, Row, Score, check_temperature, completion_of, fail

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_IDLE_PASS_S = 1.0
"An idle loop passes this often, so that `progress_at` tells idle from hung."
_JOIN_S = 10.0
"`close` waits so long for the step in progress; a hung device must not hang the shutdown."
_START_S = 1800.0
"Bound on loading vLLM; compiling a large model for CUDA takes minutes."
_DEAD_HOLD_S = 60.0
"A dead engine keeps callers for so long, so that their groups do not race through the queue until the process has ended."


class VllmEngine:
    """Implements `workers.engine.Engine`; serves nothing before the first `stage`."""

    def __init__(self, config: Config, assets: ModelAssets) -> None:
        """Loads vLLM, which takes seconds to minutes. Raises ConfigError, or whatever vLLM raises."""
        self._max_sequences = config.rollout.max_sequences
        self._max_model_len = config.rollout.max_model_len or config.trainer.seq_len
        self._in_flight = config.rollout.in_flight
        self._version, self._digest = -1, ""
        self._progress_at = time.monotonic()
        self._last_error: str | None = None
        self._refused: tuple[int, str] | None = None
        self._generated_tokens = self._finished_tokens = self._num_updates = 0
        self._busy_s = self._update_pause_s = self._last_pause_s = 0.0
        self._has_nan = False
        "the served policy has left NaN in the cache"
        self._rows: dict[str, Row] = {}
        self._scored: dict[str, tuple[Score, int]] = {}
        self._condition = threading.Condition()  # guards all below
        self._pending: list[Group] = []
        self._running: list[Group] = []
        self._scoring: list[Score] = []
        self._staged: StagedPolicy | None = None
        self._has_news = self._is_closed = self._is_dead = False
        started: Future[VllmCore] = Future()
        # vLLM is built by the thread that steps it: OpenMP and CUDA keep settings per thread
        self._thread = threading.Thread(target=self._run, args=(config, assets, started), name="vllm", daemon=True)
        self._thread.start()
        self._core = started.result(_START_S)

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
        """`time.monotonic()` of the loop's last pass; -inf when the engine is dead."""
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
            vocab_size=self._core.vocab_size,
            has_tokenizer=self._core.has_tokenizer,
        )
        check_temperature(request)
        group = Group(request=request)
        with self._condition:
            self._refuse_if_closed(f"group {request.group_id}")
            if self._refused is not None and request.pinned_version == self._refused[0]:
                raise EngineError(f"group {request.group_id}: {self._last_error}")
            self._pending.append(group)
            self._wake()
        return group.future.result()

    def stage(self, version: int, digest: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Serve this policy from the next step on that may swap; returns at once. Replaces one staged before.

        Versions may go back (evaluation); the served one drops what was staged. A policy that does not fit the model is
        reported in `last_error` and the log, and the served one stays.
        """
        with self._condition:
            is_served = (version, digest) == (self._version, self._digest)
            self._staged = None if is_served else StagedPolicy(version=version, digest=digest, tensors=tensors)
            self._wake()

    def cancel(self, group_id: str) -> None:
        """Give up a group, if it is here: its `generate` raises EngineClosed, its sequences leave at the next step."""
        with self._condition:
            for group in (*self._pending, *self._running):
                if group.request.group_id == group_id:
                    fail(group.future, EngineClosed(f"group {group_id} was cancelled"))
            self._wake()

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
            self._refuse_if_closed("score")
            if self._version < 0:
                raise EngineError("cannot score: the engine serves no policy yet")
            self._scoring.append(score)
            self._wake()
        version, logprobs = score.future.result()
        return version, [logprobs[i][len(prompt) - 1 :] for i, (prompt, _) in enumerate(sequences)]

    def stats(self) -> EngineStats:
        """Counters since the engine started."""
        return EngineStats(
            generated_tokens=self._generated_tokens,
            running_sequences=len(self._rows),
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
            log.warning("vLLM's step has not ended within %.0f s; its thread is left to the process exit", _JOIN_S)

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
        with self._condition:
            dropped = {group for group in self._running if group.future.done()}
            self._pending = [group for group in self._pending if not group.future.done()]
            self._running = [group for group in self._running if group not in dropped]
        for request_id in [name for name, row in self._rows.items() if row.group in dropped]:
            self._finished_tokens += self._core.num_tokens(request_id)
            self._core.abort(request_id)
            del self._rows[request_id]

    def _swap(self) -> None:
        """Load the staged policy, if it need not wait for running or pinned requests."""
        with self._condition:
            policy = self._staged
            if policy is None or self._must_not_swap():
                return
            self._staged = None
        if problem := self._core.mismatch(policy.tensors):
            self._refuse(policy.version, problem)
            return
        started = time.monotonic()
        self._core.load(policy.tensors)
        self._version, self._digest, self._refused = policy.version, policy.digest, None
        self._num_updates += 1
        for request_id, row in list(self._rows.items()):
            if num_tokens := self._core.num_tokens(request_id):
                row.marks.append((policy.version, num_tokens))
            else:  # it may have found, or computed, blocks of the policy before
                del self._rows[request_id]
                self._core.abort(request_id)
                self._start(row.group, row.index)
        if self._has_nan:
            self._core.clear_cache()
            self._has_nan = False
        elif self._in_flight == "recompute" or not self._rows:
            self._core.drop_cache(of_running=self._in_flight == "recompute")
        self._last_pause_s = time.monotonic() - started
        self._update_pause_s += self._last_pause_s

    def _refuse(self, version: int, why: str) -> None:
        self._last_error = f"policy version {version} was not loaded: {why}"
        log.warning("%s; serving version %d", self._last_error, self._version)
        with self._condition:
            self._refused = version, why
            for group in self._pending:
                if group.request.pinned_version == version:
                    fail(group.future, EngineError(f"group {group.request.group_id}: {self._last_error}"))

    def _must_not_swap(self) -> bool:
        if self._scored or (self._in_flight == "drain" and self._running):
            return True
        return any(group.request.pinned_version == self._version for group in (*self._pending, *self._running))

    def _hand_over(self) -> None:
        """Give vLLM the scores that are asked for, and pending groups, in order, up to `max_sequences` sequences."""
        admitted: list[Group] = []
        with self._condition:
            scores, self._scoring = self._scoring, []
            num_sequences = len(self._rows)
            for group in sorted(filter(self._may_serve, self._pending), key=lambda group: group.urgency):
                if num_sequences and num_sequences + group.size > self._max_sequences:
                    break
                num_sequences += group.size
                admitted.append(group)
            self._running += admitted
            self._pending = [group for group in self._pending if group not in admitted]
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
                fail(group.future, EngineError(f"group {group.request.group_id}: {error}"))

    def _start(self, group: Group, index: int) -> None:
        sampling = group.request.sampling
        seed = xxhash.xxh3_64_intdigest(f"{sampling.seed}/{index}".encode()) >> 1  # a signed 64-bit number
        request_id = self._core.add(group.request.prompt_ids, sampling=sampling, seed=seed, salt=self._salt)
        self._rows[request_id] = Row(group=group, index=index, marks=[(self._version, 0)])

    @property
    def _salt(self) -> str:
        return str(self._num_updates)

    def _may_serve(self, group: Group) -> bool:
        if self._version < 0:
            return False
        if group.request.pinned_version is not None:
            return group.request.pinned_version == self._version
        is_draining = self._in_flight == "drain" and self._staged is not None
        return self._version >= group.request.min_version and not is_draining

    def _take_completion(self, finished: Finished) -> None:
        row = self._rows.pop(finished.request_id)
        group = row.group
        self._finished_tokens += len(finished.token_ids)
        problem = None
        if finished.reason not in ("stop", "length"):
            problem = f"vLLM ended a completion with {finished.reason!r}"
        elif len(finished.logprobs) != len(finished.token_ids) or not np.isfinite(finished.logprobs).all():
            problem = f"policy version {row.marks[-1][0]} gives logprobs that are not finite"
            self._has_nan = True
        if problem is None:
            group.completions[row.index] = completion_of(row, finished)
        with self._condition:
            if problem is not None:  # its other sequences leave with the next pass
                fail(group.future, EngineError(f"group {group.request.group_id}: {problem}"))
            elif len(group.completions) == group.size:
                self._running.remove(group)
                if not group.future.done():
                    group.future.set_result([group.completions[i] for i in range(group.size)])

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
            for group in self._running:
                failure = EngineError(f"group {group.request.group_id}: {self._last_error}")
                failure.__cause__ = error
                fail(group.future, failure)
            self._release_waiting(self._last_error)
            self._running, self._pending = [], []

    def _wait_for_news(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._has_news, timeout=_IDLE_PASS_S)
            self._has_news = False

    # Any thread.

    def _release_all(self) -> None:
        with self._condition:
            self._is_closed = True
            for group in self._running:
                fail(group.future, EngineClosed(f"group {group.request.group_id}: the engine was closed"))
            self._release_waiting("the engine was closed")
            self._wake()

    # With the condition held.

    def _release_waiting(self, why: str) -> None:
        for group in self._pending:
            fail(group.future, EngineClosed(f"group {group.request.group_id}: {why}"))
        for score in (*self._scoring, *(score for score, _ in list(self._scored.values()))):
            fail(score.future, EngineClosed(f"score: {why}"))

    def _refuse_if_closed(self, what: str) -> None:
        if self._is_dead:
            self._condition.wait_for(lambda: self._is_closed, timeout=_DEAD_HOLD_S)
            raise EngineClosed(f"{what}: {self._last_error}")
        if self._is_closed:
            raise EngineClosed(f"{what}: the engine is closed")

    def _wake(self) -> None:
        self._has_news = True
        self._condition.notify_all()
