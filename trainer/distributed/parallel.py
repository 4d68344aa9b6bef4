"""Several ranks as one policy: rank 0 runs the training loop, the others make its calls.

    rank 0: Trainer (trainer/loop.py)                       rank 1 ... N-1: `run_follower`
    open_policy(...)          -- open -->                   the same TrainedPolicy, of the same model folder
    policy.optimize(groups)   -- optimize, its micro-batches -->  TrainedPolicy.optimize          collectives inside
    policy.score / snapshot / save / restore  -- ... -->    the same
      (waits for a batch, publishes, ...)                   waits, for hours if need be
    policy.close()            -- close -->                  exit 0

A call is the name of a method in `REPLICATED` and its arguments. Only rank 0 knows Redis, and it alone makes micro-batches, the
same number for each rank. When a rank fails, the process that started the ranks ends all of them, and they are started again
(by `sluice run`); the trainer resumes from its newest checkpoint, on any number of ranks.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sluice.common.config import Config
from sluice.common.config.file import parse_config
from sluice.common.config.trainer import TrainerConfig
from sluice.common.errors import DiskFull, Diverged
from sluice.common.loading import add_code_folder
from sluice.common.models.causal_lm import load_pretrained
from sluice.common.parent import stop_signals
from sluice.common.policies.canary import CanarySequence
from sluice.common.types import Group
from sluice.trainer.distributed.ranks import COLLECTIVE_TIMEOUT_S, Ranks
from sluice.trainer.micro_batches import MicroBatch, Sequences, build_micro_batches, with_gradient
from sluice.trainer.objective import check_functions
from sluice.trainer.trained_policy import TrainedPolicy

log = logging.getLogger("sluice.trainer")

REPLICATED = ("optimize", "configure", "logprobs_of", "score", "snapshot", "save", "restore")
"""Methods of TrainedPolicy that all ranks call at the same time, in the same order."""
Shard = tuple[list[Group], list[Tensor]]
"""What a rank trains on: groups with its episodes only, and their advantages, [G] per group."""


class ParallelPolicy:
    """The policy over all ranks, for rank 0: `TrainedPolicy`'s methods, each made on every rank at the same time."""

    def __init__(self, policy: TrainedPolicy, ranks: Ranks | None = None) -> None:
        self._policy, self._ranks = policy, ranks or Ranks()

    @property
    def vocab_size(self) -> int:
        return self._policy.vocab_size

    @property
    def base_digest(self) -> str:
        return self._policy.base_digest

    def optimize(self, groups: list[Group], advantages: list[Tensor], *, step: int) -> dict[str, float]:
        """Optimize, each rank on the micro-batches of its shard (`shard_by_tokens`); return the metrics of all.

        advantages: [G] per group. What has no gradient goes to no rank (`with_gradient`).
        """
        config, packed = self._policy.config, self._policy.is_packed
        num_episodes = sum(len(group.episodes) for group in groups)
        groups, advantages, left_out = with_gradient(groups, advantages, config)
        how: dict[str, Any] = {"max_tokens": config.microbatch_tokens, "mask_truncated": config.mask_truncated}
        shards = shard_by_tokens(groups, advantages, num_ranks=self._ranks.size, packed=packed)
        batches = [build_micro_batches(*shard, packed=packed, **how) for shard in shards]
        own, *others = (pad_micro_batches(each, count=max(map(len, batches))) for each in batches)
        with _told(self._ranks, "optimize", [[batches] for batches in others], step=step, left_out=left_out):
            metrics = self._policy.optimize(own, step=step, left_out=left_out)
        num_left_out = num_episodes - sum(len(group.episodes) for group in groups)
        return metrics | {"loss/left_out_ratio": num_left_out / num_episodes}

    def configure(self, config: TrainerConfig) -> None:
        """Configure all ranks, if anything changes."""
        if config != self._policy.config:  # the config of SFT never comes here
            self._replicate("configure", config)

    def logprobs_of(self, sequences: Sequences) -> list[NDArray[np.float32] | None]:
        return self._replicate("logprobs_of", sequences)

    def score(self, sequences: Sequences) -> list[CanarySequence]:
        return self._replicate("score", sequences)

    def snapshot(self, dtype: torch.dtype, *, full: bool = False) -> dict[str, Tensor]:
        return self._replicate("snapshot", dtype, full=full)

    def save(self, folder: Path) -> dict[str, str]:
        return self._replicate("save", folder)

    def restore(self, folder: Path) -> None:
        self._replicate("restore", folder)

    def close(self) -> None:
        """End the other ranks: the last call."""
        with _told(self._ranks, "close", [[]] * (self._ranks.size - 1)):
            self._ranks.leave()

    def _replicate(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Make the same call on every rank; return this rank's result."""
        with _told(self._ranks, name, [list(arguments)] * (self._ranks.size - 1), **options):
            return getattr(self._policy, name)(*arguments, **options)


def open_policy(config: Config, *, end_token_ids: Sequence[int], ranks: Ranks | None = None) -> ParallelPolicy:
    """Open the policy of a run with the weights of model.path, on all ranks; for rank 0. Raises ConfigError."""
    ranks = ranks or Ranks()
    with _told(ranks, "open", [[config, list(end_token_ids)]] * (ranks.size - 1)):
        return ParallelPolicy(_build(config, end_token_ids, ranks), ranks)


def run_follower(ranks: Ranks) -> int:
    """Run a rank other than 0; return its exit code.

    Rank 0 answers SIGTERM and Ctrl-C and finishes its step with this one; without a rank 0 they end this one.
    """
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    for number in stop_signals():
        signal.signal(number, note)
    policy: TrainedPolicy | None = None
    while True:
        call = ranks.next_call(given_up=lambda: bool(signals) and ranks.rank_0_is_gone())
        if call is None:
            log.error("rank 0 is gone: ending")
            return 1
        name, arguments, options = call["call"], _from_wire(call["arguments"]), call["options"]
        with _explained(name, ranks):
            if name == "close":
                ranks.leave()
                return 0
            if name == "open":
                config, end_token_ids = arguments
                policy = _build(config, end_token_ids, ranks)
                continue
            assert policy is not None and name in REPLICATED, name
            try:
                getattr(policy, name)(*arguments, **options)
            except (Diverged, DiskFull) as error:  # rank 0 has raised the same, and acts on it
                log.warning("%s: %s", name, error)


def _build(config: Config, end_token_ids: Sequence[int], ranks: Ranks) -> TrainedPolicy:
    add_code_folder(config.code_folder)
    if config.trainer.has_user_functions:
        check_functions(config.trainer)  # here and now: another machine may lack what the run was created with
    torch.manual_seed(config.seed)  # the same on all ranks: what an adapter begins with
    model = load_pretrained(config.model.path, revision=config.model.revision)
    policy = TrainedPolicy.of_run(model, config, end_token_ids=end_token_ids, ranks=ranks)
    if ranks.rank == 0 and ranks.size > 1:
        log.info("%d ranks on %s; a step's groups stay %d", ranks.size, policy.device.type, config.groups_per_step)
    return policy


@contextmanager
def _told(ranks: Ranks, name: str, arguments: list[list[Any]], **options: Any) -> Iterator[None]:
    """Have the other ranks begin the call, each with its own arguments, while rank 0 makes it inside.

    options: the same for all, and plain data.
    """
    with _explained(name, ranks):
        ranks.send_calls([{"call": name, "arguments": _to_wire(own), "options": options} for own in arguments])
        yield


@contextmanager
def _explained(call: str, ranks: Ranks) -> Iterator[None]:
    """Log rank and call of an error: one between ranks surfaces as the error of some connection."""
    try:
        yield
    except RuntimeError:
        if ranks.size > 1:
            log.error(
                "rank %d of %d failed in `%s`. If the error is one of a connection or a time-out, another rank has died, or "
                "was more than %.0f s late: look for its own last lines",
                *(ranks.rank, ranks.size, call, COLLECTIVE_TIMEOUT_S),
            )
        raise


def shard_by_tokens(
    groups: list[Group], advantages: list[Tensor], *, num_ranks: int, packed: bool = False
) -> list[Shard]:
    """Assign every episode to one rank, real tokens balanced: the longest first, each to the rank with the fewest so far.

    advantages: per group [G]. packed: the prompt of a group then counts once on each rank that has some of it, and a group stays
    together up to a rank's equal share of the tokens. A rank without an episode gets the shortest one without its reward, which
    leaves it out of the loss. Deterministic.
    """
    if num_ranks == 1:
        return [(groups, advantages)]
    prompts = [len(group.prompt_ids) for group in groups]
    completions = [[len(episode.completion.token_ids) for episode in group.episodes] for group in groups]
    lengths = [(prompts[g] + tokens, g, e) for g, own in enumerate(completions) for e, tokens in enumerate(own)]
    order = sorted(lengths, key=lambda found: -found[0])
    if packed:
        order.sort(key=lambda found: -(prompts[found[1]] + sum(completions[found[1]])))
    equal_share = sum(prompts + [sum(own) for own in completions]) / num_ranks
    loads = [0] * num_ranks
    mine: list[dict[int, list[int]]] = [{} for _ in range(num_ranks)]
    for length, g, e in order:
        after = [
            load + (completions[g][e] if packed and g in own else length) for load, own in zip(loads, mine, strict=True)
        ]
        home = [rank for rank, load in enumerate(after) if packed and g in mine[rank] and load <= equal_share]
        rank = home[0] if home else after.index(min(after))
        loads[rank] = after[rank]
        mine[rank].setdefault(g, []).append(e)
    _, g, e = min(lengths)
    idle = [replace(groups[g], episodes=[replace(groups[g].episodes[e], reward=None)])], [torch.zeros(1)]
    return [
        (
            [replace(groups[g], episodes=[groups[g].episodes[e] for e in sorted(found[g])]) for g in sorted(found)],
            [advantages[g][sorted(found[g])] for g in sorted(found)],
        )
        if found
        else idle
        for found in mine
    ]


def pad_micro_batches(batches: list[MicroBatch], *, count: int) -> list[MicroBatch]:
    """Pad to `count` passes, as many as the other ranks make, with copies of the smallest one without a loss token."""
    smallest = min(batches, key=lambda batch: batch.num_tokens)
    idle = replace(smallest, loss_mask=torch.zeros_like(smallest.loss_mask))
    return [*batches, *[idle] * (count - len(batches))]


_READERS: dict[str, Callable[[Any], Any]] = {
    "micro_batch": MicroBatch.from_wire,
    "config": lambda text: parse_config(text, source="rank 0's config"),
    "trainer": TrainerConfig.model_validate,
    "dtype": lambda name: getattr(torch, name),
    "path": Path,
}
"""Decoders of arguments that are not plain data."""


def _to_wire(value: Any) -> Any:
    match value:
        case MicroBatch():
            return {"micro_batch": value.to_wire()}
        case Config():
            return {"config": value.to_yaml()}
        case TrainerConfig():
            return {"trainer": value.model_dump(mode="json")}
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case Path():
            return {"path": str(value)}
        case list() | tuple():
            return [_to_wire(each) for each in value]
    return value


def _from_wire(value: Any) -> Any:
    if isinstance(value, dict):
        ((kind, inner),) = value.items()
        return _READERS[kind](inner)
    return [_from_wire(each) for each in value] if isinstance(value, list) else value
