"""A full disk pauses training and says so; existing files are unharmed, and with room again it continues."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from harness import (
    SMALL,
    assert_trained_once,
    counters_of,
    create_run,
    metrics_lines,
    metrics_of,
    sluice,
    tiny_folder,
    trainer,
    wait_for,
    wait_for_stall,
    workers,
)

from sluice.common.config.sft import SftConfig
from sluice.common.connections.client import connect, give_up_after, outage
from sluice.common.errors import DiskFull
from sluice.common.monitoring.diagnosis import _memory
from sluice.scripts.launcher.redis_server import EmbeddedServer, start_server
from sluice.trainer.checkpoint import newest_checkpoint
from sluice.trainer.sft import SftTrainer

MIB = 2**20
REPORTING: dict[str, Any] = {"trainer__stall_report_s": 1.0, "checkpoint__every_steps": 4}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB; a checkpoint of the tiny model has 4 MiB, a policy 1.3."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, *, leave: int) -> Path:
    """Use up a file system but for `leave` bytes, while others write and remove files there."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file, suppress(OSError):  # another was quicker
        while (free := shutil.disk_usage(folder).free) > leave:
            file.write(bytes(min(free - leave, 1 << 16)))
    return filler


def test_training_pauses_while_the_disk_of_its_policies_is_full(
    tmp_path: Path, own_redis: EmbeddedServer, small_disk: Path
) -> None:
    settings = {"trainer__num_steps": 16, "policy_store__path": str(small_disk), **REPORTING, **SMALL}
    env = create_run(tmp_path, own_redis.url, **settings)
    run_folder = tmp_path / "runs" / "roles"
    with workers(tmp_path, env), trainer(tmp_path, env) as daemon:
        wait_for(lambda: (run_folder / "checkpoints" / "latest").exists(), timeout=90, what="the first checkpoint")
        filler = fill(small_disk, leave=MIB)
        wait_for_stall(tmp_path, env, "the disk is full: no room for", daemon)
        filler.unlink()
        assert daemon.wait(240) == 0
    counters = counters_of(env)
    assert (counters.holds, counters.trained, counters.in_flight) == (True, 64, 0)
    assert_trained_once(run_folder, 16, groups_per_step=4)
    stalls = [line for line in metrics_lines(run_folder) if "stall" in line]
    assert any("the disk is full" in line.get("cause", "") for line in stalls)


def test_training_pauses_while_the_disk_of_its_checkpoints_is_full_and_the_one_before_stays_as_good(
    tmp_path: Path, own_redis: EmbeddedServer, small_disk: Path
) -> None:
    settings = {"trainer__num_steps": 1000, "output_dir": str(small_disk), **REPORTING, **SMALL, "checkpoint__keep": 1}
    env = create_run(tmp_path, own_redis.url, **settings)
    run_folder, log = small_disk / "roles", tmp_path / "trainer.log"
    checkpoints = run_folder / "checkpoints"

    def newest() -> int:
        found = newest_checkpoint(checkpoints)
        return found.state.step if found else 0

    def fill_after_a_checkpoint() -> Path:
        before = newest()
        wait_for(lambda: newest() > before, timeout=90, what="a checkpoint")
        return fill(small_disk, leave=MIB)

    with workers(tmp_path, env):
        with trainer(tmp_path, env) as daemon:
            filler = fill_after_a_checkpoint()
            wait_for_stall(tmp_path, env, "the disk is full: no room for", daemon)
            assert newest() >= 4, "the checkpoint before is as good as it was"
            assert not list(checkpoints.glob(".tmp-*"))
            filler.unlink()
            filler = fill_after_a_checkpoint()
            wait_for(lambda: log.read_text().count("the disk is full") > 1, timeout=60, what="the trainer to notice")
            fill(small_disk, leave=MIB)  # an older checkpoint may have been removed meanwhile
            daemon.terminate()
            assert daemon.wait(60) == 1
        assert "error: stopped without a checkpoint of step" in log.read_text()
        kept = newest()
        filler.unlink()
        steps = kept + 8
        assert sluice("set", f"trainer.num_steps={steps}", cwd=tmp_path, **env).returncode == 0
        with trainer(tmp_path, env) as daemon:
            assert daemon.wait(240) == 0
        assert f"resumed at step {kept}" in log.read_text()
    counters = counters_of(env)
    assert metrics_of(run_folder)[-1]["step"] == steps
    assert (counters.holds, counters.trained, counters.in_flight) == (True, steps * 4, 0)


def test_a_redis_whose_append_only_file_cannot_be_written_is_waited_for(small_disk: Path) -> None:
    server = start_server(small_disk / "redis")
    client = connect(server.url)
    filler = fill(small_disk, leave=MIB // 2)
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        stack.callback(server.stop)
        stack.callback(give_up_after, client, 0.0)  # where the test has failed
        written = pool.submit(lambda: [client.set(f"key:{i}", bytes(MIB // 8)) for i in range(16)])
        told = wait_for(lambda: outage(client), timeout=20, what="a refused write")
        assert "cannot write its data to disk (disk full?): writing pauses" in told
        causes = [cause for cause in _memory(connect(server.url), over=1.0) if "append-only file" in cause.text]
        assert [cause.kind for cause in causes] == ["redis_full"]
        assert not written.done()
        filler.unlink()
        assert written.result(20) == [True] * 16
        assert outage(client) is None
        client.close()


def test_a_model_of_supervised_training_is_replaced_whole_or_not_at_all(small_disk: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {a}+1?", "completion": f"{a + 1}"} for a in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SftConfig.model_validate(
        {
            "model": {"path": str(tiny_folder(3) / "model")},
            "dataset": {"path": str(tmp_path / "rows.jsonl")},
            "batch_size": 4,
            "trainer": {"num_steps": 1, "device": "cpu"},
        }
    )
    folder = small_disk / "sft"

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (folder / "model").iterdir()}

    assert SftTrainer(config, folder).train(lambda metrics: None)
    made = files()
    again = SftTrainer(config, folder)
    filler = fill(small_disk, leave=MIB)
    with pytest.raises(DiskFull, match="no room for the model"):
        again.train(lambda metrics: None)
    assert files() == made
    filler.unlink()
    assert SftTrainer(config, folder).train(lambda metrics: None)
    assert files() == made
    assert not list(folder.glob(".*model"))
