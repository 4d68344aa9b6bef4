"""The trainer's view of orders: what holds, and one line of metrics.jsonl for each, once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from builders import make_config
from harness import metrics_lines

from sluice.common.keys import RUNS, Keys
from sluice.common.operations import control
from sluice.common.run import Run, create_run
from sluice.trainer.control_state import ControlReader
from sluice.trainer.step_metrics import append_line


@pytest.fixture
def run(client: redis.Redis, keys: Keys, tmp_path: Path) -> Iterator[Run]:
    yield create_run(client, keys.run, make_config(), assets={}, folder=str(tmp_path / "not there yet"))
    client.hdel(RUNS, keys.run)


def told(run: Run) -> list[tuple[str, object, object]]:
    lines = metrics_lines(Path(run.folder))
    return [(line["control"], line["old"], line["new"]) for line in lines if "control" in line]


def test_every_order_is_told_once_also_over_restarts_of_the_trainer(client: redis.Redis, run: Run) -> None:
    control.change(client, run, ["sampling.temperature=0.5"], who="a")  # before there is a trainer
    first = ControlReader(client, run)
    first.read()
    first.read()
    assert told(run) == [("sampling.temperature", 1.0, 0.5)]
    control.pause(client, run, who="b")
    append_line(Path(run.folder) / "metrics.jsonl", {"step": 1, "version": 1})
    with (Path(run.folder) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "control": "pau\n')  # torn by a power failure
    second = ControlReader(client, run)
    for reader in (second, second):
        reader.read()
    lines = [line for line in (Path(run.folder) / "metrics.jsonl").read_text().splitlines() if '"entry"' in line]
    assert len(lines) == 2
    assert '"control": "paused"' in lines[1]


def test_what_holds_is_read_again_each_time(client: redis.Redis, run: Run) -> None:
    reader = ControlReader(client, run)
    reader.read()
    assert reader.config is run.config
    assert reader.metrics() == {}
    control.change(client, run, ["max_policy_age=4"], who="a")
    control.drain(client, run, who="a")
    reader.read()
    assert reader.config.replay_buffer.max_policy_age == 4
    assert reader.state.draining is not None
    assert reader.metrics() == {"setting/replay_buffer.max_policy_age": 4.0}
    control.change(client, run, ["max_policy_age=1"], who="a")
    control.resume(client, run, who="a")
    reader.read()
    assert reader.config == run.config
    assert reader.metrics() == {"setting/replay_buffer.max_policy_age": 1.0}, "a curve goes back with its setting"
    assert reader.state.draining is None
