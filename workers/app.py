"""The Celery app: `celery -A sluice worker -Q rollout` (or dataset, reference, reward, eval).

One queue per worker process (or `-Q rollout,eval`: one engine for both). It decides pool and concurrency, so the plain
command is right:

    dataset    a tick thread admits groups and sends overdue stages again
    rollout    task threads feed one engine
    eval       the same engine, pinned to the version under evaluation
    reward     processes run user code, with time limits; they never import torch
    reference  task threads feed one batched model

common/pipeline.py defines pool and concurrency. Only SLUICE_REDIS_URL and SLUICE_RUN are needed; config, model config,
tokenizer and weights come from the run.
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

from sluice.common.connections.broker import make_app
from sluice.common.connections.client import run_name
from sluice.common.errors import ConfigError, ConnectionFailed
from sluice.common.monitoring.printable import escape_log_records, printable
from sluice.common.pipeline import QUEUES, STAGES, stage_on
from sluice.workers.context import Context, CooperativePool


class QueueWorker(Worker):
    """A Celery worker that takes its pool, concurrency and tasks from its queue."""

    def __init__(self, app: Any = None, hostname: str | None = None, **options: Any) -> None:
        queues = _served_queues(options.get("queues"))
        role, stage = queues[0], stage_on(queues[0])
        _refuse_other_pool(role, stage.pool)
        try:
            context = import_module(f"sluice.workers.{stage.module}").prepare(self.app, ",".join(queues))
        except (ConfigError, ConnectionFailed) as error:
            _refuse(str(error))
        self.app.conf.worker_enable_remote_control = context.run.config.metrics.remote_control
        signal.signal(signal.SIGUSR2, Context.drain)
        options["pool"] = CooperativePool if stage.pool == "threads" else stage.pool
        options["concurrency"] = options.get("concurrency") or stage.concurrency(context.run.config)
        options["without_gossip"] = options["without_mingle"] = True  # no worker needs to know another: starts faster
        if hostname is None or hostname.startswith("celery@"):
            hostname = host_format(default_nodename(f"{role}-{token_hex(3)}@%h"))
        for chatty in ("celery.worker.strategy", "celery.app.trace"):  # two lines for each message
            logging.getLogger(chatty).setLevel(logging.WARNING)
        super().__init__(app, hostname, **options)

    def install_platform_tweaks(self, worker: Any) -> None:
        """Install Celery's signal handlers; a closed terminal ends a worker as SIGTERM does, instead of restarting it."""
        hangup = signal.getsignal(signal.SIGHUP)
        super().install_platform_tweaks(worker)
        signal.signal(signal.SIGHUP, hangup if hangup is signal.SIG_IGN else signal.getsignal(signal.SIGTERM))


def _served_queues(queues: Any) -> list[str]:
    """Return the one queue, or the two of one stage together (rollout and eval)."""
    names = queues.split(",") if isinstance(queues, str) else list(queues or ())
    if both := [[s.queue, s.eval_queue] for s in STAGES if sorted(names) == sorted([s.queue, s.eval_queue])]:
        return both[0]
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
    click.echo(f"error: {printable(message)}", err=True)
    sys.exit(2)


escape_log_records()
try:
    app = make_app(run_name())
except ConfigError as error:
    _refuse(str(error))
app.Worker = type("Worker", (QueueWorker,), {"app": app})
app.set_current()
