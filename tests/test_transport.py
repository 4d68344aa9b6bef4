"""The broker transport under a real Celery worker: foreign elements, a dead broker, a broker that refuses writes."""

from __future__ import annotations

import json
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from harness import kill, running, wait_for
from kombu import Queue

from sluice.common.connections.broker import make_app, send, send_stage
from sluice.common.connections.client import connect
from sluice.common.connections.transport import MAX_MESSAGE_BYTES, MAX_REJECTED, MAX_REJECTED_BYTES
from sluice.scripts.launcher.redis_server import EmbeddedServer

PREFIX = "sluice:{tiny}:mq:"

APP = """
import os
from sluice.common.connections.broker import make_app
from sluice.common.connections.client import connect

app = make_app("tiny")
done = connect()

@app.task(name="rollout.generate")
def generate(group):
    done.rpush("done", group)
"""


@pytest.fixture
def client(own_redis: EmbeddedServer) -> Iterator[redis.Redis]:
    found = connect(own_redis.url)
    yield found
    found.close()


@contextmanager
def tiny_worker(folder: Path, url: str) -> Iterator[object]:
    """A plain worker of one task on our transport; it notes each group in the list `done`."""
    (folder / "tinyapp.py").write_text(APP)
    argv = [sys.executable, "-m", "celery", "-A", "tinyapp", "worker", "-Q", "rollout", "-P", "threads", "-c", "2"]
    argv += ["--without-gossip", "--without-mingle", "--loglevel", "INFO"]
    with running(argv, cwd=folder, log=folder / "worker.log", SLUICE_REDIS_URL=url) as process:
        yield process


def log_of(folder: Path) -> str:
    return (folder / "worker.log").read_text()


def is_done(client: redis.Redis, group: str) -> bool:
    return group.encode() in client.lrange("done", 0, -1)


def message(**changes) -> bytes:
    """A message of ours as it lies in a queue, with changes by path."""
    whole = {
        "body": "W1sidDEiXSwge30sIHt9XQ==",
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"task": "rollout.generate", "id": "x", "lang": "py", "root_id": "x", "parent_id": None},
        "properties": {
            "delivery_tag": "x",
            "delivery_info": {"exchange": "", "routing_key": "rollout"},
            "body_encoding": "base64",
            "priority": 0,
        },
    }
    for path, value in changes.items():
        *above, last = path.split("__")
        part = whole
        for name in above:
            part = part[name]
        part[last] = value
    return json.dumps(whole).encode()


FOREIGN = [
    b"not json",
    b"\xff\xfe\x00",
    b"[]",
    b"{}",
    b"5",
    b"null",
    b'"text"',
    b"[" * 60_000,
    b'{"properties": null}',
    b"0" * (MAX_MESSAGE_BYTES + 1),
    message(properties__delivery_info={}),
    message(properties__delivery_tag=None),
    message(properties__body_encoding=[]),
    message(headers=[1]),
    message(headers={}),
    message(headers={"task": "rollout.generate"}),
    message(headers__task="no.such.task"),
    message(headers__task="celery.starmap"),
    message(headers__task="reward.score"),  # of another queue
    message(body="="),  # empty
    message(body="AAAA"),  # no JSON
    message(body="NQ=="),  # 5 instead of (args, kwargs, embed)
    *(message(body=body) for body in [None, 5, [], {}]),
    *(message(body=b64encode(json.dumps(body).encode()).decode()) for body in [
        [[], {}, {}], [["t1", "t2"], {}, {}], [[5], {}, {}], [{"a": 1}, {}, {}], ["t", {}, {}], [["t1"], {"x": 1}, {}],
        [["t1"], [], 5], [["t1"], {}, {"callbacks": [{"task": "rollout.generate"}]}], [["t1"], {}, {"chord": 1}],
    ]),
    message(**{"content-type": "application/x-python-serialize"}),
    message(**{"content-type": 5}),
    message(**{"content-encoding": 5}),
]  # fmt: skip
_TEXT, _NOTHING = [5, -1.5, True, [], {"a": 1}], [5, -1, "2030-01-01T00:00:00", True, [1], {"a": 1}]
WRONG_HEADERS: dict[str, list[Any]] = {
    **dict.fromkeys(["task", "id", "lang", "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin"], _TEXT),
    **dict.fromkeys(["eta", "expires", "shadow", "group", "group_index", "stamped_headers"], _NOTHING),
    "timelimit": [-1, "x", {}, [1, 1], ["x"], [None, -1]],
    "retries": [-1, 1, "x", [], {}, None],
    "replaced_task_nesting": [-1, "x", [], {}],
    "ignore_result": [5, "x", [], {}],
    "stamps": [5, "x", [1], {"a": {}}],
    "sent_at": ["soon", [], {}, float("inf")],
    **{
        key: [5, [], {}]
        for key in ["callbacks", "errbacks", "chain", "chord", "delivery_info", "called_directly", "utc"]
    },
    **{key: [5, "x", {}] for key in ["reply_to", "correlation_id", "hostname", "headers", "get", "compression"]},
}
UNACKED = [b"x", b"[]", b"{}", b"5", b"\xff", b"[" * 50_000]
FOREIGN += [message(**{f"headers__{name}": v}) for name, values in WRONG_HEADERS.items() for v in values]


def test_foreign_elements_are_set_aside_and_the_worker_goes_on(tmp_path, own_redis, client):
    app = make_app("tiny", url=own_redis.url)
    client.lpush(PREFIX + "rollout", *FOREIGN)
    for tag, harm in enumerate(UNACKED):  # of a worker that died an hour ago
        client.hset(PREFIX + "unacked", f"tag{tag}", harm)
        client.zadd(PREFIX + "unacked_index", {f"tag{tag}": 1.0})
    client.lpush(PREFIX + "rollout", message(headers__traceparent="00-1", headers__baggage={"a": [1]}))
    send_stage(app, "t2", "rollout")
    with tiny_worker(tmp_path, own_redis.url) as process:
        both = [b"t1", b"t2"]  # what a tracer adds to a message does no harm; two threads may end in any order
        done = lambda: sorted(client.lrange("done", 0, -1)) == both  # noqa: E731
        wait_for(done, timeout=30, what="the messages behind the foreign elements")
        log = log_of(tmp_path)
        assert log.count("of queue `unacked` is not a message and was set aside") == len(UNACKED), log
        assert log.count("of queue `rollout` is not a message and was set aside") == len(FOREIGN)
        for words in ("b'not json'", "header timelimit", "header eta", "no task 'celery.starmap'", "takes 1 arguments"):
            assert words in log, words
        assert "Traceback" not in log and process.poll() is None
        records = [json.loads(record) for record in client.lrange(PREFIX + "rejected", 0, -1)]
        assert len(records) == MAX_REJECTED < len(FOREIGN)
        assert {record["queue"] for record in records} <= {"rollout", "unacked"}
        assert all(len(record["element"]) <= 4 * MAX_REJECTED_BYTES for record in records)
        assert client.llen(PREFIX + "rollout") == 0
        wait_for(lambda: client.hlen(PREFIX + "unacked") == 0, timeout=5, what="nothing to circulate")
        assert make_app("tiny", url=own_redis.url).control.inspect(timeout=1).ping() is None, "nobody asked for it"


TROUBLES = [
    (("CONFIG", "SET", "maxmemory", 1), "out of memory (maxmemory)", ("CONFIG", "SET", "maxmemory", 0)),
    (("REPLICAOF", "127.0.0.1", "1"), "read-only replica", ("REPLICAOF", "NO", "ONE")),
]


def test_a_broker_that_refuses_writes_pauses_the_worker(tmp_path, own_redis, client):
    app = make_app("tiny", url=own_redis.url)
    with tiny_worker(tmp_path, own_redis.url) as process:
        send_stage(app, "t1", "rollout")
        wait_for(lambda: is_done(client, "t1"), timeout=20, what="the first message")
        for i, (trouble, words, cure) in enumerate(TROUBLES):
            client.lpush(PREFIX + "rollout", *(message(properties__delivery_tag=f"tag{i}-{n}") for n in range(20)))
            client.execute_command(*trouble)
            wait_for(lambda words=words: words in log_of(tmp_path), timeout=20, what="the worker to say why it waits")
            began = time.monotonic()
            assert not send(make_app("tiny", url=own_redis.url), "rollout.generate", "rollout", "t2")
            assert time.monotonic() - began < 20
            assert log_of(tmp_path).count("Connection to broker lost") <= 4 * (i + 1), "reconnections are paced"
            client.execute_command(*cure)
            send_stage(app, f"cured{i}", "rollout")
            wait_for(lambda i=i: is_done(client, f"cured{i}"), timeout=30, what="a message after the cure")
        assert process.poll() is None
        assert "Unrecoverable" not in log_of(tmp_path)


def test_a_killed_broker_does_not_end_a_worker_with_messages_in_hand(own_redis):
    """kombu 5.7 ends here with "'NoneType' object has no attribute 'hostname'": the broker dies, the closing of the first
    channel fails and leaves the second open, without its transport, until somebody closes that one too."""
    connection = make_app("tiny", url=own_redis.url).connection(transport_options={"socket_timeout": 1})
    channels = [connection.channel(), connection.channel()]
    queue = Queue("q")
    for channel in channels:
        queue(channel).declare()
        with connection.Producer() as producer:
            producer.publish("text", routing_key="q")
        assert queue(channel).get() is not None  # taken, not acknowledged
    kill(own_redis)
    began = time.monotonic()
    connection.collect()
    for channel in channels:  # as Celery's consumer does next; only connection errors are tolerated
        connection.maybe_close_channel(channel)
    with pytest.raises(connection.connection_errors):
        channels[1].basic_ack("late")  # as a task that ends after the connection
    assert time.monotonic() - began < 15


def test_a_message_that_cannot_be_sent_costs_seconds_and_no_exception(own_redis, client, caplog):
    app = make_app("tiny", url=own_redis.url)
    client.config_set("appendfsync", "always")  # this is about the messages after the kill, not the one before
    assert send(app, "rollout.generate", "rollout", "t1")
    kill(own_redis)
    began = time.monotonic()
    for _ in range(50):
        send_stage(app, "t2", "rollout")
    assert time.monotonic() - began < 20
    assert "was not sent" in caplog.text and "the ledger sends it again" in caplog.text
    own_redis.restart()
    wait_for(lambda: send(app, "rollout.generate", "rollout", "t3"), timeout=8, what="sending again")
    assert "messages were not sent while the broker was unavailable" in caplog.text
    assert client.llen(PREFIX + "rollout") == 2


@pytest.mark.timeout(30)
def test_a_subscription_that_was_lost_is_a_lost_connection_though_the_server_is_back(own_redis):
    """One that reconnected by itself would be read without a bound, in the consumer's only thread."""
    with make_app("tiny", url=own_redis.url).connection() as connection:
        subscription = connection.channel().subclient
        subscription.subscribe("news")
        assert subscription.parse_response()[0] == b"subscribe"
        kill(own_redis)
        own_redis.restart()
        with pytest.raises(redis.ConnectionError):
            subscription.parse_response()
