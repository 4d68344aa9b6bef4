"""`sluice dashboard` and `sluice metrics`: what runs do, served over HTTP; metrics also printed once."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import click
import redis

from sluice.common.errors import ConfigError
from sluice.common.run import Run, list_runs, open_run
from sluice.scripts.launcher.run_folder import RunFolders, opened_run
from sluice.scripts.options import RunName, UserPath, example


@click.command(epilog=example("sluice dashboard --port 8265"))
@click.argument("names", nargs=-1, metavar="[RUN]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; another one needs a token.")
@click.option("--port", default=8265, show_default=True, help="Port; 0 = any free one.")
@click.option("--listening", type=int, hidden=True, help="File descriptor of a socket that listens there already.")
@click.option("--token-file", type=UserPath(dir_okay=False, path_type=Path), help="Else SLUICE_DASHBOARD_TOKEN.")
def dashboard(names: tuple[str, ...], host: str, port: int, listening: int | None, token_file: Path | None) -> None:
    """Serve a live, read-only web page over Redis: curves, queues, workers, ledger, samples. Default: every run."""
    from sluice.dashboard.auth import check_token, listen, page_url
    from sluice.dashboard.snapshots import Readers
    from sluice.dashboard.web import serve

    token = _token(token_file)
    check_token(host, token)
    with opened_run(names[0] if names else None) as (client, _, _):
        if listening is None:
            listening, port = listen(host, port)
        click.echo(f"dashboard at {page_url(host, port)}", err=True)
        readers = Readers(client, names, RunFolders(Path("runs")))
        serve(readers, host=host, port=port, listening=listening, token=token)


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get("SLUICE_DASHBOARD_TOKEN") or None
    try:
        return file.read_text().strip()
    except OSError as error:
        raise ConfigError(f"--token-file {file}: {error.strerror}") from None


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
