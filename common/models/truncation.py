"""Which tokens a truncated distribution keeps: top_k, top_p and min_p, for the engine that samples and the roles that score.

Sampling divides by the temperature first. Then min_p and top_k cut, and top_p cuts what they left, renormalised: vLLM's
order (transformers' applies min_p last, which differs only where min_p and top_p cut together).

Legend: n = rows, V = vocabulary, K = candidates examined.

Invariants:
* every cut keeps a prefix of the descending order, so the kept set is `logits >= threshold`: the likeliest token always
  stays, and of logits equal to the threshold all do;
* a row's threshold depends on its own logits and parameters only, not on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sluice.common.config import SamplingConfig
from sluice.common.types import SamplingParams

_CANDIDATES = 64
"Likeliest tokens examined first; times 8 until they hold top_p of every row. Sorting full vocabularies is far slower."

_CUTS = ("top_k", "top_p", "min_p")


@dataclass(frozen=True, kw_only=True, slots=True)
class Truncation:
    """What every row of a batch was sampled with; the defaults cut nothing."""

    top_k: int = 0
    "0 = off"
    top_p: float = 1.0
    "1 = off"
    min_p: float = 0.0
    "0 = off"
    min_tokens: int = 0
    "tokens at the start of a completion that could not be end tokens"
    end_token_ids: tuple[int, ...] = ()
    "what min_tokens excluded"

    @classmethod
    def of(cls, sampling: SamplingConfig | SamplingParams, *, end_token_ids: Sequence[int]) -> Truncation:
        """Return the truncation of `sampling`, for a model that ends with any of `end_token_ids`."""
        return cls(
            **{name: getattr(sampling, name) for name in (*_CUTS, "min_tokens")},
            end_token_ids=tuple(end_token_ids) if sampling.min_tokens else (),
        )

    def kept(self, logits: Tensor) -> Tensor | None:
        """Return bool [n, V] for logits [n, V] that are divided by the temperature already; none = all are kept."""
        if (self.top_k, self.top_p, self.min_p) == (0, 1.0, 0.0):
            return None
        return logits >= thresholds(logits, **{name: logits.new_tensor([getattr(self, name)]) for name in _CUTS})


def thresholds(logits: Tensor, *, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Return the lowest kept logit of each row, [n, 1]; -inf where nothing is cut.

    logits [n, V], divided by the temperature; top_k (0 = off), top_p (1 = off), min_p (0 = off): [n], or [1] for all rows.
    """
    vocabulary = logits.shape[-1]
    top_k, top_p, min_p = top_k[:, None], top_p[:, None], min_p[:, None]
    likeliest = logits.amax(-1, keepdim=True)  # [n, 1]
    floor = likeliest + min_p.log()  # [n, 1]
    has_k, has_p = top_k > 0, top_p < 1
    mass = (logits - likeliest).exp_().masked_fill_(logits < floor, 0.0).sum(-1, keepdim=True)  # [n, 1], times exp(max)
    candidates = max(_CANDIDATES, int(top_k.max()))
    while True:
        head = logits.topk(min(candidates, vocabulary), dim=-1).values  # [n, K], descending
        rank = torch.arange(head.shape[-1], device=logits.device)  # [K]
        weights = (head - likeliest).exp_().masked_fill_((has_k & (rank >= top_k)) | (head < floor), 0.0)
        cumulated = weights.cumsum(-1)  # [n, K]
        total = torch.where(has_k, cumulated[:, -1:], mass)
        before = torch.cat([torch.zeros_like(total), cumulated[:, :-1]], dim=-1)
        dropped = (weights == 0) | (has_p & (before >= top_p * total))
        if candidates >= vocabulary or bool((dropped[:, -1:] | has_k | ~has_p).all()):
            break
        candidates *= 8
    last = ((~dropped).sum(-1, keepdim=True) - 1).clamp_(min=0)  # [n, 1]
    return torch.where(has_k | has_p, head.gather(-1, last), floor)
