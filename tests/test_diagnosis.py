"""Every cause of a stall is named, from hand-made heartbeats, queues and ledgers in a real Redis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import redis
from builders import admit_one, make_config, make_ledger, publish_policy, push_group, reward_payload
from harness import wait_for

from sluice.common.connections.client import connect
from sluice.common.keys import Keys
from sluice.common.ledger.replay_buffer import ReplayBuffer
from sluice.common.monitoring.diagnosis import Cause, alarms, diagnose, explain
from sluice.common.monitoring.heartbeats import SILENT_AFTER_S, read_heartbeats, send_heartbeat
from sluice.common.monitoring.metric_stream import write_metrics
from sluice.common.policies.manifest import Manifest
from sluice.common.run import create_run
from sluice.common.serialization import encode
from sluice.dashboard.run_state import collect_status
from sluice.scripts.launcher.progress import Progress
from sluice.scripts.launcher.redis_server import EmbeddedServer


class Situation:
    """A run with policy 0 published, and what can be wrong with it."""

    def __init__(self, client: redis.Redis, keys: Keys, folder: Path) -> None:
        config = make_config(trainer={"loss": {"kl_beta": 0.0}}, policy_store={"pickup_alarm_s": 5.0})
        self.client, self.keys = client, keys
        self.run = create_run(client, keys.run, config, assets={}, folder=str(folder))
        self.ledger = make_ledger(client, keys)
        publish_policy(client, keys, 0)

    def staff(self, *, without: str = "", **stats: Any) -> None:
        """One live worker on every queue; `rollout={...}` adds to the stats of that role."""
        own = {"dataset": {"stopped_by": "no_credit"}, "rollout": {"version": 0, "digest": ""}, "reward": {}}
        for role in own.keys() - {without}:
            self.beat(role, running=1, **own[role] | stats.get(role, {}))

    def beat(self, role: str, *, number: int = 1, **stats: Any) -> None:
        send_heartbeat(self.client, self.keys, f"{role}@host:{number}", {"role": role, "alarm": "", **stats})

    def silence(self, process: str, *, seconds: float) -> None:
        self.client.zincrby(self.keys.processes, -1000 * seconds, process)

    def queue_up(self, queue: str, num_messages: int) -> None:
        self.client.rpush(self.keys.celery_prefix + queue, *(f"message {i}" for i in range(num_messages)))

    def step(self, step: int, **metrics: float) -> None:
        write_metrics(self.client, self.keys, {"step": step, **metrics}, max_length=100)

    def cause(self) -> Cause:
        return diagnose(self.client, self.run)

    def alarms(self) -> list[Cause]:
        return alarms(self.client, self.run)

    def status(self) -> dict[str, Any]:
        return collect_status(self.client, self.run)


@pytest.fixture
def now(client: redis.Redis, keys: Keys, tmp_path: Path) -> Situation:
    return Situation(client, keys, tmp_path)


def test_the_place_where_groups_wait_is_named(now: Situation) -> None:
    now.staff(without="reward")
    now.queue_up("reward", 3)
    assert now.cause() == Cause("no_workers", "0 workers on `reward`, 3 messages queued")
    reason = "redis_memory: 870 MiB of maxmemory 1000 MiB used"
    now.staff(dataset={"stopped_by": reason})
    assert now.cause() == Cause("admission", f"no group is in flight; admission stopped by {reason}")
    now.client.delete(now.keys.celery_prefix + "reward")
    for _ in range(4):
        admit_one(now.ledger)
    assert now.cause().kind == "working"
    assert reason in now.cause().text
    now.queue_up("reward", 3)
    found = now.cause()
    assert found.kind == "queue_backed_up"
    assert found.text.startswith("queue `reward` is backed up: 3 messages queued for 1 workers; 4 groups in flight")
    now.queue_up("rejected", 2)
    assert [alarm.kind for alarm in now.alarms()] == ["rejected_messages"]


def test_a_process_that_stopped_beating_is_silent_within_five_seconds_of_redis_clock(now: Situation) -> None:
    assert SILENT_AFTER_S < 5
    now.staff()
    assert all(0 <= stats["silent_s"] < 2 for stats in read_heartbeats(now.client, now.keys).values())
    assert now.cause().kind == "admission"
    now.silence("rollout@host:1", seconds=6.0)
    expected = Cause("silent_worker", "rollout@host:1 has been silent for 6 s: dead, stopped or cut off")
    assert now.cause() == expected
    assert expected in now.alarms()
    now.staff()
    assert now.alarms() == []


def test_what_a_process_says_of_itself_comes_first(now: Situation) -> None:
    now.staff(rollout={"alarm": "still serves version 0: tensor w does not match its digest"})
    found = now.cause()
    assert found == Cause("alarm", "rollout@host:1: still serves version 0: tensor w does not match its digest")
    assert found in now.alarms()


def test_a_policy_that_nobody_picks_up_is_named_after_its_bound(now: Situation) -> None:
    publish_policy(now.client, now.keys, 1)
    now.staff()
    assert now.alarms() == [], "workers have pickup_alarm_s to fetch it"
    now.client.hincrbyfloat(now.keys.policy, "published_at", -6)
    found = now.cause()
    assert found.kind == "not_picked_up"
    assert found.text.startswith("no rollout worker has picked up policy version 1, published 6 s ago")
    assert found.text.endswith("the newest that one serves is 0")
    assert found.kind in {alarm.kind for alarm in now.alarms()}
    now.staff(rollout={"version": 1})
    assert now.alarms() == []
    now.silence("rollout@host:1", seconds=6.0)
    assert "not_picked_up" in {alarm.kind for alarm in now.alarms()}, "a silent worker serves no request"


def test_a_worker_that_serves_other_weights_or_samples_otherwise_raises_an_alarm(now: Situation) -> None:
    manifest = Manifest(version=0, step=0, incarnation=1, parent=-1, num_bytes=1, digest="a" * 64, tensors={})
    wire = {name: getattr(manifest, name) for name in Manifest.__slots__}
    now.client.hset(now.keys.manifests, "0", encode(wire))
    for sound in ({"digest": "a" * 12}, {"mismatch": 0.9e-3}):  # in float32 logprobs may differ by as much
        now.staff(rollout=sound)
        assert now.alarms() == []
    for stats, kind, text in (
        ({"digest": "b" * 12}, "digest_mismatch", "serves policy version 0 with digest bbbbbbbbbbbb"),
        (
            {"mismatch": 0.2},
            "sampler_mismatch",
            "serves policy version 0, but its logprobs are 0.2 nats from the trainer's",
        ),
        ({"mismatch": 0.0, "cache_mismatch": 3.0}, "sampler_mismatch", "3 nats from its own fresh forward pass"),
    ):
        now.staff(rollout=stats)
        (found,) = now.alarms()
        assert found.kind == kind
        assert found.text.startswith("rollout@host:1 ")
        assert text in found.text


def test_groups_dropped_as_stale_since_the_last_step_are_named(now: Situation) -> None:
    now.staff(rollout={"version": 9})
    push_group(now.ledger)
    now.step(1, **{"staleness/dropped": 0})
    for version in (1, 2, 3):
        publish_policy(now.client, now.keys, version)
    buffer = ReplayBuffer(now.ledger, groups_per_step=2, max_policy_age=1, max_resample_count=0)
    assert buffer.sample(3, step=1).evicted == 1
    admit_one(now.ledger)
    found = now.cause()
    assert found.kind == "stale_drops"
    assert found.text.startswith("1 groups were dropped as stale since step 1")
    now.step(2, **{"staleness/dropped": 1})
    assert now.cause().kind == "working", "those of earlier steps explain nothing"


def test_a_batch_worth_of_groups_dropped_for_equal_rewards_is_named(now: Situation) -> None:
    now.staff()
    now.step(4, **{"filter/dropped": 0})
    for num_dropped in (1, 2):
        assert now.cause().kind != "zero_variance", "a group now and then explains nothing"
        now.ledger.store(push_group(now.ledger, until="rollout"), "reward", reward_payload(), is_zero_variance=True)
        assert now.ledger.counters().dropped == {"zero_variance": num_dropped}
    admit_one(now.ledger)
    expected = "2 groups were dropped for equal rewards since step 4; 18 more may be, then they are kept; 1 in flight"
    assert now.cause() == Cause("zero_variance", expected)
    now.step(5, **{"filter/dropped": 2})
    assert now.cause().kind == "working"


def test_status_shows_cause_kind_and_alarms(now: Situation) -> None:
    now.client.hset(now.keys.run_record, "status", "running")
    now.staff(without="rollout", reward={"alarm": "cannot score"})
    assert now.status()["stall_kind"] == "no_trainer"
    now.beat("trainer", waiting_s=6.0)
    shown = now.status()
    assert (shown["stall_kind"], shown["alarms"]) == ("no_workers", ["reward@host:1: cannot score"])
    assert json.dumps(shown)
    now.beat("trainer", waiting_s=0.0)
    assert now.status()["stalled_by"] is None
    now.silence("trainer@host:1", seconds=6.0)
    assert now.status()["stall_kind"] == "silent_trainer"


def test_a_run_that_has_not_begun_says_what_is_loading_and_a_stopped_trainer_is_named_everywhere(
    now: Situation,
) -> None:
    assert now.status()["status"] == "created"
    now.beat("dataset")
    loading = Cause("starting", "loading: rollout, reward, trainer")
    assert explain(now.client, now.run) == loading and now.status()["stalled_by"] == loading.text
    now.staff()
    now.client.hset(now.keys.run_record, "status", "running")
    now.beat("trainer", doing="loading the model", waiting_s=0.0)
    loading = Cause("starting", "the trainer is loading the model")
    assert explain(now.client, now.run) == loading and now.status()["stalled_by"] == loading.text
    now.beat("trainer", doing="", waiting_s=0.0)
    assert explain(now.client, now.run) == Cause("working", "the trainer is training on a batch")
    assert now.status()["stalled_by"] is None
    now.beat("trainer", waiting_s=6.0)
    assert explain(now.client, now.run).kind == now.status()["stall_kind"] == "admission"
    now.silence("trainer@host:1", seconds=6.0)  # as after SIGSTOP
    silent = "the trainer has been silent for 6 s: dead, stopped or cut off"
    assert explain(now.client, now.run).text == now.status()["stalled_by"] == silent
    now.client.delete(now.keys.process("trainer@host:1"))
    assert explain(now.client, now.run).kind == now.status()["stall_kind"] == "no_trainer"


def test_progress_says_what_is_loading_that_groups_are_lost_and_that_no_trainer_is_there(
    now: Situation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sluice.scripts.launcher.progress.SOON_S", 0.0)
    monkeypatch.setattr("sluice.scripts.launcher.progress.READ_EVERY_S", 0.0)
    progress = Progress(now.client, now.run)

    def said() -> str:
        progress.update()
        return capsys.readouterr().err

    now.beat("dataset")
    assert "starting, 0 s so far: 1 of 4 processes ready, loading: rollout, reward, trainer\n" in said()
    assert said() == "", "once"
    now.client.hset(now.keys.run_record, "status", "running")
    now.beat("trainer", doing="loading the model")
    assert said().endswith("loading: rollout, reward, trainer; the trainer is loading the model\n")
    now.staff()
    now.beat("trainer", doing="", waiting_s=1.0)
    assert said().endswith("all processes are ready; the first batch has 0 of 2 groups, 0 are in progress\n")
    now.ledger.drop([admit_one(now.ledger), admit_one(now.ledger)], reason="bad_row", detail="row 3: \x1b[2J")
    expected = (
        f"2 of the last 2 groups were lost. The last one, t1: bad_row: row 3: \\x1b[2J (`sluice ledger {now.run.name}`"
    )
    assert f"losing groups: {expected}" in said()
    assert now.cause().kind == "losing_groups" and "losing_groups" in {alarm.kind for alarm in now.alarms()}
    now.client.delete(now.keys.ends, now.keys.process("trainer@host:1"))
    assert "starting, 0 s so far: 3 of 4 processes ready, loading: trainer\n" in said()
    now.beat("trainer", doing="", waiting_s=0.0)
    step = {"reward/mean": 0.5, "staleness/mean": 1.0, "throughput/trained_tokens_per_s": 9.0, "admission/credits": 1}
    now.step(3, **step)
    monkeypatch.setattr("sluice.scripts.launcher.progress.STALLED_AFTER_S", 0.0)
    lines = (said() + said()).splitlines()
    assert lines[0].startswith("step 3/")
    assert lines[1] == "step 4 has taken 0 s so far: the trainer is training on a batch"
    now.client.delete(now.keys.process("trainer@host:1"))
    assert said() == "no step for 0 s: no trainer is running\n"
    progress.say_unreachable(redis.ConnectionError("refused"))
    assert said().startswith(
        "Redis is unreachable, every role waits for it: refused\nRedis is reachable again, after 0.0 s\n"
    )


def test_progress_has_a_line_per_evaluation(
    client: redis.Redis, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = [
        {"name": name, "dataset": {"path": "x"}, "num_samples": samples} for name, samples in (("a", 0), ("b", 1))
    ]
    run = create_run(client, keys.run, make_config(evaluation={"datasets": datasets}), assets={}, folder=str(tmp_path))
    progress = Progress(client, run)
    scores = {"a/pass@1": 0.5, "a/pass@1_stderr": 0.1, "a/of@users": 7.0, "b/pass@1": 1.0, "b/sampled_pass@1": 0.25}
    line = {"step": 3, "eval/a/version": 2, "eval/b/version": 2, **{f"eval/{name}": v for name, v in scores.items()}}
    write_metrics(client, keys, line, max_length=10)
    progress.update()
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [
        "eval a, policy version 2: pass@1 0.500 ± 0.100",
        "eval b, policy version 2: pass@1 1.000  sampled_pass@1 0.250",
    ]


def test_a_redis_that_is_full_or_away_is_a_cause_and_no_exception(
    own_redis: EmbeddedServer, keys: Keys, tmp_path: Path
) -> None:
    client = connect(own_redis.url, retry=redis.retry.Retry(redis.backoff.NoBackoff(), 1), socket_timeout=2.0)
    now = Situation(client, keys, tmp_path)
    now.staff()
    client.set("sluice:filler", bytes(20 << 20))

    def is_nearly_full() -> bool:  # memory use falls when the append-only file is written
        client.config_set("maxmemory", int(int(client.info("memory")["used_memory"]) * 1.05))
        return [alarm.text.startswith("Redis is nearly full") for alarm in now.alarms()] == [True]

    wait_for(is_nearly_full, timeout=10, what="a warning")
    now.staff()  # again: on a busy machine the first heartbeats have expired by now
    assert now.cause().kind == "admission"
    client.config_set("maxmemory", int(int(client.info("memory")["used_memory"]) * 0.8))
    with pytest.raises(redis.OutOfMemoryError):
        client.set("sluice:probe", "x")
    now.beat("rollout", number=2, running=0, version=0)
    assert "rollout@host:2" in read_heartbeats(client, keys), "heartbeats go on"
    found = now.cause()
    assert found.kind == "redis_full"
    assert "of maxmemory" in found.text
    wait_for(lambda: "redis_full" in [alarm.kind for alarm in now.alarms()], timeout=10, what="an alarm as well")
    own_redis.process.kill()
    own_redis.process.wait()
    assert now.cause().kind == "redis_unreachable"
    assert [alarm.kind for alarm in now.alarms()] == ["redis_unreachable"]
    client.close()
