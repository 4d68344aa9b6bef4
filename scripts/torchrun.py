"""`python -m scripts.torchrun N`: torchrun over N ranks of the trainer on this machine, as a role of `sluice run`.

What it adds to `torchrun --standalone --nproc-per-node N -m trainer`: the exit code of the rank that failed first (2 = its
input is wrong; torchrun's own is always 1), and one line as the last in the log, where torchrun has two tracebacks.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run(num_ranks: int) -> int:
    """Exit code 0: all ranks ended in good order, by themselves or told to; 1: one was killed; else that of the first to fail."""
    try:
        main(["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(num_ranks), "-m", "trainer"])
    except SignalException:
        return 0
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        cause = (
            f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with code {failure.exitcode}"
        )
        print(f"rank {rank} {cause} (pid {failure.pid}), so all {num_ranks} ranks were ended", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1])))
