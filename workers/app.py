"""The Celery app: `celery -A sluice worker -Q rollout` (or dataset, reference, reward, eval).

One queue per worker process (or `-Q rollout,eval`: one engine for both). It decides pool and concurrency, so the plain
command is right:

    dataset    threads -c 1                     its tick thread admits groups and sends overdue parts again
    rollout    threads -c rollout.concurrency   task threads feed one engine
    eval       threads -c rollout.concurrency   the same engine, pinned to the version under evaluation
    reference  threads -c reference.concurrency task threads feed one batched model
    reward     prefork -c reward.concurrency    user code, with time limits; never imports torch

Only SLUICE_REDIS_URL and SLUICE_RUN are needed; config, model config, tokenizer and weights come from the run.
"""

from __future__ import annotations

import logging
import signal
import sys
from importlib import import_module
from secrets import token_hex
from typing import Any

import click
from celery.apps.worker import Worker
from celery.utils.nodenames import default_nodename, host_format

from sluice.common.config import QUEUES
from sluice.common.connections.broker import make_app
from sluice.common.connections.client import run_name
from sluice.common.errors import ConfigError, ConnectionFailed
from sluice.workers.context import Context


class QueueWorker(Worker):
    """A Celery worker that takes its pool, concurrency and tasks from its queue."""

    def __init__(self, app: Any = None, hostname: str | None = None, **options: Any) -> None:
        queues = _served_queues(options.get("queues"))
        role = queues[0]
        try:
            module = import_module(f"sluice.workers.{'rollout' if role == 'eval' else role}")
            pool, concurrency = module.prepare(self.app, ",".join(queues))
        except (ConfigError, ConnectionFailed) as error:
            _refuse(str(error))
        _refuse_other_pool(role, pool)
        signal.signal(signal.SIGUSR2, Context.drain)
        options["pool"] = pool
        options["concurrency"] = options.get("concurrency") or concurrency
        options["without_gossip"] = options["without_mingle"] = True  # no worker needs to know another: starts faster
        if hostname is None or hostname.startswith("celery@"):
            hostname = host_format(default_nodename(f"{role}-{token_hex(3)}@%h"))
        for chatty in ("celery.worker.strategy", "celery.app.trace"):  # two lines for each message
            logging.getLogger(chatty).setLevel(logging.WARNING)
        super().__init__(app, hostname, **options)


def _served_queues(queues: Any) -> list[str]:
    """One queue, or rollout and eval together."""
    names = queues.split(",") if isinstance(queues, str) else list(queues or ())
    if sorted(names) == ["eval", "rollout"]:
        return ["rollout", "eval"]
    if len(names) != 1 or names[0] not in QUEUES:
        _refuse(
            f"name the one queue this worker serves: -Q followed by one of {', '.join(QUEUES)}, or rollout,eval "
            f"(got {','.join(names) or 'none'})"
        )
    return names


def _refuse_other_pool(role: str, pool: str) -> None:
    context = click.get_current_context(silent=True)
    if context and context.get_parameter_source("pool") == click.core.ParameterSource.COMMANDLINE:
        _refuse(f"drop -P: a {role} worker runs on its own pool ({pool}), chosen by its queue")


def _refuse(message: str) -> Any:
    click.echo(f"error: {message}", err=True)
    sys.exit(2)


try:
    app = make_app(run_name())
except ConfigError as error:
    _refuse(str(error))
app.Worker = type("Worker", (QueueWorker,), {"app": app})
app.set_current()
