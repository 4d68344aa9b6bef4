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

from sluice.common.config.trainer import TrainerConfig
from sluice.common.loading import is_function_path
from sluice.common.models.logprobs import pad_sequences
from sluice.common.models.packing import plan_batches
from sluice.common.types import Episode, Group, SamplingParams
from sluice.trainer.loss import is_zero_without_advantage
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
        """Tokens of prompts and completions."""
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
        wire = {
            name: (tensor.int() if tensor.dtype == torch.long else tensor).numpy()
            for name, tensor in self._tensors().items()
        }
        return {**wire, "sampling": self.sampling and asdict(self.sampling)}

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> MicroBatch:
        """Invert `to_wire`."""
        values: dict[str, Any] = {"ref_logprobs": None, **wire}
        for name, value in wire.items():
            if isinstance(value, np.ndarray):
                values[name] = torch.from_numpy(value).long() if value.dtype == np.int32 else torch.from_numpy(value)
        return cls(**{**values, "sampling": wire["sampling"] and SamplingParams.from_wire(wire["sampling"])})

    def to(self, device: torch.device | str) -> MicroBatch:
        """Copy to another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    prompt_ids: NDArray[np.int32]
    episode: Episode
    advantage: Tensor
    "scalar"

    @property
    def sequence(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return self.prompt_ids, self.episode.completion.token_ids


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

    packed: whether the model runs without pads; the prompt of a group then counts once, otherwise B * S counts. advantages:
    per group [G], in the order of its episodes. `sluice.trainer.reward_shaping.loss_tokens` says which tokens are in the loss.
    """
    alike: dict[SamplingParams | None, list[_Row]] = {}
    for group, group_advantages in zip(groups, advantages, strict=True):
        alike.setdefault(group.sampling and group.sampling.distribution, []).extend(
            _Row(prompt_ids=group.prompt_ids, episode=episode, advantage=advantage)
            for episode, advantage in zip(group.episodes, group_advantages, strict=True)
        )
    return [
        _collate([rows[i] for i in batch], sampling=sampling, mask_truncated=mask_truncated)
        for sampling, rows in alike.items()
        for batch in plan_batches([row.sequence for row in rows], max_tokens=max_tokens, packed=packed)
    ]


def padding_share(micro_batches: Iterable[MicroBatch], *, packed: bool) -> float:
    """Return the share of pads among the tokens that run through the model, in [0, 1); 0 where it is packed."""
    counts = [(batch.num_tokens, batch.num_padded_tokens) for batch in micro_batches]
    return 0.0 if packed else 1.0 - sum(real for real, _ in counts) / sum(padded for _, padded in counts)


def step_normaliser(masks: Iterable[Tensor | NDArray[np.bool_]], *, aggregation: str) -> int:
    """Count `num_tokens` of `policy_loss` for a step with these loss masks, [B, T] or [T]; over ranks the counts add up.

    Tokens in the loss, or else sequences with at least one, before any off-policy masking.
    """
    return sum(int((mask if aggregation == "token_mean" else mask.any(-1)).sum()) for mask in masks)


def with_gradient(
    groups: list[Group], advantages: list[Tensor], config: TrainerConfig
) -> tuple[list[Group], list[Tensor], int]:
    """Return the groups and advantages [G] of the episodes that change the gradient, and the others' share of the normaliser.

    An episode changes nothing where none of its tokens is in the loss; and, where the loss is a multiple of the advantage, where
    that is 0. If none changes anything the shortest stays, so that every step has the metrics that need logprobs.
    """
    if config.skip_zero_gradient == "off" or config.objective is not None or is_function_path(config.loss.loss):
        return groups, advantages, 0
    masks = [[loss_tokens(e, mask_truncated=config.mask_truncated) for e in group.episodes] for group in groups]
    needs_advantage = is_zero_without_advantage(config.loss)
    kept = [
        [i for i, mask in enumerate(own) if mask.any() and not (needs_advantage and values[i] == 0)]
        for own, values in zip(masks, advantages, strict=True)
    ]
    if not any(kept):
        sizes = [
            (not m.any(), len(groups[g].prompt_ids) + len(m), g, i)
            for g, own in enumerate(masks)
            for i, m in enumerate(own)
        ]
        *_, g, i = min(sizes)
        kept[g] = [i]
    left_out = [mask for own, of in zip(masks, kept, strict=True) for i, mask in enumerate(own) if i not in of]
    some = [g for g, of in enumerate(kept) if of]
    return (
        [replace(groups[g], episodes=[groups[g].episodes[i] for i in kept[g]]) for g in some],
        [advantages[g][kept[g]] for g in some],
        step_normaliser(left_out, aggregation=config.loss.aggregation),
    )


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


def _collate(rows: list[_Row], *, sampling: SamplingParams | None, mask_truncated: bool) -> MicroBatch:
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
        sampling=sampling,
    )


def _pad(values: list[NDArray[np.float32]] | list[NDArray[np.bool_]], *, width: int) -> Tensor:
    """float32 [B, width], right-padded with 0."""
    padded = torch.zeros(len(values), width)
    for row, value in zip(padded, values, strict=True):
        row[: len(value)] = torch.from_numpy(value)
    return padded
