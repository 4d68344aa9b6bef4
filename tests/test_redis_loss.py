"""Redis comes back without its last second, or without anything."""

from __future__ import annotations

import shutil
from pathlib import Path

from harness import SMALL, assert_trained_once, counters_of, create_run, kill, metrics_of, trainer, wait_for, workers

from sluice.scripts.launcher.redis_server import EmbeddedServer

STEPS = 40


def num_steps(run_folder: Path) -> int:
    return int(max((metrics["step"] for metrics in metrics_of(run_folder)), default=0))


def wait_for_steps(run_folder: Path, more: int, *, timeout: float = 90) -> None:
    target = num_steps(run_folder) + more
    wait_for(lambda: num_steps(run_folder) >= target, timeout=timeout, what=f"step {target}")


def copy_data(server: EmbeddedServer) -> Path:
    """What would be on the disk if the power failed now: the append-only file is written at its end only."""
    copy = server.folder / "copy"
    shutil.copytree(server.folder / "appendonlydir", copy)
    return copy


def come_back_with(server: EmbeddedServer, copy: Path | None) -> None:
    kill(server)
    shutil.rmtree(server.folder / "appendonlydir")
    if copy:
        copy.rename(server.folder / "appendonlydir")
    server.restart()


def test_what_redis_forgets_is_settled_by_this_trainer_and_the_next(tmp_path: Path, own_redis: EmbeddedServer) -> None:
    env = create_run(tmp_path, own_redis.url, trainer__num_steps=STEPS, checkpoint__every_steps=2, **SMALL)
    run_folder = tmp_path / "runs" / "roles"
    with workers(tmp_path, env):
        with trainer(tmp_path, env) as daemon:
            for _ in range(2):
                wait_for_steps(run_folder, 3)
                copy = copy_data(own_redis)
                wait_for_steps(run_folder, 5)
                come_back_with(own_redis, copy)
            wait_for_steps(run_folder, 3)
            reconciled = counters_of(env).reconciled
            assert reconciled > 0, "the lost steps had groups that Redis did not know were trained"
            assert "Redis has lost the trainer's last writes" in (tmp_path / "trainer.log").read_text()
            copy = copy_data(own_redis)
            wait_for_steps(run_folder, 5)
            daemon.kill()
        come_back_with(own_redis, copy)  # as after a power failure of both
        with trainer(tmp_path, env) as daemon:
            assert daemon.wait(240) == 0
    counters = counters_of(env)
    assert (counters.holds, counters.trained, counters.in_flight) == (True, STEPS * 4, 0)
    assert counters.reconciled > reconciled
    assert_trained_once(run_folder, STEPS, groups_per_step=4)


def test_a_run_that_redis_has_lost_says_what_can_be_saved(tmp_path: Path, own_redis: EmbeddedServer) -> None:
    env = create_run(tmp_path, own_redis.url, trainer__num_steps=1000, checkpoint__every_steps=2, **SMALL)
    run_folder = tmp_path / "runs" / "roles"
    with workers(tmp_path, env), trainer(tmp_path, env) as daemon:
        wait_for_steps(run_folder, 3)
        come_back_with(own_redis, None)
        assert daemon.wait(180) == 2
    text = (tmp_path / "trainer.log").read_text()
    assert "error: Redis has lost run roles: was it restarted without its append-only file?" in text
    assert "sluice export" in text
    assert (run_folder / "checkpoints" / "latest").is_file()
