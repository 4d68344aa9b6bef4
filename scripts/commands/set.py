"""`sluice set`."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import click

from sluice.common.errors import ConfigError
from sluice.scripts.control import Who
from sluice.scripts.options import Json, example


@click.command("set", epilog=example("sluice set trainer.learning_rate=1e-6 gsm8k"))
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]... [RUN]")
@Who
@Json
def set_(arguments: tuple[str, ...], who: str | None, as_json: bool) -> None:
    """Change settings of a run without a restart; without KEY=VALUE: what can be set, what holds, and the trail."""
    from sluice.common.operations import control
    from sluice.scripts.launcher.existing_run import opened_run

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


def _show(state: dict[str, Any], acts_from: dict[str, str]) -> None:
    for key, value in state["settings"].items():
        mark = "*" if key in state["changed"] else " "
        click.echo(f"{mark} {key} = {json.dumps(value)}    acts on {acts_from[key]}")
    for entry in state["change_log"]:
        when = datetime.fromtimestamp(float(entry["at"]))
        click.echo(
            f"{when:%Y-%m-%d %H:%M:%S}  step {entry['step']}  {entry['who']}  {entry['key']}: {entry['old']} -> {entry['new']}"
        )
