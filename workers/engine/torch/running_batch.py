"""The rows that decode together: admit, step, retire. No threads, no policies: `torch_engine` drives it.

Legend: n = rows active (always the first n), S = positions attended by the rows of a forward pass (the longest of them,
rounded up), V = vocabulary, E = distinct sets of end tokens, G = groups admitted together, P = the longest of their prompts.

Invariants:
* noise is drawn at admission, so it depends on the seed and the place in the group, not on the batch;
* before a step the cache holds every token of a row but its last; the step runs that one and samples the next. So
  admitting a prompt and recomputing a row are one operation, and no prefill computes logits;
* a step reads one thing back from the device: which rows have finished (and the tokens of rows that have stop texts). The
  host knows all lengths without asking, because every row grows by one each step (length = row.offset + number of steps);
* a few long rows do not make the others attend to their length: they run in a forward pass of their own where that costs
  less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sluice.common.errors import EngineError
from sluice.common.types import Completion
from sluice.workers.engine.serving import version_spans
from sluice.workers.engine.torch.batch_tensors import BatchTensors
from sluice.workers.engine.torch.kv_cache import SlotCache, cache_argument, round_up
from sluice.workers.engine.torch.sampling import sample
from sluice.workers.engine.torch.scheduler import PREFILL_TOKENS
from sluice.workers.engine.torch.sequence import RunningSequence, SequenceGroup, features, noise, parameters
from sluice.workers.engine.torch.split_batch import SPLIT_SAVES, split_batch
from sluice.workers.engine.torch.stop_strings import StopStrings


class RunningBatch:
    """Continuous batch over one model; owned by one thread.

    max_positions: bound on the positions (rows times longest) that keys and values are stored for; none = no bound.
    decode: text of token ids, for stop texts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int],
        max_sequences: int,
        max_model_len: int,
        max_positions: int | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.rows: list[RunningSequence] = []
        self._model = model
        self._decode = decode
        self._cache_argument = cache_argument(model)
        self._device, self._dtype = model.device, model.dtype
        self._max_positions = max_positions
        self._cache = SlotCache(
            max_rows=max_sequences, max_length=max_model_len, max_positions=max_positions, device=model.device
        )
        self._tensors = BatchTensors(max_rows=max_sequences, device=model.device)
        self._num_steps = 0
        self._spans: list[tuple[slice, int]] = []  # rows of each forward pass, and the largest offset among them
        self._asked: Counter[str] = Counter()  # running rows per sampling feature
        self._split_saves = SPLIT_SAVES.get(model.device.type, SPLIT_SAVES["cuda"])
        self._early_until = 0  # number of steps from which on no row is short of min_tokens
        self._positions = torch.arange(round_up(max_model_len), device=self._device)  # [max S]
        self._eos_token_ids = frozenset(eos_token_ids)
        self._end_sets: dict[frozenset[int], int] = {}
        self._is_end = torch.zeros(0, model.config.get_text_config().vocab_size, dtype=torch.bool, device=self._device)
        self._end_set(self._eos_token_ids)  # set 0

    @property
    def longest(self) -> int:
        """Tokens that the longest running row may reach."""
        return max((row.group.max_length for row in self.rows), default=0)

    def admit(self, groups: Sequence[SequenceGroup], *, version: int) -> None:
        """Prefill each prompt once and start its rows; `version` samples their first token."""
        first, sizes = len(self.rows), [group.size for group in groups]
        source = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(sizes))  # [rows], prompt of each row
        width = max(group.max_length for group in groups)
        self._tensors.reserve(rows=first + len(source), width=width)
        if self._max_positions is not None:  # laid out once for what was admitted, not every few steps
            self._reserve(rows=first + len(source), length=max(width, self.longest))
        prompts = torch.zeros(len(groups), max(group.prompt_length for group in groups), dtype=torch.long)  # [G, P]
        row = first
        for prompt, group in zip(prompts, groups, strict=True):
            prompt[: group.prompt_length] = torch.from_numpy(np.asarray(group.request.prompt_ids))
            self._tensors.uniforms[row : row + group.size, group.prompt_length : group.max_length] = noise(group).to(
                self._device
            )
            row += group.size
        counts = torch.tensor([self._counts(group) for group in groups]).T  # [4, G]
        knobs = torch.tensor([parameters(group.request.sampling) for group in groups]).T  # [4, G]
        self._tensors.write(first, counts=counts[:, source], parameters=knobs[:, source])
        prompts, source = prompts.to(self._device), source.to(self._device)
        self._tensors.tokens[first : first + len(source), : prompts.shape[1]] = prompts[source]
        held = [group.prompt_length - 1 for group in groups for _ in range(group.size)]
        self._prefill(prompts[:, :-1], first_row=first, source=source, held=held)
        for group in groups:
            self._early_until = max(self._early_until, self._num_steps + group.request.sampling.min_tokens)
            self._asked.update(dict.fromkeys(features(group.request.sampling), group.size))
            self.rows += [self._row(group, index, version=version) for index in range(group.size)]
        self._rearrange()

    def step(self) -> list[tuple[RunningSequence, Completion]]:
        """One more token for every row; returns the rows that this token finished, in no order."""
        n, tensors = len(self.rows), self._tensors
        lengths = tensors.lengths[:n]
        position = lengths[:, None]  # [n, 1], of the token to sample
        stages = [self._forward(rows, longest=offset + self._num_steps) for rows, offset in self._spans]
        logits = self._without_early_ends(stages[0] if len(stages) == 1 else torch.cat(stages))
        uniforms = tensors.uniforms[:n].gather(1, position)[:, 0]
        tokens, logprobs = sample(logits, uniforms=uniforms, **self._sampling(n))
        tensors.tokens[:n].scatter_(1, position, tokens[:, None])
        tensors.logprobs[:n].scatter_(1, position, logprobs[:, None])
        lengths += 1
        self._num_steps += 1
        is_end = self._is_end[0, tokens] if len(self._is_end) == 1 else self._is_end[tensors.end_sets[:n], tokens]
        finished = (is_end | (lengths == tensors.limits[:n])).nonzero().flatten()
        done: list[int] = finished.tolist()
        stopped = self._stopped(tokens) if self._asked["stop"] else set()
        if stopped:
            done = sorted({*done, *stopped})
            finished = torch.tensor(done, device=self._device)
        if not done:
            return []
        results = self._completions(finished, done, stopped=stopped)
        self._remove(done)
        return results

    def discard(self, groups: set[SequenceGroup]) -> None:
        """Drop the rows of these groups."""
        self._remove([r for r, row in enumerate(self.rows) if row.group in groups])

    def start_version(self, version: int) -> None:
        """From the next step on, `version` samples."""
        for row in self.rows:
            length = row.offset + self._num_steps
            if row.version_starts[-1][1] == length:  # no token was sampled under the version before
                row.version_starts.pop()
            row.version_starts.append((version, length))

    def recompute(self) -> Iterator[None]:
        """Rebuild the cache of all rows with the model's present weights; yields after every pass, for progress."""
        held = self._held(self.rows)
        rows_per_pass = max(1, PREFILL_TOKENS // max((1, *held)))
        for first in range(0, len(held), rows_per_pass):
            stage = held[first : first + rows_per_pass]
            sequences = self._tensors.tokens[first : first + len(stage), : max(stage)]
            self._prefill(sequences, first_row=first, source=torch.arange(len(stage), device=self._device), held=stage)
            yield

    def _prefill(self, sequences: Tensor, *, first_row: int, source: Tensor, held: list[int]) -> None:
        """Cache `sequences` [G, P]; row first_row + i takes the first held[i] tokens of sequence source[i].

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
        rows = max(first_row + len(source), len(self.rows))
        self._reserve(rows=rows, length=max(sequences.shape[1], self._longest_length()))
        self._cache.fill(prefilled, first_row=first_row, source=source, held=held)

    def _forward(self, rows: slice, *, longest: int) -> Tensor:
        """Run the last token of these rows, of which the longest has `longest` tokens: logits [n, V] of the next."""
        span = round_up(longest)  # S
        self._reserve(rows=len(self.rows), length=round_up(self._longest_length()))
        lengths = self._tensors.lengths[rows]
        last = lengths - 1  # [n]
        self._cache.begin_step(rows=rows, positions=last, span=span)
        hidden = self._positions[:span] >= lengths[:, None]  # [n, S]
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, -torch.inf)
        output = self._model(
            input_ids=self._tensors.tokens[rows].gather(1, last[:, None]),
            position_ids=last[:, None],
            attention_mask=mask[:, None, None],
            **{self._cache_argument: self._cache},
            use_cache=True,
        )
        return output.logits[:, -1]

    def _reserve(self, *, rows: int, length: int) -> None:
        if not self._cache.has_room(rows=rows, length=length):
            self._cache.reserve(rows=rows, length=length, held=self._held(self.rows))

    def _held(self, rows: Sequence[RunningSequence]) -> list[int]:
        """Tokens of each row whose keys and values are cached: all but the last."""
        return [row.offset + self._num_steps - 1 for row in rows]

    def _longest_length(self) -> int:
        return max((offset for _, offset in self._spans), default=-self._num_steps) + self._num_steps

    def _without_early_ends(self, logits: Tensor) -> Tensor:
        """End tokens at -inf in the rows that have not come to min_tokens."""
        if self._num_steps >= self._early_until:
            return logits
        n = len(logits)
        is_early = self._tensors.lengths[:n] < self._tensors.ends_from[:n]  # [n]
        return logits.masked_fill(is_early[:, None] & self._is_end[self._tensors.end_sets[:n]], -torch.inf)

    def _sampling(self, n: int) -> dict[str, Any]:
        """The arguments of `sample` that some row asks for."""
        arguments: dict[str, Any] = {}
        if self._asked["temperature"]:
            arguments["temperature"] = self._tensors.temperature[:n]
        if self._asked["truncation"]:
            arguments["truncation"] = {name: column[:n] for name, column in self._tensors.truncation.items()}
        return arguments

    def _stopped(self, tokens: Tensor) -> set[int]:
        """The rows whose newest token completes a stop text, once they have min_tokens."""
        asking = [(r, row) for r, row in enumerate(self.rows) if row.stop_strings is not None]
        newest: list[int] = tokens[torch.tensor([r for r, _ in asking], device=self._device)].tolist()
        stopped = set()
        for (r, row), token in zip(asking, newest, strict=True):
            assert row.stop_strings is not None
            is_complete = row.stop_strings.completed_by(token)
            num_tokens = row.offset + self._num_steps - row.group.prompt_length
            if is_complete and num_tokens >= row.group.request.sampling.min_tokens:
                stopped.add(r)
        return stopped

    def _completions(
        self, finished: Tensor, done: list[int], *, stopped: set[int]
    ) -> list[tuple[RunningSequence, Completion]]:
        """What the rows `done` (`finished` on the device) are. Raises EngineError where a logprob is not finite."""
        tokens = self._tensors.tokens[finished].int().cpu().numpy()  # [finished, W]
        logprobs = self._tensors.logprobs[finished].cpu().numpy()  # [finished, W]
        results = []
        for i, r in enumerate(done):
            row = self.rows[r]
            length = row.offset + self._num_steps
            stage = slice(row.group.prompt_length, length)
            if not np.isfinite(logprobs[i, stage]).all():
                raise EngineError(f"policy version {row.version_starts[-1][0]} gives logprobs that are not finite")
            last = int(tokens[i, length - 1])
            has_stopped = (
                r in stopped or last in self._eos_token_ids or last in row.group.request.sampling.stop_token_ids
            )
            completion = Completion(
                token_ids=tokens[i, stage].copy(),
                rollout_logprobs=logprobs[i, stage].copy(),
                policy_versions=version_spans(row.version_starts, end=length),
                finish_reason="stop" if has_stopped else "length",
            )
            results.append((row, completion))
        return results

    def _remove(self, done: list[int]) -> None:
        """Close the holes: rows from the end take the places of those removed."""
        n, gone = len(self.rows), set(done)
        for r in done:
            self._asked.subtract(features(self.rows[r].group.request.sampling))
        kept = n - len(gone)
        targets = [r for r in done if r < kept]
        sources = [r for r in range(kept, n) if r not in gone]
        if sources:
            self._move(sources=sources, targets=targets)
        del self.rows[kept:]
        self._rearrange()

    def _rearrange(self) -> None:
        """After rows came or went: which rows run in which forward pass."""
        offsets = np.array([row.offset for row in self.rows], dtype=np.int64)
        order, spans = split_batch(offsets, split_saves=self._split_saves)
        if order is not None:
            self._move(sources=order, targets=list(range(len(order))))
        self._spans = spans
        if not self.rows:  # sets of end tokens that requests brought
            self._end_sets, self._is_end = {self._eos_token_ids: 0}, self._is_end[:1]

    def _move(self, *, sources: list[int], targets: list[int]) -> None:
        moves = [(of, to) for of, to in zip(sources, targets, strict=True) if of != to]
        rows = [self.rows[of] for of, _ in moves]
        of, to = torch.tensor(moves, device=self._device).T
        self._cache.move(sources=of, targets=to, held=self._held(rows))
        self._tensors.move(sources=of, targets=to)
        for (_, target), row in zip(moves, rows, strict=True):
            self.rows[target] = row

    def _row(self, group: SequenceGroup, index: int, *, version: int) -> RunningSequence:
        start, stop = group.prompt_length, group.request.sampling.stop
        assert not stop or self._decode is not None, "check_request refuses stop texts without a tokenizer"
        texts = StopStrings(stop, self._decode) if stop and self._decode is not None else None
        return RunningSequence(
            group=group,
            index=index,
            offset=start - self._num_steps,
            version_starts=[(version, start)],
            stop_strings=texts,
        )

    def _counts(self, group: SequenceGroup) -> tuple[int, ...]:
        """In the order of `BatchTensors`: length, limit, the length from which on it may end, its set of end tokens."""
        start, sampling = group.prompt_length, group.request.sampling
        ends = self._end_set(self._eos_token_ids | frozenset(sampling.stop_token_ids))
        return start, group.max_length, start + sampling.min_tokens, ends

    def _end_set(self, tokens: frozenset[int]) -> int:
        """Index of a set of end tokens in `_is_end` [E, V]; sets stay until the batch is empty."""
        if tokens not in self._end_sets:
            is_end = torch.zeros(1, self._is_end.shape[1], dtype=torch.bool, device=self._device)
            is_end[0, list(tokens)] = True
            self._end_sets[tokens] = len(self._is_end)
            self._is_end = torch.cat([self._is_end, is_end])
        return self._end_sets[tokens]
