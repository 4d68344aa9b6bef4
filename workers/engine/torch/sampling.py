"""Drawing one token per row from logits, with the logprob of exactly the distribution that was drawn from.

Legend: n = rows, V = vocabulary, B = vocabulary entries of a block.

Invariants:
* a row's token depends on its own logits, parameters and uniform number only: truncation keeps vocabulary order, so a
  row that truncates nothing draws the same token, whatever its neighbours ask for;
* a token of probability zero is never drawn;
* logprobs are float32 whatever the model computes in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sluice.common.models.truncation import thresholds

_BLOCK = 64
"B: a power of two near the root of usual vocabularies; most of them are multiples of it."


def sample(
    logits: Tensor, *, uniforms: Tensor, temperature: Tensor | None = None, truncation: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverse CDF; return it and its logprob: ([n] int64, [n] float32).

    logits [n, V]; uniforms [n] in [0, 1). The optional arguments are none when no row asks for them: temperature [n], where
    0 takes the likeliest token and reports its logprob at 1; truncation = top_k, top_p, min_p [n], off where 0, 1 and 0.
    One uniform per row against the CDF, first of blocks, then within one: four times as fast as a CDF over 8192 entries, and
    a draw per vocabulary entry (Gumbel, multinomial) costs several times as much again.
    """
    # The distribution that is drawn from, up to its normalisation: the logprob below is that of the same one.
    logits = logits.float()
    if temperature is not None:
        logits = logits / temperature.where(temperature > 0, 1.0)[:, None]
    if truncation is not None:
        logits = logits.masked_fill(logits < thresholds(logits, **truncation), -torch.inf)
    # Probabilities times `total`, so that nothing need be divided; the largest is 1.
    top = logits.amax(-1, keepdim=True)  # [n, 1]
    weights = _in_blocks((logits - top).exp_())  # [n, V/B, B]
    masses = weights.sum(-1)  # [n, V/B]
    cumulated = masses.cumsum(-1)
    total = cumulated[:, -1:]  # [n, 1]
    # Rounding can make the product equal to the total, behind every token.
    aim = (uniforms[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    # First the block that `aim` falls into, then the entry within it.
    block = torch.searchsorted(cumulated, aim, right=True).clamp_(max=masses.shape[1] - 1)  # [n, 1]
    aim -= cumulated.gather(1, block) - masses.gather(1, block)
    inside = weights.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0]  # [n, B]
    entry = torch.searchsorted(inside.cumsum(-1), aim, right=True).clamp_(max=_BLOCK - 1)  # [n, 1]
    # The likeliest replaces an entry of probability 0 that rounding alone selected.
    entry = torch.where(inside.gather(1, entry) == 0, inside.argmax(-1, keepdim=True), entry)
    # Greedy rows drew as well, and are overwritten: no branch per row.
    tokens = block * _BLOCK + entry
    if temperature is not None:
        tokens = torch.where((temperature == 0)[:, None], logits.argmax(-1, keepdim=True), tokens)
    logprobs = logits.gather(1, tokens) - top - total.log()
    return tokens[:, 0], logprobs[:, 0]


def _in_blocks(weights: Tensor) -> Tensor:
    """Reshape [n, V] to [n, V/B, B], padded with 0."""
    missing = -weights.shape[-1] % _BLOCK
    padded = torch.nn.functional.pad(weights, (0, missing)) if missing else weights
    return padded.view(len(weights), -1, _BLOCK)
