"""Orders to real runs: pause over the death of every process, drain and resume, settings that act at once."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import (
    SMALL,
    counters_of,
    create_run,
    metrics_lines,
    metrics_of,
    only_run,
    quickstart_config,
    running_sluice,
    sluice,
    tiny_folder,
    trainer,
    wait_for,
    workers,
)

from sluice.common.connections.client import connect
from sluice.common.keys import Keys
from sluice.scripts.launcher.redis_server import EmbeddedServer

ON_POLICY = {
    "trainer__loss": {"kl_beta": 0.0},
    "replay_buffer": {"batch_size": 4, "max_policy_age": 0},
    "sampling__group_size": 4,
    "trainer__warmup_steps": 0,
    "evaluation": {"datasets": []},
    "audit": "all",
}


def last_step(folder: Path) -> int:
    return int(max((line["step"] for line in metrics_of(folder)), default=0))


def wait_for_step(folder: Path, step: int) -> None:
    wait_for(lambda: last_step(folder) >= step, timeout=120, what=f"step {step}")


def json_of(command: str, cwd: Path, env: dict[str, str]) -> dict[str, Any]:
    done = sluice(command, "--json", cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def changes_of(cwd: Path, env: dict[str, str]) -> list[tuple[str, str, str, str]]:
    return [(o["key"], o["old"], o["new"], o["who"]) for o in json_of("set", cwd, env)["change_log"]]


def test_a_paused_run_stands_still_also_over_the_death_of_every_process(
    own_redis: EmbeddedServer, tmp_path: Path
) -> None:
    env = create_run(tmp_path, own_redis.url, trainer__num_steps=1000, checkpoint__every_steps=1, **SMALL)
    folder, keys = tmp_path / "runs" / "roles", Keys("roles")
    client = connect(own_redis.url)

    def is_at_rest() -> bool:
        return not client.zcard(keys.deadlines) and json_of("status", tmp_path, env)["processes"] != {}

    with ExitStack() as stack:
        started = stack.enter_context(workers(tmp_path, env))
        started += [stack.enter_context(trainer(tmp_path, env))]
        wait_for_step(folder, 2)
        done = sluice("pause", cwd=tmp_path, **env, SLUICE_WHO="alice@laptop")
        assert (done.returncode, done.stdout) == (0, "roles paused; `sluice resume` continues it\n")
        at_pause = int(client.hget(keys.policy, "step"))
        wait_for(is_at_rest, timeout=30, what="what is in flight to be finished")
        step = wait_for(
            lambda: (s := last_step(folder)) == int(client.hget(keys.policy, "step")) and s,
            timeout=30,
            what="the step that was running to be published",
        )
        assert step <= at_pause + 2, "the step being trained at the time, and one that was being published"
        before = counters_of(env)
        status = json_of("status", tmp_path, env)
        assert status["stall_kind"] == "paused"
        assert "paused by alice@laptop since" in status["stalled_by"]
        for process in started:
            process.send_signal(signal.SIGKILL)
        for process in started:
            process.wait(10)
        old = set(status["processes"])
        stack.enter_context(workers(tmp_path, env))
        stack.enter_context(trainer(tmp_path, env))

        def roles_back() -> set[str]:
            heartbeats = json_of("status", tmp_path, env)["processes"]
            return {stats["role"] for name, stats in heartbeats.items() if name not in old}

        wait_for(lambda: len(roles_back()) == 4, timeout=120, what="every role to be back")
        log = tmp_path / "trainer.log"
        wait_for(
            lambda: "paused by alice@laptop" in log.read_text().partition("resumed at step")[2],
            timeout=60,
            what="the trainer to stand still again",
        )
        after = counters_of(env)
        assert (after.admitted, after.dropped, after.dead) == (before.admitted, {}, {})
        assert last_step(folder) == step
        assert sluice("resume", cwd=tmp_path, **env).stdout == "roles continues\n"
        wait_for_step(folder, step + 3)
    assert counters_of(env).holds
    orders = [line for line in metrics_lines(folder) if "control" in line]
    assert [(o["control"], o["old"], o["new"]) for o in orders] == [("paused", False, True), ("paused", True, False)]
    assert orders[0]["who"] == "alice@laptop"
    client.close()


def test_settings_act_within_a_step_and_every_step_can_be_computed_again(
    own_redis: EmbeddedServer, tmp_path: Path
) -> None:
    env = create_run(tmp_path, own_redis.url, trainer__num_steps=1000, **ON_POLICY)
    folder, stored = tmp_path / "runs" / "roles", (tmp_path / "runs" / "roles" / "config.yaml").read_bytes()
    with workers(tmp_path, env), trainer(tmp_path, env) as process:
        wait_for_step(folder, 2)
        wrong = sluice("set", "trainer.learning_rate=-1", cwd=tmp_path, **env)
        assert wrong.returncode == 2
        assert "trainer.learning_rate = -1: Input should be greater than 0" in wrong.stderr
        changes = ["trainer.learning_rate=1e-4", "sampling.temperature=0.6", "sampling.top_p=0.9", "max_policy_age=1"]
        assert sluice("set", *changes, "--who", "bob", cwd=tmp_path, **env).returncode == 0
        client = connect(own_redis.url)
        step = int(client.hget(Keys("roles").policy, "step"))
        wait_for_step(folder, step + 6)
        assert sluice("set", f"trainer.num_steps={last_step(folder) + 30}", cwd=tmp_path, **env).returncode == 0
        assert process.wait(180) == 0
    lines = metrics_of(folder)
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == 2e-4
    assert all(line["learning_rate"] == 1e-4 for line in lines if line["step"] > step + 2)
    # strictly on-policy until max_policy_age was raised; a trainer at another temperature would show ratios far from 1
    on_policy = [line for line in lines if line["staleness/token_mean"] == 0]
    assert all(abs(line["off_policy/ratio_max"] - 1) < 1e-3 for line in on_policy)
    assert lines[-1]["staleness/max"] == 1, "admission goes by the new bound"
    assert client.hget(Keys("roles").run_record, "status") == b"finished"
    assert (folder / "config.yaml").read_bytes() == stored
    replayed = sluice("replay", str(folder), cwd=tmp_path)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert json_of("set", tmp_path, env)["settings"]["sampling.temperature"] == 0.6
    assert changes_of(tmp_path, env)[:2] == [
        ("trainer.learning_rate", "0.0002", "0.0001", "bob"),
        ("sampling.temperature", "1.0", "0.6", "bob"),
    ]
    refused = sluice("pause", cwd=tmp_path, **env)
    assert refused.returncode == 2
    assert "run roles is finished" in refused.stderr
    client.close()


def test_a_drained_run_ends_in_good_order_and_is_gone_on_with(tmp_path: Path) -> None:
    # groups that are filtered out get no successor during a drain, so fewer than a batch may be left
    overrides = ON_POLICY | {"trainer__num_steps": 1000, "trainer__filter_zero_variance": True}
    config = quickstart_config(tmp_path, tiny=tiny_folder(700), **overrides)
    with running_sluice("run", str(config), "replay_buffer.max_policy_age=1", cwd=tmp_path) as process:
        wait_for(lambda: list(tmp_path.glob("runs/*/metrics.jsonl")), timeout=120, what="the run folder")
        folder = only_run(tmp_path)
        wait_for_step(folder, 2)
        assert sluice("drain", cwd=tmp_path).returncode == 0
        assert process.wait(240) == 0, (tmp_path / "output.log").read_text()
    output = (tmp_path / "output.log").read_text()
    assert f"drained; resume with: sluice run {config} --resume {folder.name}" in output
    summary = json.loads((folder / "summary.json").read_text())
    step, ledger = summary["steps"], summary["ledger"]
    assert ledger["holds"]
    assert ledger["trained"] == 4 * step
    assert ledger["dropped"].keys() <= {"zero_variance"}
    assert ledger["dead"] == {}
    assert ledger["in_flight"] < 4, "fewer groups than a batch are left"
    assert json_of("status", tmp_path, {})["status"] == "drained"
    with running_sluice("run", str(config), "--resume", f"runs/{folder.name}/", cwd=tmp_path) as process:
        wait_for_step(folder, step + 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(180) == 130
    assert [(key, new) for key, _, new, _ in changes_of(tmp_path, {})] == [("draining", "true"), ("draining", "false")]
