"""A rollout worker in a network namespace of its own, so that its network can be cut while the rest of the machine continues.

    worker --- veth pair --- relay on this machine's end --- Redis on 127.0.0.1

Needs root and the `ip` command; `FarWorker.is_permitted` tells. A cut takes the link down: established connections fall
silent, new ones do not get through.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from benchmarks.shared.processes import environment

HERE, THERE = "10.231.77.1", "10.231.77.2"


class FarWorker:
    """Made by `far_worker`."""

    def __init__(self, *, url: str, run: str, log: Path) -> None:
        self.name = f"sluice{os.getpid()}"
        self._link = f"slc{os.getpid()}"
        self._url, self._run, self._log = url, run, log
        self._process: subprocess.Popen[bytes] | None = None
        self.num_starts = 0

    @staticmethod
    def is_permitted() -> bool:
        if os.geteuid() != 0 or not shutil.which("ip"):
            return False
        probe = subprocess.run(["ip", "netns", "add", "sluice-probe"], capture_output=True)
        subprocess.run(["ip", "netns", "del", "sluice-probe"], capture_output=True)
        return probe.returncode == 0

    def lay_cable(self) -> None:
        for command in (
            f"netns add {self.name}",
            f"link add {self._link} type veth peer name far netns {self.name}",
            f"addr add {HERE}/30 dev {self._link}",
            f"link set {self._link} up",
            f"-n {self.name} addr add {THERE}/30 dev far",
            f"-n {self.name} link set far up",
            f"-n {self.name} link set lo up",
        ):
            subprocess.run(["ip", *command.split()], check=True)

    def keep_alive(self, relay_port: int) -> None:
        """Start the worker, or start it again: no supervisor does."""
        if self._process and self._process.poll() is None:
            return
        parts = urlsplit(self._url)
        user = parts.netloc.rpartition("@")[0]
        url = urlunsplit(parts._replace(netloc=f"{user}@{HERE}:{relay_port}"))
        env = environment(SLUICE_REDIS_URL=url, SLUICE_RUN=self._run)
        argv = ["ip", "netns", "exec", self.name, sys.executable, "-m", "celery", "-A", "sluice", "worker"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([*argv, "-Q", "rollout", "-l", "INFO"], env=env, stdout=log, stderr=log)
        self.num_starts += 1

    def cut(self, seconds: float) -> None:
        """Take the link down now, and up again after a while."""
        subprocess.run(["ip", "link", "set", self._link, "down"], check=True)
        timer = threading.Timer(seconds, subprocess.run, [["ip", "link", "set", self._link, "up"]])
        timer.daemon = True
        timer.start()

    def remove(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
        subprocess.run(["ip", "netns", "del", self.name], check=False)
        subprocess.run(["ip", "link", "del", self._link], check=False, capture_output=True)


@contextlib.contextmanager
def far_worker(*, url: str, run: str, log: Path) -> Iterator[tuple[FarWorker, int]]:
    """Yield the worker (not started yet), and the port of its relay."""
    worker = FarWorker(url=url, run=run, log=log)
    worker.lay_cable()
    try:
        with _relay(target_port=urlsplit(url).port or 6379) as port:
            yield worker, port
    finally:
        worker.remove()


@contextlib.contextmanager
def _relay(*, target_port: int) -> Iterator[int]:
    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target_port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pipe(reader, far_writer), pipe(far_reader, writer))

    loop = asyncio.new_event_loop()
    server: Any = loop.run_until_complete(asyncio.start_server(serve, HERE, 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
