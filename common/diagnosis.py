"""Why nothing moves: the first cause that explains why the trainer has no batch, in words.

Read from heartbeats, queues and the ledger alone, so that `sluice status`, the trainer's log and the dashboard say the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import redis

from common.connection import connect
from common.ledger import read_account
from common.metrics import read_heartbeats
from common.run import Run


def broker_client(client: redis.Redis) -> redis.Redis:
    """The server that holds Celery's queues: SLUICE_BROKER_URL's, else the data server that `client` speaks to."""
    url = os.environ.get("SLUICE_BROKER_URL")
    return _connect_once(url) if url else client


@cache
def _connect_once(url: str) -> redis.Redis:
    return connect(url)


def queue_depths(client: redis.Redis, run: Run, queues: tuple[str, ...]) -> dict[str, int]:
    """Messages waiting per queue, on the broker where it is another server than the data's."""
    with broker_client(client).pipeline(transaction=False) as pipe:
        for queue in queues:
            pipe.llen(run.keys.celery_prefix + queue)
        return dict(zip(queues, pipe.execute(), strict=True))


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a run does not move."""

    kind: str
    text: str


def diagnose(client: redis.Redis, run: Run) -> Cause:
    return Cause("working", explain_stall(client, run))


def explain_stall(client: redis.Redis, run: Run) -> str:
    """One sentence: what the run is waiting for."""
    needed = ("dataset", "rollout", *run.config.parts)
    beats = read_heartbeats(client, run.keys)
    roles = [facts["role"] for facts in beats.values()]
    depths = queue_depths(client, run, needed)
    for queue in needed:
        if queue not in roles:
            return f"0 workers on `{queue}`, {depths[queue]} messages queued"
    if alarms := [f"{name}: {facts['alarm']}" for name, facts in beats.items() if facts.get("alarm")]:
        return "; ".join(alarms)
    account = read_account(client, run.keys)
    if account.in_flight == 0:
        stopped = {facts.get("stopped_by", "?") for facts in beats.values() if facts["role"] == "dataset"}
        return f"no group is in flight; admission stopped by {', '.join(sorted(stopped))}"
    deepest = max(needed, key=lambda queue: depths[queue])
    running = {q: sum(f.get("running", 0) for f in beats.values() if f["role"] == q) for q in needed}
    busy = ", ".join(f"{count} on {queue}" for queue, count in running.items() if count) or "none"
    note = f"; {account.dropped['stale']} groups were dropped as stale so far" if account.dropped.get("stale") else ""
    queued = f"; longest queue: {depths[deepest]} on `{deepest}`" if depths[deepest] else ""
    return f"{account.in_flight} groups in flight, being worked on: {busy}{queued}{note}"
