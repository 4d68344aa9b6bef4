"""Padding-free forward passes: the sequences of a batch one after another in a single row, each attending to itself alone.

    padded   a a a a      packed   a a a a b b c      groups ((1, 4), (1, 2), (1, 1))
             b b . .
             c . . .

Everything but attention works on single tokens, so a packed row costs what its tokens cost. Attention is registered with
transformers under the name `sluice_packed`: one varlen kernel on a GPU in half precision, elsewhere one call per distinct
length. Positions count from 0 in each sequence; the longest comes first.

A model is packed only after `enable_packing` has checked that it computes packed sequences as it computes each alone, and
makes no call that this attention does not support (windows, soft caps, sinks, biases, layers other than attention).

Legend: B = sequences, S = padded length, N = tokens of the row, H = heads, D = width of a head.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function

from sluice.common.models.probe import draw_ids, probe_lengths

NAME = "sluice_packed"
_HARMLESS = {"position_ids", "cache_position", "use_cache", "is_causal"}
"""Arguments of an attention call that have no effect here; any other one that is set is refused."""
_PROBE_BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Relative differences of the outputs. Rounding stays ten times below; a sequence that sees its neighbour differs fully."""


class CannotPackError(ValueError):
    """The model needs more than causal attention within each sequence."""


@dataclass(slots=True)
class Layout:
    """Where the sequences of a packed row are: an argument of every attention call of a packed forward pass."""

    groups: tuple[tuple[int, int], ...]
    "(sequences, tokens of each), in the order of the row: sequences of one length are neighbours"
    offsets: Tensor
    "int32 [B + 1], where each begins; last, N"
    longest: int
    "tokens"
    num_calls: int = 0
    "attention calls so far"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """What a packed forward pass reads, and where in it each sequence begins."""

    inputs: dict[str, Any]
    "input_ids and position_ids, long [1, N]; the layout as `packing`"
    starts: Tensor
    "long [B], in the order of the batch"
    layout: Layout


def pack(input_ids: Tensor, lengths: Tensor) -> PackedRow:
    """Pack the first lengths [B] (at least 1 each) tokens of the rows of input_ids [B, S], longest first."""
    order = lengths.argsort(descending=True, stable=True)
    sorted_lengths = lengths[order]
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    is_real = columns < sorted_lengths.unsqueeze(-1)  # [B, S]
    ends = sorted_lengths.cumsum(0)
    starts = torch.empty_like(ends)
    starts[order] = ends - sorted_lengths
    counts = sorted_lengths.tolist()
    layout = Layout(
        groups=tuple((len(list(same)), length) for length, same in groupby(counts)),
        offsets=torch.nn.functional.pad(ends, (1, 0)).int(),
        longest=counts[0],
    )
    inputs = {
        "input_ids": input_ids[order][is_real].unsqueeze(0),
        "position_ids": columns.expand(is_real.shape)[is_real].unsqueeze(0),
        "packing": layout,
    }
    return PackedRow(inputs=inputs, starts=starts, layout=layout)


def plan_batches(lengths: Sequence[int], *, max_tokens: int, packed: bool) -> list[list[int]]:
    """Divide the indices of all sequences, longest first, into the fewest batches of max_tokens each, about equally full.

    A packed batch counts its tokens, a padded one its rows times the longest. A longer sequence is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # stable: equal lengths keep their order

    def fill(bound: int) -> list[list[int]]:
        batches: list[list[int]] = []
        used = 0
        for i in order:
            more = lengths[i] if packed else (lengths[batches[-1][0]] if batches else 0)
            if batches and used + more <= bound:
                batches[-1].append(i)
                used += more
            else:
                batches.append([i])
                used = lengths[i]
        return batches

    fewest = len(fill(max_tokens))
    return fill(bisect_left(range(max_tokens), True, key=lambda bound: len(fill(bound)) <= fewest))


def causal_lm(model: Any) -> Any:
    """Return the transformers model itself, where `model` is a peft wrapper around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_packed(model: Any) -> bool:
    """Return whether `enable_packing` has accepted the model."""
    return getattr(causal_lm(model).config, "_attn_implementation", None) == NAME


def enable_packing(model: Any, *, longest: int) -> str | None:
    """Let `common.models.logprobs` run the model padding-free. Return none, or why it cannot: then the model is as before.

    The model must be in eval mode, with its weights, on its device, and not be sharded yet: sequences of up to `longest`
    tokens run through it.
    """
    model = causal_lm(model)
    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        return "its attention does not go through transformers' AttentionInterface"
    before = model.config._attn_implementation
    try:
        with torch.no_grad():
            _probe(model, longest=longest)
    except Exception as error:  # any exception of an unusual model: it stays padded
        model.set_attn_implementation(before)
        return str(error) or repr(error)
    return None


def _probe(model: PreTrainedModel, *, longest: int) -> None:
    """Check that packed sequences come out as each alone. Raises CannotPackError, or what the model raises."""
    device = next(model.parameters()).device
    config = model.config.get_text_config()
    lengths = [*probe_lengths(config, longest=longest), 6, 6, 1]
    rows = [draw_ids(model, length, seed=i) for i, length in enumerate(lengths)]
    alone = [_output(model, input_ids=row[None])[0] for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    model.set_attn_implementation(NAME)
    _output(model, input_ids=ids[:, : min(lengths[0], 9)])  # without a layout: shows which masks the model asks for
    row = pack(ids, torch.tensor(lengths, device=device))
    packed = _output(model, **row.inputs)[0]
    if row.layout.num_calls != config.num_hidden_layers:
        raise CannotPackError(f"{row.layout.num_calls} of its {config.num_hidden_layers} layers are plain attention")
    expected = torch.cat(alone)
    difference = float((packed - expected).float().norm() / expected.float().norm().clamp(min=1e-9))
    computed = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else expected.dtype
    if not difference <= _PROBE_BOUNDS[computed]:
        raise CannotPackError(f"packed sequences differ from each alone by {difference:.2g} of their size")


def _output(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Return the last hidden states, or the logits where the model has no separate decoder."""
    outputs = model.base_model(**inputs, use_cache=False)
    found: Tensor = outputs.logits if model.base_model is model else outputs.last_hidden_state
    return found


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention [1, N, H, D] within each sequence of a packed row.

    query: [1, H, N, D]; key and value: the same with H heads or fewer. Without a layout it is the causal attention of
    right-padded rows. Raises CannotPackError for anything more.
    """
    if odd := [n for n, x in others.items() if n not in _HARMLESS and x is not None and x is not False]:
        raise CannotPackError(f"its attention takes {', '.join(odd)}")
    if others.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise CannotPackError("its attention is not causal")
    if packing is None:
        if attention_mask is not None:
            raise CannotPackError("its attention needs a mask other than the causal one")
        return sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling)
    packing.num_calls += 1
    device = query.device.type
    if torch.is_autocast_enabled(device):  # norms and rotations change it; kernels need one dtype
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    q, k, v = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))  # [N, H, D]
    if dropout == 0.0 and _has_varlen(q, v):
        return _by_varlen(q, k, v, packing, scaling).unsqueeze(0), None
    return _by_length(q, k, v, packing, scaling, dropout).unsqueeze(0), None


def _has_varlen(query: Tensor, value: Tensor) -> bool:
    """Return whether torch's varlen kernel (FlashAttention) accepts them."""
    is_half, width = query.dtype in (torch.float16, torch.bfloat16), query.shape[-1]
    if not (query.is_cuda and is_half and width == value.shape[-1] <= 256 and width % 8 == 0):
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def _by_varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None) -> Tensor:
    """Compute [N, H, D] with one kernel for all lengths."""
    # imported here: it loads torch's compiler, which takes seconds that a process on a CPU can save
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 accepts fewer key heads without the argument
    gqa: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    span = (layout.offsets, layout.offsets, layout.longest, layout.longest)
    attended = varlen_attn(query, key, value, *span, scale=scaling, window_size=(-1, 0), **gqa)
    assert isinstance(attended, Tensor)
    return attended


def _by_length(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, dropout: float
) -> Tensor:
    """Compute [N, H, D] with one batched call per distinct length."""
    sizes = [count * length for count, length in layout.groups]
    parts = []
    for group, *chunk in zip(layout.groups, *(x.split(sizes) for x in (query, key, value)), strict=True):
        q, k, v = (x.unflatten(0, group).transpose(1, 2) for x in chunk)  # [count, H, length, D]
        attended = scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def _causal_or_refused(**asked: Any) -> Tensor | None:
    """Return no mask for plain causal attention, else one that `packed_attention` refuses when it is not packed."""
    is_plain = asked["mask_function"] is causal_mask_function and asked.get("local_size") is None
    return None if is_plain and asked.get("attention_mask") is None else torch.empty(0)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _causal_or_refused)
