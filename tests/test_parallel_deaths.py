"""Ranks of the trainer die, or are told to stop: all of them end, with the cause in the log, and the run continues."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import sys
from pathlib import Path

import psutil
from harness import (
    SMALL,
    alive,
    assert_trained_once,
    children,
    create_run,
    metrics_of,
    only_run,
    quickstart_config,
    running,
    running_sluice,
    tiny_folder,
    wait_for,
)

from sluice.common.connections.client import connect
from sluice.common.policies.store import PolicyStore
from sluice.common.run import open_run
from sluice.scripts.launcher.redis_server import EmbeddedServer


def rank_of(pid: int, rank: int) -> psutil.Process | None:
    """A rank of the trainer among the descendants of a process."""
    for child in children(pid):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            # torchrun tells a rank which one it is; ours say it themselves
            if child.environ().get("RANK") == str(rank) or f"(rank {rank} of" in " ".join(child.cmdline()):
                return child
    return None


def loopback_only(ranks: list[psutil.Process | None]) -> bool:
    """Whether what the ranks listen at, if anything, is reached from this machine alone."""
    sockets = [connection for rank in ranks if rank for connection in rank.net_connections(kind="inet")]
    return {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN} <= {"127.0.0.1", "::1"}


def test_a_killed_rank_ends_all_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    steps = 12
    settings = {"evaluation__datasets": [], "trainer__num_steps": steps, "checkpoint__every_steps": 2, **SMALL}
    config = quickstart_config(tmp_path, tiny=tiny_folder(), replicas={"trainer": 2}, **settings)
    sharded = ("trainer.parallel=fsdp", "lease.running_s=3", "lease.queued_s=3")
    with running_sluice("run", str(config), *sharded, cwd=tmp_path) as process:
        wait_for(
            lambda: list(tmp_path.glob("runs/*/metrics.jsonl")) and len(metrics_of(only_run(tmp_path))) >= 3,
            timeout=120,
            what="three steps",
        )
        first, second = rank_of(process.pid, 0), rank_of(process.pid, 1)
        assert first is not None and second is not None
        second.kill()
        wait_for(lambda: not alive([first]), timeout=20, what="rank 0 to end with rank 1")
        assert process.wait(240) == 0
    run_folder = only_run(tmp_path)
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["restarts"] == {"trainer": 1}
    assert (summary["ledger_holds"], summary["ledger"]["trained"]) == (True, steps * 4)
    assert_trained_once(run_folder, steps, groups_per_step=4)
    log = (run_folder / "logs" / "trainer.log").read_text()
    assert f"rank 1 was killed by SIGKILL (pid {second.pid}), so all 2 ranks were ended" in log
    assert "resumed at step" in log
    newest = run_folder / "checkpoints" / f"step-{steps:08d}"
    assert (newest / "model-00001.safetensors").is_file()


def test_the_exit_code_is_that_of_the_rank_that_failed(tmp_path: Path, redis_url: str) -> None:
    """Rank 0 does not find its run, while rank 1 waits for it."""
    env = {"SLUICE_REDIS_URL": redis_url, "SLUICE_RUN": "none"}
    with running_sluice("train", "--ranks", "2", cwd=tmp_path, **env) as process:
        assert process.wait(180) == 2
    output = (tmp_path / "output.log").read_text()
    assert "error: there is no run 'none' on this Redis" in output
    assert "rank 0 ended with code 2" in output.splitlines()[-1]


def test_a_run_whose_gradients_are_no_longer_finite_ends_with_the_reason(tmp_path: Path) -> None:
    """The first of the optimizer steps on a batch throws the weights out of range, for the ten after it."""
    settings = {"evaluation__datasets": [], "trainer__learning_rate": 1e30, "trainer__warmup_steps": 0, **SMALL}
    config = quickstart_config(tmp_path, tiny=tiny_folder(), replicas={"trainer": 2}, **settings)
    with running_sluice("run", str(config), "trainer.num_iterations=12", cwd=tmp_path) as process:
        assert process.wait(240) == 3
    output = (tmp_path / "output.log").read_text()
    assert "training has diverged" in output and "Lower trainer.learning_rate" in output
    # a batch of equal rewards has no gradient: then it is the next one
    assert re.search(r"step \d+: the gradients of 10 optimizer steps in a row were not finite", output)
    assert "Traceback" not in output


def test_ranks_that_wait_end_with_rank_0_and_stop_in_good_order(tmp_path: Path, own_redis: EmbeddedServer) -> None:
    """No worker lives: rank 0 waits for a batch, rank 1 for rank 0. Started by torchrun, then as `sluice run` does."""
    env = create_run(tmp_path, own_redis.url, trainer__stall_report_s=0.5, **SMALL)
    client = connect(own_redis.url)
    run = open_run(client, env["SLUICE_RUN"])
    store = PolicyStore(client, run.keys, run.config.policy_store)
    log = tmp_path / "trainer.log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = ["torch.distributed.run", "--nnodes", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    starts = {
        "kill": [*torchrun, "--nproc-per-node", "2", "-m", "sluice.trainer"],
        "stop": ["sluice.scripts.cli", "train", "--ranks", "2"],
    }
    for version, end in enumerate(starts):
        said_before = len(log.read_text()) if log.exists() else 0
        waits = lambda at=said_before: "trainer has waited" in log.read_text()[at:]  # type: ignore[misc]  # noqa: E731
        with running([sys.executable, "-m", *starts[end]], cwd=tmp_path, log=log, **env) as process:
            wait_for(lambda v=version: store.latest_version() == v, timeout=90, what="the policy")  # type: ignore[misc]
            wait_for(waits, timeout=30, what="rank 0 to wait for a batch, and rank 1 for rank 0")
            ranks = [rank_of(process.pid, rank) for rank in (0, 1)]
            assert None not in ranks
            if end == "kill":
                ranks[0].kill()  # type: ignore[union-attr]
                assert process.wait(15) != 0
                assert "rank 1 sluice.trainer: rank 0 is gone: ending" in log.read_text()
            else:
                assert loopback_only(ranks), "ranks of one machine listen to it alone"
                process.send_signal(signal.SIGTERM)
                assert process.wait(15) == 0
                assert "stopped at step 0" in log.read_text()
                assert client.hget(run.keys.run_record, "status") == b"stopped"
            assert alive([rank for rank in ranks if rank]) == []
    client.close()
