"""Padding-free forward passes: the sequences of a batch one after another in a single row, what several begin with once.

    padded   p p a a a      packed   p p a a a b x x x      pieces   p p: itself;  a a a and b: p p and itself;  x x x: itself
             p p b . .
             x x x . .

Everything but attention works on single tokens, so a packed row costs what its tokens cost: the prompt of a group is computed
once, and its completions attend to it and to themselves. Attention is registered with transformers under the name
`sluice_packed`: one varlen kernel on a GPU in half precision, elsewhere one call per distinct size of a piece. Positions count
from 0 in each sequence; what has the most keys comes first.

A model is packed only after `enable_packing` has checked that it computes packed sequences as it computes each alone, and
makes no call that this attention does not support (windows, soft caps, sinks, biases, layers other than attention).

Legend: B = sequences, S = padded length, K = pieces, N = tokens of the row, M = keys of all pieces, H = heads, D = their width.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
    """Where the pieces of a packed row are: an argument of every attention call of a packed forward pass."""

    groups: tuple[tuple[int, int, int], ...]
    "(pieces, tokens of each, keys of each), in the order of the row: pieces of one size are neighbours"
    query_offsets: Tensor
    "int32 [K + 1], where each begins; last, N"
    key_offsets: Tensor
    "int32 [K + 1], where its keys begin in `keys`; last, M"
    keys: Tensor | None
    "long [M], the token that each key is; none where every piece has its own tokens alone"
    num_calls: int = 0
    "attention calls so far"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """What a packed forward pass reads, and where in it each sequence is."""

    inputs: dict[str, Any]
    "input_ids and position_ids, long [1, N]; the layout as `packing`"
    layout: Layout
    prefix_lengths: Tensor
    "long [B], in the order of the batch"
    prefix_starts: Tensor
    "long [B], where the sequence's prefix begins"
    rest_starts: Tensor
    "long [B], where the token after it is"

    def place(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return where in the row the tokens at these positions of these sequences are; all of one shape."""
        beyond = positions - self.prefix_lengths[rows]
        return torch.where(beyond < 0, self.prefix_starts[rows] + positions, self.rest_starts[rows] + beyond)


def equal_prefixes(input_ids: Tensor, prefix_lengths: Tensor) -> Tensor:
    """Return a number per row, long [B]: rows that begin with the same prefix_lengths [B] tokens have the same."""
    columns = torch.arange(int(prefix_lengths.max()), device=input_ids.device)
    prefixes = input_ids[:, : len(columns)].where(columns < prefix_lengths.unsqueeze(-1), -1)
    found: Tensor = torch.unique(prefixes, dim=0, return_inverse=True)[1]
    return found


def pack(input_ids: Tensor, prefix_lengths: Tensor, lengths: Tensor) -> PackedRow:
    """Pack the first lengths [B] tokens of the rows of input_ids [B, S].

    prefix_lengths: [B], from 1 to the length. Rows whose prefixes are the same tokens share them.
    """
    device, every = input_ids.device, torch.arange(len(input_ids), device=input_ids.device)
    # A prefix that several rows have is a piece of its own, taken from the first of them; a row's rest is another, or all of it.
    family = equal_prefixes(input_ids, prefix_lengths)
    num_members = torch.bincount(family)
    first = torch.full_like(num_members, len(every)).scatter_reduce(0, family, every, "amin")
    is_shared = num_members[family] > 1
    heads = every[is_shared & (first[family] == every)]
    shared_lengths = prefix_lengths.where(is_shared, 0)
    rests = every[lengths > shared_lengths]
    rows = torch.cat([heads, rests])
    begins = torch.cat(
        [torch.zeros_like(heads), shared_lengths[rests]]
    )  # columns of the first token, and of the one after
    ends = torch.cat([prefix_lengths[heads], lengths[rests]])
    is_head = torch.arange(len(rows), device=device) < len(heads)
    order = (ends * (input_ids.shape[1] + 1) - begins).argsort(descending=True, stable=True)
    rows, begins, ends, is_head = (x[order] for x in (rows, begins, ends, is_head))
    sizes = ends - begins
    starts = sizes.cumsum(0) - sizes
    # Where each row's prefix is: at the start of its family's piece, or of its own.
    head_starts = torch.zeros_like(num_members).index_put((family[rows[is_head]],), starts[is_head])
    rest_starts = torch.zeros_like(every).index_put((rows[~is_head],), starts[~is_head])
    prefix_starts = torch.where(is_shared, head_starts[family], rest_starts)
    # The tokens of the row, and the keys that each piece attends to: those of the prefix before it, then its own.
    piece = torch.arange(len(rows), device=device).repeat_interleave(sizes)  # [N]
    columns = begins[piece] + torch.arange(len(piece), device=device) - starts[piece]  # [N]
    key_starts = ends.cumsum(0) - ends
    keys = None
    if len(heads):
        of = torch.arange(len(rows), device=device).repeat_interleave(ends)  # [M]
        column = torch.arange(len(of), device=device) - key_starts[of]  # [M]
        keys = torch.where(column < begins[of], prefix_starts[rows[of]] + column, starts[of] + column - begins[of])
    pairs = zip(sizes.tolist(), ends.tolist(), strict=True)
    layout = Layout(
        groups=tuple((len(list(same)), *size) for size, same in groupby(pairs)),
        query_offsets=_offsets(sizes),
        key_offsets=_offsets(ends),
        keys=keys,
    )
    inputs = {"input_ids": input_ids[rows[piece], columns], "position_ids": columns}
    return PackedRow(
        inputs={name: ids.unsqueeze(0) for name, ids in inputs.items()} | {"packing": layout},
        layout=layout,
        prefix_lengths=prefix_lengths,
        prefix_starts=prefix_starts,
        rest_starts=torch.where(is_shared, rest_starts, rest_starts + prefix_lengths),
    )


def _offsets(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()


def plan_batches(
    sequences: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]], *, max_tokens: int, packed: bool
) -> list[list[int]]:
    """Divide the indices of all (prompt_ids, token_ids) into the fewest batches of max_tokens each, about equally full.

    The longest comes first, and where the model is packed after it those with its prompt. A packed batch counts its tokens, an
    equal prompt once; a padded one its rows times the longest. A longer sequence is a batch of its own.
    """
    lengths = [len(prompt) + len(tokens) for prompt, tokens in sequences]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # stable: equal lengths keep their order
    prompts = [prompt.tobytes() for prompt, _ in sequences]
    if packed:
        rank = {prompt: i for i, prompt in reversed(list(enumerate(prompts[i] for i in order)))}
        order.sort(key=lambda i: rank[prompts[i]])

    def fill(bound: int) -> list[list[int]]:
        batches: list[list[int]] = []
        used = 0
        for i in order:
            more = lengths[i] if packed else (lengths[batches[-1][0]] if batches else 0)
            if packed and batches and prompts[batches[-1][-1]] == prompts[i]:
                more = len(sequences[i][1])
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
    rows = [draw_ids(model, n, seed=i) for i, n in enumerate([*probe_lengths(config, longest=longest), 6, 6, 1])]
    # Of the longest and of one of 6 tokens, most is shared with a row that ends otherwise.
    prefix_lengths = [len(row) - min(3, len(row) - 1) for row in rows]
    for i in (0, -2):
        rows.append(torch.cat([rows[i][: prefix_lengths[i]], draw_ids(model, 2, seed=len(rows))]))
        prefix_lengths.append(prefix_lengths[i])
    alone = [_output(model, input_ids=row[None])[0] for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    model.set_attn_implementation(NAME)
    _output(model, input_ids=ids[:, : min(len(rows[0]), 9)])  # without a layout: shows which masks the model asks for
    lengths = torch.tensor([len(row) for row in rows], device=device)
    row = pack(ids, torch.tensor(prefix_lengths, device=device), lengths)
    hidden = _output(model, **row.inputs)[0]
    if row.layout.num_calls != config.num_hidden_layers:
        raise CannotPackError(f"{row.layout.num_calls} of its {config.num_hidden_layers} layers are plain attention")
    places = [(torch.full_like(each, i), torch.arange(len(each), device=device)) for i, each in enumerate(rows)]
    packed, expected = torch.cat([hidden[row.place(*of)] for of in places]), torch.cat(alone)
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
    """Compute causal attention [1, N, H, D] of each piece of a packed row to what it continues, and to itself.

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
    if packing.keys is not None:
        k, v = k.index_select(0, packing.keys), v.index_select(0, packing.keys)  # [M, H, D]
    if dropout == 0.0 and _has_varlen(q, v):
        return _by_varlen(q, k, v, packing, scaling).unsqueeze(0), None
    return _by_size(q, k, v, packing, scaling, dropout).unsqueeze(0), None


def _has_varlen(query: Tensor, value: Tensor) -> bool:
    """Return whether torch's varlen kernel (FlashAttention) accepts them."""
    is_half, width = query.dtype in (torch.float16, torch.bfloat16), query.shape[-1]
    if not (query.is_cuda and is_half and width == value.shape[-1] <= 256 and width % 8 == 0):
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def _by_varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None) -> Tensor:
    """Compute [N, H, D] with one kernel for all pieces; key and value are [M, H, D]."""
    # imported here: it loads torch's compiler, which takes seconds that a process on a CPU can save
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 accepts fewer key heads without the argument
    gqa: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    longest = max(tokens for _, tokens, _ in layout.groups), max(keys for _, _, keys in layout.groups)
    span = (layout.query_offsets, layout.key_offsets, *longest)  # the last query is aligned with the last key
    attended = varlen_attn(query, key, value, *span, scale=scaling, window_size=(-1, 0), **gqa)
    assert isinstance(attended, Tensor)
    return attended


def _by_size(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, dropout: float
) -> Tensor:
    """Compute [N, H, D] with one batched call per distinct size of a piece; key and value are [M, H, D]."""
    tokens, keys = ([count * size[i] for count, *size in layout.groups] for i in (0, 1))
    parts = []
    for group, q, k, v in zip(layout.groups, query.split(tokens), key.split(keys), value.split(keys), strict=True):
        count, num_queries, num_keys = group
        q = q.unflatten(0, (count, num_queries)).transpose(1, 2)  # [count, H, queries, D]
        k, v = (x.unflatten(0, (count, num_keys)).transpose(1, 2) for x in (k, v))
        mask = None
        if num_queries < num_keys:
            mask = q.new_ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        attended = scaled_dot_product_attention(
            *(q, k, v, mask),
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        parts.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def _causal_or_refused(**asked: Any) -> Tensor | None:
    """Return no mask for plain causal attention, else one that `packed_attention` refuses when it is not packed."""
    is_plain = asked["mask_function"] is causal_mask_function and asked.get("local_size") is None
    return None if is_plain and asked.get("attention_mask") is None else torch.empty(0)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _causal_or_refused)
