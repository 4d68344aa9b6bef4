"""The `sluice` command. Bad input is one paragraph and exit code 2, never a traceback."""

from __future__ import annotations

import os
import sys
from itertools import chain
from typing import NoReturn, TextIO, cast

import click
import redis

from sluice.common.errors import SluiceError
from sluice.common.monitoring.printable import escape_log_records, printable
from sluice.scripts.commands.chat import chat
from sluice.scripts.commands.control import drain, evaluate, pause, resume, set_
from sluice.scripts.commands.convert import export, replay
from sluice.scripts.commands.data import data
from sluice.scripts.commands.doctor import doctor
from sluice.scripts.commands.init import init
from sluice.scripts.commands.look import dead, ledger, samples, status, trace
from sluice.scripts.commands.plan import plan
from sluice.scripts.commands.run import create, quickstart, run, train, worker
from sluice.scripts.commands.runs import runs
from sluice.scripts.commands.serve import dashboard, metrics
from sluice.scripts.commands.sft import sft
from sluice.scripts.options import Unread

SECTIONS = {
    "Run": (quickstart, init, run, sft, create, worker, train, plan, data, doctor),
    "Look": (status, dashboard, ledger, samples, dead, trace, metrics, runs),
    "Operate": (pause, resume, drain, set_, evaluate),
    "Use": (chat, export, replay),
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


for _command in chain.from_iterable(SECTIONS.values()):
    cli.add_command(_command)


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point. What is wrong outside of Sluice is one paragraph and exit code 2; Ctrl-C ends with 130."""
    os.umask(0o077)  # prompts, completions, weights and the password are of no other user's concern
    escape_log_records()
    sys.stderr = cast(TextIO, Unread(sys.stderr))
    try:
        sys.exit(cli.main(args=argv, prog_name="sluice", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort as abort:  # Ctrl-C, or a question that was answered with no
        sys.exit(130 if isinstance(abort.__cause__, KeyboardInterrupt) else 1)
    except SluiceError as error:
        text = str(error)
    except (redis.ConnectionError, redis.TimeoutError) as error:
        text = f"Redis became unavailable: {error}"
    except (
        redis.ResponseError
    ) as error:  # out of memory, a key that another program has written, a right that is missing
        text = f"Redis refused: {error}"
    except OSError as error:  # a full disk, a folder without the right to write, no more processes or open files
        text = f"{error.filename}: {error.strerror}" if error.filename else f"the system refused: {error}"
    click.echo(f"error: {printable(text)}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
