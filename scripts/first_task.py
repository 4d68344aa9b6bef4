"""The files of `sluice init`: a config, rewards and, where no data is given, rows of an example.

no model, no data    two-digit sums and the quickstart's tiny model: learns in half a minute on a CPU
no data              the same sums, and the model that is given; of `code`, small functions to write
no model             the data that is given, and a small model from the hub
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

TASKS = {
    "math": "the number between <answer> and </answer> is compared with the target",
    "code": "a block of Python is run against the tests of its row, in a sandbox",
    "custom": "a function of yours in rewards.py says how good a response is",
}
DEFAULT_MODELS = {"code": "Qwen/Qwen2.5-Coder-0.5B-Instruct", "math": "Qwen/Qwen3-0.6B", "custom": "Qwen/Qwen3-0.6B"}
_SYSTEM_PROMPTS = {
    "math": "Think, then put the final number between <answer> and </answer>.",
    "code": "Answer with one fenced block of Python.",
}
_NOTES = {
    "prompt_template": "columns in braces",
    "prompt_column": "text, or a list of messages; or prompt_template: 'Reverse: {word}'",
    "target_column": "what the answer is compared with; null: the rewards need none",
    "target_delimiter": "the target is the text after the last one",
}
_CODE_ROWS = (
    ("add(a, b)", "returns the sum of two numbers", ["assert add(2, 3) == 5", "assert add(-1, 1) == 0"]),
    ("is_even(n)", "returns whether a number is even", ["assert is_even(4)", "assert not is_even(7)"]),
    ("reverse(text)", "returns a text backwards", ["assert reverse('abc') == 'cba'", "assert reverse('') == ''"]),
    ("largest(values)", "returns the largest of a list", ["assert largest([3, 9, 2]) == 9"]),
    ("vowels(text)", "counts the vowels of a text", ["assert vowels('banana') == 3", "assert vowels('xyz') == 0"]),
    ("unique(values)", "returns a list without repeats, in order", ["assert unique([2, 1, 2]) == [2, 1]"]),
)
_CONFIG = """\
# sluice run run.yaml
model: {{path: {model}}}    # a hub id or a folder

dataset:
{dataset}
sampling:
  group_size: {group_size}    # completions per prompt
  max_res_tokens: {max_res_tokens}    # of one completion

reward:
  aggregation: sum
  functions:
{rewards}
replay_buffer: {{batch_size: 8}}    # prompts per step

trainer:
  num_steps: {num_steps}
  seq_len: {seq_len}    # holds prompt and completion
  local_batch_size: {local_batch_size}
  learning_rate: {learning_rate}
{evaluation}"""
_TINY = {"group_size": 16, "max_res_tokens": 40, "seq_len": 64, "local_batch_size": 64} | {
    "num_steps": 60,
    "learning_rate": "2.0e-4",
}
_USUAL = {"group_size": 8, "max_res_tokens": 512, "seq_len": 1024, "local_batch_size": 4} | {
    "num_steps": 200,
    "learning_rate": "2.0e-6",
}
_SHORT = '''\
def short(prompt, response, target):
    """Return more for a shorter response: from 1, of nothing, to 0, of 2,000 characters and more."""
    return max(0.0, 1 - len(response) / 2000)
'''
_LAST_WORD = '''\
import re


def score(prompt, response, target):
    """Return 1 where the last word of the response, tags aside, is the target; else 0."""
    words = re.sub(r"<[^>]*>", " ", response).split()
    return float(bool(words) and words[-1].strip(".") == target)
'''
_LENGTH = '''\
def score(prompt, response, target):
    """Return 1 for a response of 20 words, less the farther from it. Put in its place what you want."""
    return 1 / (1 + abs(len(response.split()) - 20))
'''
_ABOUT = '''\
"""Rewards of this task, named in run.yaml: a number for a response, or None where the function does not apply.

Columns of the dataset are arguments too: write f(completions, my_column, **_) to be called for a whole group, as in TRL.
"""

'''


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstTask:
    """What was asked for."""

    task: str
    model: str
    dataset: dict[str, Any] | None
    "keys of the section; none = rows of the example"
    is_tiny: bool
    "the model is the example's"
    is_table: bool
    "the data can be split into rows to train on and rows to evaluate"

    def files(self) -> dict[str, str]:
        """Return name and text of every file."""
        rows = {} if self.dataset is not None else {"rows.jsonl": _lines_of(self._rows())}
        return {"run.yaml": self._config(), "rewards.py": _ABOUT + self._rewards(), **rows}

    def _config(self) -> str:
        dataset = self._dataset()
        is_split = self.is_table and not (self.task == "code" and self.dataset is None)
        return _CONFIG.format(
            **(_TINY if self.is_tiny else _USUAL),
            model=json.dumps(self.model),
            dataset=_yaml({**dataset, **({"split": "train[:90%]"} if is_split else {})}, indent=2),
            rewards="".join(f"    - {line}\n" for line in self._functions()),
            evaluation=self._evaluation(dataset) if is_split else "",
        )

    def _dataset(self) -> dict[str, Any]:
        example: dict[str, Any] = {
            "path": "rows.jsonl",
            "prompt_template": "What is {a}+{b}?",
            "target_column": "target",
        }
        if self.task == "code":
            example = {"path": "rows.jsonl", "prompt_column": "prompt", "target_column": None}
        system = {} if self.is_tiny or self.task == "custom" else {"system_prompt": _SYSTEM_PROMPTS[self.task]}
        return {**(self.dataset or example), **system, "max_req_tokens": 24 if self.is_tiny else 512}

    def _functions(self) -> list[str]:
        if self.task == "custom":
            return ["rewards.py:score"]
        return [self.task, "{function: rewards.py:short, weight: 0.1}"]

    def _evaluation(self, dataset: dict[str, Any]) -> str:
        """Return the section: the last rows of the same table, which are not trained on."""
        keys = _yaml({**dataset, "split": "train[90%:]"}, indent=8, notes=False)
        steps = 30 if self.is_tiny else 50
        return f"\nevaluation:\n  every_steps: {steps}\n  datasets:\n    - num_prompts: 100\n      dataset:\n{keys}"

    def _rewards(self) -> str:
        if self.task != "custom":
            return _SHORT
        return _LAST_WORD if self._dataset()["target_column"] else _LENGTH

    def _rows(self) -> list[dict[str, Any]]:
        if self.task == "code":
            return [
                {"prompt": f"Write a Python function {head} that {what}.", "test_list": tests}
                for head, what, tests in _CODE_ROWS
            ]
        from sluice.scripts.prepare_tiny import operand_pairs  # torch loads here

        rng, (train, held_out) = random.Random(0), operand_pairs()
        pairs = rng.sample(train, 900) + rng.sample(held_out, 100)
        return [{"a": a, "b": b, "target": str(a + b)} for a, b in pairs]


def _yaml(section: dict[str, Any], *, indent: int, notes: bool = True) -> str:
    lines = []
    for key, value in section.items():
        note = f"    # {_NOTES[key]}" if notes and key in _NOTES else ""
        lines.append(f"{' ' * indent}{key}: {json.dumps(value, ensure_ascii=False)}{note}\n")
    return "".join(lines)


def _lines_of(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
