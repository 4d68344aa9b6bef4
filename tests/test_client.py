"""The patient client: what it waits out, what it says meanwhile, and what it raises at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from builders import for_each
from harness import wait_for
from redis.backoff import NoBackoff
from redis.retry import Retry

from sluice.common.connections import outage as patience
from sluice.common.connections.client import (
    BLOCK_S,
    SOCKET_TIMEOUT_S,
    connect,
    give_up_after,
    outage,
    persistence_warning,
    without_password,
)
from sluice.common.errors import ConnectionFailed
from sluice.scripts.commands.doctor import examine_redis
from sluice.scripts.launcher.redis_server import EmbeddedServer, start_server


@pytest.fixture(autouse=True)
def reports_come_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_REPORT_S", 0.2)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    found = start_server(tmp_path / "redis")
    yield found
    if found.process.poll() is None:
        found.stop()


@pytest.fixture
def patient(server: EmbeddedServer) -> Iterator[redis.Redis]:
    client = connect(server.url)
    yield client
    client.close()


def kill(server: EmbeddedServer) -> None:
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(10)


class Background(threading.Thread):
    """A call in a thread, and what came of it."""

    def __init__(self, call):
        super().__init__(daemon=True)
        self.call, self.result, self.error = call, None, None
        self.start()

    def run(self):
        try:
            self.result = self.call()
        except Exception as error:
            self.error = error

    def outcome(self, timeout: float = 10):
        self.join(timeout)
        assert not self.is_alive(), "the call still waits"
        if self.error:
            raise self.error
        return self.result


def test_a_call_waits_for_a_killed_server_says_so_and_says_that_it_is_back(server, patient, caplog):
    patient.set("key", "value")
    kill(server)
    call = Background(lambda: patient.get("key"))
    wait_for(lambda: "is unreachable" in caplog.text, timeout=6, what="a report of the outage")
    said = outage(patient)
    assert said and "Connection refused" in said and "at most 600 s" in said
    assert server.url.split("@")[1] in said and server.url.split(":")[2].split("@")[0] not in said  # no password
    server.restart()
    assert call.outcome() == b"value"
    assert "is back after" in caplog.text
    assert outage(patient) is None
    assert all(record.name == "sluice.redis" for record in caplog.records if "is unreachable" in record.message)


def test_reports_come_every_five_seconds_for_all_threads_together(monkeypatch, server, patient, caplog):
    monkeypatch.setattr(patience, "REPORT_EVERY_S", 1.0)
    kill(server)
    calls = [Background(lambda: patient.get("key")) for _ in range(5)]
    wait_for(lambda: caplog.text.count("is unreachable") >= 2, timeout=6, what="a second report")
    first, second = [r for r in caplog.records if "is unreachable" in r.message][:2]
    assert second.created - first.created >= 1.0
    server.restart()
    for call in calls:
        call.outcome()
    assert caplog.text.count("is back after") == 1


def test_the_wait_is_bounded_and_can_be_shortened_while_it_lasts(server, patient):
    kill(server)
    call = Background(lambda: patient.get("key"))
    wait_for(lambda: outage(patient), timeout=5, what="the call to wait")
    give_up_after(patient, 0.0)
    with pytest.raises(redis.ConnectionError):
        call.outcome(5)


def test_nested_retries_of_one_call_have_one_limit(server, patient):
    give_up_after(patient, 1.0)
    kill(server)
    began = time.monotonic()
    with pytest.raises(redis.ConnectionError):
        patient.get("key")
    assert 0.9 < time.monotonic() - began < 10, "limits that multiply would make it minutes"


def test_a_pipeline_of_scripts_waits_and_loads_its_scripts_into_the_new_server(server, patient):
    script = patient.register_script("return redis.call('SET', KEYS[1], ARGV[1])")

    def send():
        with patient.pipeline(transaction=False) as pipe:
            for i in range(3):
                script(keys=[f"k{i}"], args=[i], client=pipe)
            return pipe.execute()

    send()
    with patient.pipeline(transaction=False) as pipe:  # the scripts are there when execute looks, and gone when it runs
        script(keys=["late"], args=[1], client=pipe)
        load, pipe.load_scripts = (
            pipe.load_scripts,
            lambda: (patient.script_flush(), setattr(pipe, "load_scripts", load)),
        )
        assert pipe.execute() == [b"OK"]
    kill(server)
    call = Background(send)
    wait_for(lambda: outage(patient), timeout=5, what="the pipeline to wait")
    server.restart()
    assert call.outcome() == [b"OK"] * 3
    assert patient.mget("k0", "k1", "k2") == [b"0", b"1", b"2"]


@pytest.mark.parametrize("how", ["command", "script", "pipeline", "transaction"])
def test_a_full_server_pauses_writes_until_there_is_room(server, patient, caplog, how):
    admin = connect(server.url, retry=Retry(NoBackoff(), 0))
    admin.config_set("maxmemory", 1)
    script = patient.register_script("return redis.call('SET', KEYS[1], 'v')")

    def write():
        if how == "command":
            return patient.set("key", "v")
        if how == "script":
            return script(keys=["key"])
        with patient.pipeline(transaction=how == "transaction") as pipe:
            pipe.set("key", "v")
            script(keys=["other"], client=pipe)
            return pipe.execute()

    call = Background(write)
    wait_for(lambda: outage(patient), timeout=5, what="the write to wait")
    assert "out of memory (maxmemory)" in (outage(patient) or "")
    assert patient.get("key") is None  # reading goes on
    wait_for(lambda: "writing pauses" in caplog.text, timeout=6, what="the report")
    admin.config_set("maxmemory", 0)
    assert call.outcome()
    assert patient.get("key") == b"v"
    admin.close()


def test_a_replica_that_becomes_master_is_waited_for(server, patient, tmp_path):
    admin = connect(server.url, retry=Retry(NoBackoff(), 0))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        admin.replicaof("127.0.0.1", str(nobody.getsockname()[1]))
        call = Background(lambda: patient.set("key", "v"))
        wait_for(lambda: "read-only replica" in (outage(patient) or ""), timeout=5, what="the write to wait")
        admin.replicaof("NO", "ONE")
        assert call.outcome()
    admin.close()


@for_each(
    ("message", "words"),
    [
        ("MISCONF Errors writing to the AOF file: No space left on device", "disk full"),
        ("Command # 2 (SET a b) of pipeline caused error: MISCONF Errors writing", "disk full"),
        ("Error running script (call to f_1): @user_script:1: -OOM command not allowed", "out of memory"),
        ("MASTERDOWN Link with MASTER is down", "lost its master"),
        ("NOREPLICAS Not enough good replicas to write.", "too few replicas"),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", None),
        ("the user wrote OOM into a message", None),
    ],
)
def test_refusals_are_told_from_errors_by_their_code(message, words):
    found = patience.refusal(redis.ResponseError(message))
    assert (found is None) if words is None else (words in (found or ""))


def test_errors_of_our_own_surface_at_once(patient):
    patient.set("text", "x")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        patient.lpush("text", "y")
    with pytest.raises(redis.ResponseError, match="mistake"):
        patient.eval("return redis.error_reply('mistake')", 0)
    with pytest.raises(redis.exceptions.NoScriptError):
        patient.evalsha("0" * 40, 0)
    patient.config_set("requirepass", "changed")
    patient.connection_pool.disconnect()
    with pytest.raises(redis.AuthenticationError):
        patient.get("text")
    assert outage(patient) is None


def test_a_wrong_address_or_password_is_said_at_once(server):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionFailed, match=r"cannot reach Redis at .*refused"):
            connect(f"redis://127.0.0.1:{nobody.getsockname()[1]}/0")
    with pytest.raises(ConnectionFailed, match="refused the password"):
        connect(server.url.replace("redis://:", "redis://:wrong"))


def test_a_blocking_read_ends_before_the_socket_gives_up():
    assert BLOCK_S + 2 <= SOCKET_TIMEOUT_S


def test_only_a_server_without_an_append_only_file_is_warned_of(patient):
    assert persistence_warning(patient) is None
    patient.config_set("appendonly", "no")
    assert "append-only file" in (persistence_warning(patient) or "")


def test_no_password_is_shown():
    assert without_password("redis://u:secret@h:1/0") == "redis://u:***@h:1/0"
    shown = without_password("sentinel://:secret@a:1,b:2/mymaster/0?sentinel_password=other")
    assert shown == "sentinel://:***@a:1,b:2/mymaster/0?sentinel_password=***"


def test_doctor_warns_of_a_server_that_may_lose_groups(monkeypatch, server, patient):
    monkeypatch.setenv("SLUICE_REDIS_URL", server.url)
    monkeypatch.setenv("SLUICE_RUN_KEY", "k" * 32)
    assert [finding.level for finding in examine_redis()] == ["ok"]
    monkeypatch.delenv("SLUICE_RUN_KEY")
    assert [finding.level for finding in examine_redis()] == ["ok", "note"]
    patient.config_set("appendonly", "no")
    patient.config_set("maxmemory", "512mb")
    levels = {finding.level: finding.text for finding in examine_redis()}
    assert "append-only file" in levels["warning"]
    assert "every role pauses" in levels["note"]
    patient.config_set("maxmemory-policy", "allkeys-lru")
    levels = {finding.level: finding.text for finding in examine_redis()}
    assert "evicts keys" in levels["problem"] and "512 MiB" in levels["problem"]
