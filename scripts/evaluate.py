"""`sluice eval`: ask for an evaluation of the newest policy and wait for it."""

from __future__ import annotations

import os
import time
from typing import Any

import redis

from common import evaluation
from common.broker import make_app, send
from common.diagnosis import explain_stall
from common.errors import ConfigError, SluiceError
from common.metrics import read_heartbeats
from common.run import Run


def evaluate_latest(client: redis.Redis, run: Run, *, url: str, timeout_s: float) -> list[dict[str, Any]]:
    """Results on every configured set. Raises ConfigError, and SluiceError when it does not finish in time."""
    if not run.config.evaluation.datasets:
        raise ConfigError(f"run {run.name} has no evaluation.datasets in its config")
    beats = read_heartbeats(client, run.keys).values()
    roles = {facts["role"] for facts in beats} | {"eval" for facts in beats if facts.get("evaluates")}
    if missing := {"dataset", "eval", "reward"} - roles:
        raise ConfigError(
            f"an evaluation needs workers on {', '.join(sorted(missing))}: start them with `sluice worker QUEUE`"
        )
    newest = client.hget(run.keys("policy"), "version")
    if newest is None:
        raise ConfigError(f"run {run.name} has published no policy yet: is its trainer running?")
    version = int(newest)
    for dataset in run.config.evaluation.datasets:
        evaluation.request(client, run.keys, dataset, version=version)
    send(make_app(run.name, url=os.environ.get("SLUICE_BROKER_URL") or url), "dataset.evaluate", "dataset")
    deadline = time.monotonic() + timeout_s
    results = []
    for dataset in run.config.evaluation.datasets:
        while (found := evaluation.result(client, run.keys, dataset, version=version)) is None:
            if time.monotonic() > deadline:
                raise SluiceError(
                    f"the evaluation did not finish within {timeout_s:.0f} s: {explain_stall(client, run)}"
                )
            time.sleep(0.2)
        results.append(
            {
                "dataset": found.dataset,
                "version": version,
                "pass@1": found.pass_at_1,
                f"pass@{found.k}": found.pass_at_k,
            }
        )
    return results
