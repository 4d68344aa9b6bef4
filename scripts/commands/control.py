"""`sluice pause`, `resume`, `drain` and `set`: commands that change the control state of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import click

from sluice.common.errors import ConfigError
from sluice.common.operations import control
from sluice.scripts.launcher.run_folder import opened_run
from sluice.scripts.options import Json, RunName, example

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
        click.echo(json.dumps(state))
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
