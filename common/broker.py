"""The Celery app of a run, without its tasks: queues, transport settings and how a part is sent.

Every setting here was measured (see docs/operations.md): the defaults hang for ever on a half-open connection, redeliver
after up to 100 s, or end the worker. A message is a hint, the ledger is the truth: acknowledging late keeps a
message visible while it is worked on, and a message delivered twice is refused by `claim`.
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu import Queue

from common.config import QUEUES
from common.connection import broker_url
from common.keys import Keys

PART_TASKS = {
    "task": ("dataset.prepare", "dataset"),
    "rollout": ("rollout.generate", "rollout"),
    "reward": ("reward.score", "reward"),
    "reference": ("reference.score", "reference"),
}
"""Part of a group -> (Celery task, queue)."""


def make_app(run: str, *, url: str | None = None) -> Celery:
    """A Celery app bound to one run's queues, on the broker of the environment unless `url` names it. Does not connect."""
    app = Celery("sluice", set_as_current=False)
    app.conf.update(
        broker_url=url or broker_url(),
        broker_transport="common.transport:Transport",
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
        worker_proc_alive_timeout=600,
        worker_hijack_root_logger=True,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        broker_transport_options={
            "global_keyprefix": Keys(run).celery_prefix,
            "visibility_timeout": 3600,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            "unacked_mutex_expire": 15,
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "retry_on_timeout": True,
            "health_check_interval": 10,
        },
    )
    return app


def send_part(app: Celery, group_id: str, part: str) -> None:
    """Tell a queue that a part of a group is owed."""
    name, queue = PART_TASKS[part]
    if part == "rollout" and group_id.startswith("e"):
        queue = "eval"
    send(app, name, queue, group_id)


def send(app: Celery, name: str, queue: str, *args: Any) -> None:
    """Send a task by name; the arguments are ids, never payloads."""
    app.send_task(name, args=args, queue=queue, argsrepr=repr(args)[:100], ignore_result=True)
