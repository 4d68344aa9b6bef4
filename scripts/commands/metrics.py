"""`sluice metrics`: the state of runs for Prometheus, printed once or served."""

from __future__ import annotations

from contextlib import suppress

import click
import redis

from sluice.common.errors import ConfigError
from sluice.common.run import Run, list_runs, open_run
from sluice.scripts.launcher.run_folder import opened_run
from sluice.scripts.options import RunName, example


@click.command(epilog=example("sluice metrics --all --listen 127.0.0.1:9464"))
@RunName
@click.option("--all", "all_runs", is_flag=True, help="Every run of this Redis.")
@click.option("--listen", metavar="HOST:PORT", help="Serve /metrics there until Ctrl-C, instead of printing it once.")
def metrics(name: str | None, all_runs: bool, listen: str | None) -> None:
    """Print or serve queues, ledger, workers, ages and alarms in Prometheus' text format."""
    from prometheus_client import generate_latest, start_http_server

    from sluice.dashboard.prometheus import registry

    if name and all_runs:
        raise ConfigError(f"{name} and --all: name one run or ask for all")
    with opened_run(name) as (client, opened, _):
        made = registry(client, lambda: _runs(client) if all_runs else [opened])
        if listen is None:
            click.echo(generate_latest(made).decode(), nl=False)
            return
        host, port = _address(listen)
        try:
            server, thread = start_http_server(port, addr=host, registry=made)
        except OSError as error:
            raise ConfigError(f"--listen {listen}: {error.strerror}; choose another port") from None
        click.echo(f"serving http://{host}:{server.server_port}/metrics until Ctrl-C", err=True)
        try:
            thread.join()
        finally:
            server.shutdown()


def _runs(client: redis.Redis) -> list[Run]:
    opened = []
    for name in list_runs(client):
        with suppress(ConfigError):  # deleted in the meantime
            opened.append(open_run(client, name))
    return opened


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--listen {listen!r}: give HOST:PORT, e.g. 127.0.0.1:9464")
    return host, int(port)
