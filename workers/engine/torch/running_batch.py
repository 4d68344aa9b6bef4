"""The sequences that decode together, one row each: admit, step, retire. No threads, no policies: `engine` drives it.

Legend: n = rows active (always the first n), S = positions attended by the rows of a forward pass (the longest of them,
rounded up), V = vocabulary, G = groups admitted together, P = the longest of their prompts.

Invariants:
* noise is drawn at admission, so it depends on the seed and the index in the group, not on the batch;
* before a step the cache holds every token of a row but its last; the step runs that one and samples the next. So
  admitting a prompt and recomputing a row are one operation, and no prefill computes logits;
* a step reads one thing back from the device: which rows have finished (and the tokens of rows that have stop texts). The
  host knows all lengths without asking, because every row grows by one each step (length = offset + number of steps);
* a few long rows do not make the others attend to their length: they run in a forward pass of their own where that is
  cheaper.
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
from sluice.workers.engine.serving import SequenceGroup, version_spans
from sluice.workers.engine.torch.batch_tensors import BatchTensors
from sluice.workers.engine.torch.kv_cache import SlotCache, cache_argument, round_up
from sluice.workers.engine.torch.sampling import sample
from sluice.workers.engine.torch.scheduler import PREFILL_TOKENS
from sluice.workers.engine.torch.sequence import RunningSequence, features, noise, parameters
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
        self.sequences: list[RunningSequence] = []  # one per row, in the order of the rows
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
        vocab_size = model.config.get_text_config().vocab_size
        self._is_end = torch.zeros(vocab_size, dtype=torch.bool, device=self._device)  # [V]
        self._is_end[list(self._eos_token_ids)] = True

    @property
    def longest(self) -> int:
        """Tokens that the longest running sequence may reach."""
        return max((sequence.group.max_length for sequence in self.sequences), default=0)

    def num_tokens(self) -> list[tuple[SequenceGroup, int]]:
        """Return the tokens of each running sequence so far."""
        steps = self._num_steps
        return [(row.group, max(0, row.offset + steps - row.group.prompt_length)) for row in self.sequences]

    def admit(self, groups: Sequence[SequenceGroup], *, version: int) -> None:
        """Prefill each prompt once and start its sequences; `version` samples their first token."""
        # New rows follow the active ones; those of one group are neighbours and share its prompt.
        first, sizes = len(self.sequences), [group.size for group in groups]
        source = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(sizes))  # [rows], prompt of each row
        # Room for the longest that any of them may become. Under a memory bound the cache is laid out for that as well: once,
        # not every few steps.
        width = max(group.max_length for group in groups)
        self._tensors.reserve(rows=first + len(source), width=width)
        if self._max_positions is not None:
            self._reserve(rows=first + len(source), length=max(width, self.longest))
        # Position p of a row holds the uniform number that draws the token at p, from the end of the prompt on.
        prompts = torch.zeros(len(groups), max(group.prompt_length for group in groups), dtype=torch.long)  # [G, P]
        row = first
        for prompt, group in zip(prompts, groups, strict=True):
            prompt[: group.prompt_length] = torch.from_numpy(np.asarray(group.request.prompt_ids))
            self._tensors.uniforms[row : row + group.size, group.prompt_length : group.max_length] = noise(group).to(
                self._device
            )
            row += group.size
        # Counts and parameters of a group are repeated for each of its rows; retired rows have left theirs there.
        starts = [(group.prompt_length, group.max_length, group.request.sampling.min_tokens) for group in groups]
        counts = torch.tensor([(start, limit, start + least) for start, limit, least in starts]).T  # [3, G]
        settings = torch.tensor([parameters(group.request.sampling) for group in groups]).T  # [4, G]
        self._tensors.write(first, counts=counts[:, source], parameters=settings[:, source])
        # The cache gets each prompt but its last token, which the first step runs.
        prompts, source = prompts.to(self._device), source.to(self._device)
        self._tensors.tokens[first : first + len(source), : prompts.shape[1]] = prompts[source]
        held = [group.prompt_length - 1 for group in groups for _ in range(group.size)]
        self._prefill(prompts[:, :-1], first_row=first, source=source, held=held)
        # The rows become active only when all that a step reads of them is on the device.
        for group in groups:
            self._early_until = max(self._early_until, self._num_steps + group.request.sampling.min_tokens)
            self._asked.update(dict.fromkeys(features(group.request.sampling), group.size))
            self.sequences += [self._start(group, index, version=version) for index in range(group.size)]
        self._rearrange()

    def step(self) -> list[tuple[RunningSequence, Completion]]:
        """Sample one more token for every sequence; return the sequences that it finished, in no order."""
        # One or two forward passes cover the first n rows in order, so their logits join to [n, V].
        n, tensors = len(self.sequences), self._tensors
        lengths = tensors.lengths[:n]
        position = lengths[:, None]  # [n, 1], of the token to sample
        outputs = [self._forward(rows, longest=offset + self._num_steps) for rows, offset in self._spans]
        logits = self._without_early_ends(outputs[0] if len(outputs) == 1 else torch.cat(outputs))
        # Each row draws with the uniform number of its own position, and the logprob is that of the distribution drawn from.
        uniforms = tensors.uniforms[:n].gather(1, position)[:, 0]
        tokens, logprobs = sample(logits, uniforms=uniforms, **self._sampling(n))
        tensors.tokens[:n].scatter_(1, position, tokens[:, None])
        tensors.logprobs[:n].scatter_(1, position, logprobs[:, None])
        # Lengths grow on the device and on the host at once; from here on the new token is each row's last.
        lengths += 1
        self._num_steps += 1
        # The step waits for the device here, to learn which rows have ended; rows with stop texts make it wait once more.
        finished = (self._is_end[tokens] | (lengths == tensors.limits[:n])).nonzero().flatten()
        done: list[int] = finished.tolist()
        stopped = self._stopped(tokens) if self._asked["stop"] else set()
        if stopped:
            done = sorted({*done, *stopped})
            finished = torch.tensor(done, device=self._device)
        if not done:
            return []
        # Completions are copied out before their rows are given to others.
        results = self._completions(finished, done, stopped=stopped)
        self._remove(done)
        return results

    def discard(self, groups: set[SequenceGroup]) -> None:
        """Drop the sequences of these groups."""
        self._remove([r for r, sequence in enumerate(self.sequences) if sequence.group in groups])

    def start_version(self, version: int) -> None:
        """Record that `version` samples from the next step on."""
        for sequence in self.sequences:
            length = sequence.offset + self._num_steps
            if sequence.version_starts[-1][1] == length:  # no token was sampled under the version before
                sequence.version_starts.pop()
            sequence.version_starts.append((version, length))

    def recompute(self) -> Iterator[None]:
        """Rebuild the cache of all rows with the model's present weights; yields after every pass, to report progress."""
        held = self._held(self.sequences)
        rows_per_pass = max(1, PREFILL_TOKENS // max((1, *held)))
        for first in range(0, len(held), rows_per_pass):
            chunk = held[first : first + rows_per_pass]
            tokens = self._tensors.tokens[first : first + len(chunk), : max(chunk)]
            self._prefill(tokens, first_row=first, source=torch.arange(len(chunk), device=self._device), held=chunk)
            yield

    def _prefill(self, tokens: Tensor, *, first_row: int, source: Tensor, held: list[int]) -> None:
        """Cache `tokens` [G, P]; row first_row + i takes the first held[i] of prompt source[i].

        Padding is on the right: the causal mask keeps it from the tokens before it, decoding overwrites it before it
        is attended.
        """
        if tokens.shape[1] == 0:
            return
        # The decoder alone runs, without the output head: nothing is sampled from a prefill.
        prefilled = DynamicCache()
        self._model.base_model(
            input_ids=tokens,
            position_ids=self._positions[None, : tokens.shape[1]],
            **{self._cache_argument: prefilled},
            use_cache=True,
        )
        # Reserving may move the cache, so it comes before the copy; rows already cached keep what they hold.
        rows = max(first_row + len(source), len(self.sequences))
        self._reserve(rows=rows, length=max(tokens.shape[1], self._longest_length()))
        self._cache.fill(prefilled, first_row=first_row, source=source, held=held)

    def _forward(self, rows: slice, *, longest: int) -> Tensor:
        """Run the last token of these rows, of which the longest has `longest` tokens; return logits [n, V] of the next."""
        # The slot of every row's last token must exist before the model writes it.
        span = round_up(longest)  # S
        self._reserve(rows=len(self.sequences), length=round_up(self._longest_length()))
        # The model stores keys and values at `last` through the cache.
        lengths = self._tensors.lengths[rows]
        last = lengths - 1  # [n]
        self._cache.begin_step(rows=rows, positions=last, span=span)
        # A row attends to its own tokens only: slots behind its length hold padding or a retired row's values.
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
            self._cache.reserve(rows=rows, length=length, held=self._held(self.sequences))

    def _held(self, sequences: Sequence[RunningSequence]) -> list[int]:
        """Count the tokens of each sequence whose keys and values are cached: all but the last."""
        return [sequence.offset + self._num_steps - 1 for sequence in sequences]

    def _longest_length(self) -> int:
        return max((offset for _, offset in self._spans), default=-self._num_steps) + self._num_steps

    def _without_early_ends(self, logits: Tensor) -> Tensor:
        """Set end tokens to -inf in the rows that have not reached min_tokens."""
        if self._num_steps >= self._early_until:
            return logits
        n = len(logits)
        is_early = self._tensors.lengths[:n] < self._tensors.ends_from[:n]  # [n]
        return logits.masked_fill(is_early[:, None] & self._is_end, -torch.inf)

    def _sampling(self, n: int) -> dict[str, Any]:
        """Return the optional arguments of `sample` that some row asks for."""
        arguments: dict[str, Any] = {}
        if self._asked["temperature"]:
            arguments["temperature"] = self._tensors.temperature[:n]
        if self._asked["truncation"]:
            arguments["truncation"] = {name: column[:n] for name, column in self._tensors.truncation.items()}
        return arguments

    def _stopped(self, tokens: Tensor) -> set[int]:
        """Return the rows whose newest token completes a stop text, once they have min_tokens."""
        asking = [(r, sequence) for r, sequence in enumerate(self.sequences) if sequence.stop_strings is not None]
        newest: list[int] = tokens[torch.tensor([r for r, _ in asking], device=self._device)].tolist()
        stopped = set()
        for (r, sequence), token in zip(asking, newest, strict=True):
            assert sequence.stop_strings is not None
            is_complete = sequence.stop_strings.completed_by(token)
            num_tokens = sequence.offset + self._num_steps - sequence.group.prompt_length
            if is_complete and num_tokens >= sequence.group.request.sampling.min_tokens:
                stopped.add(r)
        return stopped

    def _completions(
        self, finished: Tensor, done: list[int], *, stopped: set[int]
    ) -> list[tuple[RunningSequence, Completion]]:
        """Copy out the rows `done` (`finished` on the device). Raises EngineError where a logprob is not finite."""
        tokens = self._tensors.tokens[finished].int().cpu().numpy()  # [finished, W]
        logprobs = self._tensors.logprobs[finished].cpu().numpy()  # [finished, W]
        results = []
        for i, r in enumerate(done):
            sequence = self.sequences[r]
            length = sequence.offset + self._num_steps
            span = slice(sequence.group.prompt_length, length)
            if not np.isfinite(logprobs[i, span]).all():
                raise EngineError(f"policy version {sequence.version_starts[-1][0]} gives logprobs that are not finite")
            has_stopped = r in stopped or int(tokens[i, length - 1]) in self._eos_token_ids
            completion = Completion(
                token_ids=tokens[i, span].copy(),
                rollout_logprobs=logprobs[i, span].copy(),
                policy_versions=version_spans(sequence.version_starts, end=length),
                finish_reason="stop" if has_stopped else "length",
            )
            results.append((sequence, completion))
        return results

    def _remove(self, done: list[int]) -> None:
        """Close the holes: rows from the end take the places of those removed."""
        n, gone = len(self.sequences), set(done)
        for r in done:
            self._asked.subtract(features(self.sequences[r].group.request.sampling))
        kept = n - len(gone)
        targets = [r for r in done if r < kept]
        sources = [r for r in range(kept, n) if r not in gone]
        if sources:
            self._move(sources=sources, targets=targets)
        del self.sequences[kept:]
        self._rearrange()

    def _rearrange(self) -> None:
        """Decide which rows run in which forward pass, after rows came or went."""
        offsets = np.array([sequence.offset for sequence in self.sequences], dtype=np.int64)
        order, spans = split_batch(offsets, split_saves=self._split_saves)
        if order is not None:
            self._move(sources=order, targets=list(range(len(order))))
        self._spans = spans

    def _move(self, *, sources: list[int], targets: list[int]) -> None:
        moves = [(of, to) for of, to in zip(sources, targets, strict=True) if of != to]
        moved = [self.sequences[of] for of, _ in moves]
        of, to = torch.tensor(moves, device=self._device).T
        self._cache.move(sources=of, targets=to, held=self._held(moved))
        self._tensors.move(sources=of, targets=to)
        for (_, target), sequence in zip(moves, moved, strict=True):
            self.sequences[target] = sequence

    def _start(self, group: SequenceGroup, index: int, *, version: int) -> RunningSequence:
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
