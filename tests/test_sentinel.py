"""Redis behind Sentinel: real servers, a real fail-over, our client and a Celery worker on our transport."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from harness import kill, wait_for
from test_transport import is_done, log_of, tiny_worker

from sluice.common.connections.broker import make_app, send
from sluice.common.connections.client import connect
from sluice.common.connections.sentinel import parse
from sluice.common.errors import ConfigError, ConnectionFailed
from sluice.scripts.commands.doctor import examine_redis
from sluice.scripts.launcher.redis_server import EmbeddedServer, find_server, free_port, start_server

SENTINEL = """
bind 127.0.0.1 -::1
port {port}
dir {folder}
sentinel monitor mymaster 127.0.0.1 {master} 1
sentinel auth-pass mymaster {password}
sentinel down-after-milliseconds mymaster 1000
sentinel failover-timeout mymaster 5000
"""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    master: EmbeddedServer
    replica: EmbeddedServer
    password: str
    sentinel: str

    @property
    def url(self) -> str:
        nobody, port = free_port(), self.sentinel.rpartition(":")[2]  # a sentinel that is down is passed over
        return f"sentinel://:{self.password}@127.0.0.1:{nobody},[::1]:{port},{self.sentinel}/mymaster/0"


def port_of(server: EmbeddedServer) -> int:
    return urlsplit(server.url).port or 0


@pytest.fixture
def cluster(tmp_path: Path, own_redis: EmbeddedServer) -> Iterator[Cluster]:
    password, port = urlsplit(own_redis.url).password or "", free_port()
    with contextlib.ExitStack() as stack:
        replica = start_server(tmp_path / "replica")
        stack.callback(replica.stop)
        first, second = (stack.enter_context(connect(server.url)) for server in (own_redis, replica))
        first.config_set("repl-diskless-sync-delay", 0)
        second.config_set("masterauth", password)
        second.config_set("requirepass", password)
        second.replicaof("127.0.0.1", str(port_of(own_redis)))
        wait_for(lambda: second.info("replication")["master_link_status"] == "up", timeout=15, what="the replica")

        config = tmp_path / "sentinel.conf"
        config.write_text(SENTINEL.format(port=port, folder=tmp_path, master=port_of(own_redis), password=password))
        with (tmp_path / "sentinel.out").open("wb") as output:
            process = subprocess.Popen([find_server(), str(config), "--sentinel"], stdout=output, stderr=output)
        stack.callback(process.wait, 10)
        stack.callback(process.kill)
        asked = stack.enter_context(redis.Redis(port=port, retry=None))

        def knows_the_replica() -> bool:
            with contextlib.suppress(redis.RedisError):
                return asked.sentinel_master("mymaster")["num-slaves"] == 1
            return False

        wait_for(knows_the_replica, timeout=15, what="the sentinel to know the replica")
        yield Cluster(master=own_redis, replica=replica, password=password, sentinel=f"127.0.0.1:{port}")


def test_writing_and_consuming_go_on_after_a_fail_over(tmp_path: Path, cluster: Cluster) -> None:
    client = connect(cluster.url)
    assert client.info("server")["tcp_port"] == port_of(cluster.master)
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
        kill(cluster.master)
        killed = time.monotonic()
        wait_for(lambda: written[-1] > killed + 1, timeout=15, what="the client to write to the new master")
        assert client.info("server")["tcp_port"] == port_of(cluster.replica)
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
    assert f"Sentinel names 127.0.0.1:{port_of(cluster.master)} as the master, 1 replicas" in told
    assert cluster.password not in "".join(told)
    with pytest.raises(ConnectionFailed, match="know no master 'other'; they know: mymaster"):
        connect(f"sentinel://:{cluster.password}@{cluster.sentinel}/other/0")
    with pytest.raises(ConnectionFailed, match="refused the password"):
        connect(f"sentinel://:wrong@{cluster.sentinel}/mymaster/0")
    with pytest.raises(ConnectionFailed, match=r"no Sentinel of sentinel://\S+:1/mymaster/0 can be asked .*refused"):
        connect(f"sentinel://:{cluster.password}@127.0.0.1:1/mymaster/0")


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
