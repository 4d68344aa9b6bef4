"""Examples of supervised training: dataset rows as the token ids of a prompt and of the completion to learn.

They match what RL will meet: the prompt's tokens are those of `common.data.prompt_reader`; the completion's are those of its raw
text, without the chat template, and the token that ends a turn.

Legend: P = prompt tokens, T = completion tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.common.config.sft import ExamplesConfig
from sluice.common.data.prompt_reader import PromptReader
from sluice.common.errors import ConfigError
from sluice.common.types import Completion, Episode, Group
from sluice.trainer.micro_batches import MicroBatch, build_micro_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("sluice.sft")


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row as token ids."""

    prompt_ids: NDArray[np.int32]
    "[P]"
    token_ids: NDArray[np.int32]
    "[T], the end of the turn included"

    @property
    def num_tokens(self) -> int:
        """P + T."""
        return len(self.prompt_ids) + len(self.token_ids)


class ExampleSource(PromptReader[ExamplesConfig]):
    """Examples by cursor. Opening it and reading example 0 finds every mistake in the config."""

    def __init__(
        self,
        config: ExamplesConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_token_ids: Sequence[int],
        max_tokens: int,
        seed: int,
        section: str = "dataset",
    ) -> None:
        """eos_token_ids: what ends a completion of this model. Raises ConfigError: not found, unreadable, empty."""
        super().__init__(config, tokenizer, seed=seed, section=section)
        self._eos_token_ids = eos_token_ids
        self._end = end_of_turn(tokenizer, eos_token_ids=eos_token_ids, chat_template=config.chat_template)
        self._max_tokens = max_tokens

    def example_at(self, cursor: int) -> Example | None:
        """Return the example at a cursor, none where it is left out or over `max_tokens`. Raises ConfigError, naming the row."""
        row, where = self.row_at(cursor)
        if row is None:
            return None
        prompt = self.prompt(row, where)
        if self._config.completion_column is None:
            prompt, completion = self._split(prompt, where)
        else:
            completion = self.cell(row, "completion_column", where)
            if isinstance(completion, list) and len(completion) == 1:
                completion = self._content(completion[0], where)
        if not isinstance(completion, str):
            raise ConfigError(
                f"{self._source}, {where}: column {self._config.completion_column!r} holds {type(completion).__name__}; "
                "a completion is text, or a list of one assistant message"
            )
        if not completion.strip():
            raise ConfigError(f"{self._source}, {where}: the completion is empty; fill in or remove that row")
        token_ids = self._tokenizer(completion, add_special_tokens=False)["input_ids"]
        if token_ids[-1] not in self._eos_token_ids:
            token_ids = [*token_ids, self._end]
        example = Example(
            prompt_ids=np.asarray(self.prompt_ids(prompt, where), dtype=np.int32),
            token_ids=np.asarray(token_ids, dtype=np.int32),
        )
        return example if example.num_tokens <= self._max_tokens else None

    def example_or_none(self, cursor: int) -> Example | None:
        """Do as `example_at`, but return none for a malformed row too; the log then says what is wrong."""
        try:
            return self.example_at(cursor)
        except ConfigError as error:
            log.warning("skipped: %s", error)
            return None

    def count(self) -> int:
        """Count the examples of one pass over a table; the log names no row, since each will be met again."""
        assert self.num_rows is not None, "a stream has no end"
        found = 0
        for cursor in range(self.num_rows):
            with suppress(ConfigError):
                found += self.example_at(cursor) is not None
        return found

    def _split(self, messages: Any, where: str) -> tuple[list[Any], str]:
        """Split a conversation into prompt messages and completion text."""
        if not isinstance(messages, list) or len(messages) < 2:
            raise ConfigError(
                f"{self._source}, {where}: column {self._config.prompt_column!r} is not a conversation of two turns or more, "
                f"as completion_column: null needs it; name the column of the completion in {self._section}.completion_column"
            )
        return messages[:-1], self._content(messages[-1], where)

    def _content(self, message: Any, where: str) -> str:
        """Return the text of an assistant's turn."""
        if not isinstance(message, dict) or message.get("role") != "assistant":
            raise ConfigError(f"{self._source}, {where}: the last turn is not the assistant's; remove what follows it")
        idle = sorted(name for name, value in message.items() if value and name not in ("role", "content"))
        if idle:
            raise ConfigError(
                f"{self._source}, {where}: {', '.join(idle)} of the last turn: only its content is trained on"
            )
        return message.get("content") or ""


def end_of_turn(tokenizer: PreTrainedTokenizerBase, *, eos_token_ids: Sequence[int], chat_template: bool) -> int:
    """Return the token after a completion: the end token that the chat template writes; else the tokenizer's own."""
    if chat_template and tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "completion"}]
        tail = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("completion")[2]
        for token in tokenizer(tail, add_special_tokens=False)["input_ids"]:
            if token in eos_token_ids:
                return int(token)
    return tokenizer.eos_token_id if tokenizer.eos_token_id in eos_token_ids else min(eos_token_ids)


def micro_batches_of(examples: Sequence[Example], *, max_tokens: int, packed: bool = False) -> list[MicroBatch]:
    """Build micro-batches of the examples, each a group of one completion; max_tokens and packed as in `build_micro_batches`."""
    groups = [_group_of(example) for example in examples]
    return build_micro_batches(groups, [torch.ones(1) for _ in groups], max_tokens=max_tokens, packed=packed)


def _group_of(example: Example) -> Group:
    completion = Completion(
        token_ids=example.token_ids,
        rollout_logprobs=np.zeros(len(example.token_ids), np.float32),
        policy_versions=((0, len(example.token_ids)),),
        finish_reason="stop",
    )
    episode = Episode(completion=completion, reward=1.0, rewards={}, ref_logprobs=None)
    return Group(
        group_id="",
        policy_version=0,
        prompt_ids=example.prompt_ids,
        prompt=None,
        target=None,
        episodes=[episode],
        timestamps={},
    )
