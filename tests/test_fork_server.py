"""Roles that are forked: what they have of their own, how they end, and what happens when the fork server is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
from builders import make_config
from harness import alive, wait_for

from sluice.common.pipeline import QUEUES
from sluice.scripts.launcher import fork_server
from sluice.scripts.launcher.fork_server import ForkServer
from sluice.scripts.launcher.processes import Process
from sluice.scripts.launcher.roles import dashboard_role, trainer_role, worker_role


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as started:
        yield started


def started(server: ForkServer, program: str, log: Path, *arguments: str, **env: str) -> Process:
    return server.start([sys.executable, "-c", program, *arguments], log=log, env=env)


def printed(server: ForkServer, program: str, log: Path, **env: str) -> str:
    process = started(server, program, log, **env)
    assert process.wait(30) == 0, log.read_text()
    return log.read_text()


def test_a_role_has_what_it_needs_already_and_its_own_environment(server: ForkServer, tmp_path: Path) -> None:
    program = "import os, sys; print({'torch', 'transformers'} <= set(sys.modules), os.environ['MARK'], os.getcwd())\n"
    program += "import torch; print(torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork(), torch.get_num_threads())"
    expected = f"True mine {os.getcwd()}\nFalse False 2\n"
    assert printed(server, program, tmp_path / "log", MARK="mine", OMP_NUM_THREADS="2") == expected
    assert "MARK" not in printed(server, "import os; print(dict(os.environ))", tmp_path / "next")
    assert psutil.Process(server.pid).num_threads() == 1


def test_a_program_gets_its_arguments_as_they_are_and_random_numbers_of_its_own(
    server: ForkServer, tmp_path: Path
) -> None:
    program = "import sys, random, numpy; print(sys.argv, random.random(), numpy.random.random(), sep='|')"
    argv = [sys.executable, "-P", "-c", program, "-P", "threads", "-m", ""]
    for name in ("a", "b"):
        assert server.start(argv, log=tmp_path / name, env={}).wait(20) == 0
    ours, others = ((tmp_path / name).read_text().split("|") for name in ("a", "b"))
    assert ours[0] == "['-c', '-P', 'threads', '-m', '']"
    assert ours[1] != others[1] and ours[2] != others[2]


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("pass", 0),
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('what is wrong')", 1),
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
    ],
)
def test_the_exit_code_is_that_of_a_process_of_its_own(
    server: ForkServer, tmp_path: Path, program: str, code: int
) -> None:
    process = started(server, program, tmp_path / "log")
    assert process.wait(20) == code
    assert process.poll() == code
    ours = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ours.returncode == code
    assert tmp_path.joinpath("log").read_text().splitlines()[-1:] == ours.stderr.splitlines()[-1:]


def test_what_is_registered_for_the_end_is_done(server: ForkServer, tmp_path: Path) -> None:
    program = "import atexit, threading, time; atexit.register(print, 'bye')\n"
    program += "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()"
    assert printed(server, program, tmp_path / "log") == "thread\nbye\n"


def test_a_role_shows_its_command_line_and_leads_its_group(server: ForkServer, tmp_path: Path) -> None:
    program = ("-c", "import time; time.sleep(60)", "-Q", "rollout", "--of", "this run")
    process = started(server, program[1], tmp_path / "log", *program[2:])
    title = [Path(sys.executable).name, *program]
    wait_for(lambda: psutil.Process(process.pid).cmdline()[: len(title)] == title, timeout=10, what="its title")
    assert os.getpgid(process.pid) == process.pid
    process.kill()
    assert process.wait(10) == -signal.SIGKILL


def test_a_server_that_is_killed_hangs_or_is_interrupted_ends_with_its_roles_and_the_next_one_starts_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "REPLY_S", 1.0)
    with ForkServer() as server:

        def kill(role: Process) -> None:
            os.kill(server.pid, signal.SIGKILL)

        def hang(role: Process) -> None:
            os.kill(server.pid, signal.SIGSTOP)
            role.send_signal(signal.SIGTERM)
            family = [psutil.Process(role.pid)]
            wait_for(lambda: not alive(family), timeout=5, what="a role whose server hangs to get its signal")

        def interrupt(role: Process) -> None:
            """Its reply, which is still to come, is not taken for another."""
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(server, "_replies", Mock(**{"readline.side_effect": KeyboardInterrupt}))
                role.poll()

        for disturb in (kill, hang, interrupt):
            role = started(server, "import time; time.sleep(600)", tmp_path / "log")
            assert role.poll() is None
            before = server.pid
            disturb(role)
            assert role.wait(30) == -signal.SIGKILL and server.pid != before
            wait_for(lambda pid=role.pid: not psutil.pid_exists(pid), timeout=10, what="the role to be gone")
            assert printed(server, "print('again')", tmp_path / disturb.__name__) == "again\n"


def test_roles_that_must_not_load_torch_are_not_forked() -> None:
    config = make_config()
    roles = [
        *(worker_role(config, queue, 0) for queue in QUEUES),
        trainer_role(config),
        dashboard_role(listening=3, port=1, token=""),
    ]
    assert {role.name for role in roles if not role.is_forked} == {"reward-0", "dashboard"}
