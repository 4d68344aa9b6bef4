"""The engine contract: token ids in, token ids out, with logprobs and the policy version of every token.

    task threads --generate()--> [ pending ] --admit--> [ running rows ] --EOS or length--> futures resolve
    policy thread --stage()----> [ staged policy ] --swapped in between two decode steps--> every later token has its version

One engine per process, shared by all task threads; it batches what they submit. The operations are those of `serving.Engine`;
two implementations pass one contract test: `engine.torch.engine.TorchEngine` and (with the extra `sluice-rl[vllm]`)
`engine.vllm.engine.VllmEngine`.

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

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from sluice.common.errors import ConfigError
from sluice.common.types import SamplingParams

ScoredSequence = tuple[NDArray[np.int32], NDArray[np.int32]]
"""prompt_ids [P] and token_ids [T]"""


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


def check_engine(name: str) -> None:
    """Refuse an engine that cannot run here, before anything starts. Raises ConfigError."""
    if name == "vllm" and find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine=vllm: vLLM is not installed in this environment; `pip install 'sluice-rl[vllm]'` in one of its own "
            "(it pins torch and caps transformers), or use rollout.engine=torch"
        )
