"""The patient client: what it waits out, what it says meanwhile, and what it raises at once."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import redis
from builders import for_each
from harness import SMALL, create_run, kill, sluice, trainer, wait_for, worker
from redis.backoff import NoBackoff
from redis.retry import Retry
from test_security import serving

from sluice.common.connections import outage as patience
from sluice.common.connections.address import parse_address
from sluice.common.connections.broker import make_app
from sluice.common.connections.client import BLOCK_S, SOCKET_TIMEOUT_S, connect, give_up_after, outage, without_password
from sluice.common.connections.sentinel import parse
from sluice.common.errors import ConfigError, ConnectionFailed
from sluice.scripts.commands.doctor import examine_redis
from sluice.scripts.launcher.redis_server import EmbeddedServer, free_port


@pytest.fixture(autouse=True)
def reports_come_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_REPORT_S", 0.2)


@pytest.fixture
def patient(own_redis: EmbeddedServer) -> Iterator[redis.Redis]:
    client = connect(own_redis.url)
    yield client
    client.close()


@pytest.fixture
def in_background(patient: redis.Redis) -> Iterator[Callable[..., Future[Any]]]:
    """Starts a call in a thread."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit
        give_up_after(patient, 0.0)  # where a test has failed


def test_calls_wait_for_a_killed_server_and_say_so_together(monkeypatch, own_redis, patient, in_background, caplog):
    monkeypatch.setattr(patience, "REPORT_EVERY_S", 1.0)
    patient.set("key", "value")
    kill(own_redis)
    calls = [in_background(patient.get, "key") for _ in range(5)]
    wait_for(lambda: caplog.text.count("is unreachable") >= 2, timeout=6, what="two reports of the outage")
    said = outage(patient)
    assert said and "Connection refused" in said and "at most 600 s" in said
    password, address = own_redis.url.removeprefix("redis://:").split("@")
    assert address in said and password not in said
    first, second = [r for r in caplog.records if "is unreachable" in r.message][:2]
    assert second.created - first.created >= 1.0
    assert first.name == second.name == "sluice.redis"
    own_redis.restart()
    assert [call.result(10) for call in calls] == [b"value"] * 5
    assert caplog.text.count("is back after") == 1
    assert outage(patient) is None


def test_the_wait_is_bounded_and_can_be_shortened_while_it_lasts(own_redis, patient, in_background):
    kill(own_redis)
    call = in_background(patient.get, "key")
    wait_for(lambda: outage(patient), timeout=5, what="the call to wait")
    give_up_after(patient, 0.0)
    with pytest.raises(redis.ConnectionError):
        call.result(5)
    give_up_after(patient, 1.0)
    began = time.monotonic()
    with pytest.raises(redis.ConnectionError):
        patient.get("key")
    assert 0.9 < time.monotonic() - began < 10, "limits that multiply would make it minutes"


def test_a_pipeline_of_scripts_waits_and_loads_its_scripts_into_the_new_server(own_redis, patient, in_background):
    script = patient.register_script("return redis.call('SET', KEYS[1], ARGV[1])")

    def send():
        with patient.pipeline(transaction=False) as pipe:
            for i in range(3):
                script(keys=[f"k{i}"], args=[i], client=pipe)
            return pipe.execute()

    send()
    with patient.pipeline(transaction=False) as pipe:  # the scripts are there when execute looks, and gone when it runs
        script(keys=["late"], args=[1], client=pipe)
        load = pipe.load_scripts
        pipe.load_scripts = lambda: (patient.script_flush(), setattr(pipe, "load_scripts", load))
        assert pipe.execute() == [b"OK"]
    kill(own_redis)
    call = in_background(send)
    wait_for(lambda: outage(patient), timeout=5, what="the pipeline to wait")
    own_redis.restart()
    assert call.result(10) == [b"OK"] * 3
    assert patient.mget("k0", "k1", "k2") == [b"0", b"1", b"2"]


@pytest.mark.parametrize("how", ["command", "script", "pipeline", "transaction"])
def test_a_full_server_pauses_writes_until_there_is_room(own_redis, patient, in_background, caplog, how):
    admin = connect(own_redis.url, retry=Retry(NoBackoff(), 0))
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

    call = in_background(write)
    wait_for(lambda: outage(patient), timeout=5, what="the write to wait")
    assert "out of memory (maxmemory)" in (outage(patient) or "")
    assert patient.get("key") is None  # reading goes on
    wait_for(lambda: "writing pauses" in caplog.text, timeout=6, what="the report")
    admin.config_set("maxmemory", 0)
    assert call.result(10)
    assert patient.get("key") == b"v"
    admin.close()


def test_a_replica_that_becomes_master_is_waited_for(own_redis, patient, in_background):
    admin = connect(own_redis.url, retry=Retry(NoBackoff(), 0))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        admin.replicaof("127.0.0.1", str(nobody.getsockname()[1]))
        call = in_background(patient.set, "key", "v")
        wait_for(lambda: "read-only replica" in (outage(patient) or ""), timeout=5, what="the write to wait")
        admin.replicaof("NO", "ONE")
        assert call.result(10)
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


def test_a_wrong_address_or_password_is_said_at_once(own_redis):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionFailed, match=r"cannot reach Redis at .*refused"):
            connect(f"redis://127.0.0.1:{nobody.getsockname()[1]}/0")
    with pytest.raises(ConnectionFailed, match="refused the password"):
        connect(own_redis.url.replace("redis://:", "redis://:wrong"))


def test_a_blocking_read_ends_before_the_socket_gives_up():
    assert BLOCK_S + 2 <= SOCKET_TIMEOUT_S


def test_no_password_is_shown():
    assert without_password("redis://u:secret@h:1/0") == "redis://u:***@h:1/0"
    shown = without_password("sentinel://:secret@a:1,b:2/mymaster/0?sentinel_password=other")
    assert shown == "sentinel://:***@a:1,b:2/mymaster/0?sentinel_password=***"


SECRET = "hunter2"
MALFORMED = [
    f"redis://:{SECRET}@h:x/0", f"redis://:{SECRET}", f"redis://u:{SECRET}", f"redis://{SECRET}@h", f"redis://:pa/{SECRET}@h:1/0",
    f"redis://:pa?{SECRET}@h", f"redis://:pa#{SECRET}@h", f"redis:/:{SECRET}@h", f"u:{SECRET}@h:1", SECRET, f"http://:{SECRET}@h",
    f"redis://:{SECRET}@h:99999/0", f"redis://:{SECRET}@h:1/{SECRET}", f"redis://:{SECRET}@[::1/0", f"redis://:{SECRET}@::1:1/0",
    f"redis://:{SECRET} @h", f" redis://:{SECRET}@h", f"redis://:{SECRET}@h:1/0?{SECRET}", f"redis://:{SECRET}@h1,h2/0", f"unix://:{SECRET}@",
    f"sentinel://:{SECRET}@h:x/m", f"sentinel://:{SECRET}@/m", f"sentinel://{SECRET}@h/m", f"REDIS://:{SECRET}@h", f"redis://:{SECRET}@h:1/0\n",
]  # fmt: skip
UNKNOWN_OPTIONS = [
    (f"redis://:{SECRET}@h:1/0?decode_responses=true", "a redis URL takes no option, not decode_responses"),
    (f"redis://:{SECRET}@h/?db=3", "not db: the form is redis://:password@host:6379/0"),
    (f"redis://h:1/0?password={SECRET}", "takes no option, not password"),
    (f"rediss://:{SECRET}@h:1/0?ssl_min_version=3", "ssl_check_hostname only, not ssl_min_version"),
    (f"unix://:{SECRET}@/s?retry=1", "takes the option db, username, password only, not retry"),
    (f"sentinel://:{SECRET}@h/m?sentinel_pass={SECRET}", "takes the option sentinel_password only, not sentinel_pass"),
]


@for_each("url", [*MALFORMED, *(url for url, _ in UNKNOWN_OPTIONS)])
def test_a_malformed_url_is_refused_with_the_form_and_shows_no_password(url):
    for use in (connect, lambda url: make_app("r", url=url)):
        with pytest.raises(ConfigError, match=r"URL (has|takes)") as refused:
            use(url)
        assert SECRET not in str(refused.value) and refused.value.__cause__ is None
        assert dict(UNKNOWN_OPTIONS).get(url, "") in str(refused.value)
    assert SECRET not in without_password(url)


def test_a_url_means_the_same_to_redis_and_to_celery():
    for url in ("redis://[::1]:6380/3", "redis://me:p%40%2Fs@host/", "redis://:a@b@h_1.x-y:1/0"):
        address, celery = parse_address(url), make_app("r", url=url).connection()
        ours = redis.Redis.from_url(url).connection_pool.connection_kwargs
        assert (
            [(ours["host"], ours.get("port", 6379))] == list(address.hosts) == [(celery.hostname, celery.port or 6379)]
        )
        assert ours.get("db", 0) == address.database == int(celery.virtual_host.strip("/") or 0)
        assert (ours.get("username"), ours.get("password")) == (address.username, address.password)
        assert (celery.userid or None, celery.password) == (address.username, address.password)
    found = parse_address("sentinel://[::1],[fe80::1]:2,c/m/2")
    assert found.hosts == (("::1", 26379), ("fe80::1", 2), ("c", 26379))
    assert parse("sentinel://[::1],c:2/m").server == "sentinel://[::1]:26379,c:2/m/0"
    assert without_password("redis://me:@h") == "redis://me:***@h"


def test_a_server_that_cannot_hold_a_run_is_refused_in_words(own_redis, patient, tmp_path):
    by = own_redis.url.removesuffix("/0")
    with pytest.raises(ConnectionFailed, match=r"has no database 99: it is the number at the end of the URL"):
        connect(f"{by}/99")
    patient.acl_setuser("blind", enabled=True, passwords=["+" + SECRET], commands=["+get", "+ping"], keys=["*"])
    host = by.rpartition("@")[2]
    with pytest.raises(
        ConnectionFailed, match=r"Redis at redis://blind:\*\*\*@\S+ does not permit this: .*info.*users.acl"
    ):
        connect(f"redis://blind:{SECRET}@{host}/0")
    patient.replicaof("127.0.0.1", "1")
    with pytest.raises(ConnectionFailed, match=r"is a replica, which takes no writes: name its master, 127.0.0.1:1"):
        connect(own_redis.url)
    done = sluice("runs", "list", cwd=tmp_path, SLUICE_REDIS_URL=own_redis.url)
    assert done.returncode == 2 and "is a replica" in done.stderr and "Traceback" not in done.stderr
    patient.replicaof("NO", "ONE")

    env = create_run(tmp_path, own_redis.url, **SMALL)
    patient.config_set("maxmemory", "512mb")
    patient.config_set("maxmemory-policy", "volatile-lru")
    evicting = "error: Redis evicts keys when it reaches maxmemory (512 MiB, policy volatile-lru)"
    done = sluice("create", str(tmp_path / "job.yaml"), "--name", "other", cwd=tmp_path, SLUICE_REDIS_URL=own_redis.url)
    assert done.returncode == 2 and evicting in done.stderr
    with trainer(tmp_path, env) as process:
        assert process.wait(120) == 2
    assert evicting in (tmp_path / "trainer.log").read_text()
    wrong = by.replace("redis://:", f"redis://:{SECRET}") + "/0"
    with worker("reward", cwd=tmp_path, **{**env, "SLUICE_BROKER_URL": wrong}) as process:
        assert process.wait(120) == 2
    said = (tmp_path / "reward.log").read_text()
    assert "refused the password" in said and SECRET not in said


def test_a_cluster_is_refused_in_words(tmp_path):
    port = free_port()
    bus = f"cluster-port {free_port()}"  # by default the port + 10000, which may be none
    with serving(tmp_path, f"port {port}\ncluster-enabled yes\n{bus}"):
        for database in (0, 3):
            with pytest.raises(
                ConnectionFailed, match="is a Redis Cluster: a run needs one server, or one behind Sentinel"
            ):
                connect(f"redis://127.0.0.1:{port}/{database}")


def test_doctor_warns_of_a_server_that_may_lose_groups(monkeypatch, own_redis, patient):
    monkeypatch.setenv("SLUICE_REDIS_URL", own_redis.url)
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
