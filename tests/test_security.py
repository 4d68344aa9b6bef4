"""Closed doors of Redis: a user per role, TLS, a socket; and secrets that stand nowhere but where they belong."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
import redis
from builders import make_config, publish_policy, push_group
from harness import ROOT, SMALL, counters_of, create_run, sluice, trainer, wait_for, worker
from test_flower import NUM_GROUPS

from sluice.common.connections.broker import make_app, send_stage
from sluice.common.connections.client import connect
from sluice.common.errors import ConnectionFailed
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import Ledger
from sluice.common.run import create_run as store_run
from sluice.scripts.launcher.redis_server import EmbeddedServer, free_port

REDIS = shutil.which("redis-server")
pytestmark = pytest.mark.skipif(REDIS is None, reason="no redis-server on PATH")
ROLES = ("trainer", "operator", "dataset", "rollout", "reward", "viewer")


@contextmanager
def serving(folder: Path, settings: str) -> Iterator[None]:
    """A Redis with these lines of configuration."""
    assert REDIS is not None
    (folder / "server.conf").write_text(f'bind 127.0.0.1\ndaemonize no\nsave ""\ndir {folder}\n{settings}\n')
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen([REDIS, str(folder / "server.conf")], stdout=log, stderr=log)
    try:
        wait_for(lambda: b"eady to accept" in (folder / "server.log").read_bytes(), timeout=20, what="Redis")
        yield
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def urls(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Role -> URL, of a server with the users of config/redis."""
    port, users = free_port(), tmp_path / "users"
    made = subprocess.run(
        [sys.executable, str(ROOT / "config" / "redis" / "make_users"), str(users), f"127.0.0.1:{port}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(file.stat().st_mode & 0o077 == 0 for file in [users, *users.iterdir()])
    with serving(tmp_path, f"port {port}\n{made.stdout}"):
        yield {role: (users / f"sluice-{role}.url").read_text().strip() for role in ROLES}


def test_a_run_with_a_user_for_each_role_and_what_each_may_not(tmp_path: Path, urls: dict[str, str]) -> None:
    env = create_run(tmp_path, urls["operator"], trainer__num_steps=2, policy_store__transport="redis", **SMALL)
    of = {role: {**env, "SLUICE_REDIS_URL": url} for role, url in urls.items()}
    with ExitStack() as roles:
        for queue in ("dataset", "rollout", "reward"):
            roles.enter_context(worker(queue, cwd=tmp_path, **of[queue]))
        process = roles.enter_context(trainer(tmp_path, of["trainer"]))
        assert process.wait(180) == 0, (tmp_path / "trainer.log").read_text()[-3000:]
        counters = counters_of(of["viewer"])
        assert (counters.trained, counters.dead, counters.holds) == (8, {}, True)
        for command in (("status", "--json"), ("ledger",), ("samples",), ("metrics",), ("runs", "list")):
            shown = sluice(*command, cwd=tmp_path, **of["viewer"])
            assert shown.returncode == 0, (command, shown.stderr)
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    for name, text in logs.items():
        assert "NOPERM" not in text and "ACL failure" not in text, name
        for url in urls.values():
            assert url.rpartition("@")[0].rpartition(":")[2] not in text, name
    admin, keys = connect(urls["operator"]), Keys("roles")
    assert admin.hget(keys.policy, "version") == b"2"
    for role in ("dataset", "rollout", "reward", "viewer"):
        _is_kept_out(connect(urls[role]), keys)
    assert admin.hget(keys.policy, "version") == b"2"
    refused = sluice("pause", cwd=tmp_path, **of["viewer"])
    assert refused.returncode == 2
    for words in ("sluice-viewer:***@", "does not permit this", "docs/security.md"):
        assert words in refused.stderr
    assert "Traceback" not in refused.stderr


def _is_kept_out(client: redis.Redis, keys: Keys) -> None:
    """Weights, pointer, manifests, orders, the run's record and batches; other people's keys; the server itself."""
    forbidden: list[tuple[object, ...]] = [
        ("HSET", keys.policy, "version", 99),
        ("HSET", keys.manifests, "99", "x"),
        ("SET", keys.tensors("weights", 99), "x"),
        ("SET", keys.tensors("weights", 0, 0), "x"),
        ("HSET", keys.lineage, "99", "0:0"),
        ("HSET", keys.settings, "trainer.learning_rate", "1.0"),
        ("XADD", keys.controls, "*", "a", "b"),
        ("HSET", keys.run_record, "config", "x"),
        ("DEL", keys.batches),
        ("XADD", keys.metrics, "*", "a", "b"),
        ("SET", "elsewhere", "x"),
        ("FLUSHALL",),
        ("CONFIG", "GET", "*"),
        ("KEYS", "*"),
        ("ACL", "LIST"),
        ("CLIENT", "KILL", "ID", "1"),
        ("SHUTDOWN",),
        ("REPLICAOF", "127.0.0.1", "1"),
    ]
    for command in forbidden:
        with pytest.raises((redis.exceptions.NoPermissionError, ConnectionFailed)):
            client.execute_command(*command)
    by_script = "return redis.call('HSET', KEYS[1], 'version', '99')"
    with pytest.raises((redis.exceptions.ResponseError, ConnectionFailed)):
        client.eval(by_script, 1, keys.policy)
    client.close()


def certificates(folder: Path) -> None:
    """A CA and a certificate for 127.0.0.1 that it signed."""
    subject = ["-days", "2", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    ca = ["-x509", "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test CA", *subject]
    server = ["-x509", "-CA", "ca.crt", "-CAkey", "ca.key", "-keyout", "server.key", "-out", "server.crt", *subject]
    for arguments in (ca, [*server, "-subj", "/CN=redis", "-addext", "subjectAltName=IP:127.0.0.1"]):
        subprocess.run(["openssl", "req", *arguments], cwd=folder, check=True, capture_output=True)


def test_data_and_messages_travel_over_tls(tmp_path: Path) -> None:
    for name in ("ours", "others"):
        (tmp_path / name).mkdir()
        certificates(tmp_path / name)
    ours, port = tmp_path / "ours", free_port()
    tls = f"tls-cert-file {ours}/server.crt\ntls-key-file {ours}/server.key\ntls-ca-cert-file {ours}/ca.crt\n"
    with serving(tmp_path, f"port 0\ntls-port {port}\n{tls}tls-auth-clients no\nrequirepass over-the-wire"):
        url = f"rediss://:over-the-wire@127.0.0.1:{port}/0?ssl_cert_reqs=required&ssl_ca_certs="
        _is_scored_over(url + str(ours / "ca.crt"), tmp_path)
        with pytest.raises(ConnectionFailed, match=r"cannot reach Redis at rediss://.*certificate verify failed"):
            connect(url + str(tmp_path / "others" / "ca.crt"))
        with pytest.raises(ConnectionFailed):
            connect(f"redis://:over-the-wire@127.0.0.1:{port}/0")


def test_data_and_messages_travel_over_a_socket(tmp_path: Path) -> None:
    socket = tmp_path / "redis.sock"
    with serving(tmp_path, f"port 0\nunixsocket {socket}\nunixsocketperm 700\nrequirepass within-the-machine"):
        _is_scored_over(f"unix://:within-the-machine@{socket}?db=0", tmp_path)


def _is_scored_over(url: str, folder: Path) -> None:
    """A real reward worker scores groups over this URL, which is in a file."""
    (folder / "ones.py").write_text("def ones(prompts, completions, **kwargs):\n    return [1.0] * len(completions)\n")
    functions = [{"function": f"{folder / 'ones.py'}:ones"}]
    config = make_config(reward={"functions": functions}, trainer={"loss": {"kl_beta": 0.0}})
    client, keys = connect(url), Keys("closed")
    store_run(client, keys.run, config, assets={}, folder=str(folder))
    publish_policy(client, keys, 0)
    app = make_app(keys.run, url=url)
    ledger = Ledger(client, keys, config, worker="w")
    for _ in range(NUM_GROUPS):
        send_stage(app, push_group(ledger, until="rollout"), "reward")
    (folder / "url").write_text(url + "\n")
    with worker("reward", cwd=folder, SLUICE_REDIS_URL_FILE=str(folder / "url"), SLUICE_RUN=keys.run):
        wait_for(lambda: client.xlen(keys.stream(0)) == NUM_GROUPS, timeout=60, what="the groups' scores")
    password = re.findall(r"over-the-wire|within-the-machine", url)[0]
    assert password not in (folder / "reward.log").read_text()
    app.close()
    client.close()


def test_the_embedded_servers_password_is_in_its_folder_only(tmp_path: Path, own_redis: EmbeddedServer) -> None:
    password = own_redis.url.rpartition("@")[0].rpartition(":")[2]
    assert len(password) >= 32
    process = psutil.Process(own_redis.process.pid)
    assert not any(password in word for word in process.cmdline())
    assert {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    files = [path for path in own_redis.folder.rglob("*") if path.is_file()]
    assert [path.name for path in files if password in path.read_text("latin-1")] == ["url"]
    assert (own_redis.folder / "url").stat().st_mode & 0o077 == 0
    with pytest.raises(redis.AuthenticationError):
        redis.Redis.from_url(re.sub(r"//.*@", "//", own_redis.url), retry=None).ping()
    for command in (["doctor"], ["status"], ["runs", "list"]):
        done = sluice(*command, cwd=tmp_path, SLUICE_REDIS_URL=own_redis.url)
        assert password not in done.stdout + done.stderr, command
