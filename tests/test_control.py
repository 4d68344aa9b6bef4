"""Orders to a run: what is refused, what is recorded, what two operators at once leave, what ledger and trainer do then."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import redis
from builders import admit_one, for_each, make_config, publish_policy, push_group

from sluice.common.connections.client import connect
from sluice.common.errors import ConfigError
from sluice.common.keys import RUNS, Keys
from sluice.common.ledger.ledger import Ledger
from sluice.common.ledger.replay_buffer import ReplayBuffer
from sluice.common.monitoring.diagnosis import diagnose
from sluice.common.monitoring.metric_stream import read_events, write_event
from sluice.common.operations import control
from sluice.common.run import Run, RunRecord, create_run, open_run
from sluice.trainer.control_state import ControlReader
from sluice.trainer.step_metrics import append_line


@pytest.fixture
def client(server_flavours: str) -> Iterator[redis.Redis]:
    connection = connect(server_flavours)
    yield connection
    connection.close()


@pytest.fixture
def run(client: redis.Redis, keys: Keys, tmp_path: Path) -> Iterator[Run]:
    config = make_config(replay_buffer={"batch_size": 2, "max_policy_age": 1}, trainer={"seq_len": 16, "num_steps": 50})
    yield create_run(client, keys.run, config, assets={}, folder=str(tmp_path / "not there yet"))
    client.hdel(RUNS, keys.run)


@pytest.fixture
def ledger(client: redis.Redis, run: Run) -> Ledger:
    """Of that run, with policy 0 published."""
    publish_policy(client, run.keys, 0)
    return Ledger(client, run.keys, run.config, worker="w")


def at_once(url: str, act: Callable[[redis.Redis, int], Any], *, count: int) -> tuple[list[Any], list[ConfigError]]:
    """Do it in so many threads, each with a connection of its own. Returns what was done, and what was refused."""
    barrier = threading.Barrier(count)

    def one(number: int) -> Any:
        with connect(url) as own:
            barrier.wait(10)
            try:
                return act(own, number)
            except ConfigError as error:
                return error

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(one, range(count), timeout=60))
    refused = [result for result in results if isinstance(result, ConfigError)]
    return [result for result in results if result not in refused], refused


def change_log(client: redis.Redis, run: Run) -> list[tuple[str, str, str, str]]:
    entries = control.read_control_state(client, run.keys).change_log
    return [(fields["who"], fields["key"], fields["old"], fields["new"]) for _, fields in entries]


def test_a_setting_is_in_the_effective_config_and_the_stored_one_stays(client: redis.Redis, run: Run) -> None:
    stored = client.hget(run.keys.run_record, "config")
    for version in range(3):
        publish_policy(client, run.keys, version)
    control.change(client, run, ["max_policy_age=3", "trainer.learning_rate=2e-6"], who="alice")
    config = control.effective(client, run)
    assert config.replay_buffer.max_policy_age == 3
    assert config.trainer.learning_rate == 2e-6
    assert config.max_credits == 8
    assert client.hget(run.keys.run_record, "config") == stored
    assert change_log(client, run) == [
        ("alice", "replay_buffer.max_policy_age", "1", "3"),
        ("alice", "trainer.learning_rate", "1e-05", "2e-06"),
    ]
    (_, entry), _ = control.read_control_state(client, run.keys).change_log
    assert entry["step"] == "2"
    assert abs(float(entry["at"]) - client.time()[0]) < 60


def test_the_same_order_twice_is_one_change_and_the_stored_value_is_no_override(client: redis.Redis, run: Run) -> None:
    for _ in range(2):
        control.change(client, run, ["sampling.temperature=0.7"], who="a")
    assert len(change_log(client, run)) == 1
    control.change(client, run, ["sampling.temperature=1.0"], who="b")
    assert control.read_control_state(client, run.keys).settings == {}
    assert change_log(client, run)[-1] == ("b", "sampling.temperature", "0.7", "1.0")


@for_each(
    ("assignment", "message"),
    [
        ("max_policy_age=-1", "replay_buffer.max_policy_age = -1: Input should be greater than or equal to 0"),
        ("sampling.temperature=11", "sampling.temperature = 11: Input should be less than or equal to 10"),
        ("sampling.temperature=0", "nothing would be learned"),
        ("sampling.group_size=4", "group_size cannot be changed during a run; these can: replay_buffer.max"),
        ("trainer.lerning_rate=1", "cannot be changed"),
        ("trainer.loss.kl_beta=0.1", "whether references are computed"),
        ("trainer.num_steps=3", "step 3 is trained already"),
        ("trainer.learning_rate=", "is not of the form key=value"),
        ("trainer.learning_rate=fast", "trainer.learning_rate = 'fast'"),
    ],
)
def test_what_is_out_of_range_is_refused_and_nothing_is_changed(
    client: redis.Redis, run: Run, assignment: str, message: str
) -> None:
    for version in range(4):
        publish_policy(client, run.keys, version)
    with pytest.raises(ConfigError) as error:
        control.change(client, run, ["sampling.top_p=0.9", assignment], who="a")
    assert message in str(error.value)
    assert control.read_control_state(client, run.keys) == control.ControlState()


def test_vllm_gets_no_temperature_that_it_refuses(client: redis.Redis, keys: Keys) -> None:
    run = create_run(client, keys.run, make_config(rollout={"engine": "vllm"}), assets={}, folder="runs/x")
    with pytest.raises(ConfigError, match=r"vLLM samples at 0\.01 to 2\.0"):
        control.change(client, run, ["sampling.temperature=3"], who="a")


def test_a_run_that_has_ended_takes_no_orders(client: redis.Redis, run: Run) -> None:
    change = partial(control.change, assignments=["sampling.top_p=0.9"])
    RunRecord(client, run.keys).set_status("finished")
    for state in ("finished", "gone"):
        for order in (control.pause, control.drain, control.resume, change):
            with pytest.raises(ConfigError, match=f"is {state}: there is nothing to change"):
                order(client, run, who="a")
        client.delete(run.keys.run_record)


def test_operators_at_once_lose_no_change_and_break_no_rule(
    server_flavours: str, client: redis.Redis, run: Run
) -> None:
    """What a change calls old is what the change before it calls new, and the last one holds."""

    def set_many(own: redis.Redis, number: int) -> None:
        for value in range(1, 6):
            settings = [f"sampling.top_k={number * 10 + value}", f"trainer.max_grad_norm={value}"]
            control.change(own, run, settings, who=str(number))

    assert at_once(server_flavours, set_many, count=4)[1] == []
    changes = [(key, old, new) for _, key, old, new in change_log(client, run)]
    for name in ("sampling.top_k", "trainer.max_grad_norm"):
        values = [(old, new) for key, old, new in changes if key == name]
        assert all(before[1] == after[0] for before, after in pairwise(values)), values
        assert str(control.at(control.effective(client, run), name)) in {values[-1][1], values[-1][1] + ".0"}


def test_a_change_is_judged_again_when_another_came_first(client: redis.Redis, run: Run, monkeypatch) -> None:
    checked = control._checked

    def slow(*arguments):
        if not control.read_control_state(client, run.keys).settings:
            monkeypatch.setattr(control, "_checked", checked)
            control.change(client, run, ["sampling.top_p=0.5"], who="faster")
        return checked(*arguments)

    monkeypatch.setattr(control, "_checked", slow)
    control.change(client, run, ["sampling.top_k=7"], who="slower")
    config = control.effective(client, run)
    assert (config.sampling.top_p, config.sampling.top_k) == (0.5, 7)


def test_a_paused_run_admits_nothing_and_says_who_paused_it(client: redis.Redis, run: Run, ledger: Ledger) -> None:
    admit_one(ledger)
    assert control.pause(client, run, who="alice")
    assert not control.pause(client, run, who="bob")
    admission = ledger.admit(10)
    assert (admission.stopped_by, admission.cursors) == ("paused", [])
    cause = diagnose(client, run)
    assert cause.kind == "paused"
    assert cause.text.startswith("paused by alice since 20")
    assert control.resume(client, run, who="bob")
    assert not control.resume(client, run, who="bob")
    assert diagnose(client, run).kind != "paused"
    admit_one(ledger)
    assert change_log(client, run) == [("alice", "paused", "false", "true"), ("bob", "paused", "true", "false")]


def test_a_drain_lifts_a_pause_and_a_resumption_lifts_both(client: redis.Redis, run: Run, ledger: Ledger) -> None:
    control.pause(client, run, who="a")
    control.drain(client, run, who="b")
    control_state = control.read_control_state(client, run.keys)
    assert control_state.paused is None
    assert control_state.draining is not None and control_state.draining["who"] == "b"
    assert ledger.admit(1).stopped_by == "draining"
    control.pause(client, run, who="a")
    control.resume(client, run, who="a")
    assert control.read_control_state(client, run.keys).draining is None
    admit_one(ledger)


def test_a_higher_bound_admits_more_and_a_lower_one_drops_what_is_too_old(
    client: redis.Redis, run: Run, ledger: Ledger
) -> None:
    buffer = ReplayBuffer(ledger, groups_per_step=2, max_policy_age=1)
    assert len(ledger.admit(100).cursors) == 4
    ledger.config = control.change(client, run, ["max_policy_age=2"], who="a")
    assert len(ledger.admit(100).cursors) == 2
    for cursor in range(5):
        push_group(ledger, group_id=f"t{cursor}")
    assert buffer.num_untrained() == 6, "all that no batch holds: in the buffer and in flight"
    push_group(ledger, group_id="t5")
    publish_policy(client, run.keys, 1)
    assert buffer.sample(1, step=1).groups is not None
    assert buffer.num_untrained() == 4
    buffer.acknowledge(1)
    assert buffer.num_untrained() == 4
    publish_policy(client, run.keys, 2)
    buffer.max_policy_age = control.change(client, run, ["max_policy_age=1"], who="a").replay_buffer.max_policy_age
    sample = buffer.sample(2, step=2)
    assert (sample.groups, sample.evicted) == (None, 4)
    assert ledger.counters().holds


def test_two_creators_of_one_name_make_one_run(server_flavours: str, client: redis.Redis, keys: Keys) -> None:
    def create(own: redis.Redis, seed: int) -> Run:
        return create_run(own, keys.run, make_config(seed=seed), assets={}, folder=f"runs/{seed}")

    made, refused = at_once(server_flavours, create, count=8)
    assert (len(made), len(refused)) == (1, 7)
    assert all("is in use" in str(error) for error in refused)
    assert open_run(client, keys.run).config == made[0].config
    client.hdel(RUNS, keys.run)


def test_the_trainer_tells_every_order_once_also_over_its_restarts(client: redis.Redis, run: Run) -> None:
    file = Path(run.folder) / "metrics.jsonl"
    control.change(client, run, ["sampling.temperature=0.5"], who="a")  # before there is a trainer
    first = ControlReader(client, run)
    first.read()
    first.read()
    (told,) = map(json.loads, file.read_text().splitlines())
    assert (told["control"], told["old"], told["new"]) == ("sampling.temperature", 1.0, 0.5)
    control.pause(client, run, who="b")
    append_line(file, {"step": 1, "version": 1})
    with file.open("a") as torn:
        torn.write('{"step": 1, "control": "pau\n')  # by a power failure
    second = ControlReader(client, run)
    second.read()
    second.read()
    lines = [line for line in file.read_text().splitlines() if '"entry"' in line]
    assert len(lines) == 2
    assert '"control": "paused"' in lines[1]


def test_the_trainer_reads_what_holds_again_each_time(client: redis.Redis, run: Run) -> None:
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


def test_events_are_stamped_with_the_step_and_a_retry_adds_none(client: redis.Redis, run: Run) -> None:
    for _ in range(2):
        write_event(client, run.keys, "killed", process="rollout-0", how="was killed by SIGKILL")
    write_event(client, run.keys, "restarted", process="rollout-0")
    control.pause(client, run, who="ada")
    events = [event for _, event in read_events(client, run.keys)]
    assert all(abs(float(event.pop("at")) - time.time()) < 60 for event in events)
    assert events == [
        {"event": "killed", "step": "0", "process": "rollout-0", "how": "was killed by SIGKILL"},
        {"event": "restarted", "step": "0", "process": "rollout-0"},
        {"event": "setting", "step": "0", "who": "ada", "key": "paused", "old": "false", "new": "true"},
    ]
    newest, _ = read_events(client, run.keys)[-1]
    assert read_events(client, run.keys, after=newest) == []
