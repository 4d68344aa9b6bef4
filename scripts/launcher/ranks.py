"""`sluice train --ranks N`: the N ranks of the trainer on this machine, as one role of `sluice run`.

The ranks find each other through a file in a folder that only this user can open, and talk over the loopback device. torchrun
is for several machines: its rendezvous listens on every address and unpickles what it is sent.

    SIGTERM --> rank 0, which finishes its step with the others and tells them to end (`trainer.distributed.parallel`)
    the first rank that fails --> SIGTERM to the others, SIGKILL to what is left after GRACE_S
    this process dies --> the kernel kills the ranks
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from tempfile import mkdtemp
from types import FrameType

from sluice.common.parent import stop_signals
from sluice.scripts.launcher.forked import Command, fork, imports_without_threads
from sluice.scripts.launcher.processes import Process
from sluice.scripts.launcher.roles import PYTHON

GRACE_S = 5.0
"""A waiting rank needs a moment to see that rank 0 has ended; a computing one fails at its next exchange."""
POLL_S = 0.1


def run(num_ranks: int) -> int:
    """Return 0 where all ranks ended gracefully; else the exit code of the first to fail, 1 where it was killed."""
    with imports_without_threads():
        import sluice.trainer.loop  # noqa: F401  # once, for all ranks

    folder = mkdtemp(prefix="sluice-ranks-")  # of this process alone: no rank may remove it when it ends
    ranks = [_start(rank, num_ranks, store=f"{folder}/store") for rank in range(num_ranks)]

    def forward(number: int, frame: FrameType | None) -> None:
        ranks[0].send_signal(number)

    for asked in stop_signals():
        signal.signal(asked, forward)
    try:
        return _wait(ranks)
    finally:
        _end(ranks)
        shutil.rmtree(folder, ignore_errors=True)


def _start(rank: int, num_ranks: int, *, store: str) -> Process:
    """Start a rank in a process group of its own: Ctrl-C in a terminal reaches it through `forward`, once.

    It is forked from this process, where the kernel ends it together with us.
    """
    env = {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks)}
    env |= {"SLUICE_RANKS_STORE": store, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    argv = [*PYTHON, "-m", "sluice.trainer"]
    if sys.platform != "linux":
        return subprocess.Popen(argv, env=os.environ | env, process_group=0)
    return fork(Command(argv=argv, env=os.environ | env, title=[*argv, f"(rank {rank} of {num_ranks})"]))


def _wait(ranks: list[Process]) -> int:
    ended_at: float | None = None
    while True:
        codes = [process.poll() for process in ranks]
        # Rank 0 ends last of all that matters: its checkpoint is written, and every rank has said goodbye.
        if codes[0] == 0 and ended_at is None:
            ended_at = time.monotonic()
        if ended_at is not None and time.monotonic() - ended_at > GRACE_S:
            for process in ranks[1:]:
                process.kill()
            return 0
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            rank, code = min(failed, key=lambda found: found[1] > 0)  # others may have failed because one was killed
            cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            _end(ranks)  # first, so that the cause is the last line of the log
            print(f"rank {rank} {cause} (pid {ranks[rank].pid}), so all {len(ranks)} ranks were ended", file=sys.stderr)
            return max(code, 1)
        if None not in codes:
            return 0
        time.sleep(POLL_S)


def _end(ranks: list[Process]) -> None:
    for process in ranks:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for process in ranks:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1])))
