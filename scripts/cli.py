"""The `sluice` command. Bad input is one paragraph and exit code 2, never a traceback."""

from __future__ import annotations

import sys
from typing import Any

import click
import redis

from sluice.common.errors import SluiceError
from sluice.scripts.commands.control import drain, pause, resume, set_
from sluice.scripts.commands.dashboard import dashboard
from sluice.scripts.commands.data import data
from sluice.scripts.commands.dead import dead
from sluice.scripts.commands.doctor import doctor
from sluice.scripts.commands.evaluate import evaluate
from sluice.scripts.commands.export import export
from sluice.scripts.commands.ledger import ledger
from sluice.scripts.commands.metrics import metrics
from sluice.scripts.commands.plan import plan
from sluice.scripts.commands.replay import replay
from sluice.scripts.commands.role import train, worker
from sluice.scripts.commands.run import create, run
from sluice.scripts.commands.runs import runs
from sluice.scripts.commands.samples import samples
from sluice.scripts.commands.sft import sft
from sluice.scripts.commands.status import status
from sluice.scripts.commands.trace import trace

SECTIONS = {
    "Run": (run, sft, create, worker, train, plan, data, doctor),
    "Look": (status, dashboard, ledger, samples, dead, trace, metrics, runs),
    "Operate": (pause, resume, drain, set_, evaluate),
    "Convert": (export, replay),
}


class _Sections(click.Group):
    """A group whose help lists its commands by what they are for, none of them cut."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(command.name or "", command.get_short_help_str(limit=1000)) for command in commands]
                )


@click.group(cls=_Sections, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="sluice-rl")
def cli() -> None:
    """Asynchronous RL post-training for language models on Celery and Redis.

    SLUICE_REDIS_URL names the Redis server, SLUICE_RUN the run; commands that read a run take the newest one otherwise.
    """


for _commands in SECTIONS.values():
    for _command in _commands:
        cli.add_command(_command)


def main(argv: list[str] | None = None) -> Any:
    """Entry point: Sluice's own errors become one paragraph and exit code 2."""
    try:
        return cli.main(args=argv, prog_name="sluice")
    except SluiceError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (redis.ConnectionError, redis.TimeoutError) as error:
        click.echo(f"error: Redis became unavailable: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
