"""`sluice eval`: request an evaluation of the newest policy and wait for it; `--list`: the results of all evaluations."""

from __future__ import annotations

import json
import os
import time

import click
import redis

from sluice.common.connections.broker import make_app, send
from sluice.common.errors import ConfigError, SluiceError
from sluice.common.ledger import evaluations as evaluation
from sluice.common.monitoring.diagnosis import diagnose
from sluice.common.monitoring.heartbeats import read_heartbeats
from sluice.common.pipeline import stages_for
from sluice.common.policies.lineage import read_pointer
from sluice.common.run import Run
from sluice.dashboard.evaluations import describe, list_evaluations
from sluice.scripts.launcher.existing_run import opened_run
from sluice.scripts.options import Json, RunName, example


@click.command("eval", epilog=example("sluice eval gsm8k", "sluice eval --list --json"))
@RunName
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, help="Seconds to wait for the result.")
@click.option("--list", "only_list", is_flag=True, help="Evaluate nothing: all results so far, by version.")
@Json
def evaluate(name: str | None, timeout_s: float, only_list: bool, as_json: bool) -> None:
    """Evaluate the newest policy of a running run on its held-out sets, beside training."""
    with opened_run(name) as (client, opened, url):
        version = None if only_list else _evaluate_newest(client, opened, url=url, timeout_s=timeout_s)
        results = [e for e in list_evaluations(client, opened) if version in (None, e["version"])]
    if as_json:
        click.echo(json.dumps({"evaluations": results}))
    for result in () if as_json else results:
        click.echo(describe(result))


def _evaluate_newest(client: redis.Redis, run: Run, *, url: str, timeout_s: float) -> int:
    """Evaluate the newest version on every configured set; return it. Raises ConfigError, and SluiceError on a time-out."""
    if not run.config.evaluation.datasets:
        raise ConfigError(f"run {run.name} has no evaluation.datasets in its config")
    heartbeats = read_heartbeats(client, run.keys).values()
    roles = {stats["role"] for stats in heartbeats} | {"eval" for stats in heartbeats if stats.get("evaluates")}
    if missing := {stage.queue_for("eval") for stage in stages_for(run.config, "eval")} - roles:
        raise ConfigError(
            f"an evaluation needs workers on {', '.join(sorted(missing))}: start them with `sluice worker QUEUE`"
        )
    newest = read_pointer(client, run.keys).get("version")
    if newest is None:
        raise ConfigError(f"run {run.name} has published no policy yet: is its trainer running?")
    version = int(newest)
    for dataset in run.config.evaluation.datasets:
        evaluation.request(client, run.keys, dataset, version=version)
    send(make_app(run.name, url=os.environ.get("SLUICE_BROKER_URL") or url), "dataset.evaluate", "dataset")
    deadline = time.monotonic() + timeout_s
    for dataset in run.config.evaluation.datasets:
        while evaluation.result(client, run.keys, dataset, version=version) is None:
            if time.monotonic() > deadline:
                raise SluiceError(
                    f"the evaluation did not finish within {timeout_s:.0f} s: {diagnose(client, run).text}"
                )
            time.sleep(0.2)
    return version
