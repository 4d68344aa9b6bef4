"""A process that has imported what a role with a model needs, and forks such roles: they start in milliseconds.

    ForkServer, in the supervisor           main(), in the server
    start(argv, ...)  -- Command -->        fork --> the role, a child of the server
                      <-- pid --
    process.poll()    -- pid -->            waitpid: only when it is asked, so until then the pid is the role's
                      <-- exit code --

One request and one reply at a time, JSON lines over a socket pair that only these two hold. The server has one thread
and never touches CUDA. `sluice run` imports everything itself and forks the server before it does anything else: its own checks
(model, data, rewards) need most of the same imports.

The server dies with the supervisor, and its roles die with it (signals of the kernel). The supervisor starts another server, a
new process, when it needs one: roles of the former have then ended by SIGKILL.

Roles that must not load torch (reward, dashboard) are not started from here, nor any role where the kernel has no such signal.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sluice.scripts.launcher.forked import Command, ForkedProcess, fork, imports_without_threads, set_title, wait_for
from sluice.scripts.launcher.processes import Process, spawn

PRELOADED = (
    "sluice.common.models.causal_lm",
    "sluice.workers.dataset",
    "sluice.workers.rollout",
    "sluice.workers.reference",
    "sluice.workers.engine.torch.engine",
    "sluice.trainer.loop",
    "celery.bin.celery",
    "celery.concurrency.thread",
    "celery.worker.consumer",
    "celery.worker.autoscale",
)
IMPORTS_S = 600.0
"""Bound of the first reply, which waits for the imports, from a cold disk."""
REPLY_S = 20.0
"""Bound of every other one: a server that hangs or is stopped is ended, with its roles, and another one starts them again."""
_ROOM = "." * 1000
"""Where the titles of roles are written (`set_title`)."""


class ForkServer:
    """The supervisor's side; a server is always running or starting."""

    def __init__(self, *, is_fork: bool = False) -> None:
        """`is_fork`: the first server is a fork of this process, which imports everything now, as it will need most of it. Only
        while this process has one thread, no connection and no user code."""
        self._is_fork = is_fork
        self._lock = threading.Lock()
        self._generation = 0
        self._launch()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """PID of the server."""
        return self._server.pid

    def start(self, argv: list[str], *, log: Path, env: Mapping[str, str]) -> ForkedProcess:
        """Start a role, as `spawn` does."""
        log.parent.mkdir(parents=True, exist_ok=True)
        output = str(log.resolve())
        return self.fork(Command(argv=argv, env={**os.environ, **env}, cwd=os.getcwd(), stdout=output, stderr=output))

    def fork(self, command: Command) -> ForkedProcess:
        """Start a child of the server."""
        for _ in range(2):  # only a request shows that a server was killed
            with self._lock:
                generation, reply = self._generation, self._ask(asdict(command))
            if isinstance(reply, int):
                return ForkedProcess(reply, partial(self._exit_code, reply, generation))
        raise RuntimeError(f"no fork server starts here: {reply}")

    def _exit_code(self, pid: int, generation: int) -> int | None:
        """Return the exit code of a role that this generation of the server started; None while it runs."""
        with self._lock:
            reply = self._ask(pid) if generation == self._generation else ""
        return -signal.SIGKILL if isinstance(reply, str) else reply  # it ended with its server

    def close(self) -> None:
        """End the server, and with it the roles that it started."""
        with self._lock:
            self._end()

    def _launch(self) -> None:
        self._generation += 1
        self._connection, theirs = socket.socketpair()
        self._connection.settimeout(IMPORTS_S)
        self._replies = self._connection.makefile("rb")
        program = "from sluice.scripts.launcher.fork_server import main; main()"
        argv = [sys.executable, "-P", "-c", program, str(theirs.fileno()), _ROOM]
        env = {"PYTHONUNBUFFERED": "1"}
        with theirs, imports_without_threads():
            if self._is_fork and self._generation == 1:
                _import()
                env |= os.environ
                command = Command(argv=argv, env=env, cwd=os.getcwd(), stdout=os.devnull, stderr=os.devnull)
                self._server: Process = fork(command, close=self._connection.fileno())
            else:
                self._server = spawn(argv, log=Path(os.devnull), env=env, pass_fds=(theirs.fileno(),))

    def _end(self) -> None:
        self._server.kill()
        self._server.wait()
        self._replies.close()
        self._connection.close()

    def _ask(self, request: Any) -> int | str | None:
        """Return the server's reply; an error text where there is none, and then another server takes its place."""
        try:
            self._connection.sendall(json.dumps(request).encode() + b"\n")
            line = self._replies.readline()
            self._connection.settimeout(REPLY_S)
            reply = json.loads(line) if line else f"the fork server has ended (exit code {self._server.poll()})"
        except OSError as error:
            reply = f"the fork server does not answer: {error}"
        except BaseException:  # a second Ctrl-C: the reply that is still to come must not be taken for the next one
            self._connection.shutdown(socket.SHUT_RDWR)
            raise
        if isinstance(reply, str):
            self._end()
            self._launch()
        return reply


def main() -> None:
    """Import, then answer requests until the supervisor has ended."""
    set_title([sys.executable, "-m", __name__])
    with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rb") as requests:
        _import()
        gc.collect()
        gc.freeze()  # what is never collected is not copied for a role
        for line in requests:
            request = json.loads(line)
            reply = wait_for(request) if isinstance(request, int) else _fork(Command(**request), connection)
            connection.sendall(json.dumps(reply).encode() + b"\n")


def _import() -> None:
    for module in PRELOADED:
        with suppress(Exception):  # a role that needs it says what is wrong with it
            importlib.import_module(module)


def _fork(command: Command, connection: socket.socket) -> int | str:
    try:
        return fork(command, close=connection.fileno()).pid
    except OSError as error:
        return f"cannot fork: {error}"
