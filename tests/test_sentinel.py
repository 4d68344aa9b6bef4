"""Redis behind Sentinel: real servers, a real fail-over, our client and a Celery worker on our transport."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from harness import wait_for
from test_transport import is_done, log_of, tiny_worker

from sluice.common.connections.broker import make_app, send
from sluice.common.connections.client import connect
from sluice.common.connections.sentinel import parse
from sluice.common.errors import ConfigError, ConnectionFailed
from sluice.scripts.commands.doctor import examine_redis
from sluice.scripts.launcher.redis_server import find_server, free_port

PASSWORD = "sentinel-test"

SERVER = """
bind 127.0.0.1
port {port}
requirepass {password}
masterauth {password}
dir {folder}
save ""
appendonly yes
appendfilename {port}.aof
appenddirname {port}
repl-diskless-sync-delay 0
"""

SENTINEL = """
bind 127.0.0.1
port {port}
dir {folder}
sentinel monitor mymaster 127.0.0.1 {master} 1
sentinel auth-pass mymaster {password}
sentinel down-after-milliseconds mymaster 1000
sentinel failover-timeout mymaster 5000
"""


@dataclass
class Cluster:
    url: str
    master: subprocess.Popen[bytes]
    master_port: int
    replica_port: int
    sentinel_port: int


def wait_until(condition: Callable[[], bool], *, what: str) -> None:
    """Poll a server that may still be starting."""

    def holds() -> bool:
        with contextlib.suppress(redis.RedisError):
            return condition()
        return False

    wait_for(holds, timeout=15, what=what)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    master, replica, sentinel = (free_port() for _ in range(3))
    with contextlib.ExitStack() as stack:

        def start(port: int, config: str, *options: str) -> subprocess.Popen[bytes]:
            path = tmp_path / f"{port}.conf"
            path.write_text(config.format(port=port, folder=tmp_path, password=PASSWORD, master=master))
            with (tmp_path / f"{port}.out").open("wb") as output:
                process = subprocess.Popen([find_server(), str(path), *options], stdout=output, stderr=output)
            stack.callback(process.wait, 10)
            stack.callback(process.kill)
            return process

        first = start(master, SERVER)
        start(replica, SERVER + f"replicaof 127.0.0.1 {master}\n")
        probe = stack.enter_context(redis.Redis(port=replica, password=PASSWORD, retry=None))
        wait_until(lambda: probe.info("replication")["master_link_status"] == "up", what="the replica to follow")
        start(sentinel, SENTINEL, "--sentinel")
        asked = stack.enter_context(redis.Redis(port=sentinel, retry=None))
        wait_until(lambda: asked.sentinel_master("mymaster")["num-slaves"] == 1, what="the sentinel to know it")
        nobody = free_port()  # a sentinel that is down is passed over
        yield Cluster(
            url=f"sentinel://:{PASSWORD}@127.0.0.1:{nobody},127.0.0.1:{sentinel}/mymaster/0",
            master=first,
            master_port=master,
            replica_port=replica,
            sentinel_port=sentinel,
        )


def test_writing_and_consuming_go_on_after_a_fail_over(tmp_path: Path, cluster: Cluster) -> None:
    client = connect(cluster.url)
    assert client.info("server")["tcp_port"] == cluster.master_port
    app = make_app("tiny", url=cluster.url)
    stop, written = threading.Event(), []

    def write() -> None:
        writer = connect(cluster.url)
        while not stop.wait(0.05):
            writer.incr("counter")
            written.append(time.monotonic())
        writer.close()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    with tiny_worker(tmp_path, cluster.url) as process:
        assert send(app, "rollout.generate", "rollout", "t1")
        wait_for(lambda: is_done(client, "t1"), timeout=20, what="the worker to consume from the first master")
        client.wait(1, 2000)
        os.kill(cluster.master.pid, signal.SIGKILL)
        killed = time.monotonic()
        wait_for(lambda: written[-1] > killed + 1, timeout=15, what="the client to write to the new master")
        assert client.info("server")["tcp_port"] == cluster.replica_port
        wait_for(lambda: send(app, "rollout.generate", "rollout", "t2"), timeout=15, what="a message to the new master")
        wait_for(lambda: is_done(client, "t2"), timeout=20, what="the worker to consume from the new master")
        assert process.poll() is None  # type: ignore[attr-defined]
        assert "Unrecoverable" not in log_of(tmp_path)
    stop.set()
    thread.join(10)
    client.close()
    print(f"longest gap between writes: {max(b - a for a, b in itertools.pairwise(written)):.1f} s")


def test_what_is_wrong_is_named(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_REDIS_URL", cluster.url)
    told = [finding.text for finding in examine_redis()]
    assert f"Sentinel names 127.0.0.1:{cluster.master_port} as the master, 1 replicas" in told
    assert PASSWORD not in "".join(told)
    here = f"127.0.0.1:{cluster.sentinel_port}"
    with pytest.raises(ConnectionFailed, match="know no master 'other'; they know: mymaster"):
        connect(f"sentinel://:{PASSWORD}@{here}/other/0")
    with pytest.raises(ConnectionFailed, match="refused the password"):
        connect(f"sentinel://:wrong@{here}/mymaster/0")
    with pytest.raises(ConnectionFailed, match=r"no Sentinel of sentinel://\S+:1/mymaster/0 can be asked .*refused"):
        connect(f"sentinel://:{PASSWORD}@127.0.0.1:1/mymaster/0")


def test_a_url_is_read_or_refused_with_the_form() -> None:
    found = parse("sentinel://me:p%40ss@a,b:2/mymaster?sentinel_password=s")
    assert found.sentinels == (("a", 26379), ("b", 2))
    assert (found.master, found.database) == ("mymaster", 0)
    assert (found.username, found.password, found.sentinel_password) == ("me", "p@ss", "s")
    assert found.server == "sentinel://a:26379,b:2/mymaster/0"
    for wrong in ("sentinel://a:x/mymaster", "sentinel://a/", "sentinel:///mymaster", "sentinel://a/m/zero"):
        with pytest.raises(ConfigError, match="sentinel URL"):
            parse(wrong)
    with pytest.raises(ConfigError, match="sentinel_password only, not ssl"):
        parse("sentinel://a/mymaster?ssl=1")
