"""`sluice dashboard`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from sluice.common.errors import ConfigError
from sluice.scripts.options import UserPath, example


@click.command(epilog=example("sluice dashboard --port 8265"))
@click.argument("names", nargs=-1, metavar="[RUN]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; another one needs a token.")
@click.option("--port", default=8265, show_default=True, help="Port; 0 = any free one.")
@click.option("--token-file", type=UserPath(dir_okay=False, path_type=Path), help="Else SLUICE_DASHBOARD_TOKEN.")
def dashboard(names: tuple[str, ...], host: str, port: int, token_file: Path | None) -> None:
    """Serve a live, read-only web page over Redis: curves, queues, workers, ledger, samples. Default: every run."""
    from sluice.dashboard.auth import check_token, free_port, page_url
    from sluice.dashboard.web import serve
    from sluice.scripts.launcher.existing_run import opened_run

    token = _token(token_file)
    check_token(host, token)
    with opened_run(names[0] if names else None) as (client, _, _):
        port = free_port(host, port)
        serve(
            client,
            names,
            host=host,
            port=port,
            token=token,
            started=lambda: click.echo(f"dashboard at {page_url(host, port)}", err=True),
        )


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get("SLUICE_DASHBOARD_TOKEN") or None
    try:
        return file.read_text().strip()
    except OSError as error:
        raise ConfigError(f"--token-file {file}: {error.strerror}") from None
