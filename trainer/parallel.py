"""Several ranks as one policy: rank 0 runs the training loop, the others make its calls.

    rank 0: Trainer (trainer/loop.py)                   rank 1 ... N-1: `follow`
    open_policy(...)          -- open -->               the same TrainedPolicy, of the same model folder
    policy.optimize(shares)   -- optimize, its share --> TrainedPolicy.optimize    collectives inside
    policy.score / snapshot / save / restore  -- ... --> the same
      (waits for a batch, publishes, ...)               waits, for hours if need be
    policy.close()            -- end -->                exit 0

Only rank 0 knows Redis. A rank that fails ends by itself, torchrun then ends all of them, and who started torchrun starts it
again (`sluice run` does); the trainer goes on from its newest checkpoint, on as many ranks as there are then.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.canary import CanarySequence
from common.config import Config
from common.config_file import parse_config
from common.errors import DiskFull
from common.model import load_pretrained
from common.types import Group
from trainer.batch import MicroBatch
from trainer.policy import TrainedPolicy
from trainer.ranks import COLLECTIVE_TIMEOUT_S, Ranks

log = logging.getLogger("sluice.trainer")

Sequences = list[tuple[NDArray[np.int32], NDArray[np.int32]]]
"""(prompt_ids, token_ids)"""


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
    def is_packed(self) -> bool:
        return self._policy.is_packed

    @property
    def base_digest(self) -> str:
        return self._policy.base_digest

    def optimize(self, shares: list[list[MicroBatch]], *, step: int) -> dict[str, float]:
        """As TrainedPolicy's, on the micro-batches of each rank (`deal`); metrics are those of all."""
        own, *others = evened(shares)
        bodies = [{"step": step, "micro_batches": [_to_wire(batch) for batch in share]} for share in others]
        with self._call("optimize", bodies):
            return self._policy.optimize(own, step=step)

    def score(self, sequences: Sequences) -> list[CanarySequence]:
        with self._call("score", {"sequences": sequences}):
            return self._policy.score(sequences)

    def snapshot(self, dtype: torch.dtype, *, whole: bool = False) -> dict[str, Tensor]:
        with self._call("snapshot", {"dtype": str(dtype).removeprefix("torch."), "whole": whole}):
            return self._policy.snapshot(dtype, whole=whole)

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
            self._ranks.tell_others([{"call": name, **one} for one in bodies])
            yield


def open_policy(config: Config, *, end_token_ids: Sequence[int], ranks: Ranks | None = None) -> ParallelPolicy:
    """The policy of a run with the weights of model.path, on all ranks; for rank 0. Raises ConfigError."""
    ranks = ranks or Ranks()
    body = {"call": "open", "config": config.to_yaml(), "end_token_ids": list(end_token_ids)}
    ranks.tell_others([body] * (ranks.size - 1))
    with _explained("open", ranks):
        return ParallelPolicy(_build(config, end_token_ids, ranks), ranks)


def follow(ranks: Ranks) -> int:
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
            _make(call, policy)


def _make(call: dict[str, Any], policy: TrainedPolicy) -> None:
    """One call of rank 0, on this rank."""
    match call["call"]:
        case "optimize":
            policy.optimize([_from_wire(wire) for wire in call["micro_batches"]], step=call["step"])
        case "score":
            policy.score([(prompt, tokens) for prompt, tokens in call["sequences"]])
        case "snapshot":
            policy.snapshot(getattr(torch, call["dtype"]), whole=call["whole"])
        case "save":
            try:
                policy.save(Path(call["folder"]))
            except DiskFull as error:  # rank 0 has raised the same, and tries again
                log.warning("%s", error)
        case "restore":
            policy.restore(Path(call["folder"]))
        case name:
            raise AssertionError(f"no call {name}")


def _build(config: Config, end_token_ids: Sequence[int], ranks: Ranks) -> TrainedPolicy:
    torch.manual_seed(config.seed)  # the same on all ranks: what the model is made with
    model = load_pretrained(config.model.path, revision=config.model.revision)
    policy = TrainedPolicy.of_run(model, config, end_token_ids=end_token_ids, ranks=ranks)
    torch.manual_seed(config.seed + ranks.rank)  # another one on each: what it drops out
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


def deal(groups: list[Group], advantages: list[Tensor], *, num_ranks: int) -> list[tuple[list[Group], list[Tensor]]]:
    """Every episode to one rank, so that their real tokens are balanced: the longest first, each to whom has least so far.

    advantages: per group [G]. The groups of a rank hold its episodes only, the advantages go with them. The same input
    gives the same shares.
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
    return [
        (
            [replace(groups[g], episodes=[groups[g].episodes[e] for e in sorted(found[g])]) for g in sorted(found)],
            [advantages[g][sorted(found[g])] for g in sorted(found)],
        )
        for found in mine
    ]


def evened(shares: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
    """The same number of passes for every rank: one with fewer gets some without a loss token, the smallest there is."""
    count = max(len(share) for share in shares)
    smallest = min((batch for share in shares for batch in share), key=lambda batch: batch.num_tokens)
    idle = replace(smallest, loss_mask=torch.zeros_like(smallest.loss_mask))
    return [[*share, *[idle] * (count - len(share))] for share in shares]


def _to_wire(batch: MicroBatch) -> dict[str, Any]:
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in values.items()}


def _from_wire(wire: dict[str, Any]) -> MicroBatch:
    return MicroBatch(
        **{name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in wire.items()}
    )
