"""`sluice pause`, `resume`, `drain` and `set` change the control state of a run; `eval` requests an evaluation of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import click
import redis

from sluice.common.connections.broker import make_app, send
from sluice.common.connections.secrets import secret
from sluice.common.errors import ConfigError, SluiceError
from sluice.common.ledger import evaluations as evaluation
from sluice.common.monitoring.diagnosis import diagnose
from sluice.common.monitoring.heartbeats import is_readable, read_heartbeats
from sluice.common.operations import control
from sluice.common.pipeline import stages_for
from sluice.common.policies.lineage import read_pointer
from sluice.common.run import Run
from sluice.dashboard.evaluations import describe
from sluice.scripts.launcher.run_folder import opened_run
from sluice.scripts.options import Json, RunName, echo_json, example

Who = click.option("--who", envvar="SLUICE_WHO", help="Who gives the command, for the change log; default: user@host.")


@click.command(epilog=example("sluice pause gsm8k"))
@RunName
@Who
def pause(name: str | None, who: str | None) -> None:
    """Pause a run: nothing is admitted and no step begins; what is in flight is finished and kept. Outlives restarts."""
    _give(name, who, control.pause, "paused; `sluice resume` continues it", "was paused already")


@click.command(epilog=example("sluice resume gsm8k"))
@RunName
@Who
def resume(name: str | None, who: str | None) -> None:
    """Undo `sluice pause` and `sluice drain`."""
    _give(name, who, control.resume, "continues", "was neither paused nor draining")


@click.command(epilog=example("sluice drain gsm8k"))
@RunName
@Who
def drain(name: str | None, who: str | None) -> None:
    """End a run gracefully: train full batches of what is in flight, checkpoint, exit 0. --resume continues it."""
    _give(name, who, control.drain, "is draining", "was draining already")


def _give(name: str | None, who: str | None, command: Callable[..., bool], done: str, was_so: str) -> None:
    with opened_run(name) as (client, opened, _):
        changed = command(client, opened, who=who or control.default_who())
    click.echo(f"{opened.name} {done if changed else was_so}")


@click.command("set", epilog=example("sluice set trainer.learning_rate=1e-6 gsm8k"))
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]... [RUN]")
@Who
@Json
def set_(arguments: tuple[str, ...], who: str | None, as_json: bool) -> None:
    """Change settings of a run without a restart; without KEY=VALUE: show settings, values and the change log."""
    names = [argument for argument in arguments if "=" not in argument]
    assignments = [argument for argument in arguments if "=" in argument]
    if len(names) > 1:
        raise ConfigError(f"{' '.join(names)}: give key=value settings and at most one run")
    with opened_run(names[0] if names else None) as (client, opened, _):
        if assignments:
            control.change(client, opened, assignments, who=who or control.default_who())
        control_state = control.read_control_state(client, opened.keys)
        config = control.with_settings(opened.config, control_state.settings)
    state = {
        "run": opened.name,
        "settings": {key: control.at(config, key) for key in control.CHANGEABLE},
        "changed": sorted(control_state.settings),
        "paused": control_state.paused,
        "draining": control_state.draining,
        "change_log": [fields for _, fields in control_state.change_log],
    }
    if as_json:
        echo_json(state)
    elif assignments:
        changed = ", ".join(f"{key}={value}" for key, value in sorted(control_state.settings.items()))
        click.echo(f"{opened.name}: {changed}")
    else:
        _show(state)


def _show(state: dict[str, Any]) -> None:
    for key, value in state["settings"].items():
        mark = "*" if key in state["changed"] else " "
        click.echo(f"{mark} {key} = {json.dumps(value)}    acts on {control.CHANGEABLE[key]}")
    for entry in state["change_log"]:
        when, change = datetime.fromtimestamp(float(entry["at"])), f"{entry['key']}: {entry['old']} -> {entry['new']}"
        click.echo(f"{when:%Y-%m-%d %H:%M:%S}  step {entry['step']}  {entry['who']}  {change}")


@click.command("eval", epilog=example("sluice eval gsm8k", "sluice eval --list --json"))
@RunName
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, help="Seconds to wait for the result.")
@click.option("--list", "only_list", is_flag=True, help="Evaluate nothing: all results so far, by version.")
@Json
def evaluate(name: str | None, timeout_s: float, only_list: bool, as_json: bool) -> None:
    """Evaluate the newest policy of a running run on its held-out sets, beside training."""
    with opened_run(name) as (client, opened, url):
        version = None if only_list else _evaluate_newest(client, opened, url=url, timeout_s=timeout_s)
        results = [e for e in evaluation.read_all(client, opened) if version in (None, e["version"])]
    if as_json:
        echo_json({"evaluations": results})
    for result in () if as_json else results:
        click.echo(describe(result))


def _evaluate_newest(client: redis.Redis, run: Run, *, url: str, timeout_s: float) -> int:
    """Evaluate the newest version on every configured set; return it. Raises ConfigError, and SluiceError on a time-out."""
    if not run.config.evaluation.datasets:
        raise ConfigError(f"run {run.name} has no evaluation.datasets in its config")
    heartbeats = [stats for stats in read_heartbeats(client, run.keys).values() if is_readable(stats)]
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
    send(make_app(run.name, url=secret("SLUICE_BROKER_URL") or url), "dataset.evaluate", "dataset")
    deadline = time.monotonic() + timeout_s
    for dataset in run.config.evaluation.datasets:
        while evaluation.result(client, run.keys, dataset, version=version) is None:
            if time.monotonic() > deadline:
                raise SluiceError(
                    f"the evaluation did not finish within {timeout_s:.0f} s: {diagnose(client, run).text}"
                )
            time.sleep(0.2)
    return version
