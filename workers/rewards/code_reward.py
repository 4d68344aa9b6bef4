"""Rewards for code that the model wrote, run in a sandbox (workers/sandbox.py)."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from sluice.common.errors import ConfigError
from sluice.workers.memory_group import group_folder
from sluice.workers.sandbox import LEVELS, MAX_PROCESSES, Isolation, Outcome, SandboxError, available, run_python

_BLOCK = r"(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n`]*\n(.*?)"
_CLOSED = (re.compile(_BLOCK + r"^[ \t]*\1", re.DOTALL | re.MULTILINE), re.compile(_BLOCK + r"\1", re.DOTALL))
"""A fenced block with its end on a line of its own, and one that ends anywhere."""
_PYTHON = re.compile(r"(?:python|py|pypy)[\d.]*(?![\w-])", re.IGNORECASE)
log = logging.getLogger("sluice.reward")


class CodeReward:
    """Share of a problem's tests that the completion's last block of Python passes; 0.0 without a block.

    Columns of the dataset, either: `test_list` (MBPP): statements that raise where the code is wrong; or `inputs` and
    `outputs` (APPS, TACO): what the program reads, and what it must print, compared outside of it line by line, without the
    blanks at their ends.
    None where a row has neither.
    """

    def __init__(
        self,
        *,
        timeout_s: float = 2.0,
        memory_mib: int = 512,
        isolation: Isolation = "network",
        all_or_nothing: bool = False,
    ) -> None:
        """Bound each run by timeout_s; reward.time_limit_s bounds all runs of a group. isolation: the least accepted.

        Raises ConfigError where this machine offers less.
        """
        if isolation not in LEVELS:
            raise ConfigError(f"CodeReward: isolation = {isolation!r}: use one of {', '.join(LEVELS)}")
        self._level = available()
        if LEVELS.index(self._level) < LEVELS.index(isolation):
            raise ConfigError(
                f"CodeReward: isolation = {isolation!r}, but this machine offers {self._level!r}: install bubblewrap and allow "
                "user namespaces, score in a container that has them, or lower isolation (docs/untrusted_code.md)"
            )
        try:
            run_python("", timeout_s=timeout_s, memory_mib=memory_mib, isolation=self._level)
        except SandboxError as error:
            raise ConfigError(f"CodeReward: with memory_mib = {memory_mib} no program can run: {error}") from None
        if group_folder() is None:
            log.warning(
                "CodeReward: memory is bounded for each process of a program (%d MiB), not for all of them (up to %d), as this "
                "user may make no control group: bound the memory of the reward worker's container (docs/untrusted_code.md)",
                *(memory_mib, MAX_PROCESSES),
            )
        self._timeout_s, self._memory_mib, self._all = timeout_s, memory_mib, all_or_nothing

    def __call__(
        self,
        completions: list[Any],
        test_list: list[list[str]] | None = None,
        inputs: list[list[str]] | None = None,
        outputs: list[list[str]] | None = None,
        **_: Any,
    ) -> list[float | None]:
        scores: list[float | None] = []
        for i, completion in enumerate(completions):
            asserts = test_list[i] if test_list is not None else None
            given, wanted = (inputs[i], outputs[i]) if inputs is not None and outputs is not None else (None, None)
            if not asserts and not (given and wanted):
                scores.append(None)
                continue
            code = code_of(completion if isinstance(completion, str) else completion[-1]["content"])
            if code is None:
                passed = [False]
            elif asserts:
                passed = self._asserted(code, list(asserts))
            else:
                passed = self._printed(code, list(given or ()), list(wanted or ()))
            share = sum(passed) / len(passed)
            scores.append(float(share == 1.0) if self._all else share)
        return scores

    def _asserted(self, code: str, tests: list[str]) -> list[bool]:
        found = self._run(code, tests=tests)
        return [i in found.passed and not found.timed_out for i in range(len(tests))]

    def _printed(self, code: str, inputs: list[Any], outputs: list[Any]) -> list[bool]:
        passed = []
        for given, wanted in zip(inputs, outputs, strict=True):
            found = self._run(code, stdin=_text(given))
            passed.append(not found.timed_out and _lines(found.output) == _lines(_text(wanted)))
        return passed

    def _run(self, code: str, *, stdin: str = "", tests: Sequence[str] = ()) -> Outcome:
        return run_python(
            code,
            tests=tests,
            stdin=stdin,
            timeout_s=self._timeout_s,
            memory_mib=self._memory_mib,
            isolation=self._level,
        )


def code_of(text: str) -> str | None:
    """Return the last fenced block that is marked as Python, or else has no mark; None where there is none."""
    text = text.replace("\r\n", "\n")
    blocks = next(filter(None, (pattern.findall(text) for pattern in _CLOSED)), [])
    marked = [code for _, mark, code in blocks if _PYTHON.match(mark.strip("{.}"))]
    found = marked or [code for _, mark, code in blocks if not mark]
    return textwrap.dedent(found[-1]) if found else None


def _text(value: Any) -> str:
    """Return what a test reads or expects: some datasets have a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().split("\n")]
