"""Drawing one token per row from logits, with the logprob of exactly the distribution that was drawn from.

Legend: n = rows, V = vocabulary.

Invariants:
* a row's token depends on its own logits, parameters and uniform number only: truncation keeps vocabulary order, so a
  row that truncates nothing draws the same token whatever its neighbours ask for;
* a token of probability zero is never drawn;
* logprobs are float32 whatever the model computes in.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    *,
    uniforms: Tensor,
    temperature: Tensor | None = None,
    truncation: tuple[Tensor, Tensor] | None = None,
    greedy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF, and its logprob: ([n] int64, [n] float32).

    logits [n, V]; uniforms [n] in [0, 1). The optional arguments are none when no row asks for them:
    temperature [n] > 0; truncation = (top_k [n], top_p [n]), off where 0 and 1; greedy [n] bool takes the likeliest.
    One uniform per row against the CDF: a draw per vocabulary entry (Gumbel, multinomial) costs several times as much.
    """
    logits = logits.float()
    if temperature is not None:
        logits = logits / temperature[:, None]
    if truncation is not None:
        logits = truncate(logits, top_k=truncation[0], top_p=truncation[1])
    probs = logits.softmax(-1)  # [n, V]
    cdf = probs.cumsum(-1)  # [n, V]
    drawn = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
    drawn.clamp_(max=logits.shape[-1] - 1)  # [n, 1]; rounding can make the product equal to the last entry
    # The likeliest token stands in for one that rounding alone selected (CUDA's parallel cumsum is not monotone).
    likeliest = probs.argmax(-1, keepdim=True)  # [n, 1]
    replaced = probs.gather(1, drawn) == 0
    if greedy is not None:
        replaced |= greedy[:, None]
    tokens = torch.where(replaced, likeliest, drawn)
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


def truncate(logits: Tensor, *, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Logits [n, V], -inf outside the top_k likeliest and, of those, outside the smallest set that has mass top_p.

    top_k [n] (0 = off) and top_p [n] (1 = off). The likeliest token always stays; of equal logits the lower id does.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # [n, V] both
    rank = torch.arange(logits.shape[-1], device=logits.device)  # [V]
    dropped = (rank >= top_k[:, None]) & (top_k[:, None] > 0)
    probs = ordered.masked_fill_(dropped, -torch.inf).softmax(-1)
    mass_before = probs.cumsum(-1) - probs
    dropped |= (mass_before >= top_p[:, None]) & (top_p[:, None] < 1) & (rank > 0)
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
