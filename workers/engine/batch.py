"""The rows that decode together: admit, step, retire. No threads, no policies: `torch_engine` drives it.

Legend: R = rows allocated, n = rows active (always the first n), W = token positions allocated, S = positions
attended (the longest row, rounded up), V = vocabulary, G = groups admitted together, P = the longest of their prompts.

Invariants:
* row r's sequence is tokens[r, :lengths[r]], prompt then completion; logprobs[r, p] and uniforms[r, p] belong to the
  token at p. Noise is drawn at admission, so it depends on the seed and the place in the group, not on the batch;
* before a step the cache holds every token of a row but its last; the step runs that one and samples the next. So
  admitting a prompt and recomputing a row are one operation, and no prefill computes logits;
* a step reads one thing back from the device: which rows have finished. The host knows all lengths without asking,
  because every row grows by one each step (length = row.offset + number of steps).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from common.errors import EngineError
from common.types import Completion
from workers.engine import GenerationRequest
from workers.engine.kv_cache import SlotCache, cache_argument, round_up
from workers.engine.sampling import sample

PREFILL_TOKENS = 16384
"Padded tokens of one prefill pass; a longer single prompt goes alone."


@dataclass(eq=False, kw_only=True, slots=True)
class Group:
    """One request, and what of it is finished."""

    request: GenerationRequest
    future: Future[list[Completion]] = field(default_factory=Future)
    completions: dict[int, Completion] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.request.sampling.n

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def is_complete(self) -> bool:
        return len(self.completions) == self.size


@dataclass(eq=False, kw_only=True, slots=True)
class Row:
    """The host's side of one running completion."""

    group: Group
    index: int
    "place in the group"
    offset: int
    "sequence length less the batch's step count: constant while the row runs"
    marks: list[tuple[int, int]]
    "(policy version, sequence length from which on it samples)"


class RunningBatch:
    """Continuous batch over one model; owned by one thread."""

    def __init__(
        self, model: PreTrainedModel, *, eos_token_ids: Sequence[int], max_sequences: int, max_model_len: int
    ) -> None:
        self.rows: list[Row] = []
        self._model = model
        self._cache_argument = cache_argument(model)
        self._device, self._dtype = model.device, model.dtype
        self._max_sequences = max_sequences
        self._cache = SlotCache(max_rows=max_sequences, max_length=max_model_len)
        self._num_steps = 0
        self._longest_offset = 0
        self._sampling: dict[str, Any] = {}
        self._positions = torch.arange(round_up(max_model_len), device=self._device)  # [max S]
        self._eos_token_ids = frozenset(eos_token_ids)
        self._is_eos = torch.zeros(model.config.get_text_config().vocab_size, dtype=torch.bool, device=self._device)
        self._is_eos[list(eos_token_ids)] = True  # [V]
        self._tokens = self._empty(0, 0, dtype=torch.long)  # [R, W]
        self._logprobs = self._empty(0, 0, dtype=torch.float32)  # [R, W]
        self._uniforms = self._empty(0, 0, dtype=torch.float32)  # [R, W]
        self._lengths = self._empty(0, dtype=torch.long)  # [R]
        self._limits = self._empty(0, dtype=torch.long)  # [R], the length at which a row ends

    def admit(self, groups: Sequence[Group], *, version: int) -> None:
        """Prefill each prompt once and start its rows; `version` samples their first token."""
        first, sizes = len(self.rows), [group.size for group in groups]
        lengths = torch.tensor([group.prompt_length for group in groups])  # [G]
        max_tokens = torch.tensor([group.request.sampling.max_tokens for group in groups])  # [G]
        source = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(sizes))  # [rows], prompt of each row
        self._reserve(rows=first + len(source), width=int((lengths + max_tokens).max()))
        prompts = torch.zeros(len(groups), int(lengths.max()), dtype=torch.long)  # [G, P], padded on the right
        new = slice(first, first + len(source))
        row = first
        for prompt, group in zip(prompts, groups, strict=True):
            prompt[: group.prompt_length] = torch.from_numpy(np.asarray(group.request.prompt_ids))
            noise = _noise(group)  # [group size, max_tokens]
            start = group.prompt_length
            self._uniforms[row : row + group.size, start : start + noise.shape[1]] = noise.to(self._device)
            row += group.size
        prompts, source = prompts.to(self._device), source.to(self._device)
        self._tokens[new, : prompts.shape[1]] = prompts[source]
        self._lengths[new] = lengths.to(self._device)[source]
        self._limits[new] = (lengths + max_tokens).to(self._device)[source]
        self._prefill(prompts[:, :-1], first_row=first, source=source)
        for group in groups:
            start = group.prompt_length
            self.rows += [
                Row(group=group, index=i, offset=start - self._num_steps, marks=[(version, start)])
                for i in range(group.size)
            ]
        self._recompose(came=True)

    def step(self) -> list[tuple[Row, Completion]]:
        """One more token for every row; returns the rows that this token finished, in no order."""
        n = len(self.rows)
        lengths = self._lengths[:n]
        position = lengths[:, None]  # [n, 1], of the token to sample
        logits = self._forward(n)
        tokens, logprobs = sample(logits, uniforms=self._uniforms[:n].gather(1, position)[:, 0], **self._sampling)
        self._tokens[:n].scatter_(1, position, tokens[:, None])
        self._logprobs[:n].scatter_(1, position, logprobs[:, None])
        lengths += 1
        self._num_steps += 1
        finished = (self._is_eos[tokens] | (lengths == self._limits[:n])).nonzero().flatten()
        done: list[int] = finished.tolist()
        if not done:
            return []
        results = self._completions(finished, [self.rows[r] for r in done])
        self._remove(done)
        return results

    def discard(self, groups: set[Group]) -> None:
        """Drop the rows of these groups."""
        self._remove([r for r, row in enumerate(self.rows) if row.group in groups])

    def mark(self, version: int) -> None:
        """From the next step on, `version` samples."""
        for row in self.rows:
            length = row.offset + self._num_steps
            if row.marks[-1][1] == length:  # no token was sampled under the version before
                row.marks.pop()
            row.marks.append((version, length))

    def recompute(self) -> Iterator[None]:
        """Rebuild the cache of all rows with the model's present weights; yields after every pass, for progress."""
        lengths = [row.offset + self._num_steps for row in self.rows]
        rows_per_pass = max(1, PREFILL_TOKENS // max(lengths, default=1))
        for first in range(0, len(lengths), rows_per_pass):
            part = lengths[first : first + rows_per_pass]
            sequences = self._tokens[first : first + len(part), : max(part) - 1]
            self._prefill(sequences, first_row=first, source=torch.arange(len(part), device=self._device))
            yield

    def _prefill(self, sequences: Tensor, *, first_row: int, source: Tensor) -> None:
        """Cache `sequences` [G, P]; row first_row + i takes sequence source[i].

        Padding is on the right: the causal mask keeps it from the tokens before it, decoding overwrites it before it
        is attended.
        """
        if sequences.shape[1] == 0:
            return
        prefilled = DynamicCache()
        self._model.base_model(
            input_ids=sequences,
            position_ids=self._positions[None, : sequences.shape[1]],
            **{self._cache_argument: prefilled},
            use_cache=True,
        )
        self._cache.reserve(rows=first_row + len(source), length=sequences.shape[1])
        self._cache.fill(prefilled, first_row=first_row, source=source)

    def _forward(self, n: int) -> Tensor:
        """Run the last token of every row: logits [n, V] of the next."""
        span = round_up(self._longest_offset + self._num_steps)  # S
        self._cache.reserve(rows=n, length=span)
        lengths = self._lengths[:n]
        last = lengths - 1  # [n]
        self._cache.begin_step(positions=last, span=span)
        hidden = self._positions[:span] >= lengths[:, None]  # [n, S]
        mask = torch.zeros(n, span, dtype=self._dtype, device=self._device).masked_fill_(hidden, -torch.inf)
        output = self._model(
            input_ids=self._tokens[:n].gather(1, last[:, None]),
            position_ids=last[:, None],
            attention_mask=mask[:, None, None],
            **{self._cache_argument: self._cache},
            use_cache=True,
        )
        return output.logits[:, -1]

    def _completions(self, finished: Tensor, rows: list[Row]) -> list[tuple[Row, Completion]]:
        """What the rows at indices `finished` have become. Raises EngineError where a logprob is not finite."""
        tokens = self._tokens[finished].int().cpu().numpy()  # [finished, W]
        logprobs = self._logprobs[finished].cpu().numpy()  # [finished, W]
        results = []
        for i, row in enumerate(rows):
            length = row.offset + self._num_steps
            part = slice(row.group.prompt_length, length)
            if not np.isfinite(logprobs[i, part]).all():
                raise EngineError(f"policy version {row.marks[-1][0]} gives logprobs that are not finite")
            completion = Completion(
                token_ids=tokens[i, part].copy(),
                rollout_logprobs=logprobs[i, part].copy(),
                policy_versions=_spans(row.marks, end=length),
                finish_reason="stop" if int(tokens[i, length - 1]) in self._eos_token_ids else "length",
            )
            results.append((row, completion))
        return results

    def _remove(self, done: list[int]) -> None:
        """Close the holes: rows from the end take the places of those removed."""
        n, gone = len(self.rows), set(done)
        kept = n - len(gone)
        targets = [r for r in done if r < kept]
        sources = [r for r in range(kept, n) if r not in gone]
        if sources:
            span = round_up(self._longest_offset + self._num_steps)
            to, of = torch.tensor(targets, device=self._device), torch.tensor(sources, device=self._device)
            self._cache.move(sources=of, targets=to, span=span)
            for tensor in (self._tokens, self._logprobs, self._uniforms, self._lengths, self._limits):
                tensor[to] = tensor[of]
            for target, source in zip(targets, sources, strict=True):
                self.rows[target] = self.rows[source]
        del self.rows[kept:]
        self._recompose(came=False)

    def _recompose(self, *, came: bool) -> None:
        """After rows came or went: the longest row, and the sampling arguments that some row asks for."""
        self._longest_offset = max((row.offset for row in self.rows), default=0)
        if not came and not self._sampling:
            return  # fewer rows ask for no more than nothing
        asked = [row.group.request.sampling for row in self.rows]
        self._sampling = {}
        if any(s.temperature == 0 for s in asked):
            self._sampling["greedy"] = self._column([s.temperature == 0 for s in asked])
        if any(s.temperature not in (0, 1) for s in asked):
            self._sampling["temperature"] = self._column([s.temperature or 1.0 for s in asked])
        if any(s.temperature > 0 and (s.top_k > 0 or s.top_p < 1) for s in asked):
            self._sampling["truncation"] = (
                self._column([s.top_k if s.temperature > 0 else 0 for s in asked]),
                self._column([s.top_p if s.temperature > 0 else 1.0 for s in asked]),
            )

    def _reserve(self, *, rows: int, width: int) -> None:
        old_rows, old_width = self._tokens.shape
        if rows <= old_rows and width <= old_width:
            return
        rows, width = max(rows, old_rows, min(2 * old_rows, self._max_sequences)), max(width, old_width)
        self._tokens, self._logprobs, self._uniforms = (
            self._copied(old, self._empty(rows, width, dtype=old.dtype))
            for old in (self._tokens, self._logprobs, self._uniforms)
        )
        self._lengths, self._limits = (
            self._copied(old, self._empty(rows, dtype=old.dtype)) for old in (self._lengths, self._limits)
        )

    def _column(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, device=self._device)

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self._device)

    @staticmethod
    def _copied(old: Tensor, new: Tensor) -> Tensor:
        new[tuple(slice(0, size) for size in old.shape)] = old
        return new


def _noise(group: Group) -> Tensor:
    """All uniforms of a group, [group size, max_tokens], on the CPU: the same on every device."""
    sampling = group.request.sampling
    return torch.rand(sampling.n, sampling.max_tokens, generator=torch.Generator().manual_seed(sampling.seed))


def _spans(marks: list[tuple[int, int]], *, end: int) -> tuple[tuple[int, int], ...]:
    """Run lengths from (version, first position) marks."""
    ends = [start for _, start in marks[1:]] + [end]
    return tuple((version, stop - start) for (version, start), stop in zip(marks, ends, strict=True))
