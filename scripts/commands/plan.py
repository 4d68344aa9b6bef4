"""`sluice plan`: what a config would start here, and the commands for several machines. Starts and stores nothing.

Counts, commands and GPUs are those that `sluice run` would use (scripts/launcher/roles.py), refusals included. Datasets,
tokenizer and rewards are not checked: `sluice doctor CONFIG` does that.
"""

from __future__ import annotations

import shlex
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from sluice.common.config import Config
from sluice.common.config.file import load_config
from sluice.common.paths import expanded
from sluice.common.pipeline import FIRST, stage_on, stages_for
from sluice.scripts.launcher.roles import assigned_gpus, check_gpus, trainer_gpus, worker_bounds
from sluice.scripts.options import ConfigFile, Json, Overrides, echo_json, example
from sluice.trainer.trackers import check_trackers


@click.command(epilog=example("sluice plan quickstart replicas.rollout=2"))
@ConfigFile
@Overrides
@Json
def plan(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what `sluice run` would start on this machine, and the commands for several. Starts nothing."""
    found = make_plan(load_config(config, list(overrides)), config, overrides)
    if as_json:
        echo_json(found)
    else:
        render_plan(found)


def make_plan(config: Config, path: str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what is shown, as plain data. Raises ConfigError where this machine's GPUs do not suffice."""
    check_gpus(config)
    check_trackers(config.metrics)
    roles = [_worker(config, queue, *bounds) for queue, bounds in worker_bounds(config).items()]
    roles = [role for role in [*roles, _trainer(config)] if role["max"]]
    files = list(expanded(config.model.path).glob("*.safetensors"))  # none for a hub id
    return {
        "model": config.model.path,
        "weights_mib": round(sum(file.stat().st_size for file in files) / 2**20, 1) if files else None,
        "roles": roles,
        "processes": {end: sum(role[end] for role in roles) for end in ("min", "max")},
        "groups_per_step": config.groups_per_step,
        "completions_per_step": config.groups_per_step * config.sampling.group_size,
        "credits": config.max_credits,
        "messages_per_group": [stage.name for stage in stages_for(config) if stage is not FIRST],
        "machines": _machines(path, overrides, roles),
        "notes": _notes(config, roles),
    }


def _worker(config: Config, queue: str, min_workers: int, max_workers: int) -> dict[str, Any]:
    stage = stage_on(queue)
    gpus = [assigned_gpus(config, queue, i) for i in range(max_workers)] if stage.needs_device else []
    pool = {"pool": stage.pool, "concurrency": stage.concurrency(config), "gpus": [each for each in gpus if each]}
    command = f"celery -A sluice worker -Q {queue}"
    return {"role": queue, "min": min_workers, "max": max_workers, **pool, "command": command}


def _trainer(config: Config) -> dict[str, Any]:
    ranks = config.replicas.trainer
    pool = {"pool": "process per rank", "concurrency": 1, "gpus": [[gpu] for gpu in trainer_gpus(config)]}
    command = "sluice train" + (f" --ranks {ranks}" if ranks > 1 else "")
    return {"role": "trainer", "min": ranks, "max": ranks, **pool, "command": command}


def _notes(config: Config, roles: list[dict[str, Any]]) -> list[str]:
    """Return warnings about waste and missing settings."""
    notes = [
        f"{role['max']} {role['role']} workers for at most {config.max_credits} credits: the others idle; raise "
        "replay_buffer.batch_size or max_policy_age, or lower the number"
        for role in roles
        if role["role"] not in ("eval", "trainer") and role["max"] > config.max_credits
    ]
    if config.policy_store.transport == "directory":
        path = config.policy_store.path or "not set: memory of one machine"
        notes.append(
            f"on several machines policy_store.path ({path}) must be a folder that all share; else: policy_store.transport=redis"
        )
    return notes


def _machines(path: str, overrides: tuple[str, ...], roles: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the commands to type, in order, and where."""
    create = shlex.join(["sluice", "create", path, *overrides, "--name", "NAME"])
    export = "export SLUICE_REDIS_URL=redis://HOST:6379/0 SLUICE_RUN=NAME"
    steps = [{"where": "on every machine", "command": export}, {"where": "once, anywhere", "command": create}]
    for role in roles:
        is_trainer = role["role"] == "trainer"
        needs_gpu = not is_trainer and stage_on(role["role"]).needs_device
        alone = " each with its own CUDA_VISIBLE_DEVICES" if needs_gpu and role["max"] > 1 else ""
        count = "once" if is_trainer or _range(role, "..") == "1" else f"{_range(role, '..')} times"
        steps.append({"where": f"{count}, on any machine{alone}", "command": role["command"]})
    return steps


def _range(ends: dict[str, Any], to: str) -> str:
    return str(ends["max"]) if ends["min"] == ends["max"] else f"{ends['min']}{to}{ends['max']}"


def render_plan(found: dict[str, Any]) -> None:
    """Print the plan for people."""
    console = Console(soft_wrap=True, highlight=False)
    weights = "" if found["weights_mib"] is None else f", {found['weights_mib']:,} MiB of weights"
    console.print(f"model {found['model']}{weights}", markup=False)
    stages = " + ".join(found["messages_per_group"])
    console.print(
        f"{found['groups_per_step']} groups a step ({found['completions_per_step']} completions), at most "
        f"{found['credits']} between admission and publication (credits); messages per group: {stages}"
    )
    shown = _range(found["processes"], " to ")
    table = Table(title=f"sluice run starts {shown} processes here, beside Redis", title_justify="left")
    for name in ("role", "number", "pool", "GPUs", "command"):
        table.add_column(name, overflow="fold")
    for role in found["roles"]:
        gpus = " ".join("+".join(each) for each in role["gpus"]) or "-"
        pool = f"{role['pool']} x {role['concurrency']}"
        table.add_row(role["role"], _range(role, ".."), pool, gpus, role["command"])
    (console if console.is_terminal else Console(width=160)).print(table)
    console.print("on several machines:")
    for line in found["machines"]:
        console.print(f"  # {line['where']}\n  {line['command']}", markup=False)
    for note in found["notes"]:
        console.print(f"note: {note}", markup=False)
