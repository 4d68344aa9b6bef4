"""A run that only loses groups says so, and ends by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import redis
import yaml
from builders import admit_one, make_config, publish_policy, push_group, rollout_payload, started_ledger
from harness import (
    counters_of,
    create_run,
    quickstart_config,
    running_sluice,
    sluice,
    tiny_folder,
    trainer,
    wait_for,
    workers,
)

from sluice.common.connections.client import connect
from sluice.common.errors import RewardError, raised_at
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import Ledger
from sluice.common.ledger.replay_buffer import ReplayBuffer
from sluice.common.monitoring.heartbeats import read_heartbeats
from sluice.common.monitoring.losses import Losses, forget_dropped, read_losses
from sluice.common.run import Run, RunRecord, open_run
from sluice.common.run import create_run as store_run
from sluice.dashboard.run_state import collect_status

K, WINDOW = 2, 8
"""Groups per step, and four batches' worth."""


def die(ledger: Ledger, *, detail: str = "RewardError('boom') at rewards.py:5\nTraceback") -> str:
    """Admit a group whose reward fails at its only attempt."""
    group = push_group(ledger, until="rollout")
    claim = ledger.claim(group, "reward", fields=())
    assert claim
    ledger.config = make_config(lease={"max_attempts": 1})
    ledger.fail(claim, reason="RewardError", detail=detail)
    ledger.config = make_config()
    return group


def losses_of(ledger: Ledger) -> Losses:
    run = Run(name=ledger.keys.run, keys=ledger.keys, config=ledger.config, assets={}, folder="")
    return read_losses(ledger.client, run)


def test_groups_that_die_in_a_row_are_counted_named_and_end_the_run(client: redis.Redis, keys: Keys) -> None:
    ledger, config = started_ledger(client, keys), make_config()
    failing_groups = [push_group(ledger, until="rollout") for _ in range(4)]
    for group in failing_groups:
        assert losses_of(ledger).stall(config) is None
        claim = ledger.claim(group, "reward", fields=())
        assert claim and ledger.fail(claim, reason="RewardError", detail="RewardError('boom') at rewards.py:5")
    failing = losses_of(ledger).stall(config)
    assert failing and failing.startswith(
        "4 attempts failed, and no group was completed meanwhile. The last one, t3: Rew"
    )
    ledger.drop(failing_groups, reason="bad_row")
    client.delete(keys.ends, keys.lost)
    die(ledger)
    assert losses_of(ledger).alarm(config) is None, "one of a batch is not a run that loses"
    group = die(ledger)
    found = losses_of(ledger)
    expected = (
        f"2 of the last 2 groups were lost. The last one, {group}: RewardError('boom') at rewards.py:5 "
        f"(`sluice dead {keys.run} --show {group}` shows more)"
    )
    assert found.alarm(config) == found.stall(config) == expected
    push_group(ledger)
    found = losses_of(ledger)
    assert found.alarm(config) == expected.replace("last 2", "last 3"), "half of them and more"
    assert found.stall(config) is None, "one was completed since"
    for _ in range(WINDOW - 1):
        die(ledger)
    assert losses_of(ledger).verdict(config) is None
    die(ledger)
    verdict = losses_of(ledger).verdict(config)
    assert verdict is not None
    assert "8 groups in a row were lost (trainer.max_lost_batches = 4), and no step was made" in verdict
    assert losses_of(ledger).verdict(make_config(trainer={"max_lost_batches": None})) is None
    publish_policy(client, keys, 1)
    assert losses_of(ledger).verdict(config) is losses_of(ledger).stall(config) is None, "a step was made"


def test_rows_that_cannot_be_used_end_the_run_after_a_whole_epoch_of_them(client: redis.Redis, keys: Keys) -> None:
    ledger, config = started_ledger(client, keys), make_config()

    def drop(count: int, *, num_rows: int) -> None:
        for _ in range(count):
            ledger.drop(
                [admit_one(ledger)], reason="prompt_too_long", detail="prompt 9 has 900 tokens", num_rows=num_rows
            )

    drop(19, num_rows=20)
    assert losses_of(ledger).verdict(config) is None, "more than four batches' worth: long prompts may stand together"
    alarm = losses_of(ledger).alarm(config)
    assert alarm is not None and "8 of the last 8" in alarm and "prompt_too_long: prompt 9 has 900 tokens" in alarm
    forget_dropped(client, keys)
    drop(19, num_rows=20)
    assert losses_of(ledger).verdict(config) is None, "a row could be used in between"
    drop(1, num_rows=20)
    verdict = losses_of(ledger).verdict(config)
    assert verdict is not None and "none of 20 rows in a row could be used" in verdict
    assert losses_of(ledger).verdict(make_config(trainer={"max_dropped_epochs": 2})) is None
    drop(1, num_rows=0)
    assert losses_of(ledger).verdict(config) is None, "a stream whose end was not reached yet"


def test_complete_groups_that_the_trainer_cannot_read_end_the_run_too(client: redis.Redis, keys: Keys) -> None:
    """Each of them is complete first, which resets what counts groups that die on their way."""
    ledger, config = started_ledger(client, keys), make_config()
    buffer = ReplayBuffer(ledger, groups_per_step=K, max_policy_age=1)
    for _ in range(WINDOW // K):
        assert losses_of(ledger).verdict(config) is None
        for _ in range(K):
            group = push_group(ledger, until="rollout")
            client.hset(keys.group(group), "rollout", rollout_payload()[:-9])
            ledger.store(group, "reward", b"")
            ledger.store(group, "reference", b"")
        assert buffer.sample(0, step=1).groups is None
    verdict = losses_of(ledger).verdict(config)
    assert verdict is not None and "undecodable" in verdict


def test_a_failed_run_admits_nothing_and_shows_why(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    run = store_run(client, keys.run, make_config(), assets={}, folder=str(tmp_path))
    ledger = started_ledger(client, keys)
    RunRecord(client, keys).set_status("failed", failure="it only loses")
    assert ledger.admit(1).stopped_by == "failed"
    assert collect_status(client, run)["failure"] == "it only loses"
    RunRecord(client, keys).set_status("running")
    assert ledger.admit(1).cursors and RunRecord(client, keys).failure == ""


def test_the_place_of_an_error_is_the_last_line_of_the_users_own_file(tmp_path: Path) -> None:
    import importlib.util

    path = tmp_path / "mine.py"
    path.write_text("import json\n\n\ndef broken():\n    json.loads('{')\n")
    spec = importlib.util.spec_from_file_location("mine", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(RewardError) as caught:
        try:
            module.broken()
        except ValueError as error:
            raise RewardError("it broke") from error
    assert raised_at(caught.value) == f"{path}:5"
    assert raised_at(ValueError("never raised")) == ""


LATE = """
import sys


def late(completions, **kwargs):
    if "-Q" not in sys.argv:  # the launcher's own check
        return [0.0] * len(completions)
    return [1 / (len(text) - len(text)) for text in completions]
"""


def test_a_reward_that_always_raises_is_named_and_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    place = f"{tmp_path / 'late.py'}:8"
    function = [{"function": f"{tmp_path / 'late.py'}:late"}]
    config = quickstart_config(tmp_path, tiny=tiny_folder(), evaluation__datasets=[], reward__functions=function)
    with running_sluice("run", str(config), "--name", "loses", cwd=tmp_path) as process:
        assert process.wait(120) == 3
    lines = (tmp_path / "output.log").read_text().splitlines()
    began = next(line for line in lines if line.startswith("starting, "))
    assert "loading: " in began and "trainer" in began
    named = next(line for line in lines if line.startswith("losing groups: "))
    error = next(line for line in lines if line.startswith("error: "))
    assert "the run only loses groups and has ended: " in error and "(trainer.max_lost_batches = 4)" in error
    for line in (named, error):
        assert "reward function late raised ZeroDivisionError: division by zero" in line and line.count(place) == 1
        assert re.search(r"`sluice (dead loses --show t\d+|trace t\d+ loses)`", line)
    folder = tmp_path / "runs" / "loses"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["ended"]) == ("failed", error.removeprefix("error: "))
    assert (folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    shown = sluice("status", "loses", cwd=tmp_path).stdout
    assert "loses: failed" in shown and "the run only loses groups and has ended" in " ".join(shown.split())


def test_a_run_whose_prompts_are_all_too_long_fails_role_by_role(tmp_path: Path, redis_url: str) -> None:
    """The trainer decides, so no launcher is needed; and nothing is admitted afterwards, so no worker goes on in vain."""
    name = f"long-{tmp_path.name}"
    env = create_run(tmp_path, redis_url, name=name, dataset__max_req_tokens=8)
    with connect(redis_url) as client:
        run = open_run(client, name)
        settings = yaml.safe_load(RunRecord(client, run.keys).config)
        settings["dataset"]["max_req_tokens"] = 2  # preflight refuses a first prompt that is too long
        client.hset(run.keys.run_record, "config", yaml.safe_dump(settings))
        with workers(tmp_path, env, "dataset"), trainer(tmp_path, env) as process:
            assert process.wait(120) == 3
            dropped = counters_of(env).dropped["prompt_too_long"]
            record = RunRecord(client, run.keys)
            assert record.status == "failed"
            assert "which is every row of the dataset (trainer.max_dropped_epochs = 1)" in record.failure
            assert "prompt_too_long: prompt " in record.failure and "dataset.max_req_tokens = 2" in record.failure
            wait_for(lambda: stopped_by(client, run) == "failed", timeout=10, what="admission to end")
            assert counters_of(env).dropped["prompt_too_long"] - dropped < dropped
            summary = json.loads((tmp_path / "runs" / name / "summary.json").read_text())
            assert (summary["status"], summary["ended"]) == ("failed", record.failure)
    log = (tmp_path / "trainer.log").read_text()
    assert f"error: {record.failure}" in log
    assert (tmp_path / "runs" / name / "reward.png").read_bytes().startswith(b"\x89PNG")


def stopped_by(client: redis.Redis, run: Run) -> object:
    heartbeats = read_heartbeats(client, run.keys).values()
    return next((stats["stopped_by"] for stats in heartbeats if stats["role"] == "dataset"), None)
