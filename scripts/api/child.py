"""`sluice run` as a child of a user's program: when the program ends, however that is, the run ends too, in order.

    python -m sluice.scripts.api.child PARENT run CONFIG --name NAME

The child asks for a signal itself: what would ask between fork and exec could not run in a program with threads. The kernel sends
it when the thread ends that started the child, so a thread of its own does (process.py); and once more for each other thread of a
program that is killed, so only the first is passed on, as SIGTERM: a second SIGTERM ends a run at once.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from sluice.common.parent import die_with, ended_by_ctrl_c


def _end_in_order(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    parent, *arguments = sys.argv[1:]
    signal.signal(signal.SIGUSR1, _end_in_order)
    die_with(int(parent), number=signal.SIGUSR1)
    with ended_by_ctrl_c():
        from sluice.scripts import cli

    cli.main(arguments)


if __name__ == "__main__":
    main()
