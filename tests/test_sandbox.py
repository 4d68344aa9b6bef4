"""Code that the model wrote: it is scored, and can do nothing else."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import psutil
import pytest
from builders import for_each

from sluice.common.config import RewardFunction
from sluice.common.errors import ConfigError
from sluice.workers.rewards import CodeReward
from sluice.workers.rewards.loading import load_reward_functions
from sluice.workers.sandbox import LEVELS, Isolation, available, run_python

TESTS = ["assert double(2) == 4", "assert double(-1) == -2", "assert double(0) == 0", "assert double('a') == 'aa'"]
HERE = LEVELS[: LEVELS.index(available()) + 1]


def fenced(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nDone."


@for_each(
    ("code", "expected"),
    [
        ("def double(x):\n    return x * 2", 1.0),
        ("def double(x):\n    return x + 2", 0.25),
        ("def double(x):\n    return 2 * x if x else exit(0)", 0.75),
        ("def double(x:", 0.0),
        ("raise RuntimeError", 0.0),
        ("import sys\nsys.exit(0)", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("print('PASSED 0')\nprint(' 0')\ndef double(x):\n    return None", 0.0),
        ("def double(x):\n    while True: pass", 0.0),
        ("import os\nfor _ in range(5): os.fork()\nwhile True: pass", 0.0),
        ("x = bytearray(4 << 30)\ndef double(x):\n    return x * 2", 0.0),
        ("while True: print('x' * 10000)", 0.0),
        ("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass", 0.0),
    ],
)
def test_the_score_is_the_share_of_tests_passed_whatever_the_code_tries(code: str, expected: float) -> None:
    began = time.monotonic()
    assert CodeReward(timeout_s=1.0, isolation="limits")([fenced(code)], test_list=[TESTS]) == [expected]
    assert time.monotonic() - began < 20


def test_programs_are_judged_by_what_they_print() -> None:
    reward = CodeReward(timeout_s=1.0, isolation="limits")
    given = {"inputs": [["1 2\n", "3 4\n"]] * 3, "outputs": [["3\n", "7"]] * 3}
    adds = fenced("a, b = map(int, input().split())\nprint(a + b)")
    reads = fenced("import sys\na, b = sys.stdin.read().split()\nprint(3)")
    assert reward([adds, reads, "no code"], **given) == [1.0, 0.5, 0.0]
    strict = CodeReward(isolation="limits", all_or_nothing=True)
    two = {name: column[:2] for name, column in given.items()}
    assert strict([adds, reads], **two) == [1.0, 0.0]
    assert reward([adds]) == [None], "a row without tests does not apply"
    text = fenced("def double(x): return 0") + fenced("def double(x): return 2 * x")
    message = {"role": "assistant", "content": text}
    assert reward([[message]], test_list=[TESTS]) == [1.0], "the last block of the last message counts"


@for_each("level", HERE)
def test_what_a_program_can_reach(level: Isolation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_REDIS_URL", "redis://:secret@h:1/0")
    (tmp_path / "secret").write_text("treasure")
    listener = socket.create_server(("127.0.0.1", 0))
    program = f"""
import os, socket, sys
print(sorted(os.environ), flush=True)
try:
    print(open({str(tmp_path / "secret")!r}).read())
except OSError:
    print("no file")
try:
    socket.create_connection(("127.0.0.1", {listener.getsockname()[1]}), timeout=1)
    print("connected")
except OSError:
    print("no network")
ours = "/proc/{os.getpid()}/cmdline"
print("parent" if os.path.exists(ours) and b"pytest" in open(ours, "rb").read() else "alone")
open("scratch", "w").write("x")
"""
    with listener:
        found = run_python(program, timeout_s=5, memory_mib=512, isolation=level)
    assert "SLUICE" not in found.output and "secret@" not in found.output
    assert ("treasure" in found.output) == (level != "files")
    assert ("connected" in found.output) == (level == "limits")
    assert level != "files" or "alone" in found.output
    assert not (Path.cwd() / "scratch").exists()


@for_each("level", [level for level in HERE if level != "limits"])
def test_nothing_that_a_program_starts_outlives_it(level: Isolation) -> None:
    mark = f"outlives-{os.getpid()}-{level}"
    sleeper = f"[sys.executable, '-c', 'import time; time.sleep(60)', {mark!r}]"
    program = f"import os, sys\nif os.fork() == 0:\n    os.setsid()\n    os.execv(sys.executable, {sleeper})\n"
    run_python(program, timeout_s=3, memory_mib=512, isolation=level)
    deadline = time.monotonic() + 5
    while any(mark in (process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline, "a process of the program lives on"
        time.sleep(0.05)


def test_more_isolation_than_there_is_is_refused_before_anything_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sluice.workers.rewards.code_reward.available", lambda: "limits")
    for isolation, message in (
        ("files", "this machine offers 'limits': install bubblewrap"),
        ("none", "use one of limits, network, files"),
    ):
        entry = RewardFunction(function="sluice.workers.rewards.CodeReward", kwargs={"isolation": isolation})
        with pytest.raises(ConfigError, match=message):
            load_reward_functions([entry])
