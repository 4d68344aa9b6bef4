"""Roles that are forked: what they have of their own, how they end, and what happens when the fork server is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from builders import make_config
from harness import (
    SMALL,
    alive,
    assert_trained_once,
    children,
    metrics_of,
    only_run,
    quickstart_config,
    running_sluice,
    tiny_folder,
    wait_for,
)

from sluice.scripts.launcher import fork_server
from sluice.scripts.launcher.fork_server import ForkServer
from sluice.scripts.launcher.processes import Process
from sluice.scripts.launcher.roles import dashboard_role, trainer_role, worker_role


class Interrupting:
    """Replies that a second Ctrl-C interrupts."""

    def readline(self) -> bytes:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as started:
        yield started


def started(server: ForkServer, program: str, log: Path, **env: str) -> Process:
    return server.start([sys.executable, "-c", program], log=log, env=env)


def printed(server: ForkServer, program: str, log: Path, **env: str) -> str:
    process = started(server, program, log, **env)
    assert process.wait(30) == 0, log.read_text()
    return log.read_text()


def test_the_server_has_one_thread_and_has_not_touched_cuda(server: ForkServer, tmp_path: Path) -> None:
    program = "import torch; print(torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork())"
    assert printed(server, program, tmp_path / "log") == "False False\n"
    assert psutil.Process(server.pid).num_threads() == 1


def test_a_role_has_what_it_needs_already_and_its_own_environment(server: ForkServer, tmp_path: Path) -> None:
    program = (
        "import os, sys; print('torch' in sys.modules, 'transformers' in sys.modules, os.environ['MARK'], os.getcwd())"
    )
    assert printed(server, program, tmp_path / "log", MARK="mine") == f"True True mine {os.getcwd()}\n"
    program = "import torch; print(torch.get_num_threads())"
    assert printed(server, program, tmp_path / "threads", OMP_NUM_THREADS="2") == "2\n"
    assert "MARK" not in printed(server, "import os; print(dict(os.environ))", tmp_path / "next")


def test_a_program_gets_its_arguments_as_they_are(server: ForkServer, tmp_path: Path) -> None:
    log = tmp_path / "log"
    argv = [sys.executable, "-P", "-c", "import sys; print(sys.argv)", "-P", "threads", "-m", ""]
    assert server.start(argv, log=log, env={}).wait(20) == 0
    assert log.read_text() == "['-c', '-P', 'threads', '-m', '']\n"


def test_two_roles_draw_different_numbers(server: ForkServer, tmp_path: Path) -> None:
    program = "import random, numpy; print(random.random(), numpy.random.random())"
    drawn = [printed(server, program, tmp_path / name).split() for name in ("a", "b")]
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1]


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
    argv = [sys.executable, "-c", "import time; time.sleep(60)", "-Q", "rollout", "--of", "this run"]
    process = server.start(argv, log=tmp_path / "log", env={})
    wait_for(lambda: " -Q rollout " in " ".join(psutil.Process(process.pid).cmdline()), timeout=10, what="its title")
    assert psutil.Process(process.pid).cmdline()[: len(argv)] == [Path(sys.executable).name, *argv[1:]]
    assert os.getpgid(process.pid) == process.pid
    process.kill()
    assert process.wait(10) == -signal.SIGKILL


def test_roles_end_with_their_server_and_the_next_one_starts_from_another(tmp_path: Path) -> None:
    with ForkServer() as server:
        role = started(server, "import time; time.sleep(60)", tmp_path / "log")
        assert role.poll() is None
        os.kill(server.pid, signal.SIGKILL)
        assert role.wait(20) == -signal.SIGKILL
        wait_for(lambda: not psutil.pid_exists(role.pid), timeout=10, what="the role to be gone")
        assert printed(server, "print('again')", tmp_path / "next") == "again\n"


def test_a_server_that_hangs_is_ended_and_holds_up_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "REPLY_S", 1.0)
    with ForkServer() as server:
        role = started(server, "import time; time.sleep(600)", tmp_path / "log")
        before = server.pid
        os.kill(before, signal.SIGSTOP)
        role.send_signal(signal.SIGTERM)
        wait_for(
            lambda: not alive([psutil.Process(role.pid)]), timeout=5, what="a role whose server hangs to get its signal"
        )
        assert role.wait(30) == -signal.SIGKILL and server.pid != before
        assert printed(server, "print(1)", tmp_path / "next") == "1\n"


def test_an_interrupted_request_costs_the_server_and_no_reply_is_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ForkServer() as server:
        role = started(server, "import time; time.sleep(600)", tmp_path / "log")
        with monkeypatch.context() as patch:
            patch.setattr(server, "_replies", Interrupting())
            with pytest.raises(KeyboardInterrupt):
                role.poll()
        assert role.wait(30) == -signal.SIGKILL, "its server has ended"
        assert printed(server, "print(1)", tmp_path / "next") == "1\n"


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = f"""
import sys, time
from pathlib import Path
from sluice.scripts.launcher import fork_server
from sluice.scripts.launcher.fork_server import ForkServer
server = ForkServer()
role = server.start([sys.executable, "-c", "import time; time.sleep(60)"], log=Path({str(tmp_path / "log")!r}), env={{}})
print(server.pid, role.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        family = [psutil.Process(int(word)) for word in parent.stdout.readline().split()]
        parent.kill()
        wait_for(lambda: not alive(family), timeout=10, what="server and role to end")


def test_roles_that_must_not_load_torch_are_not_forked() -> None:
    config = make_config()
    forked = {queue: worker_role(config, queue, 0).is_forked for queue in ("dataset", "rollout", "reference", "reward")}
    assert forked == {"dataset": True, "rollout": True, "reference": True, "reward": False}
    assert trainer_role(config).is_forked
    assert not dashboard_role(0).is_forked


def test_a_run_whose_fork_server_is_killed_goes_on(tmp_path: Path) -> None:
    steps = 8
    config = quickstart_config(tmp_path, tiny=tiny_folder(), evaluation__datasets=[], trainer__num_steps=steps, **SMALL)
    leases = ("lease.running_s=3", "lease.queued_s=3", "checkpoint.every_steps=2")
    with running_sluice("run", str(config), *leases, cwd=tmp_path) as process:
        wait_for(
            lambda: list(tmp_path.glob("runs/*/metrics.jsonl")) and len(metrics_of(only_run(tmp_path))) >= 2,
            timeout=90,
            what="two steps",
        )
        (server,) = [c for c in children(process.pid) if "sluice.scripts.launcher.fork_server" in " ".join(c.cmdline())]
        assert server.num_threads() == 1
        family = server.children()
        server.kill()
        wait_for(lambda: not alive(family), timeout=20, what="its roles to end with it")
        assert process.wait(120) == 0
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert (summary["ledger_holds"], summary["ledger"]["trained"]) == (True, steps * 4)
    assert summary["restarts"]["trainer"] == 1
    assert "reward-0" not in summary["restarts"]
    assert_trained_once(only_run(tmp_path), steps, groups_per_step=4)
