"""`sluice status`, `ledger`, `samples`, `trace`, `dead`: what Redis holds of a run; dead letters are requeued or discarded."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import click
import redis
from rich.live import Live

from sluice.common.connections.broker import make_app, send_stage
from sluice.common.connections.secrets import secret
from sluice.common.ledger.ledger import Ledger, read_counters, read_dead
from sluice.common.pipeline import KINDS
from sluice.common.run import Run
from sluice.dashboard.dead_letters import not_dead, read_dead_letters, render_dead
from sluice.dashboard.run_state import collect_status
from sluice.dashboard.samples import read_samples, render_sample
from sluice.dashboard.terminal import ledger_text, render
from sluice.dashboard.trace import newest_group, read_trace, render_trace
from sluice.scripts.launcher.run_folder import opened_run
from sluice.scripts.options import Json, RunName, console, echo_json, example

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
        echo_json(snapshot)
    else:
        console().print(render(snapshot))


def _watch(client: redis.Redis, run: Run) -> None:
    """Follow the run on a screen. While Redis is unavailable it keeps the last snapshot, and says so."""
    snapshot, read_at = collect_status(client, run), time.monotonic()
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


@click.command(epilog=example("sluice ledger gsm8k --json"))
@RunName
@Json
def ledger(name: str | None, as_json: bool) -> None:
    """Check the accounting identity: admitted = trained + dropped + dead + in_flight. Exit code 1 when it does not hold."""
    with opened_run(name) as (client, opened, _):
        all_counters = [read_counters(client, opened.keys, "train"), read_counters(client, opened.keys, "eval")]
    holds = all(counters.holds for counters in all_counters)
    if as_json:
        train, evals = (counters.to_dict() for counters in all_counters)
        echo_json({"run": opened.name, **train, "eval": evals, "holds": holds})
    else:
        for counters in all_counters:
            click.echo(f"{counters.kind:5}  {ledger_text(counters)}")
            reconciled = f", reconciled {counters.reconciled}" if counters.reconciled else ""
            recovered = f", recovered {counters.recovered}" if counters.recovered else ""
            refused = f"late results refused {counters.refused}{reconciled}{recovered}"
            retried = f"retried {counters.retried}, interrupted {counters.interrupted}"
            click.echo(f"       {retried}, sent again {counters.resent}, {refused}")
    sys.exit(0 if holds else 1)


@click.command(epilog=example("sluice samples -n 5 --step 100"))
@RunName
@click.option("-n", "count", default=3, show_default=True, help="Groups to show, newest first.")
@click.option("--step", type=int, help="Only groups of this trainer step.")
@Json
def samples(name: str | None, count: int, step: int | None, as_json: bool) -> None:
    """Show prompts and completions that were trained on, with rewards and advantages."""
    with opened_run(name) as (client, opened, _):
        found = read_samples(client, opened.keys, count=count, step=step)
    if as_json:
        echo_json({"samples": found})
    elif found:
        terminal = console()
        for sample in found:
            terminal.print(render_sample(sample))
    else:
        click.echo("no samples yet", err=True)


@click.command(epilog=example("sluice trace", "sluice trace t0"))
@click.argument("group", required=False)
@RunName
@Json
def trace(group: str | None, name: str | None, as_json: bool) -> None:
    """Show the life of one group, of the newest trained one by default: its stages with times, workers and attempts."""
    with opened_run(name) as (client, opened, _):
        found = read_trace(client, opened.keys, group or newest_group(client, opened.keys))
    if as_json:
        echo_json(found)
    else:
        console().print(render_trace(found))


@click.command(epilog=example("sluice dead --show t17", "sluice dead --requeue all", "sluice dead --discard t17"))
@RunName
@click.option("--show", "group", metavar="GROUP", help="One dead letter with traceback and completions.")
@click.option("--requeue", multiple=True, metavar="GROUP|all", help="Give it fresh attempts; may be repeated.")
@click.option("--discard", multiple=True, metavar="GROUP|all", help="Remove it and what it holds; may be repeated.")
@Json
def dead(
    name: str | None, group: str | None, requeue: tuple[str, ...], discard: tuple[str, ...], as_json: bool
) -> None:
    """Show dead-lettered groups with reason, worker and traceback; requeue or discard them on request."""
    if requeue and discard:
        raise click.UsageError("--requeue gives groups fresh attempts, --discard removes them: give one of the two")
    with opened_run(name) as (client, opened, url):
        ledger = Ledger(client, opened.keys, opened.config, worker="sluice dead")
        if requeue:
            sent = _requeue(ledger, opened, _chosen(client, opened, requeue), url=url)
            click.echo(f"sent again: {', '.join(sent) or 'none'}")
            return
        if discard:
            click.echo(f"discarded: {ledger.discard(_chosen(client, opened, discard))}")
            return
        letters = read_dead_letters(client, opened.keys, group=group)
        discarded = sum(ledger.counters(kind).discarded for kind in KINDS)
    if as_json:
        echo_json({"dead": letters, "discarded": discarded})
        return
    if letters:
        console().print(render_dead(letters))
    else:
        click.echo("no dead letters", err=True)
    if discarded:
        click.echo(f"{discarded} others were discarded: on request, or beyond replay_buffer.max_dead_bytes", err=True)


def _chosen(client: redis.Redis, run: Run, names: Sequence[str]) -> list[str]:
    """Return the named dead letters, or all of them. Raises ConfigError for one that is not dead."""
    found = read_dead(client, run.keys)
    for name in names:
        if name != "all" and name not in found:
            raise not_dead(name)
    return [name for name in found if name in names or "all" in names]


def _requeue(ledger: Ledger, run: Run, groups: Sequence[str], *, url: str) -> list[str]:
    """Give groups fresh attempts; return those sent."""
    app = make_app(run.name, url=secret("SLUICE_BROKER_URL") or url)
    sent = {group: ledger.requeue(group) for group in groups}
    for group, stages in sent.items():
        for stage in stages:
            send_stage(app, group, stage)
    return [group for group, stages in sent.items() if stages]
