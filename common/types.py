"""The data that travels: prompts, completions, scores, and the group that joins them.

A *group* is `group_size` completions of one prompt. It is the unit of work, of admission, of normalisation and of
accounting. The results of its stages (common/pipeline.py) are written by different roles and joined in Redis:

    task       what to generate (Task)
    rollout    the completions ({"completions": list of Completion})
    reward     scores per completion (Scores)
    reference  ref_logprobs per completion (list of float32 [T])

Legend: T = tokens of one completion, G = group_size. Arrays are numpy, so that no role needs torch to read them.
Masks come from lengths, never from comparing with a pad id; text is never re-tokenised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sluice.common.errors import SerializationError

FinishReason = Literal["stop", "length"]
VersionSpans = tuple[tuple[int, int], ...]
"""Runs of (policy version, number of tokens), in order; the counts sum to T."""
TokenSpans = tuple[tuple[int, int], ...]
"""(first token, number of tokens) within a completion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one group is sampled."""

    n: int
    "completions per prompt"
    max_tokens: int
    "bound on T"
    temperature: float = 1.0
    "0 = greedy (logprobs are then those of temperature 1)"
    top_p: float = 1.0
    "nucleus mass kept, in (0, 1]"
    top_k: int = 0
    "0 = off"
    min_p: float = 0.0
    "tokens under min_p times the probability of the likeliest are cut; 0 = off"
    min_tokens: int = 0
    "no completion ends before this many tokens"
    stop: tuple[str, ...] = ()
    "texts that end a completion; the tokens that complete one are part of it"
    seed: int = 0
    "noise of this group: same seed and weights give the same tokens, whatever else is in the batch"

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> SamplingParams:
        return cls(**{**wire, "stop": tuple(wire.get("stop", ()))})

    @property
    def distribution(self) -> SamplingParams:
        """The same without the seed: groups that agree in it can be scored in one pass."""
        return replace(self, seed=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What the dataset role asks the rollout role to generate."""

    group_id: str
    prompt_ids: NDArray[np.int32]
    "[P]"
    prompt: Any
    "text, or a list of chat messages where the dataset is conversational"
    target: str | None
    "what the answer is compared with"
    columns: dict[str, Any]
    "the other dataset columns of this row, for reward functions"
    sampling: SamplingParams

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Task:
        return cls(**{**wire, "sampling": SamplingParams.from_wire(wire["sampling"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled continuation of a prompt, as the engine returns it."""

    token_ids: NDArray[np.int32]
    "[T], the stop token included"
    rollout_logprobs: NDArray[np.float32]
    "[T], of the distribution actually sampled"
    policy_versions: VersionSpans
    "which version produced which token"
    finish_reason: FinishReason
    text: str = ""
    "decoded without end tokens; filled in by the rollout role"
    tool_spans: TokenSpans = ()
    "tokens that were inserted, not sampled (the output of a tool): context for what follows, never in the loss"

    def to_wire(self) -> dict[str, Any]:
        wire = asdict(self)
        if not self.tool_spans:
            del wire["tool_spans"]  # an older role must be able to read it
        return wire

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Completion:
        spans = {name: wire.get(name, ()) for name in ("policy_versions", "tool_spans")}
        return cls(**{**wire, **{name: tuple((int(a), int(n)) for a, n in pairs) for name, pairs in spans.items()}})


def oldest_version(completions: list[Completion]) -> int:
    """Return the oldest policy version that produced any token of the group: the version the group is stored under."""
    return min(version for completion in completions for version, _ in completion.policy_versions)


def has_reward_variance(rewards: Iterable[float | None]) -> bool:
    """Return whether the rewards of one group prefer a completion: two of them exist and differ.

    They are compared as float32, in which the trainer computes: without a difference all its advantages are 0.
    """
    return len({np.float32(reward) for reward in rewards if reward is not None}) > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The rewards of one group."""

    reward: list[float | None]
    "[G] total; None = unscorable (every function returned None)"
    by_function: dict[str, list[float | None]] = field(default_factory=dict)
    "[G] per reward function"
    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)
    "sum and number of what the functions logged with log_metric, by its name"
    extra: dict[str, list[Any]] = field(default_factory=dict)
    "[G] per column that they logged with log_extra"

    def to_wire(self) -> dict[str, Any]:
        """Return plain data, without what was not logged."""
        logged = {"metrics": self.metrics, "extra": self.extra}
        return {"reward": self.reward, "by_function": self.by_function, **{n: v for n, v in logged.items() if v}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """One completion with everything the trainer needs."""

    completion: Completion
    reward: float | None
    rewards: dict[str, float | None]
    ref_logprobs: NDArray[np.float32] | None
    "[T] or none when kl_beta is 0"
    extra: dict[str, Any] = field(default_factory=dict)
    "what reward functions logged beside it, by column"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The results of all stages of one group, joined."""

    group_id: str
    policy_version: int
    "the oldest version that produced any of its tokens"
    prompt_ids: NDArray[np.int32]
    prompt: Any
    target: str | None
    episodes: list[Episode]
    timestamps: dict[str, float]
    "stage -> seconds since the epoch, on Redis' clock"
    sampling: SamplingParams | None = None
    "what it was sampled with, which may change during a run; none = what the run was created with (older records)"
    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)
    "Scores.metrics"

    @classmethod
    def from_results(
        cls, results: Mapping[str, Any], *, policy_version: int, timestamps: dict[str, float], vocab_size: int = 1 << 31
    ) -> Group:
        """Join results by stage. Raises SerializationError, LookupError, TypeError or ValueError where they are not sound."""
        task, reward, reference = results["task"], results["reward"], results.get("reference")
        completions = [Completion.from_wire(wire) for wire in results["rollout"]["completions"]]
        _check(task["prompt_ids"], completions, reward["reward"], reference, vocab_size)
        episodes = [
            Episode(
                completion=completion,
                reward=reward["reward"][i],
                rewards={name: values[i] for name, values in reward["by_function"].items()},
                ref_logprobs=None if reference is None else reference[i],
                extra={name: values[i] for name, values in reward.get("extra", {}).items()},
            )
            for i, completion in enumerate(completions)
        ]
        return cls(
            group_id=task["group_id"],
            policy_version=policy_version,
            prompt_ids=task["prompt_ids"],
            prompt=task["prompt"],
            target=task["target"],
            episodes=episodes,
            timestamps=timestamps,
            sampling=SamplingParams.from_wire(task["sampling"]),
            metrics={n: (float(total), max(1, int(k))) for n, (total, k) in reward.get("metrics", {}).items()},
        )

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Group:
        episodes = [
            Episode(**{**episode, "completion": Completion.from_wire(episode["completion"])})
            for episode in wire["episodes"]
        ]
        sampling = wire.get("sampling")
        return cls(**{**wire, "episodes": episodes, "sampling": sampling and SamplingParams.from_wire(sampling)})


def _check(
    prompt_ids: NDArray[np.int32],
    completions: list[Completion],
    rewards: list[float | None],
    reference: list[NDArray[np.float32]] | None,
    vocab_size: int,
) -> None:
    """Raise SerializationError where stages differ in their numbers of completions or tokens, and for impossible ids,
    logprobs or rewards: training on them would end the trainer.
    """
    if len(rewards) != len(completions) or (reference is not None and len(reference) != len(completions)):
        raise SerializationError(
            f"{len(completions)} completions have a different number of rewards or reference logprobs"
        )
    for i, completion in enumerate(completions):
        tokens, rows = completion.token_ids, [completion.rollout_logprobs]
        rows += [] if reference is None else [reference[i]]
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or any(row.shape != tokens.shape for row in rows):
            raise SerializationError(
                f"completion {i} has {tokens.shape} tokens, and logprobs of {[r.shape for r in rows]}"
            )
        if not all(np.isfinite(row).all() for row in rows):
            raise SerializationError("a logprob is not finite")
    for ids in (prompt_ids, *(completion.token_ids for completion in completions)):
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise SerializationError(f"token ids from {ids.min()} to {ids.max()}, in a vocabulary of {vocab_size}")
    if not all(reward is None or math.isfinite(reward) for reward in rewards):
        raise SerializationError(f"a reward is not finite: {rewards}")
