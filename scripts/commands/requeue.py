"""`sluice dead --requeue`: dead-lettered groups back into the ledger and the queues."""

from __future__ import annotations

import os
from collections.abc import Sequence

import redis

from sluice.common.connections.broker import make_app, send_stage
from sluice.common.ledger.ledger import Ledger
from sluice.common.run import Run
from sluice.dashboard.dead_letters import read_dead


def requeue_groups(client: redis.Redis, run: Run, groups: Sequence[str], *, url: str) -> list[str]:
    """Requeue the named groups, or all; returns those sent. Raises ConfigError for one that is not dead."""
    chosen = [
        letter["group"]
        for name in groups
        for letter in read_dead(client, run.keys, group=None if name == "all" else name)
    ]
    ledger = Ledger(client, run.keys, run.config, worker="requeue")
    app = make_app(run.name, url=os.environ.get("SLUICE_BROKER_URL") or url)
    for group in chosen:
        for stage in ledger.requeue(group):
            send_stage(app, group, stage)
    return chosen
