"""How soon a run trains, and how soon a killed worker is back.

    python benchmarks/start.py [--rounds 5] [--against PATH_OF_ANOTHER_CHECKOUT]

`sluice run config/quickstart.yaml` with everything on this machine, as a user starts it. Measured: seconds and CPU seconds (of
all its processes) from the command to the first trained step in metrics.jsonl; seconds from `kill -9` of the rollout worker to
the first heartbeat of its successor. With `--against`, both checkouts take turns within one run, with this interpreter and its
packages, so that ratios hold on a machine that does other things as well.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names would hide others

import psutil
import redis

from benchmarks.shared.processes import ROOT, environment, read_steps, until
from benchmarks.shared.report import new_parser, parse, publish
from sluice.scripts.prepare_tiny import prepare

BOUND_S = 180.0
RUN = "start"


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout to measure beside this one")
    arguments = parse(parser, argv, quick={"rounds": 1})
    checkouts = {"this": ROOT} | ({"against": arguments.against.resolve()} if arguments.against else {})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory(prefix="sluice-start-", ignore_cleanup_errors=True) as folder:
        prepare(Path(folder) / "runs" / "tiny", seed=0, warmup_steps=3 if arguments.quick else 100)
        for _ in range(arguments.rounds):
            for name, checkout in checkouts.items():
                found[name].append(measure(checkout, Path(folder)))
                print(name, found[name][-1], file=sys.stderr)
    medians = {name: _medians(rounds) for name, rounds in found.items()}
    if arguments.against:
        pairs = zip(medians["this"].items(), medians["against"].values(), strict=True)
        medians["ratio"] = {name: round(ours / theirs, 3) for (name, ours), theirs in pairs}
    publish("start", arguments, {"medians": medians})


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(each[name] for each in rounds), 2) for name in rounds[0]}


def measure(checkout: Path, folder: Path) -> dict[str, float]:
    """One run of a checkout, until its rollout worker is back."""
    run = folder / "runs" / RUN
    began = time.monotonic()
    with _running(checkout, folder) as process:
        _wait(lambda: read_steps(run), process)
        first_step_s, cpu_s = time.monotonic() - began, _cpu_s(process.pid)
        client = redis.Redis.from_url((run / "redis" / "url").read_text())
        before = _rollout_workers(client)
        worker = psutil.Process(max(int(name.rpartition(b":")[2]) for name in before))
        killed_at = time.monotonic()
        worker.kill()
        _wait(lambda: _rollout_workers(client) - before, process)
        restart_s = time.monotonic() - killed_at
        client.close()
    shutil.rmtree(run, ignore_errors=True)
    return {"first_step_s": first_step_s, "first_step_cpu_s": cpu_s, "restart_s": restart_s}


@contextlib.contextmanager
def _running(checkout: Path, folder: Path) -> Iterator[psutil.Popen]:
    """`sluice run` of a checkout, ended at once with all its processes."""
    cli = "sluice.scripts.cli" if (checkout / "sluice").is_dir() else "scripts.cli"  # before everything was `sluice.*`
    argv = [sys.executable, "-m", cli, "run", str(checkout / "config" / "quickstart.yaml"), "--name", RUN]
    env = environment(PYTHONPATH=str(checkout))
    with (folder / "output").open("wb") as output:
        process = psutil.Popen(argv, cwd=folder, env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        yield process
    except BaseException:
        print((folder / "output").read_text(), file=sys.stderr)
        raise
    finally:
        family = process.children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        psutil.wait_procs(family, 20)


def _wait(condition: Callable[[], object], process: psutil.Popen) -> None:
    until(lambda: process.poll() is not None or condition(), "the run", timeout_s=BOUND_S)
    if process.poll() is not None:
        raise SystemExit("the run ended")


def _cpu_s(pid: int) -> float:
    """Of a process, what it started, and what they started and reaped."""
    total = 0.0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total


def _rollout_workers(client: redis.Redis) -> set[bytes]:
    """Names of all that have ever sent a heartbeat: the same key in every version of Sluice."""
    return {name for name in client.zrange(f"sluice:{{{RUN}}}:processes", 0, -1) if name.startswith(b"rollout")}


if __name__ == "__main__":
    main()
