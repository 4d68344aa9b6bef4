"""`sluice pause`, `resume`, `drain` and `set`: orders to a run while it goes on, each with its entry in the trail."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import click

from sluice.common.errors import ConfigError

_RUN = click.argument("name", required=False, metavar="[RUN]")
_WHO = click.option("--who", envvar="SLUICE_WHO", help="Who orders it, for the trail; default: user@host.")


@click.command()
@_RUN
@_WHO
def pause(name: str | None, who: str | None) -> None:
    """Hold a run: nothing is admitted and no step begins; what is in flight is finished and kept. Outlives restarts."""
    from sluice.common.operations import control

    _tell(name, who, control.pause, "paused; `sluice resume` goes on", "was paused already")


@click.command()
@_RUN
@_WHO
def resume(name: str | None, who: str | None) -> None:
    """Undo `sluice pause` and `sluice drain`."""
    from sluice.common.operations import control

    _tell(name, who, control.resume, "goes on", "was neither paused nor draining")


@click.command()
@_RUN
@_WHO
def drain(name: str | None, who: str | None) -> None:
    """End a run in good order: train what is in flight as far as whole batches go, checkpoint, exit 0. --resume goes on."""
    from sluice.common.operations import control

    _tell(name, who, control.drain, "is draining", "was draining already")


@click.command("set")
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]... [RUN]")
@_WHO
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def set_(arguments: tuple[str, ...], who: str | None, as_json: bool) -> None:
    """Change settings of a run without a restart; without KEY=VALUE: what can be set, what holds, and the trail."""
    from sluice.common.operations import control
    from sluice.scripts.launcher.launch import opened_run

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
        click.echo(
            f"{opened.name}: " + ", ".join(f"{key}={value}" for key, value in sorted(control_state.settings.items()))
        )
    else:
        _show(state, control.CHANGEABLE)


def _tell(name: str | None, who: str | None, order: Callable[..., bool], done: str, was_so: str) -> None:
    from sluice.common.operations.control import default_who
    from sluice.scripts.launcher.launch import opened_run

    with opened_run(name) as (client, opened, _):
        changed = order(client, opened, who=who or default_who())
    click.echo(f"{opened.name} {done if changed else was_so}")


def _show(state: dict[str, Any], acts_from: dict[str, str]) -> None:
    for key, value in state["settings"].items():
        mark = "*" if key in state["changed"] else " "
        click.echo(f"{mark} {key} = {json.dumps(value)}    acts on {acts_from[key]}")
    for entry in state["change_log"]:
        when = datetime.fromtimestamp(float(entry["at"]))
        click.echo(
            f"{when:%Y-%m-%d %H:%M:%S}  step {entry['step']}  {entry['who']}  {entry['key']}: {entry['old']} -> {entry['new']}"
        )
