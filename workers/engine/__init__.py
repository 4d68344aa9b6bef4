"""The engine contract: token ids in, token ids out, with logprobs and the policy version of every token.

    task threads --generate()--> [ pending ] --admit--> [ running rows ] --EOS or length--> futures resolve
    policy thread --stage()----> [ staged policy ] --swapped in between two decode steps--> every later token has its version

One engine per process, shared by all task threads; it batches what they submit. Two implementations pass one contract
test: `engine.torch.engine.TorchEngine` and (with the extra `sluice-rl[vllm]`) `engine.vllm.engine.VllmEngine`.

What every engine guarantees:
* logprobs are those of the distribution actually sampled (after temperature, top_p, top_k, min_p), in float32; greedy
  (temperature 0) reports the logprob at temperature 1;
* the end-of-sequence token is part of token_ids and has a logprob; so are the tokens of a stop text;
* noise depends on `sampling.seed` and the completion's index in the group only, never on what else is in the batch;
* a request waits inside `generate` until the engine serves `min_version` or newer (or exactly `pinned_version`); one that
  finds no room (sequences, KV memory) waits too. Higher priority goes first, and no request starves;
* nothing that an older version computed (a prefix cache) serves a request that a newer one begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from sluice.common.errors import ConfigError
from sluice.common.types import Completion, SamplingParams

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One group to generate."""

    group_id: str
    prompt_ids: NDArray[np.int32]
    "[P]"
    sampling: SamplingParams
    min_version: int = 0
    "the lowest policy version that may generate this group"
    pinned_version: int | None = None
    "exactly this version (evaluation); none = any from min_version on"
    priority: int = 0
    "higher goes first among those that wait; a long wait outweighs it"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Counters since the engine started."""

    generated_tokens: int
    running_sequences: int
    waiting_requests: int
    busy_s: float
    "seconds spent in prefill and decode"
    num_updates: int
    update_pause_s: float
    "seconds of generation lost to policy swaps; in the torch engine also to `score`, which follows every swap"
    last_pause_s: float
    "of them, seconds of the newest swap, without scoring"


class Engine(Protocol):
    """The operations of an engine that a rollout worker uses."""

    @property
    def version(self) -> int:
        """The policy version that produces the next token; -1 before the first policy."""

    @property
    def digest(self) -> str:
        """Digest of the served policy, as its manifest names it."""

    @property
    def progress_at(self) -> float:
        """`time.monotonic()` of the engine loop's last pass; it stops in a hung engine and moves every second in an idle one."""

    @property
    def refused(self) -> tuple[int, str] | None:
        """The policy version staged last that could not be loaded, and why; none once another was."""

    def generate(self, request: GenerationRequest) -> list[Completion]:
        """Return `sampling.n` completions in order; blocks. Thread-safe. Raises EngineError, or EngineClosed when not served."""

    def stage(self, version: int, digest: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stage a verified policy; returns at once, the swap happens between two decode steps. A newer one replaces it.

        `tensors` must not be written to afterwards: an engine may serve them in place. A policy that cannot be loaded is
        `refused`, requests pinned to it raise EngineError, and the served policy stays.
        """

    def cancel(self, group_id: str) -> None:
        """Drop a group, if it is here: its `generate` raises EngineClosed, its sequences leave at the next step."""

    def score(
        self, sequences: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]]
    ) -> tuple[int, list[NDArray[np.float32]]]:
        """Return the served version, and its logprobs [T] at temperature 1 of each (prompt_ids [P], token_ids [T]).

        Blocks; goes before generation. Computed by the same weights and kernels, so that it shows whether a swap took effect.
        Raises EngineError.
        """

    def stats(self) -> EngineStats:
        """Return counters for heartbeats and metrics."""

    def close(self) -> None:
        """Stop; requests still inside raise EngineClosed. Idempotent."""


def check_engine(name: str) -> None:
    """Refuse an engine that cannot run here, before anything starts. Raises ConfigError."""
    if name == "vllm" and find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine=vllm: vLLM is not installed in this environment; `pip install 'sluice-rl[vllm]'` in one of its own "
            "(it pins torch and caps transformers), or use rollout.engine=torch"
        )
