"""Celery workers for pipeline.py: the real ones but for a rollout role whose engine costs nothing, or sleeps (SYNTHETIC), and
bare no-op tasks.

    celery -A pipeline_worker worker -Q rollout      completions made beforehand; BENCH_LATENCY_S is slept
    celery -A pipeline_worker:noop worker -Q rollout     tasks that return at once
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from builders import random_completions
from celery import Celery, signals

from sluice.common.connections.broker import make_app
from sluice.common.connections.client import run_name
from sluice.common.serialization import decode, encode
from sluice.workers.context import Context, CooperativePool, Result

LATENCY_S = float(os.environ.get("BENCH_LATENCY_S", "0"))
TOKENS = int(os.environ.get("BENCH_TOKENS", "512"))


def prepare(app: Celery, role: str) -> tuple[Any, int]:
    """In place of sluice.workers.rollout's."""
    context = Context.open(app, role)
    made = random_completions(context.run.config.sampling.group_size, TOKENS)

    def work(claim: Any) -> Result:
        decode(claim.fields["task"])
        version = int(claim.fields["min_version"] or 0)
        time.sleep(LATENCY_S)
        wire = [{**completion, "policy_versions": [[version, TOKENS]]} for completion in made]
        payload = encode({"completions": wire, "worker": context.process})
        return Result(payload=payload, version=version, num_tokens=TOKENS * len(wire))

    def generate(group_id: str) -> None:
        context.run_stage(group_id, "rollout", work, fields=("task", "min_version"))

    app.task(generate, name="rollout.generate")
    signals.worker_ready.connect(lambda **_: context.start_heartbeat(), weak=False)
    signals.worker_shutdown.connect(lambda **_: context.close(), weak=False)
    return CooperativePool, context.run.config.rollout.concurrency


sys.modules["sluice.workers.rollout"] = sys.modules[__name__]  # what sluice.workers.app asks for the rollout role

from sluice.workers.app import app

__all__ = ["app", "noop"]

noop = make_app(run_name())


def nothing(group_id: str) -> None:
    pass


for _name in ("rollout.generate", "reward.score"):
    noop.task(nothing, name=_name, shared=False)
