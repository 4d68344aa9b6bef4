"""Micro-batches of one optimizer step: tensors within a token budget, and the step's normaliser.

Masks come from lengths, reward and finish reason, never from comparing with a pad id. The order is a function of the
groups alone, longest sequences first: a micro-batch too large for the device fails at once, not an hour later.

Legend: B = sequences, P = prompt tokens, T = completion tokens, S = padded length of prompt + completion.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sluice.common.models.logprobs import pad_sequences
from sluice.common.models.packing import plan_batches
from sluice.common.types import Episode, Group, SamplingParams
from sluice.trainer.reward_shaping import loss_tokens

Sequences = list[tuple[NDArray[np.int32], NDArray[np.int32]]]
"(prompt_ids, token_ids) each"


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """What one forward and backward pass reads."""

    input_ids: Tensor
    "long [B, S], prompt then completion, right-padded with 0"
    prompt_lengths: Tensor
    "long [B]"
    completion_lengths: Tensor
    "long [B]"
    rollout_logprobs: Tensor
    "float32 [B, T]"
    ref_logprobs: Tensor | None
    "float32 [B, T], or none when kl_beta is 0"
    advantages: Tensor
    "float32 [B]"
    loss_mask: Tensor
    "bool [B, T]"
    sampling: SamplingParams | None = None
    "sampling parameters of all its rows; none = those that the run was created with"

    @property
    def num_tokens(self) -> int:
        """Tokens of prompts and completions: what a packed pass costs."""
        return int((self.prompt_lengths + self.completion_lengths).sum())

    @property
    def num_padded_tokens(self) -> int:
        """B * S: what a padded pass costs."""
        return self.input_ids.numel()

    @property
    def loss_inputs(self) -> dict[str, Tensor | None]:
        """The arguments of an objective that come from it, by name."""
        names = ("rollout_logprobs", "advantages", "loss_mask", "ref_logprobs")
        return {name: getattr(self, name) for name in names}

    def to_wire(self) -> dict[str, Any]:
        """Encode for another rank; token ids and lengths fit 32 bits."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        wire = {
            name: (value.int() if value.dtype == torch.long else value).numpy()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return {**wire, "sampling": self.sampling and asdict(self.sampling)}

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> MicroBatch:
        """Invert `to_wire`."""
        sampling, arrays = wire["sampling"], {name: value for name, value in wire.items() if name != "sampling"}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        tensors |= {name: tensor.long() for name, tensor in tensors.items() if tensor.dtype == torch.int32}
        fields_of: dict[str, Any] = {"ref_logprobs": None, **tensors}
        return cls(**fields_of, sampling=sampling and SamplingParams.from_wire(sampling))

    def to(self, device: torch.device | str) -> MicroBatch:
        """Copy to another device."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        moved: dict[str, Any] = {name: value.to(device) for name, value in values if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    prompt_ids: NDArray[np.int32]
    episode: Episode
    advantage: Tensor
    "scalar"
    sampling: SamplingParams | None

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.episode.completion.token_ids)


def build_micro_batches(
    groups: list[Group],
    advantages: list[Tensor],
    *,
    max_tokens: int,
    packed: bool = False,
    mask_truncated: bool = False,
) -> list[MicroBatch]:
    """Build as few micro-batches as hold max_tokens each, with every episode of the groups once; a longer sequence goes alone.
    Rows of one micro-batch were sampled with the same parameters, which may change during a run.

    packed: whether the model runs without pads, which then do not count; otherwise B * S counts. advantages: per group [G],
    in the order of its episodes. `sluice.trainer.reward_shaping.loss_tokens` says which tokens are in the loss.
    """
    rows = [
        _Row(
            prompt_ids=group.prompt_ids,
            episode=episode,
            advantage=advantage,
            sampling=group.sampling and group.sampling.distribution,
        )
        for group, group_advantages in zip(groups, advantages, strict=True)
        for episode, advantage in zip(group.episodes, group_advantages, strict=True)
    ]
    alike: dict[SamplingParams | None, list[_Row]] = {}
    for row in rows:
        alike.setdefault(row.sampling, []).append(row)
    return [
        _collate([same[i] for i in batch], mask_truncated=mask_truncated)
        for same in alike.values()
        for batch in plan_batches([row.length for row in same], max_tokens=max_tokens, packed=packed)
    ]


def padding_share(micro_batches: Iterable[MicroBatch], *, packed: bool) -> float:
    """Return the share of pads among the tokens that run through the model, in [0, 1); 0 where it is packed."""
    counts = [(batch.num_tokens, batch.num_padded_tokens) for batch in micro_batches]
    return 0.0 if packed else 1.0 - sum(real for real, _ in counts) / sum(padded for _, padded in counts)


def step_normaliser(micro_batches: Iterable[MicroBatch], *, aggregation: str) -> int:
    """Count `num_tokens` of `policy_loss` for a step of these micro-batches; over ranks the counts add up."""
    return num_loss_tokens(micro_batches) if aggregation == "token_mean" else num_sequences(micro_batches)


def num_loss_tokens(micro_batches: Iterable[MicroBatch]) -> int:
    """Count tokens in the loss, before any off-policy masking."""
    return sum(int(batch.loss_mask.sum()) for batch in micro_batches)


def num_sequences(micro_batches: Iterable[MicroBatch]) -> int:
    """Count sequences with at least one token in the loss, before any off-policy masking."""
    return sum(int(batch.loss_mask.any(-1).sum()) for batch in micro_batches)


def find_logprobs(
    scored: Iterable[tuple[MicroBatch, Tensor]], sequences: Sequences
) -> list[NDArray[np.float32] | None]:
    """Return the row [T] of each sequence from micro-batches with their logprobs [B, T]; None for one that is in none."""
    found: list[NDArray[np.float32] | None] = [None] * len(sequences)
    for batch, logprobs in scored:
        for i, (prompt_ids, token_ids) in enumerate(sequences):
            ids = torch.from_numpy(np.concatenate([prompt_ids, token_ids]).astype(np.int64))
            alike = (batch.prompt_lengths == len(prompt_ids)) & (batch.completion_lengths == len(token_ids))
            for row in alike.nonzero().flatten().tolist():
                if torch.equal(batch.input_ids[row, : len(ids)], ids):
                    found[i] = logprobs[row, : len(token_ids)].float().cpu().numpy()
    return found


def _collate(rows: list[_Row], *, mask_truncated: bool) -> MicroBatch:
    completions = [row.episode.completion for row in rows]
    input_ids, prompt_lengths, completion_lengths = pad_sequences(
        [row.prompt_ids for row in rows], [completion.token_ids for completion in completions]
    )
    in_loss = [loss_tokens(row.episode, mask_truncated=mask_truncated) for row in rows]
    width = int(completion_lengths.max())
    references = [row.episode.ref_logprobs for row in rows if row.episode.ref_logprobs is not None]
    assert len(references) in (0, len(rows)), "either every episode of a step has ref_logprobs or none has"
    return MicroBatch(
        input_ids=input_ids,
        prompt_lengths=prompt_lengths,
        completion_lengths=completion_lengths,
        rollout_logprobs=_pad([completion.rollout_logprobs for completion in completions], width=width),
        ref_logprobs=_pad(references, width=width) if references else None,
        advantages=torch.stack([row.advantage for row in rows]).float(),
        loss_mask=_pad(in_loss, width=width).bool(),
        sampling=rows[0].sampling,
    )


def _pad(values: list[NDArray[np.float32]] | list[NDArray[np.bool_]], *, width: int) -> Tensor:
    """float32 [B, width], right-padded with 0."""
    padded = torch.zeros(len(values), width)
    for row, value in zip(padded, values, strict=True):
        row[: len(value)] = torch.from_numpy(value)
    return padded
