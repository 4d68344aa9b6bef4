"""`python -m sluice` and the command `sluice`: a Ctrl-C while Python still imports ends it without a traceback."""

from __future__ import annotations

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Import and run `sluice.scripts.cli`."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # not where it is ignored, as in `nohup sluice ... &`
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sluice.scripts import cli

    signal.signal(signal.SIGINT, handler)
    cli.main()


if __name__ == "__main__":
    main()
