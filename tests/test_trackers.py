"""Trackers show the run, each step once, also over crashes; none of them can stop or slow it. Completions are in Parquet."""

from __future__ import annotations

import http.server
import itertools
import json
import math
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import redis
from builders import for_each, make_run
from click.testing import CliRunner
from harness import ROOT, environment, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_step_metrics import group

from sluice.common.config.operations import MetricsConfig
from sluice.common.errors import ConfigError
from sluice.common.keys import Keys
from sluice.common.monitoring.metric_stream import last_metrics
from sluice.scripts.cli import cli
from sluice.trainer import trackers
from sluice.trainer.completions import CompletionsTable
from sluice.trainer.samples import Samples
from sluice.trainer.step_metrics import Reporter
from sluice.trainer.trackers import TrackedRun, TrackerQueue, check_trackers, tracked_id

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*")

TRAINER = """
import json, os, sys, time
from pathlib import Path
from sluice.common.config.operations import MetricsConfig
from sluice.trainer.trackers import TrackedRun, open_trackers

folder, tracker, resumed, told, steps, end = sys.argv[1:]
config = MetricsConfig.model_validate({tracker: True, "project": "demo"})
run = TrackedRun(
    name="r", run_id="0123456789abcdef", project="demo", folder=Path(folder), config={"trainer": {"learning_rate": 0.5}},
    resumed_step=int(resumed), told_step=int(told),
)
(tracker,) = open_trackers(config, run)
for step in json.loads(steps):
    tracker.log(step, {"reward/mean": step / 10, "eval/x/pass@1": 1.0})
print("logged", flush=True)
if end == "close":
    tracker.close()
    import psutil
    print([child.name() for child in psutil.Process().children(recursive=True)])
else:
    time.sleep(60)
"""


@contextmanager
def trainer_process(
    folder: Path, tracker: str, *, steps: list[int], resumed: int = 0, told: int = -1, end: str = "close"
) -> Iterator[subprocess.Popen[str]]:
    """A process that reports like a trainer; killed when the block ends."""
    argv = [sys.executable, "-c", TRAINER, str(folder), tracker, str(resumed), str(told), json.dumps(steps), end]
    where = environment(PYTHONPATH=str(ROOT), WANDB_MODE="offline")
    where = {name: value for name, value in where.items() if not name.startswith("TRACKIO_")}
    process = subprocess.Popen(argv, env=where, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wandb_records(folder: Path) -> list[Any]:
    """The records of every W&B run in a run folder. The format is that of LevelDB's logs, around protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/*run-*/*.wandb")):
        data, at, part = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
            part += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or its last piece
                record = Record()
                record.ParseFromString(part)
                found.append(record)
                part = b""
    return found


def wandb_rows(folder: Path) -> list[dict[str, float]]:
    rows = [record.history for record in wandb_records(folder) if record.WhichOneof("record_type") == "history"]
    return [{(item.key or item.nested_key[0]): json.loads(item.value_json) for item in row.item} for row in rows]


def trackio_rows(folder: Path) -> list[tuple[str, int, dict[str, float]]]:
    """(run, step, metrics) in the order they came."""
    (path,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    database.close()
    return [(run, step, json.loads(metrics)) for run, step, metrics in rows]


def queue_of(folder: Path, name: str, open: Callable[[TrackedRun], Any]) -> TrackerQueue:
    """The queue of a tracker; it opens it on its own thread."""
    run = TrackedRun(name="r", run_id="0123456789abcdef", project="demo", folder=folder, config={})
    return TrackerQueue(name=name, open=open, run=run)


def log_steps(sink: TrackerQueue, *, last: int) -> None:
    for step in range(1, last + 1):
        sink.log(step, {"reward/mean": 0.5})


class Fake:
    """A tracker that fails from its `fails_from`-th step on, and hangs in the step `stuck_in`."""

    def __init__(self, *, fails_from: int = 10**9, stuck_in: int = 0) -> None:
        self.seen: list[tuple[int, Mapping[str, float]]] = []
        self.fails_from, self.stuck_in, self.free, self.is_closed = fails_from, stuck_in, threading.Event(), False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step >= self.fails_from:
            raise OSError(28, "No space left on device")
        if step == self.stuck_in:
            assert self.free.wait(60)
        self.seen.append((step, metrics))

    def close(self) -> None:
        self.is_closed = True


def test_a_wandb_run_goes_on_after_a_kill_and_shows_each_step_once(tmp_path: Path) -> None:
    """What was told is kept, and no process of W&B outlives its trainer."""
    with trainer_process(tmp_path, "wandb", steps=[1, 2, 3], end="kill") as process:
        wait_for(lambda: len(wandb_rows(tmp_path)) == 3, timeout=40, what="three steps on disk")
        family = psutil.Process(process.pid).children(recursive=True)
        assert any(child.name() == "wandb-core" for child in family)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
    with trainer_process(tmp_path, "wandb", steps=[3, 4], resumed=2, told=3) as process:
        output, _ = process.communicate(timeout=60)
    assert output.splitlines()[-1] == "[]"
    records = wandb_records(tmp_path)
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {("0123456789abcdef", "demo", "r")}
    config = {update.key: json.loads(update.value_json) for update in runs[0].config.update}
    assert config["trainer"] == {"learning_rate": 0.5}
    rows = wandb_rows(tmp_path)
    means = [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row]
    assert means == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert [row["step"] for row in rows if "eval/x/pass@1" in row] == [1, 2, 3, 3, 4]  # results are told once only
    axes = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert {axis.step_metric for axis in axes if axis.glob_name == "*"} == {"step"}


def test_a_trackio_run_goes_on_after_a_restart_and_shows_each_step_once(tmp_path: Path) -> None:
    for resumed, told, steps in [(0, -1, [1, 2, 3]), (2, 3, [3, 4])]:
        with trainer_process(tmp_path, "trackio", steps=steps, resumed=resumed, told=told) as process:
            output, _ = process.communicate(timeout=60)
        assert output.splitlines()[-1] == "[]"
    rows = [(run, step) for run, step, metrics in trackio_rows(tmp_path) if metrics.get("reward/mean") == step / 10]
    assert rows == [("r-0123", step) for step in (1, 2, 3, 4)]


@contextmanager
def online(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], tuple[int, dict[str, Any]]]) -> Iterator[None]:
    """W&B is at a server of ours, which answers the bodies of requests with a status and JSON."""

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, data = answer(self.rfile.read(int(self.headers["content-length"])).decode())
            with suppress(BrokenPipeError):
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(data).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


def test_wandb_without_a_network_records_offline_and_nothing_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "OPEN_S", 3)
    ended = threading.Event()
    with online(monkeypatch, lambda body: (500, {"quiet": ended.wait(20)})):
        began = time.monotonic()
        sink = queue_of(tmp_path, "wandb", trackers.WandB)
        log_steps(sink, last=3)
        assert time.monotonic() - began < 2.5
        sink.close()
        assert time.monotonic() - began < 18, "the server answers after 20 s"
        ended.set()
    assert [row["step"] for row in wandb_rows(tmp_path)] == [1, 2, 3]
    assert "recorded offline: `wandb sync` uploads it" in caplog.text


def test_a_network_that_goes_away_meanwhile_holds_the_end_up_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = {"id": "p", "name": "demo", "entity": {"id": "e", "name": "e"}}
    run = {"id": "x", "name": "r", "displayName": "r", "config": "{}", "project": project, "historyLineCount": 0}
    opened, ended = threading.Event(), threading.Event()

    def answer(body: str) -> tuple[int, dict[str, Any]]:
        if opened.is_set():
            ended.wait(20)
        elif "RunResumeStatus" in body:
            return 200, {"data": {"model": {**project, "bucket": None}}}
        elif "UpsertBucket" in body:
            opened.set()
            return 200, {"data": {"upsertBucket": {"bucket": run, "inserted": True}}}
        return 200, {"data": {}}

    monkeypatch.setattr(trackers, "FINISH_S", 1)
    with online(monkeypatch, answer):
        sink = queue_of(tmp_path, "wandb", trackers.WandB)
        assert opened.wait(20)
        began = time.monotonic()
        log_steps(sink, last=3)
        assert time.monotonic() - began < 10, "the server answers after 20 s"
        sink.close()
        assert time.monotonic() - began < 18
        ended.set()
    assert [row["step"] for row in wandb_rows(tmp_path)] == [1, 2, 3]
    assert not list(tmp_path.glob("wandb/offline-*")), "it was online"


def test_a_tracker_that_fails_loses_its_own_lines_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake = Fake(fails_from=3)
    sink = queue_of(tmp_path, "fake", lambda run: fake)
    log_steps(sink, last=7)
    sink.close()
    assert [step for step, _ in fake.seen] == [1, 2]
    assert sink.dropped == 5
    assert fake.is_closed
    assert caplog.text.count("No space left on device") == 1
    assert "5 steps are missing there" in caplog.text


def test_a_tracker_that_does_not_open_is_no_reason_to_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def opens(run: TrackedRun) -> Fake:
        raise PermissionError("not you")

    sink = queue_of(tmp_path, "fake", opens)
    sink.log(1, {"reward/mean": 0.5})
    sink.close()
    assert sink.dropped == 1
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "not you" in caplog.text


def test_a_tracker_that_stands_still_costs_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    fake = Fake(stuck_in=1)
    sink = queue_of(tmp_path, "fake", lambda run: fake)
    log_steps(sink, last=trackers.LINES_HELD + 11)
    assert not fake.free.is_set() and len(fake.seen) == 0, "it still hangs in the first line"
    assert sink.dropped in (10, 11)  # the thread may have taken the first line already
    sink.close()
    assert len(fake.seen) == 0, "nor did the end wait for it"
    assert "did not finish" in caplog.text
    fake.free.set()


@contextmanager
def reporting(
    client: redis.Redis, keys: Keys, folder: Path, *, resumed: int = 0, **metrics: bool
) -> Iterator[Reporter]:
    """The reporter of a trainer that resumes from a step, with these sinks."""
    run = make_run(keys, folder, metrics=metrics)
    reporter = Reporter(client, run)
    reporter.begin(resumed, run.config)
    yield reporter
    reporter.close()


def test_a_step_is_sent_once_however_often_the_trainer_dies(
    client: redis.Redis, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    monkeypatch.setitem(trackers.TRACKERS, "trackio", lambda run: fake)
    version = itertools.count()
    for resumed, steps in [(0, [1, 2, 3, 4]), (1, [2]), (1, [2, 3, 4, 5, 6]), (6, [6])]:
        with reporting(client, keys, tmp_path, resumed=resumed, trackio=True) as reporter:
            for step in steps:
                reporter.report(step, next(version), {"reward/mean": 0.5, "loss/kl": math.nan})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 90\n')  # torn by a kill
    # an evaluation after the last step is one more line
    assert [step for step, _ in fake.seen] == [*range(1, 7), 6]
    assert not any("loss/kl" in metrics for _, metrics in fake.seen)
    assert Reporter(client, make_run(keys, tmp_path)).last_version == next(version) - 1


def test_what_a_tracker_lost_is_in_the_metrics(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with reporting(client, keys, tmp_path, tensorboard=True) as reporter:
        for step in itertools.count(1):
            reporter.report(step, step, {"reward/mean": 0.5})
            if last_metrics(client, keys).get("trackers/dropped"):
                break
            assert step < 500
            time.sleep(0.02)


def test_tensorboard_shows_the_second_training_of_a_step(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    for resumed, values in [(0, {1: 0.1, 2: 0.2, 3: 0.3}), (1, {2: 0.7})]:
        with reporting(client, keys, tmp_path, resumed=resumed, tensorboard=True) as reporter:
            for step, value in values.items():
                reporter.report(step, step, {"reward/mean": value})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(scalar.step, scalar.value) for scalar in events.Scalars("reward/mean")]
    assert scalars == [(1, pytest.approx(0.1)), (2, pytest.approx(0.7))]


def test_a_tracked_id_is_that_of_one_run() -> None:
    assert tracked_id("r", "1.5") == tracked_id("r", "1.5")
    assert len({tracked_id("r", "1.5"), tracked_id("r", "2.5"), tracked_id("s", "1.5")}) == 3


@for_each("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda wanted: None if wanted == name else find_spec(wanted))
    quickstart = str(ROOT / "config" / "quickstart.yaml")
    done = CliRunner().invoke(cli, ["plan", quickstart, f"metrics.{name}=true"])
    assert isinstance(done.exception, ConfigError)
    assert f"pip install 'sluice-rl[{name}]'" in str(done.exception)


def test_a_login_that_fails_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = MetricsConfig(wandb=True)
    with online(monkeypatch, lambda body: (401, {"errors": [{"message": "no such key"}]})):
        for key, complaint in [("short", "must have 40"), ("0" * 40, "no such key")]:
            monkeypatch.setenv("WANDB_API_KEY", key)
            with pytest.raises(ConfigError, match=f"{complaint}.*WANDB_MODE=offline"):
                check_trackers(wanted)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("WANDB_API_KEY")
        with pytest.raises(ConfigError, match="no API key: WANDB_API_KEY"):
            check_trackers(wanted)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(wanted)


def test_trained_completions_are_a_table_that_datasets_reads(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    scored, chat = group([1.0, None]), group([None, None], tokens=8)  # the first file has scores, the second has none
    chat = replace(chat, group_id="t1", prompt=[{"role": "user", "content": "ja?"}], timestamps={"rollout": 12.5})
    written = CompletionsTable(tmp_path)
    written.write(1, [scored], [[0.7, 0.0]])
    written.write(2, [chat], [[0.0, 0.0]])
    written.write(3, [scored], [[0.1, 0.0]])
    Samples(client, make_run(keys, tmp_path, metrics={"completions": True})).forget_after(
        2
    )  # killed in step 3 or after it, before a checkpoint
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "completions" / "*.parquet"), split="train", cache_dir=str(tmp_path / "hf")
    )
    assert table[0] == {
        "step": 1, "group_id": "t0", "sample": 0, "version_min": 3, "version_max": 3, "prompt": "p", "target": "1",
        "completion": "2", "reward": 1.0, "advantage": 0.7, "finish_reason": "stop", "num_tokens": 4, "generated_at": None,
        "reward/Math": 1.0,
    }  # fmt: skip
    rows = [(row["step"], row["sample"], row["reward/Math"]) for row in table]
    assert rows == [(1, 0, 1.0), (1, 1, None), (2, 0, None), (2, 1, None)]
    assert json.loads(table[2]["prompt"]) == chat.prompt
    assert table[2]["generated_at"] == 12.5
    files = sorted(path.name for path in (tmp_path / "completions").iterdir())
    assert files == ["step-000001.parquet", "step-000002.parquet"]


def test_completions_that_cannot_be_written_do_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "completions").write_text("in the way")
    CompletionsTable(tmp_path).write(1, [group([1.0, 0.0])], [[0.7, -0.7]])
    assert "the completions of step 1 were not written" in caplog.text


def test_nothing_is_written_unless_asked_for(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    with reporting(client, keys, tmp_path) as reporter:
        reporter.report(1, 1, {"reward/mean": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
