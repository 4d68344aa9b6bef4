"""`sluice run` as a child of a user's program: when the program ends, however that is, the run ends too, in order.

    python -m sluice.scripts.api.child PARENT run CONFIG --name NAME

The child asks for SIGTERM itself: what would ask between fork and exec could not run in a program with threads. The kernel sends
it when the thread ends that started the child, so a thread of its own does (process.py).
"""

from __future__ import annotations

import signal
import sys

from sluice.common.parent import die_with, ended_by_ctrl_c


def main() -> None:
    parent, *arguments = sys.argv[1:]
    die_with(int(parent), number=signal.SIGTERM)
    with ended_by_ctrl_c():
        from sluice.scripts import cli

    cli.main(arguments)


if __name__ == "__main__":
    main()
