"""A real run whose network fails: connections that die silently, and a Redis that is out of reach for a while.

Every role reaches Redis through a proxy; the test looks at Redis beside it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from harness import metrics_of, quickstart_config, running, sluice, tiny_folder, wait_for, worker
from proxy import Proxy
from test_roles import assert_trained_once

from sluice.common.connections.client import connect
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import read_counters
from sluice.scripts.launcher.redis_server import start_server

RECOVERY_S = 25.0
OUTAGE_S = 12.0
STEPS = 40


@dataclass(kw_only=True)
class Roles:
    folder: Path
    proxy: Proxy
    client: redis.Redis
    keys: Keys
    processes: dict[str, subprocess.Popen[bytes]]

    def log(self, role: str) -> str:
        return (self.folder / f"{role}.log").read_text()

    def heartbeats(self) -> dict[str, bytes]:
        """Role -> when it last beat, as the score of its process."""
        found = self.client.zrange(self.keys.processes, 0, -1, withscores=True)
        return {name.decode().partition("@")[0].partition("-")[0]: score for name, score in found}

    def steps(self) -> int:
        return len(metrics_of(self.folder / "runs" / "net"))

    def none_exited(self) -> None:
        ended = {name: process.poll() for name, process in self.processes.items() if process.poll() is not None}
        assert not ended, {name: self.log(name)[-2000:] for name in ended}


@pytest.fixture
def roles(tmp_path: Path) -> Iterator[Roles]:
    with contextlib.ExitStack() as stack:
        server = start_server(tmp_path / "redis")
        stack.callback(server.stop)
        address = urlsplit(server.url)
        proxy = stack.enter_context(Proxy(("127.0.0.1", int(address.port or 0))))
        config = quickstart_config(
            tmp_path,
            tiny=tiny_folder(),
            trainer__num_steps=STEPS,
            trainer__loss={"kl_beta": 0.0},
            checkpoint__every_steps=10,
            checkpoint__keep=100,
            evaluation__datasets=[],
            lease__queued_s=5.0,
        )
        done = sluice("create", str(config), "--name", "net", cwd=tmp_path, SLUICE_REDIS_URL=server.url)
        assert done.returncode == 0, done.stderr
        password = address.netloc.rpartition("@")[0]
        env = {"SLUICE_REDIS_URL": f"redis://{password}@127.0.0.1:{proxy.port}/0", "SLUICE_RUN": "net"}
        processes: dict[str, Any] = {
            queue: stack.enter_context(worker(queue, cwd=tmp_path, **env)) for queue in ("dataset", "reward", "rollout")
        }
        trainer = [sys.executable, "-m", "sluice.trainer"]
        processes["trainer"] = stack.enter_context(running(trainer, cwd=tmp_path, log=tmp_path / "trainer.log", **env))
        client = connect(server.url)
        stack.callback(client.close)
        found = Roles(folder=tmp_path, proxy=proxy, client=client, keys=Keys("net"), processes=processes)
        wait_for(
            lambda: found.steps() >= 2 and len(found.heartbeats()) >= 4,
            timeout=60,
            what="two steps, and four roles that beat",
        )
        yield found


def test_roles_survive_silent_connections_and_an_outage_and_the_run_finishes(roles: Roles) -> None:
    # connections that die silently
    before, steps = roles.heartbeats(), roles.steps()
    assert roles.proxy.black_hole() >= 8
    silenced, wall = time.monotonic(), time.time()
    wait_for(
        lambda: all(at > wall + 1 for at in roles.heartbeats().values()) and set(roles.heartbeats()) == set(before),
        timeout=RECOVERY_S,
        what="every role to beat again after its connections fell silent",
    )
    beat_s = time.monotonic() - silenced
    left_s = RECOVERY_S - beat_s
    wait_for(
        lambda: roles.steps() > steps + 1, timeout=left_s, what="the trainer to step after its connections fell silent"
    )
    print(f"silent connections: beats after {beat_s:.1f} s, steps after {time.monotonic() - silenced:.1f} s")
    roles.none_exited()

    # nobody reaches Redis
    roles.proxy.cut()
    cut = time.monotonic()
    for role in roles.processes:
        left_s = OUTAGE_S - (time.monotonic() - cut)
        wait_for(
            lambda role=role: "is unreachable" in roles.log(role),
            timeout=left_s,
            what=f"{role} to say what it waits for",
        )
    wait_for(lambda: time.monotonic() - cut > OUTAGE_S, timeout=OUTAGE_S + 1, what="the outage to last")
    roles.none_exited()
    roles.proxy.republish_full()
    mended, wall, steps = time.monotonic(), time.time(), roles.steps()
    wait_for(
        lambda: all(at > wall for at in roles.heartbeats().values()),
        timeout=RECOVERY_S,
        what="every role to beat after the outage",
    )
    wait_for(lambda: roles.steps() > steps + 1, timeout=RECOVERY_S, what="the trainer to step after the outage")
    print(f"outage of {OUTAGE_S:.0f} s: steps {time.monotonic() - mended:.1f} s after its end")
    assert all("is back after" in roles.log(role) for role in roles.processes)
    roles.none_exited()

    assert roles.processes["trainer"].wait(120) == 0
    counters = read_counters(roles.client, roles.keys)
    assert counters.holds, counters
    assert counters.dead == {}
    assert counters.trained == STEPS * 8
    assert_trained_once(roles.folder / "runs" / "net", STEPS)
