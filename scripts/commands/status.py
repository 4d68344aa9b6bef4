"""`sluice status`."""

from __future__ import annotations

import json
import time
from typing import Any

import click
import redis
from rich.live import Live

from sluice.common.run import Run
from sluice.dashboard.run_state import collect_status
from sluice.dashboard.terminal import render
from sluice.scripts.launcher.existing_run import opened_run
from sluice.scripts.options import Json, RunName, console, example

REFRESH_S = 1.0
HAS_ENDED = ("finished", "drained", "stopped", "failed")


@click.command(epilog=example("sluice status --watch", "sluice status gsm8k --json"))
@RunName
@click.option("--watch", is_flag=True, help="Refresh every second until the run has ended, or Ctrl-C.")
@Json
def status(name: str | None, watch: bool, as_json: bool) -> None:
    """Show where the run is: step, reward, queues, processes, and what it waits for."""
    if watch and as_json:
        raise click.UsageError("--watch draws a screen, --json prints one object: give one of them")
    with opened_run(name) as (client, opened, _):
        if watch:
            _watch(client, opened)
            return
        snapshot = collect_status(client, opened)
    if as_json:
        click.echo(json.dumps(snapshot))
    else:
        console().print(render(snapshot))


def _watch(client: redis.Redis, run: Run) -> None:
    """Follow the run on a screen. While Redis is unavailable it keeps the last snapshot, and says so."""
    snapshot: dict[str, Any] = collect_status(client, run)
    read_at = time.monotonic()
    terminal = console()
    try:
        with Live(render(snapshot), console=terminal, auto_refresh=False, transient=True) as live:
            while snapshot["status"] not in HAS_ENDED:
                time.sleep(REFRESH_S)
                trouble = ""
                try:
                    snapshot, read_at = collect_status(client, run), time.monotonic()
                except redis.RedisError:
                    old_s = time.monotonic() - read_at
                    trouble = f"Redis cannot be reached; all of this is {old_s:.0f} s old (has the run ended?)"
                live.update(render(snapshot, trouble=trouble), refresh=True)
    except KeyboardInterrupt:
        pass
    terminal.print(render(snapshot))
