"""A reward that misbehaves in every way that takes a process down: groups are retried, then dead, and never scored 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import redis
from builders import make_config, publish_policy, push_group
from harness import alive, children, wait_for, worker

from sluice.common.connections.broker import make_app, send_stage
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import Ledger
from sluice.common.monitoring.heartbeats import read_heartbeats
from sluice.common.run import create_run

REWARD = """
import asyncio, os, signal, sys, time

async def patient(completions, target, **kwargs):
    if target[0] == "awaits":
        await asyncio.sleep(1000)
    await asyncio.sleep(0)
    return [1.0 for _ in completions]

def wild(prompts, completions, target, **kwargs):
    kind = target[0]
    if kind == "sleeps":
        time.sleep(1000)
    if kind == "sleeps on":
        while True:
            try:
                time.sleep(1000)
            except BaseException:
                pass
    if kind == "raises":
        raise RuntimeError("the grader is broken")
    if kind == "leaves":
        os._exit(3)
    if kind == "exits":
        sys.exit(4)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "allocates":
        hoard = [bytearray(200 << 20) for _ in range(1000)]
    return [1.0 for _ in completions]
"""
EXPECTED = {
    "sleeps": ("RewardError", "SoftTimeLimitExceeded"),
    "awaits": ("RewardError", "reward function patient raised SoftTimeLimitExceeded"),
    "sleeps on": ("TimeLimitExceeded", "gave no answer within its time limit and was killed"),
    "raises": ("RewardError", "the grader is broken"),
    "leaves": ("WorkerLostError", "the scoring process exited"),
    "exits": ("RewardError", "raised SystemExit: 4"),
    "killed": ("WorkerLostError", "the scoring process was killed by signal 9"),
    "allocates": ("RewardError", "MemoryError"),
}


def oom_score_adj(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def test_a_reward_that_takes_its_process_down_is_a_dead_letter_and_never_a_score(
    client: redis.Redis, keys: Keys, redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "wild.py").write_text(REWARD)
    config = make_config(
        reward={
            "functions": [{"function": f"{tmp_path / 'wild.py'}:{name}"} for name in ("wild", "patient")],
            "time_limit_s": 3.2,  # killed 2 s later; Celery looks for dead children every 5 s at least
            "memory_limit_mib": 512,
            "concurrency": 3,
        },
        lease={"running_s": 60.0, "queued_s": 60.0, "max_attempts": 2},  # nothing here waits for a lease to end
        trainer={"loss": {"kl_beta": 0.0}},
        replay_buffer={"max_policy_age": 5},  # credit for all of the groups
    )
    create_run(client, keys.run, config, assets={}, folder=str(tmp_path))
    ledger, app = Ledger(client, keys, config, worker="w"), make_app(keys.run, url=redis_url)
    publish_policy(client, keys, 0)
    kinds = [*EXPECTED, *["sound"] * 4]
    group_ids = [push_group(ledger, until="rollout", target=kind) for kind in kinds]
    for group_id in group_ids:
        send_stage(app, group_id, "reward")
    env = {"SLUICE_REDIS_URL": redis_url, "SLUICE_RUN": keys.run}
    with worker("reward", cwd=tmp_path, **env) as process:
        told: list[dict[str, Any]] = []

        def stats() -> dict[str, Any]:
            return next((f for f in read_heartbeats(client, keys).values() if f["role"] == "reward"), {})

        def is_settled() -> bool:
            told.append(stats())
            for group_id, stage, _ in ledger.reap():
                send_stage(app, group_id, stage)
            counters = ledger.counters()
            return sum(counters.dead.values()) == len(EXPECTED) and client.xlen(keys.stream(0)) == 4

        wait_for(is_settled, timeout=45, what="two attempts at every bad group, and one at the others")
        assert process.poll() is None, "the worker itself lives"
        wait_for(lambda: len(alive(children(process.pid))) >= 3, timeout=10, what="all scoring processes to be back")
        wait_for(
            lambda: any(oom_score_adj(child.pid) == 1000 for child in children(process.pid)),
            timeout=20,
            what="a scoring process that offers itself to the kernel before any other",
        )
        assert oom_score_adj(process.pid) < 1000
        assert max(f.get("running", 0) for f in told) >= 2
        assert min(f.get("idle_fraction", 1.0) for f in told) < 0.5, "two of three sleep, and are busy with it"
        wait_for(
            lambda: (stats()["running"], stats()["idle_fraction"]) == (0, 1.0),
            timeout=10,
            what="those that died at work to be counted as idle",
        )

    for group_id, (kind, (reason, detail)) in zip(group_ids, EXPECTED.items(), strict=False):
        group = client.hgetall(keys.group(group_id))
        assert group[b"dead_reason"].decode() == reason, kind
        assert detail in group[b"dead_detail"].decode(), kind
        assert group[b"n:reward"] == b"2", kind
        assert b"rollout" in group, "the payload is kept"
        assert b"reward" not in group, "no score was made up"
    counters = ledger.counters()
    assert counters.retried == len(EXPECTED)
    assert counters.holds
