"""`python -m sluice.trainer`: the trainer daemon of the run that SLUICE_RUN names.

SIGTERM, Ctrl-C and a closed terminal finish the step, write a checkpoint and exit 0; a second signal exits at once. A restarted
trainer resumes from the newest checkpoint.

`sluice train --ranks N`: the same over N ranks of one machine, of which only rank 0 reads Redis;
`torchrun ... -m sluice.trainer`: of several machines.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType

from sluice.common.connections.client import (
    check_broker,
    connect,
    give_up_after,
    persistence_warning,
    refuse_eviction,
    run_name,
)
from sluice.common.errors import ConfigError, ConnectionFailed, DiskFull, Diverged, Hopeless
from sluice.common.monitoring.printable import escape_log_records, printable
from sluice.common.parent import die_with, stop_signals
from sluice.common.run import RunRecord, open_run

STOP_WITHOUT_REDIS_S = 30.0
"""How long a trainer that was told to stop waits for an unavailable Redis; then it ends without a checkpoint of its step."""


def main() -> int:
    """Return 0: finished, drained or stopped gracefully; 2: bad input; 3: hopeless; anything else: to be started again."""
    os.umask(0o077)
    rank, is_alone = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1") == "1"
    who = "" if is_alone else f" rank {rank}"
    line = f"%(asctime)s %(levelname)s{who} %(name)s: %(message)s"
    escape_log_records()
    logging.basicConfig(level=logging.INFO, format=line, stream=sys.stderr)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, killed, would leave its ranks behind
        die_with(os.getppid())
    try:
        if not is_alone and rank != "0":
            from sluice.trainer.distributed.parallel import run_follower
            from sluice.trainer.distributed.ranks import Ranks

            return run_follower(Ranks.join())
        client = connect()
        refuse_eviction(client)
        check_broker()
        run = open_run(client, run_name())
        from sluice.trainer.distributed.ranks import Ranks
        from sluice.trainer.loop import Trainer  # torch loads here, after the input was checked

        ranks = Ranks.join()
        trainer = Trainer(client, run)
    except (ConfigError, ConnectionFailed) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2

    def stop(number: int, frame: FrameType | None) -> None:
        if trainer.stopping:
            raise KeyboardInterrupt
        logging.getLogger("sluice.trainer").info("%s: finishing the step", signal.Signals(number).name)
        trainer.stopping = True
        give_up_after(client, STOP_WITHOUT_REDIS_S)

    for asked in stop_signals():
        signal.signal(asked, stop)
    if warning := persistence_warning(client):
        logging.getLogger("sluice.trainer").warning("%s", warning)
    RunRecord(client, run.keys).set_status("running")
    try:
        trainer.train(ranks)
        trainer.end(trainer.outcome)
    except ConfigError as error:  # a model that does not load, a run that Redis has lost
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except Hopeless as error:
        trainer.policy.close()
        text = printable(f"training has diverged: {error}" if isinstance(error, Diverged) else str(error))
        print(f"error: {text}", file=sys.stderr)
        trainer.end("failed", failure=text)
        return error.EXIT_CODE
    except DiskFull as error:
        print(f"error: stopped without a checkpoint of step {trainer.position.step}: {error}", file=sys.stderr)
        return 1
    finally:
        trainer.close()
    return 0


if __name__ == "__main__":
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # All is durable. C++'s own cleaning up ends some ranks by SIGABRT: a thread of gloo's is still there.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
