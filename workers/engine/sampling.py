"""Drawing one token per row from logits, with the logprob of exactly the distribution that was drawn from.

Legend: n = rows, V = vocabulary, B = vocabulary entries of a block.

Invariants:
* a row's token depends on its own logits, parameters and uniform number only: truncation keeps vocabulary order, so a
  row that truncates nothing draws the same token whatever its neighbours ask for;
* a token of probability zero is never drawn;
* logprobs are float32 whatever the model computes in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.truncation import thresholds


def sample(
    logits: Tensor,
    *,
    uniforms: Tensor,
    temperature: Tensor | None = None,
    truncation: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF, and its logprob: ([n] int64, [n] float32).

    logits [n, V]; uniforms [n] in [0, 1). The optional arguments are none when no row asks for them: temperature [n], where
    0 takes the likeliest token and reports its logprob at 1; truncation = top_k, top_p, min_p [n], off where 0, 1 and 0.
    One uniform per row against the CDF: a draw per vocabulary entry (Gumbel, multinomial) costs several times as much.
    """
    logits = logits.float()
    if temperature is not None:
        logits = logits / temperature.where(temperature > 0, 1.0)[:, None]
    if truncation is not None:
        logits = logits.masked_fill(logits < thresholds(logits, **truncation), -torch.inf)
    probs = logits.softmax(-1)  # [n, V]
    cdf = probs.cumsum(-1)  # [n, V]
    drawn = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
    drawn.clamp_(max=logits.shape[-1] - 1)  # [n, 1]; rounding can make the product equal to the last entry
    # The likeliest token stands in for one that rounding alone selected (CUDA's parallel cumsum is not monotone).
    likeliest = probs.argmax(-1, keepdim=True)  # [n, 1]
    replaced = probs.gather(1, drawn) == 0
    if temperature is not None:
        replaced |= (temperature == 0)[:, None]
    tokens = torch.where(replaced, likeliest, drawn)
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()
