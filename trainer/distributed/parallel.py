"""Several ranks as one policy: rank 0 runs the training loop, the others make its calls.

    rank 0: Trainer (trainer/loop.py)                   rank 1 ... N-1: `run_follower`
    open_policy(...)          -- open -->               the same TrainedPolicy, of the same model folder
    policy.optimize(groups)   -- optimize, its share --> its micro-batches, TrainedPolicy.optimize    collectives inside
    policy.score / snapshot / save / restore  -- ... --> the same
      (waits for a batch, publishes, ...)               waits, for hours if need be
    policy.close()            -- end -->                exit 0

Only rank 0 knows Redis. A rank that fails ends by itself, who started it then ends all of them,
and they are started again (`sluice run` does); the trainer goes on from its newest checkpoint, on as many ranks as there are
then.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
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
from sluice.common.models.causal_lm import load_pretrained
from sluice.common.policies.canary import CanarySequence
from sluice.common.types import Group
from sluice.trainer.distributed.ranks import COLLECTIVE_TIMEOUT_S, Ranks
from sluice.trainer.micro_batches import MicroBatch, Sequences, build_micro_batches
from sluice.trainer.trained_policy import TrainedPolicy

log = logging.getLogger("sluice.trainer")

"""(prompt_ids, token_ids)"""
Shard = tuple[list[Group], list[Tensor]]
"""What a rank trains on: groups with its episodes only, and their advantages, [G] per group."""


class ParallelPolicy:
    """The policy over all ranks, for rank 0: `TrainedPolicy`'s methods, each made on every rank at the same time.

    With one rank there is nobody to tell.
    """

    def __init__(self, policy: TrainedPolicy, ranks: Ranks | None = None) -> None:
        self._policy, self._ranks = policy, ranks or Ranks()

    @property
    def num_ranks(self) -> int:
        return self._ranks.size

    @property
    def vocab_size(self) -> int:
        return self._policy.vocab_size

    @property
    def base_digest(self) -> str:
        return self._policy.base_digest

    def optimize(
        self, groups: list[Group], advantages: list[Tensor], *, step: int, max_tokens: int, mask_truncated: bool = False
    ) -> dict[str, float]:
        """TrainedPolicy's, on the micro-batches that every rank makes of its share (`shard_by_tokens`); metrics are those of all.

        advantages: [G] per group. max_tokens, mask_truncated: as in `build_micro_batches`.
        """
        options: dict[str, Any] = {"step": step, "max_tokens": max_tokens, "mask_truncated": mask_truncated}
        own, *others = shard_by_tokens(groups, advantages, num_ranks=self.num_ranks)
        with self._call("optimize", [{"shard": _to_wire(shard), "options": options} for shard in others]):
            return _optimize(self._policy, own, self._ranks, **options)

    def configure(self, config: TrainerConfig) -> None:
        """TrainedPolicy's. Nobody is told where nothing changes."""
        if config != self._policy.config:  # the config of SFT never comes here
            with self._call("configure", {"trainer": config.model_dump(mode="json")}):
                self._policy.configure(config)

    def logprobs_of(self, sequences: Sequences) -> list[NDArray[np.float32] | None]:
        with self._call("logprobs_of", {"sequences": sequences}):
            return self._policy.logprobs_of(sequences)

    def score(self, sequences: Sequences) -> list[CanarySequence]:
        with self._call("score", {"sequences": sequences}):
            return self._policy.score(sequences)

    def snapshot(self, dtype: torch.dtype, *, full: bool = False) -> dict[str, Tensor]:
        with self._call("snapshot", {"dtype": str(dtype).removeprefix("torch."), "full": full}):
            return self._policy.snapshot(dtype, full=full)

    def save(self, folder: Path) -> dict[str, str]:
        with self._call("save", {"folder": str(folder)}):
            return self._policy.save(folder)

    def restore(self, folder: Path) -> None:
        with self._call("restore", {"folder": str(folder)}):
            self._policy.restore(folder)

    def close(self) -> None:
        """The last call: the other ranks end."""
        with self._call("end", {}):
            self._ranks.leave()

    @contextmanager
    def _call(self, name: str, body: dict[str, Any] | list[dict[str, Any]]) -> Iterator[None]:
        with _explained(name, self._ranks):
            bodies = body if isinstance(body, list) else [body] * (self._ranks.size - 1)
            self._ranks.send_calls([{"call": name, **one} for one in bodies])
            yield


def open_policy(config: Config, *, end_token_ids: Sequence[int], ranks: Ranks | None = None) -> ParallelPolicy:
    """The policy of a run with the weights of model.path, on all ranks; for rank 0. Raises ConfigError."""
    ranks = ranks or Ranks()
    body = {"call": "open", "config": config.to_yaml(), "end_token_ids": list(end_token_ids)}
    ranks.send_calls([body] * (ranks.size - 1))
    with _explained("open", ranks):
        return ParallelPolicy(_build(config, end_token_ids, ranks), ranks)


def run_follower(ranks: Ranks) -> int:
    """A rank other than 0, from its start to its exit code.

    SIGTERM and Ctrl-C are rank 0's to answer, which then finishes its step with this one; but without a rank 0 they end it.
    """
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    policy: TrainedPolicy | None = None
    while True:
        call = ranks.next_call(given_up=lambda: bool(signals) and ranks.rank_0_is_gone())
        if call is None:
            log.error("rank 0 is gone: ending")
            return 1
        with _explained(call["call"], ranks):
            if call["call"] == "end":
                ranks.leave()
                return 0
            if call["call"] == "open":
                config = parse_config(call["config"], source="rank 0's config")
                policy = _build(config, call["end_token_ids"], ranks)
                continue
            assert policy is not None
            _make(call, policy, ranks)


def _make(call: dict[str, Any], policy: TrainedPolicy, ranks: Ranks) -> None:
    """One call of rank 0, on this rank."""
    match call["call"]:
        case "optimize":
            try:
                _optimize(policy, _from_wire(call["shard"]), ranks, **call["options"])
            except Diverged:  # rank 0 has raised the same, says so, and ends the run
                log.warning("step %d: training has diverged", call["options"]["step"])
        case "configure":
            policy.configure(TrainerConfig.model_validate(call["trainer"]))
        case "logprobs_of":
            policy.logprobs_of([(prompt, tokens) for prompt, tokens in call["sequences"]])
        case "score":
            policy.score([(prompt, tokens) for prompt, tokens in call["sequences"]])
        case "snapshot":
            policy.snapshot(getattr(torch, call["dtype"]), full=call["full"])
        case "save":
            try:
                policy.save(Path(call["folder"]))
            except DiskFull as error:  # rank 0 has raised the same, and tries again
                log.warning("%s", error)
        case "restore":
            policy.restore(Path(call["folder"]))
        case name:
            raise AssertionError(f"no call {name}")


def _optimize(
    policy: TrainedPolicy, shard: Shard, ranks: Ranks, *, step: int, max_tokens: int, mask_truncated: bool
) -> dict[str, float]:
    """This rank's part of an optimizer step."""
    batches = build_micro_batches(*shard, max_tokens=max_tokens, packed=policy.is_packed, mask_truncated=mask_truncated)
    return policy.optimize(pad_micro_batches(batches, count=max(ranks.gather(len(batches)))), step=step)


def _build(config: Config, end_token_ids: Sequence[int], ranks: Ranks) -> TrainedPolicy:
    torch.manual_seed(config.seed)  # the same on all ranks: what an adapter begins with
    model = load_pretrained(config.model.path, revision=config.model.revision)
    policy = TrainedPolicy.of_run(model, config, end_token_ids=end_token_ids, ranks=ranks)
    if ranks.rank == 0 and ranks.size > 1:
        log.info("%d ranks on %s; a step's groups stay %d", ranks.size, policy.device.type, config.groups_per_step)
    return policy


@contextmanager
def _explained(call: str, ranks: Ranks) -> Iterator[None]:
    """What goes wrong between ranks surfaces as an error of some connection: says which rank and call, and how to read it."""
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


def shard_by_tokens(groups: list[Group], advantages: list[Tensor], *, num_ranks: int) -> list[Shard]:
    """Every episode to one rank, so that their real tokens are balanced: the longest first, each to whom has least so far.

    advantages: per group [G]. A rank for which there is none gets the shortest one without its reward, which leaves it out of
    the loss. The same input gives the same shares.
    """
    if num_ranks == 1:
        return [(groups, advantages)]
    lengths = [
        (len(group.prompt_ids) + len(episode.completion.token_ids), g, e)
        for g, group in enumerate(groups)
        for e, episode in enumerate(group.episodes)
    ]
    loads = [0] * num_ranks
    mine: list[dict[int, list[int]]] = [{} for _ in range(num_ranks)]
    for length, g, e in sorted(lengths, key=lambda found: -found[0]):
        rank = loads.index(min(loads))
        loads[rank] += length
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
    """`count` passes, as many as the other ranks make: those that lack are the smallest one without a loss token."""
    smallest = min(batches, key=lambda batch: batch.num_tokens)
    idle = replace(smallest, loss_mask=torch.zeros_like(smallest.loss_mask))
    return [*batches, *[idle] * (count - len(batches))]


def _to_wire(shard: Shard) -> dict[str, Any]:
    """Without the texts, which no rank reads: some 12 bytes a token."""
    groups = [
        replace(
            group,
            prompt="",
            target=None,
            timestamps={},
            episodes=[replace(e, completion=replace(e.completion, text="")) for e in group.episodes],
        )
        for group in shard[0]
    ]
    return {"groups": [group.to_wire() for group in groups], "advantages": [a.numpy() for a in shard[1]]}


def _from_wire(wire: dict[str, Any]) -> Shard:
    return [Group.from_wire(group) for group in wire["groups"]], [torch.from_numpy(a) for a in wire["advantages"]]
