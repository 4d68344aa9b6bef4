"""All benchmarks, one after the other, and tables and plots of docs/benchmarks.md from what is recorded in benchmarks/results.

    python benchmarks/run_all.py                      hours; the machine must have nothing else to do
    python benchmarks/run_all.py chaos pipeline       only these
    python benchmarks/run_all.py --quick              tiny sizes, a minute each: nothing is recorded
    python benchmarks/run_all.py --only-tables        measures nothing

A benchmark that fails does not keep the others from running; the exit code tells.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names would hide others

from benchmarks.shared.report import RESULTS, ROOT
from benchmarks.shared.tables import fill

HERE = Path(__file__).resolve()
NAMES = sorted({path.stem for path in HERE.parent.glob("*.py")} - {"__init__", "plots", HERE.stem})
PAGE = ROOT / "docs" / "benchmarks.md"


def filled_page() -> str:
    """Return the page with the tables of the recorded results."""
    return fill(PAGE.read_text(), {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"default all: {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that they work, records nothing")
    parser.add_argument("--only-tables", action="store_true", help="write the page and its plots again")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
    failed = []
    for name in [] if arguments.only_tables else arguments.names or NAMES:
        print(f"\n{name}", flush=True)
        command = [sys.executable, str(HERE.with_name(f"{name}.py")), *(["--quick"] if arguments.quick else [])]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if not arguments.quick:
        PAGE.write_text(filled_page())
        subprocess.run([sys.executable, str(HERE.with_name("plots.py"))], check=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
