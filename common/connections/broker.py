"""The Celery app of a run, without its tasks: queues, transport settings and how a stage is sent.

Every setting here was measured (see docs/operations.md): the defaults hang forever on a half-open connection, redeliver
after up to 100 s, or end the worker. A message is a hint, the ledger is the truth: acknowledging late keeps a
message visible while it is worked on, a message delivered twice is refused by `claim`, and a message that cannot be sent is
dropped with a warning: the ledger sends what is pending again.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from weakref import WeakKeyDictionary

import redis
from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES

from sluice.common.connections.address import Address, parse_address
from sluice.common.connections.client import broker_url
from sluice.common.keys import Keys
from sluice.common.pipeline import QUEUES, kind_of, stage_of

log = logging.getLogger("sluice.broker")

SEND_PAUSE_S = 5.0
"""After a message could not be sent, none is tried for this long: a role must not spend its time on a dead broker."""


def make_app(run: str, *, url: str | None = None) -> Celery:
    """Return a Celery app bound to one run's queues, on `url` or the broker of the environment. Does not connect."""
    app = Celery("sluice", set_as_current=False)
    where, transport, options = _broker(url or broker_url())
    app.conf.update(
        broker_url=where,
        broker_transport=transport,
        result_backend=None,
        task_ignore_result=True,
        task_serializer="msgpack",
        accept_content=["msgpack", "json"],  # json only for Celery's own control messages; no pickle
        task_queues=[Queue(name) for name in QUEUES],
        task_create_missing_queues=False,
        task_acks_late=True,
        task_reject_on_worker_lost=False,  # the ledger sends again; a poison prompt must not circulate for free
        task_acks_on_failure_or_timeout=True,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_publish_retry=False,  # the transport has waited already
        worker_proc_alive_timeout=600,
        worker_hijack_root_logger=True,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        worker_enable_remote_control=False,  # metrics.remote_control: workers/app.py
        broker_transport_options={
            "global_keyprefix": Keys(run).celery_prefix,
            "visibility_timeout": 3600,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            "unacked_mutex_expire": 15,
            # a connection that died silently is found within 12 s: BRPOP is overdue after 6 s, checked every 5 s
            "socket_timeout": 3,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "retry_on_timeout": True,
            "health_check_interval": 5,
            "max_retries": 1,  # of a producer's connection: unbounded by default
            **options,
        },
    )
    return app


def _broker(url: str) -> tuple[str, str, dict[str, str]]:
    """Return Celery's broker URL, transport and transport options for one of our URLs. Raises ConfigError."""
    address = parse_address(url)
    if address.scheme == "unix":  # redis-py's form of it; ours so that one URL serves both
        # a socket's URL needs a name before its plus
        TRANSPORT_ALIASES["sluice"] = "sluice.common.connections.transport:Transport"
        return f"sluice+{_socket_url(address)}", "sluice", {}
    if address.scheme != "sentinel":
        return url, "sluice.common.connections.transport:Transport", {}
    return (
        f"sentinel://{address.shown.rpartition('@')[2].partition(',')[0].partition('/')[0]}/{address.database}",
        "sluice.common.connections.transport:SentinelTransport",
        {"sentinel_url": url},
    )


def _socket_url(address: Address) -> str:
    """Return kombu's form of a socket's URL."""
    user, password = (quote(text or "", safe="") for text in (address.username, address.password))
    who = f"{user}:{password}@" if user or password else ""
    return f"socket://{who}{quote(address.name)}?virtual_host={address.database}"


def send_stage(app: Celery, group_id: str, name: str) -> None:
    """Tell the stage's queue that it is pending for a group."""
    stage = stage_of(name)
    send(app, stage.celery_task, stage.queue_for(kind_of(group_id)), group_id)


@dataclass(slots=True)
class _Pause:
    until: float = 0.0
    num_skipped: int = 0


_pauses: WeakKeyDictionary[Celery, _Pause] = WeakKeyDictionary()


def send(app: Celery, name: str, queue: str, *args: Any) -> bool:
    """Send a task by name; the arguments are ids, never payloads. False: the broker does not accept it now."""
    pause = _pauses.setdefault(app, _Pause())
    if time.monotonic() < pause.until:
        pause.num_skipped += 1
        return False
    try:
        headers = {"sent_at": time.time()}
        app.send_task(name, args=args, queue=queue, argsrepr=repr(args)[:100], ignore_result=True, headers=headers)
    except (OperationalError, redis.RedisError, OSError) as error:
        log.warning("%s%r was not sent (%s): the ledger sends it again when it is overdue", name, args, error)
        pause.until = time.monotonic() + SEND_PAUSE_S
        return False
    if pause.num_skipped:
        log.warning(
            "%d messages were not sent while the broker was unavailable; the ledger sends them again", pause.num_skipped
        )
        pause.num_skipped = 0
    return True
