"""The embedded Redis: at most one server ever has the data of a run."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from sluice.common.connections.client import connect
from sluice.common.errors import ConnectionFailed
from sluice.scripts.launcher.redis_server import DataInUse, EmbeddedServer, reading_server, running_url, start_server


def servers(folder: Path) -> list[int]:
    """PIDs of the Redis servers whose working directory is `folder`."""
    ours = psutil.Process().children(recursive=True)
    return [p.pid for p in ours if "redis" in p.name() and p.is_running() and p.cwd() == str(folder)]


def test_of_two_that_start_one_goes_on_and_one_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "with \"quotes\" 'and blanks', é, \n and \\"

    def start() -> EmbeddedServer | DataInUse:
        try:
            return start_server(folder)
        except DataInUse as error:
            return error

    with ThreadPoolExecutor(2) as threads:
        both = [future.result() for future in [threads.submit(start) for _ in range(2)]]
    (server,) = [one for one in both if isinstance(one, EmbeddedServer)]
    assert servers(folder) == [server.process.pid]
    (other,) = [one for one in both if isinstance(one, DataInUse)]
    assert "another process has its Redis" in str(other)
    server.stop()


def test_a_reader_takes_the_servers_place_only_when_it_is_gone(own_redis: EmbeddedServer) -> None:
    folder, client = own_redis.folder, connect(own_redis.url)
    client.set("kept", 1)
    with reading_server(folder) as url:
        assert url == own_redis.url
    client.config_set("maxclients", 1)  # of which we are one
    with pytest.raises(ConnectionFailed, match="does not answer within 10 s"), reading_server(folder):
        pass
    client.config_set("maxclients", 100)
    own_redis.process.send_signal(signal.SIGKILL)
    own_redis.process.wait()
    assert running_url(folder) == own_redis.url, "its owner lives and will start it again"
    own_redis.restart()
    with reading_server(folder) as url:
        assert url == own_redis.url
    client.close()


def test_readers_of_an_ended_run_take_turns_and_a_resuming_run_waits_for_them(tmp_path: Path) -> None:
    start_server(tmp_path).stop()
    assert running_url(tmp_path) is None

    def read(_: int) -> str:
        with reading_server(tmp_path) as url:
            client = connect(url)
            client.ping()
            client.close()
            return url

    with ThreadPoolExecutor(4) as threads:
        reading = threads.map(read, range(3))
        server = threads.submit(start_server, tmp_path).result()
        assert server.url not in list(reading) or running_url(tmp_path) == server.url
    server.stop()
    assert servers(tmp_path) == []
