"""Rewards for code that the model wrote, run in a sandbox (workers/sandbox.py)."""

from __future__ import annotations

import re
from secrets import token_hex
from typing import Any

from sluice.common.errors import ConfigError
from sluice.workers.sandbox import LEVELS, Isolation, available, run_python

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_ASSERTS = """
for _i, _test in enumerate({tests!r}):
    try:
        exec(_test, globals())
    except BaseException:
        continue
    print("\\n{nonce}", _i)
"""


class CodeReward:
    """Share of a problem's tests that the completion's last code block passes; 0.0 without a block.

    Columns of the dataset, either: `test_list` (MBPP): statements that raise where the code is wrong; or `inputs` and
    `outputs` (APPS, TACO): what the program reads, and what it must print, compared outside of it, stripped.
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
            code = code_of(completion if isinstance(completion, str) else completion[-1]["content"])
            if test_list is not None and test_list[i]:
                passed = self._asserted(code, list(test_list[i]))
            elif inputs is not None and outputs is not None and outputs[i]:
                passed = self._printed(code, list(inputs[i]), list(outputs[i]))
            else:
                scores.append(None)
                continue
            share = sum(passed) / len(passed)
            scores.append(float(share == 1.0) if self._all else share)
        return scores

    def _asserted(self, code: str | None, tests: list[str]) -> list[bool]:
        """Run the code, then each test, once; a word that the code cannot know beforehand marks those passed."""
        nonce = token_hex(16)
        printed = self._run(f"{code}\n{_ASSERTS.format(tests=tests, nonce=nonce)}") if code is not None else ""
        return [f"{nonce} {i}" in printed.splitlines() for i in range(len(tests))]

    def _printed(self, code: str | None, inputs: list[str], outputs: list[str]) -> list[bool]:
        if code is None:
            return [False] * len(outputs)
        return [
            self._run(code, stdin=given).strip() == wanted.strip()
            for given, wanted in zip(inputs, outputs, strict=True)
        ]

    def _run(self, program: str, *, stdin: str = "") -> str:
        """Return what the program printed; nothing where it ran out of time."""
        found = run_python(
            program, stdin=stdin, timeout_s=self._timeout_s, memory_mib=self._memory_mib, isolation=self._level
        )
        return "" if found.timed_out else found.output


def code_of(text: str) -> str | None:
    """Return the last fenced block; None where there is none."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None
