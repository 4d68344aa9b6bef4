"""Code that the model wrote: it is scored, and can do nothing else."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from builders import for_each

from sluice.common.config import RewardFunction
from sluice.common.errors import ConfigError
from sluice.workers.memory_group import group_folder
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
        ("def double(x): return None\nexec = print = compile = lambda *a: None", 0.0),
        ("import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\ndef double(x): return None", 0.0),
        ("import builtins\nbuiltins.BaseException = ValueError\ndef double(x): return None", 0.0),
        ("print('x' * 1_000_000)\nimport sys\nsys.stdout.close()\ndef double(x): return 2 * x", 1.0),
        ("import os\nos.closerange(0, 4096)\ndef double(x): return 2 * x", 1.0),
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


@for_each(
    ("text", "given", "wanted", "expected"),
    [
        *[
            (f"```python\n{code}\n```", "3\n", "6\n", 1.0)
            for code in (
                "import sys\nprint(int(sys.stdin.buffer.read()) * 2)",
                "print(int(open(0).read()) * 2)",
                "print(int(open('/dev/stdin').read()) * 2)",
                "import os\nprint(int(os.read(0, 99)) * 2)",
                "import sys\nsys.stdin.readline()\nsys.stdin.seek(0)\nprint(int(input()) * 2)",
                "import sys\nprint('debug', file=sys.stderr)\nprint(int(input()) * 2)",
                "from __future__ import annotations\nprint(int(input()) * 2)",
                "import dataclasses\n@dataclasses.dataclass\nclass A:\n    n: int\nprint(A(int(input())).n * 2)",
                "def main():\n    print(int(input()) * 2)\n    exit()\nif __name__ == '__main__':\n    main()",
                "import asyncio\nasync def f(): return int(input()) * 2\nprint(asyncio.run(f()))",
                "print(6)  # ``` in a line",
            )
        ],
        *[
            (text, "3\n", "6\n", 1.0)
            for text in (
                "```python3\nprint(6)\n```",
                "```Python\nprint(6)\n```",
                "```python:main.py\nprint(6)\n```",
                "```python\nprint(6)\n```\n```python-repl\n>>> 7\n```\n```pycon\n>>> 7\n```",
                "``` py title=x\nprint(6)\n```",
                "~~~python\nprint(6)\n~~~",
                "````python\nprint(6)\n````",
                "```python\r\nprint(6)\r\n```",
                "1. So:\n   ```python\n   print(6)\n   ```",
                "```\nprint(6)\n```",
                "So ```python\nprint(6)```",
                "```python\nprint(6)\n```\nrun it:\n```bash\npython x.py\n```\nwhich prints\n```\n6\n```",
            )
        ],
        ("```python\nprint(7)\n```", "3\n", "6\n", 0.0),
        ("```python\nprint(1)\nprint(2)\n```", "", "1 \n2\n", 1.0),
        ("```python\nprint(1)\nprint('  2')\n```", "", "1\n2\n", 0.0),
        ("```python\nprint('ab' * 100_000)\n```", "", "ab" * 100_000, 1.0),
        ("```python\nprint(input(), input())\n```", ["1", "2"], ["1 2"], 1.0),
        ("```python\nwhile True: pass\n```", "", "", 0.0),
        *[
            (f"```python\nimport sys\nprint({told!r}, file=sys.{where})\nsys.exit(1)\n```", "3\n", "6\n", 0.0)
            for told in ("unshare: failed", "bwrap: failed", "started", "the sandbox could not be started")
            for where in ("stdout", "stderr")
        ],
    ],
)
def test_a_program_is_run_as_its_author_means_it(text: str, given: Any, wanted: Any, expected: float) -> None:
    assert CodeReward(timeout_s=1.0)([text], inputs=[[given]], outputs=[[wanted]]) == [expected]


def test_the_sandbox_is_found_where_path_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the working directory, and in no folder of the program's own PATH."""
    (tmp_path / "bin").mkdir()
    for name in ("bwrap", "unshare"):
        if found := shutil.which(name):
            (tmp_path / "bin" / name).symlink_to(found)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "bin")
    for level in HERE:
        assert run_python("print(1)", timeout_s=5, memory_mib=512, isolation=level).output == "1\n"


def test_what_a_program_leaves_is_no_failure_of_the_sandbox() -> None:
    deep = "import os\nfor _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')\nos.chmod('.', 0)\nprint(1)"
    before = set(Path(tempfile.gettempdir()).glob("sluice-sandbox-*"))
    assert run_python(deep, timeout_s=5, memory_mib=512, isolation="limits").output == "1\n"
    assert set(Path(tempfile.gettempdir()).glob("sluice-sandbox-*")) <= before


@pytest.mark.skipif(group_folder() is None, reason="this user may make no control group")
@for_each("level", HERE)
def test_memory_is_bounded_for_all_processes_together(level: Isolation) -> None:
    program = """
import os, select, time
reads, writes = os.pipe()
for _ in range(4):
    if os.fork() == 0:
        held = bytearray(os.urandom(1)) * (64 << 20)
        os.write(1, b"held\\n")
        os.write(writes, b"x")
        time.sleep(60)
count = 0
while count < 4 and os.waitpid(-1, os.WNOHANG) == (0, 0):
    if select.select([reads], [], [], 0.01)[0]:
        count += len(os.read(reads, 4))
"""
    assert run_python(program, timeout_s=15, memory_mib=1024, isolation=level).output == "held\n" * 4
    assert run_python(program, timeout_s=15, memory_mib=160, isolation=level).output.count("held") < 4


@for_each("level", [level for level in HERE if level != "limits"])
def test_no_socket_leads_out(level: Isolation, tmp_path: Path) -> None:
    program = f"""
import os, socket
def attempt(*kind, pair=False):
    try:
        s = socket.socketpair(*kind)[0] if pair else socket.socket(*kind)
        s.connect({str(tmp_path / "socket")!r} if kind[0] == socket.AF_UNIX else (2, 1))
        print("connected", kind)
    except OSError:
        pass
attempt(socket.AF_UNIX, socket.SOCK_STREAM)
attempt(socket.AF_UNIX, socket.SOCK_DGRAM)
attempt(socket.AF_UNIX, socket.SOCK_DGRAM, pair=True)
try:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    print("vsock")
except OSError:
    pass
a, b = socket.socketpair()
a.send(b"pairs work")
print(b.recv(99).decode())
"""
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as listener:
            listener.bind(str(tmp_path / "socket"))
            if kind == socket.SOCK_STREAM:
                listener.listen()
            assert run_python(program, timeout_s=5, memory_mib=512, isolation=level).output == "pairs work\n"
        (tmp_path / "socket").unlink()


def test_a_program_cannot_read_its_tests(tmp_path: Path) -> None:
    program = """
import glob, os, sys
for path in sorted(glob.glob("/proc/[0-9]*/fd/*")) + glob.glob("/proc/[0-9]*/cmdline"):
    try:
        if "/fd/" not in path or "(deleted)" in os.readlink(path):
            print(open(path, "rb").read(1 << 20))
    except OSError:
        pass
"""
    for level in HERE:
        found = run_python(program, tests=["assert 'trea' 'sure'"], timeout_s=5, memory_mib=512, isolation=level)
        assert found.passed == {0}
        assert "'trea' 'sure'" not in found.output


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
for path in ("/x", "/dev/x", "/dev/shm/x", "/tmp/x"):
    if {level == "files"}:
        try:
            for i in range(4):
                open(f"{{path}}{{i}}", "wb").write(bytes(12 << 20))
            print("no bound at", path)
        except OSError:
            pass
"""
    with listener:
        found = run_python(program, timeout_s=5, memory_mib=512, isolation=level)
    assert "SLUICE" not in found.output and "secret@" not in found.output
    assert ("treasure" in found.output) == (level != "files")
    assert ("connected" in found.output) == (level == "limits")
    assert level != "files" or ("alone" in found.output and "no bound" not in found.output)
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
