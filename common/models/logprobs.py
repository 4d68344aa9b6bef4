"""Logprobs of completions under a causal LM: one forward pass over right-padded or packed rows, the output head in chunks.

Batches are padded on the right. A model that `enable_packing` has accepted runs their tokens without the padding, and a prompt
that several rows have once (`common.models.packing`). Any other runs the padded rows and gets no attention mask: in a causal
model a token never attends to what follows it, so padding is invisible to every real token (tests prove it for values and
gradients) and the fast unmasked attention runs. Logits are computed only for positions that predict a completion token, a chunk
at a time, in float32: [B, S, V] is never held. The trainer calls this with gradients, the reference role without.

Legend: B = sequences, P = prompt tokens, T = completion tokens, S = P + T padded, N = completion tokens of all rows,
D = width of the hidden state, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sluice.common.errors import ConfigError
from sluice.common.models.packing import causal_lm, is_packed, pack, plan_batches
from sluice.common.models.probe import COMPARED, difference, draw_ids, fresh_logprobs, probe_lengths
from sluice.common.models.truncation import Truncation

RECOMPUTE_ELEMENTS = 2**26
"""Logits computed at once (256 MiB in float32); with more, the backward pass recomputes chunk by chunk."""

UNTRUNCATED = Truncation()
_HEAD_IS_PLAIN = "_sluice_head_is_plain"
"""Attribute of a model: what `_plain_head` has found."""


def pad_sequences(
    prompts: list[NDArray[np.int32]], completions: list[NDArray[np.int32]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return input_ids long [B, S], right-padded with 0; prompt_lengths long [B]; completion_lengths long [B].

    Raises ValueError for an empty prompt: nothing would predict the first completion token.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no tokens: check dataset.prompt_column and the chat template")
    rows = [np.concatenate(pair) for pair in zip(prompts, completions, strict=True)]
    input_ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    for padded, row in zip(input_ids, rows, strict=True):
        padded[: len(row)] = torch.from_numpy(row)
    prompt_lengths, completion_lengths = (torch.tensor([len(ids) for ids in side]) for side in (prompts, completions))
    return input_ids, prompt_lengths, completion_lengths


def score_sequences(
    model: Any,
    sequences: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]],
    *,
    max_batch_tokens: int,
    temperature: float = 1.0,
    truncation: Truncation = UNTRUNCATED,
) -> list[NDArray[np.float32]]:
    """Return logprobs float32 [T] of each (prompt_ids [P], token_ids [T]), in the order given.

    Computed in batches of at most `max_batch_tokens` tokens each (a prompt counts once; where the model is not packed, padding
    and every prompt count); a longer sequence is a batch of its own.
    """
    device = next(model.parameters()).device
    scored: list[Any] = [None] * len(sequences)
    for batch in plan_batches(sequences, max_tokens=max_batch_tokens, packed=is_packed(model)):
        tensors = pad_sequences([sequences[i][0] for i in batch], [sequences[i][1] for i in batch])
        logprobs, _ = completion_logprobs(
            model, *(x.to(device) for x in tensors), temperature=temperature, truncation=truncation
        )
        rows = logprobs.float().cpu().numpy()
        for row, i in enumerate(batch):
            scored[i] = rows[row, : len(sequences[i][1])].copy()
    return scored


def completion_logprobs(
    model: Any,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    completion_lengths: Tensor,
    *,
    temperature: float = 1.0,
    truncation: Truncation = UNTRUNCATED,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return logprobs float32 [B, T] of every completion token, in nats, and the entropy [B, T] of its distribution or none.

        logprob_t = log softmax(logits_{t-1} / temperature)[token_t]         entropy_t = -sum_v p_v log p_v

    model: a transformers causal LM, or peft's wrapper around one. T is the longest completion; positions after a row's end
    hold 0. temperature 0 (greedy sampling) counts as 1. The entropy carries no gradient. With a truncation, the softmax is
    over the tokens that it keeps of these logits and the sampled token itself (which another policy may have sampled); the
    set is a constant for the gradient. So the ratio to rollout_logprobs is 1 for equal weights, where the full softmax
    would give the kept mass.
    """
    # N completion tokens of all rows, and where each is predicted: one position before its own.
    device = input_ids.device
    width = int(completion_lengths.max())
    is_completion = torch.arange(width, device=device) < completion_lengths.to(device).unsqueeze(-1)  # [B, T]
    rows, columns = is_completion.nonzero(as_tuple=True)  # [N]
    positions = prompt_lengths.to(device)[rows] + columns  # [N]; position p is predicted at p - 1
    targets = input_ids[rows, positions]  # [N]
    # The model's inputs, and where in its output the predicting positions are: padded rows, or one packed row.
    model = causal_lm(model)
    given, places = {"input_ids": input_ids}, (rows, positions - 1)
    if is_packed(model):
        ends = (prompt_lengths + completion_lengths).to(device) - 1  # the last token predicts nothing
        ends = ends.where(completion_lengths.to(device) > 0, 1)
        packed = pack(input_ids, prompt_lengths.to(device).minimum(ends), ends)
        given, places = packed.inputs, (torch.zeros_like(rows), packed.place(rows, positions - 1))
    # Hidden states [N, D] where the head can be applied here, chunk by chunk; else the model's own logits [N, V].
    head = _plain_head(model)
    if head is None:
        inputs = model(**given, use_cache=False).logits[places]  # [N, V]
        weight, bias, vocabulary = None, None, inputs.shape[-1]
    else:
        inputs = model.base_model(**given, use_cache=False).last_hidden_state[places]  # [N, D]
        weight, bias, vocabulary = head.weight.float(), head.bias, head.weight.shape[0]
    # Each chunk's logits are freed after it; under gradients, more than RECOMPUTE_ELEMENTS are recomputed, not kept.
    is_early = columns < truncation.min_tokens  # [N]
    scored = []
    size = max(1, RECOMPUTE_ELEMENTS // vocabulary)
    for chunk, chunk_targets, early in zip(*(x.split(size) for x in (inputs, targets, is_early)), strict=True):
        arguments = (chunk, weight, bias, (chunk_targets, temperature or 1.0, truncation, early), with_entropy)
        if torch.is_grad_enabled() and inputs.shape[0] * vocabulary > RECOMPUTE_ELEMENTS:
            scored.append(checkpoint(_score, *arguments, use_reentrant=False))
        else:
            scored.append(_score(*arguments))
    # Back from [N] to [B, T]; positions after a row's end stay 0.
    padded = torch.zeros(is_completion.shape, device=device)
    logprobs = padded.index_put((rows, columns), torch.cat([logprobs for logprobs, _ in scored]))
    entropy = padded.index_put((rows, columns), torch.cat([entropy for _, entropy in scored]))
    return logprobs, entropy if with_entropy else None


def _score(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    drawn: tuple[Tensor, float, Truncation, Tensor],
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Return logprobs [N] and entropy [N] (0 where not asked for) of one chunk.

    inputs: hidden states [N, D], or logits [N, V] where there is no weight. drawn: the tokens [N], and how they were
    sampled: temperature, truncation, whether min_tokens held [N].
    """
    targets, temperature, truncation, is_early = drawn
    with torch.autocast(inputs.device.type, enabled=False):
        logits = inputs.float()
        if weight is not None:
            logits = torch.nn.functional.linear(logits, weight, None if bias is None else bias.float())
        if temperature != 1.0:
            logits = logits / temperature
        scored: tuple[Tensor, Tensor] = _Score.apply(
            _truncated(logits, targets, truncation, is_early), targets, with_entropy
        )
        return scored


class _Score(torch.autograd.Function):
    """Logprobs [N] of targets [N] and entropy [N] from logits [N, V], some of which may be -inf.

    As few passes over [N, V] as possible: the probabilities are kept, which the entropy needs anyway, and

        d logprob / d logits = onehot(target) - p
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
        log_p = logits.log_softmax(-1)
        logprobs = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        entropy = torch.zeros_like(logprobs)
        if with_entropy or ctx.needs_input_grad[0]:
            p = log_p.exp()
            ctx.save_for_backward(p, targets)
            if with_entropy:
                entropy = -log_p.clamp_(min=torch.finfo(log_p.dtype).min).mul_(p).sum(-1)  # 0 log 0 = 0
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        p, targets = ctx.saved_tensors
        to_logits = p * -grad.unsqueeze(-1)
        return to_logits.scatter_add_(-1, targets.unsqueeze(-1), grad.unsqueeze(-1)), None, None


def _truncated(logits: Tensor, targets: Tensor, truncation: Truncation, is_early: Tensor) -> Tensor:
    """Return logits [N, V], -inf where sampling could not draw; targets [N] always stay."""
    if truncation == UNTRUNCATED:
        return logits
    with torch.no_grad():
        allowed = logits
        if truncation.end_token_ids:
            barred = torch.zeros_like(logits, dtype=torch.bool)
            barred[:, list(truncation.end_token_ids)] = is_early.unsqueeze(-1)
            allowed = logits.masked_fill(barred, -torch.inf)
        kept = truncation.kept(allowed)
        kept = allowed > -torch.inf if kept is None else kept & (allowed > -torch.inf)
        kept.scatter_(-1, targets.unsqueeze(-1), True)
    return logits.masked_fill(~kept, -torch.inf)


def _plain_head(model: Any) -> torch.nn.Linear | None:
    """Return the output head where logits are exactly its output; none = use the model's own full forward.

    Found once per model, by running it.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or model.base_model is model:
        return None
    if not hasattr(model, _HEAD_IS_PLAIN):
        setattr(model, _HEAD_IS_PLAIN, _head_is_plain(model, head))
    return head if getattr(model, _HEAD_IS_PLAIN) else None


@torch.no_grad()
def check_scoring(model: Any, *, longest: int, bound: float) -> None:
    """Check that the rows of a padded batch are scored as each alone, in sequences of up to `longest` tokens. Raises ConfigError.

    model: in eval mode, with its weights, on its device, not sharded yet. bound: in nats (`probe.difference`).
    """
    model = causal_lm(model)
    name, lengths = type(model).__name__, probe_lengths(model.config, longest=longest)
    counts = [min(COMPARED, length - 1) for length in lengths]

    def scored(seed: int) -> tuple[list[Tensor], list[Tensor]]:
        rows = [draw_ids(model, length, seed=i) for i, length in enumerate(lengths, start=seed)]
        expected = [fresh_logprobs(model, row, count=count) for row, count in zip(rows, counts, strict=True)]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        completion_lengths = torch.tensor(counts, device=padded.device)
        prompt_lengths = torch.tensor(lengths, device=padded.device) - completion_lengths
        logprobs, _ = completion_logprobs(model, padded, prompt_lengths, completion_lengths)
        return [row[:count] for row, count in zip(logprobs, counts, strict=True)], expected

    refused = f"{name} cannot run a padded batch"
    differs = difference(model, scored, longest=longest, bound=bound, refused=refused, advice="use another model")
    if differs is not None:
        raise ConfigError(
            f"{name} does not compute a sequence of a padded batch as it computes it alone: logprobs of rows of "
            f"{', '.join(map(str, lengths))} tokens differ by {differs:.2g} nats. It reads what follows a token, or depends on "
            "the other rows (rope scaled by the longest one, noise): use another model, or lower trainer.seq_len below the "
            "length from which it does so"
        )


@torch.no_grad()
def _head_is_plain(model: Any, head: torch.nn.Linear) -> bool:
    """Return whether the head reads the last hidden states as they are, and nothing changes what it returns.

    In a pass of the whole model, random logits stand for the head's: whatever scales, caps or cuts them shows, whatever the
    weights and the precision.
    """
    ids = torch.arange(4, device=head.weight.device)[None]  # [1, 4]
    drawn = 20 * torch.randn(1, 4, head.weight.shape[0], generator=torch.Generator().manual_seed(0)).to(head.weight)
    read: list[Tensor] = []

    def replace(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        read.append(inputs[0])
        return drawn.to(output.dtype)

    hook = head.register_forward_hook(replace)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if len(read) != 1 or read[0].shape != hidden.shape or logits.shape != drawn.shape:
        return False
    return bool(logits.equal(drawn.to(logits.dtype)) and torch.allclose(read[0], hidden, rtol=1e-3, atol=1e-3))
