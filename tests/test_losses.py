"""A run that only loses groups says so, and ends by itself."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import redis
from builders import admit_one, for_each, make_config, publish_policy, push_group, rollout_payload, started_ledger
from harness import create_run, quickstart_config, running_sluice, sluice, tiny_folder, trainer, wait_for, workers

from sluice.common.config import Config
from sluice.common.connections.client import connect
from sluice.common.errors import RewardError, raised_at
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import Ledger
from sluice.common.ledger.replay_buffer import ReplayBuffer
from sluice.common.monitoring.losses import Losses, forget_dropped, read_losses
from sluice.common.run import RunRecord
from sluice.common.run import create_run as store_run
from sluice.scripts.launcher.redis_server import EmbeddedServer

K, WINDOW = 2, 8
"""Groups per step, and four batches' worth."""


def die(ledger: Ledger, *, detail: str = "RewardError('boom') at rewards.py:5\nTraceback") -> str:
    """Admit a group whose reward always fails."""
    group = push_group(ledger, until="rollout")
    while claim := ledger.claim(group, "reward", fields=()):
        ledger.fail(claim, reason="RewardError", detail=detail)
    return group


def losses_of(ledger: Ledger) -> Losses:
    return read_losses(ledger.client, ledger.keys.run, ledger.config)


def test_groups_that_die_in_a_row_are_counted_named_and_end_the_run(client: redis.Redis, keys: Keys) -> None:
    ledger, config = started_ledger(client, keys), make_config()
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
    from sluice.dashboard.run_state import collect_status

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


REWARD = """
def late(completions, **kwargs):
    import os
    if "PREFLIGHT" in os.environ:
        return [0.0] * len(completions)
    return [1 / (len(text) - len(text)) for text in completions]
"""


def reward(folder: Path) -> list[dict[str, Any]]:
    (folder / "late.py").write_text(REWARD)
    return [{"function": f"{folder / 'late.py'}:late"}]


def test_a_reward_that_always_raises_is_named_within_seconds_and_ends_the_run(tmp_path: Path) -> None:
    config = quickstart_config(
        tmp_path, tiny=tiny_folder(), evaluation__datasets=[], reward__functions=reward(tmp_path)
    )
    with running_sluice("run", str(config), "--name", "loses", cwd=tmp_path, PREFLIGHT="1") as process:
        del process
    # the variable is only there for the launcher's own trial call, not for the roles
    with running_sluice("run", str(config), "--name", "only", cwd=tmp_path) as process:
        assert process.wait(120) == 3
    output = (tmp_path / "output.log").read_text()
    print(output)
    place = f"{tmp_path / 'late.py'}:6"
    assert "groups were lost" in output and place in output and "ZeroDivisionError" in output
    error = next(line for line in output.splitlines() if line.startswith("error: "))
    assert "the run only loses groups" in error and place in error and "trainer.max_lost_batches = 4" in error
