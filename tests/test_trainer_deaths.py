"""The trainer dies at every place where it matters; what it trained is trained once, and the run ends as if it had not."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import torch
from harness import SMALL, assert_trained_once, counters_of, create_run, metrics_of, trainer, workers
from pyarrow import parquet

from sluice.scripts.launcher.redis_server import EmbeddedServer
from sluice.trainer.checkpoint import SavedTensors, checkpoint_at, newest_checkpoint

OPTIMIZE, BUFFER = (
    "sluice.trainer.trained_policy:TrainedPolicy.optimize",
    "sluice.common.ledger.replay_buffer:ReplayBuffer",
)
WRITE = "sluice.common.policies.transports:DirectoryTransport.write"
COLLECT = "sluice.common.policies.retention:Retention.collect_garbage"
KILLS = [
    (COLLECT, "before", 3),  # two steps are published, and no checkpoint is written
    (OPTIMIZE, "after", 2),  # between optimizer step and publication
    (f"{BUFFER}.sample", "after", 3),  # a batch is dealt out, nothing else happened
    (WRITE, "after", 3),  # tensors written, the pointer not moved
    (COLLECT, "before", 3),  # the pointer moved, nobody told
    ("sluice.trainer.checkpoint:save_file", "after", 1),  # weights written, no optimizer state
    ("sluice.trainer.checkpoint:replace_text", "before", 1),  # everything in place but the `latest` pointer
    (f"{BUFFER}.acknowledge", "before", 2),  # between checkpoint and acknowledgement
    (f"{BUFFER}.acknowledge", "after", 2),
]


def test_a_trainer_killed_at_any_point_goes_on_and_trains_every_group_once(
    tmp_path: Path, own_redis: EmbeddedServer
) -> None:
    steps = 30
    settings = {"trainer__num_steps": steps, "checkpoint__every_steps": 3, "metrics__completions": True}
    env = create_run(tmp_path, own_redis.url, **settings, **SMALL)
    run_folder = tmp_path / "runs" / "roles"
    with workers(tmp_path, env):
        for place in KILLS:
            with trainer(tmp_path, env, kill_at=place) as process:
                assert process.wait(180) == -9, f"{place} was never reached"
            assert counters_of(env).holds
        assert len(metrics_of(run_folder)) > 0 and max(m["step"] for m in metrics_of(run_folder)) < steps
        with trainer(tmp_path, env) as process:
            assert process.wait(240) == 0
    counters = counters_of(env)
    assert counters.holds
    assert (counters.in_flight, counters.dead) == (0, {})
    assert counters.trained == steps * 4
    assert_trained_once(run_folder, steps, groups_per_step=4)
    assert_completions_are_those_trained(run_folder, every_steps=3)


def assert_completions_are_those_trained(run_folder: Path, *, every_steps: int) -> None:
    """The files hold each completion of the groups that the checkpoints name once, at the steps that they cover."""
    rows = parquet.read_table(run_folder / "completions").to_pylist()
    assert len({(row["group_id"], row["sample"]) for row in rows}) == len(rows) > 0
    written: dict[int, set[str]] = defaultdict(set)
    for row in rows:
        written[-(-row["step"] // every_steps) * every_steps].add(row["group_id"])
    states = [json.loads(path.read_text()) for path in (run_folder / "checkpoints").glob("step-*/state.json")]
    assert written == {state["step"]: set(state["trained_groups"]) for state in states}


def test_ten_steps_are_five_a_kill_and_five_bit_for_bit(tmp_path: Path, own_redis: EmbeddedServer) -> None:
    synchronous = {
        **SMALL,
        "replay_buffer__max_policy_age": 0,
        "rollout__concurrency": 1,  # one group at a time: the same shapes, so the same last bits
        "trainer__num_steps": 10,
        "checkpoint__every_steps": 5,
        "seed": 7,
    }
    results = {}
    for name, place in [("straight", None), ("killed", (OPTIMIZE, "after", 7))]:
        folder = tmp_path / name
        folder.mkdir()
        env = create_run(folder, own_redis.url, name=name, **synchronous)
        with workers(folder, env):
            if place:
                with trainer(folder, env, kill_at=place) as process:
                    assert process.wait(180) == -9
                found = newest_checkpoint(folder / "runs" / name / "checkpoints")
                assert found is not None and found.state.step == 5
            with trainer(folder, env) as process:
                assert process.wait(180) == 0
        assert counters_of(env).to_dict() | {"retried": 0, "interrupted": 0, "resent": 0, "refused": 0} == {
            "admitted": 40, "trained": 40, "scored": 0, "dropped": {}, "dead": {}, "in_flight": 0,
            "retried": 0, "interrupted": 0, "resent": 0, "refused": 0, "reconciled": 0, "recovered": 0, "discarded": 0,
            "kept_for_bound": 0, "holds": True,
        }  # fmt: skip
        results[name] = checkpoint_at(folder / "runs" / name / "checkpoints", 10)
    straight, killed = results["straight"], results["killed"]
    assert killed.state.version > straight.state.version
    for kind in ("model", "optimizer"):
        tensors = (SavedTensors(found.path, kind).all() for found in (straight, killed))
        torch.testing.assert_close(*tensors, rtol=0, atol=0)
    assert straight.state.random_state == killed.state.random_state
