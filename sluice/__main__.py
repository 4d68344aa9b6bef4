"""`python -m sluice` and the command `sluice`: a Ctrl-C while Python still imports ends it without a traceback."""

from __future__ import annotations

from typing import NoReturn

from sluice.common.parent import ended_by_ctrl_c


def main() -> NoReturn:
    """Import and run `sluice.scripts.cli`."""
    with ended_by_ctrl_c():
        from sluice.scripts import cli

    cli.main()


if __name__ == "__main__":
    main()
