"""Ctrl-C, a closed terminal, and output that nobody reads."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from harness import create_run, environment, quickstart_config, tiny_folder, wait_for

SLUICE = [sys.executable, "-m", "sluice"]


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *argv: str, cwd: Path, **env: str) -> None:
        self.pid, self._ours = pty.fork()
        if not self.pid:
            os.chdir(cwd)
            os.execve(argv[0], argv, environment(**env))
        self.said = ""

    def read_until(self, text: str) -> None:
        wait_for(lambda: text in self._read(), timeout=60, what=text)

    def _read(self) -> str:
        os.set_blocking(self._ours, False)
        with suppress(OSError):  # nothing to read, or the command has ended
            self.said += os.read(self._ours, 1 << 16).decode(errors="replace")
        return self.said

    def has_loaded(self, library: str) -> bool:
        """Whether the command, and not this process that it is a fork of at first, has mapped a library."""
        process = Path(f"/proc/{self.pid}")
        return b"\0sluice\0" in (process / "cmdline").read_bytes() and library in (process / "maps").read_text()

    def press_ctrl_c(self) -> None:
        os.write(self._ours, b"\x03")

    def close(self) -> None:
        os.close(self._ours)

    def exit_code(self) -> int:
        """As a shell shows it."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return 128 - code if code < 0 else code


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return quickstart_config(tmp_path, tiny=tiny_folder(), policy_store={"transport": "redis"})


def test_ctrl_c_before_anything_has_started_says_nothing(tmp_path: Path, config: Path) -> None:
    for library in ("pydantic_core", "libtorch_python"):  # the imports of the command, and of what it forks
        terminal = Terminal(*SLUICE, "run", str(config), cwd=tmp_path)
        wait_for(partial(terminal.has_loaded, library), timeout=60, what=library)
        terminal.press_ctrl_c()
        assert terminal.exit_code() == 130
        assert "Traceback" not in terminal._read()
    assert not list(tmp_path.glob("runs/*/redis"))


def test_a_second_ctrl_c_ends_at_once_and_a_closed_terminal_ends_in_order(tmp_path: Path, config: Path) -> None:
    terminal = Terminal(*SLUICE, "run", str(config), "--name", "twice", cwd=tmp_path)
    terminal.read_until("tokens/s")
    roles = psutil.Process(terminal.pid).children(recursive=True)
    terminal.press_ctrl_c()
    terminal.read_until("Ctrl-C again")
    terminal.press_ctrl_c()
    assert terminal.exit_code() == 130
    assert "Traceback" not in terminal._read() and "Aborted" not in terminal.said
    psutil.wait_procs(roles, timeout=15)
    assert not [role for role in roles if role.is_running()]

    terminal = Terminal(*SLUICE, "run", str(config), "--resume", "twice", cwd=tmp_path)
    terminal.read_until("tokens/s")
    terminal.close()
    assert terminal.exit_code() == 130
    log = (tmp_path / "runs" / "twice" / "logs" / "trainer.log").read_text()
    assert "stopped at step" in log.rpartition("resumed")[2], "it wrote a checkpoint"


def test_a_command_whose_messages_nobody_reads_goes_on(tmp_path: Path) -> None:
    """An error message that cannot be written leaves the exit code as it is; so does a reader that has gone."""
    program = "from sluice.scripts.cli import main; main(['status'])"
    for full in (Path("/dev/full"), None):
        reader, writer = os.pipe()
        os.close(reader)
        with full.open("wb") if full else os.fdopen(writer, "wb") as errors:
            done = subprocess.run(
                [sys.executable, "-c", program], cwd=tmp_path, env=environment(), stderr=errors, check=False
            )
        assert done.returncode == 2


def test_what_the_system_refuses_is_one_paragraph(tmp_path: Path, config: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    done = subprocess.run(
        [*SLUICE, "run", str(config)], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    said = done.stderr[done.stderr.index("error: ") :]  # after what it loaded and checked
    assert "runs" in said and said.count("\n") == 1 and "Traceback" not in done.stderr


def test_a_worker_in_a_closed_terminal_stops_as_at_sigterm(tmp_path: Path, redis_url: str) -> None:
    """Celery by itself would go on without one."""
    env = create_run(tmp_path, redis_url)
    terminal = Terminal(
        sys.executable,
        "-m",
        "celery",
        "-A",
        "sluice",
        "worker",
        "-Q",
        "reward",
        "--loglevel",
        "INFO",
        cwd=tmp_path,
        **env,
    )
    terminal.read_until("ready.")
    terminal.close()
    assert terminal.exit_code() == 0
