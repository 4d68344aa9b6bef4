"""Kombu's Redis transport, so that a broker in trouble or a foreign element in a queue costs time and never a worker.

* An element that is not a message as `send` writes it is moved to `<prefix>rejected` (the newest 100, 4 KiB of each) and logged,
  and consuming continues. kombu lets the error of decoding one end the worker, and Celery what a header of another type
  causes, one worker per element; some leave a worker that lives and consumes nothing.
* A broker that refuses writes (out of memory, disk full, demoted) is a lost connection: Celery reconnects and keeps the tasks
  that it holds instead of ending. Every command waits BROKER_WAIT_S for it first, which paces the reconnections; what the event
  loop waits for (BRPOP, subscriptions) fails at once.
* A channel whose transport was closed raises a connection error. kombu's dereferences a None there (AttributeError
  in `Channel.close`) when the broker dies between the closing of two channels, which ended the worker.
* One client object per channel. kombu makes a new `redis.Redis` for every command, two per consumed message and one per
  published one; the constructor alone was a quarter to a third of a consumer's main thread.
* `SentinelTransport` is the same over the master of a `sentinel://` URL.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NoReturn

import redis
from celery.app.task import Context as TaskContext
from kombu.transport import redis as kombu_redis
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from redis.backoff import NoBackoff
from redis.retry import Retry

from sluice.common.connections.outage import OutageRetry, RefusesWrites, refusal
from sluice.common.connections.sentinel import MasterConnection, parse
from sluice.common.pipeline import QUEUES, tasks_on

log = logging.getLogger("sluice.broker")

BROKER_WAIT_S = 5.0
"""How long one command waits for a broker that is unavailable or refuses writes, before Celery itself reconnects."""
_CONTENT = {"application/x-msgpack", "application/json"}
MAX_REJECTED = 100
MAX_REJECTED_BYTES = 4096
MAX_MESSAGE_BYTES = 64 * 1024
"""A message holds the id of a group, and is a hundredth of this."""


class _Headers(BaseModel):
    """Celery's headers as `send` has them written: no time limit, no later delivery, no other task that follows.

    Others are left to whoever adds them (traces), unless Celery or kombu would act on them.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    task: str
    id: str
    sent_at: FiniteFloat | None = None
    lang: str | None = None
    root_id: str | None = None
    parent_id: str | None = None
    argsrepr: str | None = None
    kwargsrepr: str | None = None
    origin: str | None = None
    ignore_result: bool | None = None
    retries: Literal[0] = 0
    replaced_task_nesting: Literal[0] = 0
    timelimit: list[None] | None = None
    stamps: dict[str, None] | None = None
    stamped_headers: None = None
    shadow: None = None
    eta: None = None
    expires: None = None
    group: None = None
    group_index: None = None

    def check(self) -> None:
        """Raise TypeError for a header that would override what Celery knows of a task."""
        if acted_on := sorted({*(self.model_extra or ())} & {*dir(TaskContext), "compression"}):
            raise TypeError(f"header {acted_on[0]} is not ours")


class _RefusalsAreConnectionErrors(redis.Connection):
    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            reply = super().read_response(*args, **kwargs)
        except redis.ResponseError as error:
            words = refusal(error)
            if words is None:
                raise
            self._refuse(words, error)
        for item in reply if isinstance(reply, list) else ():  # a transaction's reply holds its errors
            if isinstance(item, redis.ResponseError) and (words := refusal(item)):
                self._refuse(words, item)
        return reply

    def _refuse(self, words: str, error: redis.ResponseError) -> NoReturn:
        self.disconnect()  # replies to the rest of a pipeline may still be on the wire
        raise RefusesWrites(words) from error


class _Client(kombu_redis.PrefixedStrictRedis):
    def __init__(self, *args: Any, examine: Callable[[Any, Any], bool], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._examine = examine

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        reply = super().parse_response(connection, command_name, **options)
        if command_name == "BRPOP" and reply and not self._examine(*reply):
            return None  # as if the queue had been empty
        return reply


class _QoS(kombu_redis.QoS):
    """Messages that are worked on: kombu returns to their queue those of a worker that died."""

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Return one to its queue; set aside what is not a message. kombu lets its error end the worker."""
        try:
            super().restore_by_tag(tag, client, leftmost)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, redis.DataError) as error:
            with self.channel.conn_or_acquire(client) as client:
                element = client.hget(self.unacked_key, tag) or b""
                client.hdel(self.unacked_key, tag)
                client.zrem(self.unacked_index_key, tag)
            self.channel._set_aside(self.unacked_key, element, repr(error))


class Channel(kombu_redis.Channel):
    """A channel that keeps its client until its connection pool is replaced."""

    connection_class = _RefusalsAreConnectionErrors
    QoS = _QoS
    _kept: Any = None

    def __init__(self, connection: Any, *args: Any, **kwargs: Any) -> None:
        self._outage_retry = OutageRetry(self._server(connection.client), limit_s=BROKER_WAIT_S)
        super().__init__(connection, *args, **kwargs)

    def _server(self, client: Any) -> str:
        return f"{client.hostname}:{client.port} (the broker)"

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        if client is None:
            if self._kept is None or self._kept.connection_pool is not self.pool:
                self._kept = self._create_client()
            client = self._kept
        yield client

    def close(self) -> None:
        self._outage_retry.limit_s = 0.0  # what cannot be returned now is sent again by the ledger
        super().close()

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        if self.connection is None or self.connection.client is None:
            raise redis.ConnectionError("this channel of the broker was closed")
        # What the event loop reads must fail when it is lost: a subscription that reconnects silently is then read without
        # a bound in the consumer's only thread, and a BRPOP on a socket that is not polled is never read.
        retry = Retry(NoBackoff(), 0) if asynchronous else self._outage_retry
        return {**super()._connparams(asynchronous), "retry": retry}

    def _get_client(self) -> Any:
        super()._get_client()  # checks redis-py's version
        return partial(_Client, global_keyprefix=self.global_keyprefix, examine=self._examine)

    def _examine(self, key: bytes, element: bytes) -> bool:
        """Return whether an element of a queue is a message that Celery survives; any other is set aside."""
        queue = key.decode().split(self.sep)[0]
        try:
            self._check(queue, element)
        except ValidationError as error:
            wrong = error.errors(include_url=False, include_input=False)[0]
            self._set_aside(queue, element, f"header {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}")
        except Exception as error:  # of json, kombu and its codecs: none may end the worker
            self._set_aside(queue, element, repr(error))
        else:
            return True
        return False

    def _check(self, queue: str, element: bytes) -> None:
        if len(element) > MAX_MESSAGE_BYTES:
            raise ValueError(f"{len(element)} bytes")
        message = self.Message(json.loads(element), channel=self, accept=_CONTENT)
        delivery = message.delivery_info
        if not all(
            isinstance(text, str) for text in (message.delivery_tag, delivery["exchange"], delivery["routing_key"])
        ):
            raise TypeError("a name or a tag is not text")
        if queue not in QUEUES:  # the reply to a command of remote control
            return
        headers = _Headers.model_validate(message.headers)
        headers.check()
        tasks = tasks_on(queue)
        if headers.task not in tasks:
            raise LookupError(f"queue {queue} has no task {headers.task!r}")
        args, kwargs, embedded = message.decode()  # pickle is refused here, before it is read
        if (
            not isinstance(args, list)
            or len(args) != tasks[headers.task]
            or not all(isinstance(arg, str) for arg in args)
        ):
            raise TypeError(f"{headers.task} takes {tasks[headers.task]} arguments, all text")
        if kwargs or any(embedded.values()):
            raise TypeError("the body holds more than the arguments")

    def _set_aside(self, queue: str, element: bytes, reason: str) -> None:
        log.error("an element of queue `%s` is not a message and was set aside (%s): %r", queue, reason, element[:100])
        record = {
            "queue": queue,
            "at": time.time(),
            "error": reason[:MAX_REJECTED_BYTES],
            "element": element[:MAX_REJECTED_BYTES].decode(errors="backslashreplace"),
        }
        plain = redis.Redis(connection_pool=self.pool)
        rejected = f"{self.global_keyprefix}rejected"
        try:
            with plain.pipeline() as pipe:
                pipe.lpush(rejected, json.dumps(record)).ltrim(rejected, 0, MAX_REJECTED - 1).execute()
        except redis.RedisError as refused:
            log.error("it could not be kept in %s either: %s", rejected, refused)


class Transport(kombu_redis.Transport):
    """The transport that `broker_transport` names."""

    Channel = Channel

    def close_connection(self, connection: Any) -> None:
        """Close every channel, also when the broker has died and the first one fails."""
        self.cycle.close()  # type: ignore[union-attr]
        for channels in (self._avail_channels, self.channels):
            while channels:
                channel = channels.pop()
                try:
                    channel.close()
                except self.connection_errors as error:
                    log.warning("unfinished messages were not returned to the broker: %s", error)


class _Master(_RefusalsAreConnectionErrors, MasterConnection):
    pass


class SentinelChannel(Channel):
    """A channel over the master of the URL in the transport option `sentinel_url`."""

    sentinel_url: str
    from_transport_options = (*Channel.from_transport_options, "sentinel_url")  # type: ignore[assignment]
    connection_class = _Master

    def _server(self, client: Any) -> str:
        return f"{parse(client.transport_options['sentinel_url']).server} (the broker)"

    def _get_pool(self, asynchronous: bool = False) -> Any:
        address = parse(self.sentinel_url)
        options = self._connparams(asynchronous)
        del options["host"], options["port"]
        self.keyprefix_fanout = self.keyprefix_fanout.format(db=address.database)
        manager = address.manager(**options)
        # where kombu finds the connections to the sentinels, to close them with the channel
        setattr(self, "_async_sentinel_manager" if asynchronous else "_sentinel_manager", manager)
        return manager.master_for(address.master).connection_pool


class SentinelTransport(Transport):
    """The transport that `broker_transport` names for a sentinel URL."""

    Channel = SentinelChannel
