"""The table of stages: it agrees with itself and with what is deployed, and a new stage takes few files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import redis
from builders import admit_one, make_config, started_ledger

from sluice.common.config import Config, ReplicasConfig
from sluice.common.keys import RUNS, Keys
from sluice.common.ledger.ledger import read_pending
from sluice.common.pipeline import FIRST, QUEUES, STAGES, plan_for, stage_of, stage_on, stages_for

ROOT = Path(__file__).parent.parent
MILLISECONDS = 60_000


def test_every_stage_waits_for_those_before_it_and_has_a_module_settings_and_workers() -> None:
    assert [stage for stage in STAGES if not stage.waits_for] == [FIRST]
    assert set(ReplicasConfig.model_fields) == {*QUEUES, "trainer"}
    for number, stage in enumerate(STAGES):
        assert set(stage.waits_for) <= {before.name for before in STAGES[:number]}
        assert find_spec(f"sluice.workers.{stage.module}")
        assert not stage.section or stage.section in Config.model_fields
        assert stage.concurrency(make_config()) >= 1
    # queues lead to their stage, and names may have an index
    assert set(QUEUES) == {stage.queue_for(kind) for stage in STAGES for kind in ("train", "eval")}
    assert stage_on("eval") is stage_on("rollout,eval") is stage_of("rollout") is stage_of("rollout.3")


def test_a_group_goes_through_what_its_config_and_kind_need() -> None:
    with_kl = make_config(trainer={"loss": {"kl_beta": 0.1}})
    assert [stage.name for stage in stages_for(make_config())] == ["task", "rollout", "reward"]
    assert [stage.name for stage in stages_for(with_kl)] == ["task", "rollout", "reward", "reference"]
    assert plan_for(with_kl, "train") == "task< rollout<task reward<rollout reference<rollout"
    assert plan_for(with_kl, "eval") == "task< rollout<task reward<rollout"


def test_a_plan_may_have_several_stages_of_a_kind_and_joins_of_them(client: redis.Redis, keys: Keys) -> None:
    ledger = started_ledger(client, keys)
    plan = "task< episode.0<task episode.1<task reward<episode.0,episode.1"

    def store(group_id: str, stage: str) -> list[str]:
        reply = ledger.scripts("store", group_id, stage, b"x", "", MILLISECONDS, plan, "reward", 0, 2, "")
        return [item.decode() for item in reply]

    group_id = admit_one(ledger)
    assert store(group_id, "task") == ["stored", "episode.0", "episode.1"]
    client.zadd(keys.deadlines, {f"{group_id}|episode.0": 0})
    assert ledger.reap() == [(group_id, "episode.0", "train")], "one that is overdue is sent again"
    assert store(group_id, "episode.1") == ["waiting"]
    assert store(group_id, "episode.1") == ["refused"]
    assert ledger.claim(group_id, "episode.0", fields=("episode.1",)) is not None
    assert store(group_id, "episode.0") == ["stored", "reward"]
    assert read_pending(client, keys) == [(group_id, "reward")]
    other = admit_one(ledger)
    store(other, "task")
    assert ledger.drop([group_id, other], reason="bad_row") == 2, "removed whatever its stages are"
    assert read_pending(client, keys) == []
    assert not client.exists(keys.pending(group_id), keys.pending(other))


JUDGE = '''"""The `judge` queue: a grade for each group."""

from __future__ import annotations

from celery import Celery, signals

from sluice.common.ledger.ledger import Claim
from sluice.common.pipeline import stage_on
from sluice.common.serialization import decode, encode
from sluice.workers.context import Context, Result


def prepare(app: Celery, role: str) -> Context:
    context = Context.open(app, role)

    def work(claim: Claim) -> Result:
        rewards = decode(claim.fields["reward"] or b"")["reward"]
        return Result(payload=encode({"grade": max(rewards)}))

    def grade(group_id: str) -> None:
        context.run_stage(group_id, "judge", work, fields=("rollout", "reward"))

    app.task(grade, name=stage_on(role).celery_task)
    signals.worker_ready.connect(lambda **_: context.start_heartbeat(), weak=False)
    signals.worker_shutdown.connect(lambda **_: context.close(), weak=False)
    return context
'''
ENTRY = """    Stage(
        name="judge",
        queue="judge",
        celery_task="judge.grade",
        module="judge",
        labels=("judging begun", "judged"),
        waits_for=("rollout", "reward"),
    ),
)
FIRST ="""
USE = """
import os, subprocess, sys, time
import sluice
from builders import admit_one, make_config, make_ledger, part_payload, publish_policy
from sluice.common.connections.broker import make_app, send_stage
from sluice.common.connections.client import connect
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import read_group
from sluice.common.ledger.replay_buffer import ReplayBuffer
from sluice.common.monitoring.autoscale import bounds_of, read_loads
from sluice.common.run import create_run
from sluice.common.serialization import decode
from sluice.dashboard.run_state import collect_status
from sluice.dashboard.trace import read_trace
from sluice.scripts.commands.plan import make_plan
from sluice.scripts.launcher.roles import worker_bounds

client, keys = connect(), Keys(os.environ["SLUICE_RUN"])
config = make_config(replay_buffer={"batch_size": 1})
run = create_run(client, keys.run, config, assets={}, folder=os.getcwd())
ledger = make_ledger(client, keys, replay_buffer={"batch_size": 1})
publish_policy(client, keys, 0)
group = admit_one(ledger)
for stage in ("task", "rollout", "reward"):
    version = 0 if stage == "rollout" else None
    following = ledger.store(group, stage, part_payload(group, stage), version=version)
assert following == ["judge"], following
assert read_loads(client, run)["judge"].pending == 1
assert bounds_of(config)["judge"].max == worker_bounds(config)["judge"][1] == 1
assert "celery -A sluice worker -Q judge" in [role["command"] for role in make_plan(config, "x.yaml")["roles"]]
send_stage(make_app(keys.run), group, "judge")
worker = subprocess.Popen([sys.executable, "-m", "celery", "-A", "sluice", "worker", "-Q", "judge"])
try:
    deadline = time.monotonic() + 90
    while "judge" not in read_group(client, keys, group):
        assert worker.poll() is None and time.monotonic() < deadline, "the judge does nothing"
        time.sleep(0.1)
    assert "judge" in collect_status(client, run)["queues"]
finally:
    worker.terminate()
    worker.wait()
assert decode(read_group(client, keys, group)["judge"]) == {"grade": 1.0}
assert "judged" in [stage["what"] for stage in read_trace(client, keys, group)["stages"]]
(trained,) = ReplayBuffer(ledger, groups_per_step=1, max_policy_age=1).sample(0, step=1).groups
assert trained.group_id == group
"""


def test_a_new_stage_takes_an_entry_a_module_and_its_replicas(
    client: redis.Redis, redis_url: str, keys: Keys, tmp_path: Path
) -> None:
    """A copy of the package with a stage `judge` in it: these three files are all that differs."""
    package = tmp_path / "sluice"
    shutil.copytree(ROOT / "sluice", package, ignore=shutil.ignore_patterns("__pycache__"))
    replicas = '    judge: Replicas = 1\n    """Judges."""\n    trainer: int ='
    for path, before, after in (
        ("common/pipeline.py", ")\nFIRST =", ENTRY),
        ("common/config/operations.py", "    trainer: int =", replicas),
    ):
        text = (package / path).read_text()
        assert text.count(before) == 1
        (package / path).write_text(text.replace(before, after))
    (package / "workers" / "judge.py").write_text(JUDGE)
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}", "SLUICE_REDIS_URL": redis_url, "SLUICE_RUN": keys.run}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env={"PATH": "", **env}, capture_output=True, text=True, timeout=150
    )
    client.hdel(RUNS, keys.run)
    assert done.returncode == 0, done.stderr[-3000:]
