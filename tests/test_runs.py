"""Many runs on one Redis: listed, compared, archived, and one deleted without a touch of its neighbours' keys."""

from __future__ import annotations

import json
import signal
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import redis
from builders import make_config, make_ledger, publish_policy, push_group
from harness import sluice

from sluice.common.connections.broker import make_app, send
from sluice.common.connections.client import connect
from sluice.common.errors import ConfigError
from sluice.common.keys import RUNS, Keys
from sluice.common.monitoring.heartbeats import send_heartbeat
from sluice.common.monitoring.metric_stream import write_metrics
from sluice.common.operations import control
from sluice.common.operations.storage import run_keys
from sluice.common.run import Run, RunRecord, create_run, open_run
from sluice.common.serialization import encode
from sluice.scripts.commands.compare import read_run
from sluice.scripts.commands.runs import archive_run, delete_run, read_runs
from sluice.scripts.launcher.redis_server import start_server
from sluice.scripts.launcher.run_folder import new_folder, newest_run, run_folder


class Runs:
    """Runs on one Redis, whose names are beginnings of one another."""

    def __init__(self, client: redis.Redis, url: str, folder: Path) -> None:
        self.client, self.url, self.folder = client, url, folder
        base = f"test-{uuid.uuid4().hex[:10]}"
        self.names = [base, f"{base}b", f"{base}.b", f"{base}-b", base[:-1]]

    def make(self, number: int = 0) -> Run:
        """A run with a group in every state, metrics, a sample, a control command, a queued message and published policies."""
        client, name, folder = self.client, self.names[number], self.folder / "runs" / self.names[number]
        policies = str(self.folder / "policies")
        config = make_config(policy_store={"path": policies}, output_dir=str(self.folder / "runs"))
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config.to_yaml())
        (self.folder / "policies" / name).mkdir(parents=True)
        run = create_run(client, name, config, assets={}, folder=str(folder))
        publish_policy(client, run.keys, 0)
        ledger = make_ledger(client, run.keys)
        push_group(ledger)
        push_group(ledger, until="rollout")
        metrics = {"step": 3, "reward/mean": 0.5, "loss/policy": float("nan"), "time": 1.0}
        write_metrics(client, run.keys, metrics, max_length=100)
        client.xadd(run.keys.samples, {"sample": encode({"step": 3, "group": "t0", "completions": []})})
        control.change(client, run, ["sampling.temperature=0.5"], who="alice")
        assert send(make_app(name, url=self.url), "reward.score", "reward", "t0")
        return run

    def contents(self, name: str) -> dict[bytes, bytes | None]:
        return {key: self.client.dump(key) for key in run_keys(self.client, Keys(name))}

    def command(self, *arguments: str, code: int = 0) -> CompletedProcess[str]:
        done = sluice("runs", *arguments, cwd=self.folder, SLUICE_REDIS_URL=self.url)
        assert done.returncode == code, done.stderr
        return done


@pytest.fixture
def runs(client: redis.Redis, redis_url: str, tmp_path: Path) -> Iterator[Runs]:
    made = Runs(client, redis_url, tmp_path)
    yield made
    for name in made.names:
        for key in client.scan_iter(match=Keys(name).root + "*", count=1000):
            client.unlink(key)
        client.hdel(RUNS, name)


def test_one_run_is_deleted_and_its_neighbours_stay_byte_for_byte(runs: Runs) -> None:
    for number in range(len(runs.names)):
        runs.make(number)
    target, *others = runs.names
    before = {name: runs.contents(name) for name in others}
    assert all(len(keys) > 15 for keys in before.values())
    assert any(b":mq:" in key for key in runs.contents(target))
    runs.command("delete", target, code=1)
    assert runs.contents(target), "without a yes nothing is deleted"
    runs.command("delete", target, "--yes")
    assert runs.contents(target) == {}
    assert not runs.client.hexists(RUNS, target)
    assert {name: runs.contents(name) for name in others} == before
    assert all(runs.client.hexists(RUNS, name) for name in others)
    assert sorted(path.name for path in (runs.folder / "policies").iterdir()) == sorted(others)
    assert (runs.folder / "runs" / target / "config.yaml").is_file(), "checkpoints are never deleted unasked"
    assert f"there is no run '{target}'" in runs.command("delete", target, "--yes", code=2).stderr


def test_a_live_run_is_deleted_by_force_and_a_folder_only_if_it_is_the_runs(runs: Runs) -> None:
    client, run, other = runs.client, runs.make(), runs.make(1)
    send_heartbeat(client, run.keys, "rollout@host:1", {"role": "rollout"})
    before = runs.contents(run.name)
    with pytest.raises(ConfigError, match=r"is alive \(rollout@host:1\)"):
        delete_run(client, run.name)
    assert runs.contents(run.name).keys() == before.keys()
    assert delete_run(client, run.name, force=True, with_folder=True) == len(before)
    assert runs.contents(run.name) == {}
    assert not Path(run.folder).exists()
    client.hset(other.keys.run_record, "folder", str(runs.folder))
    with pytest.raises(ConfigError, match="is not the run folder"):
        delete_run(client, other.name, with_folder=True)
    assert runs.contents(other.name)
    assert Path(other.folder).is_dir()


def test_a_name_is_in_use_until_its_run_is_deleted_to_the_end(runs: Runs) -> None:
    client, run = runs.client, runs.make()
    with pytest.raises(ConfigError, match="is in use"):
        create_run(client, run.name, make_config(), assets={}, folder="x")
    RunRecord(client, run.keys).set_status("deleting")  # one that was cut off
    with pytest.raises(ConfigError, match="is being deleted"):
        create_run(client, run.name, make_config(), assets={}, folder="x")
    with pytest.raises(ConfigError, match=f"sluice runs delete {run.name}"):
        open_run(client, run.name)
    delete_run(client, run.name)
    create_run(client, run.name, make_config(), assets={}, folder="x")
    assert open_run(client, run.name).config == make_config()


def test_runs_are_listed_with_what_they_hold_and_compared_side_by_side(runs: Runs) -> None:
    client, (one, two, third) = runs.client, [runs.make(number) for number in range(3)]
    send_heartbeat(client, two.keys, "rollout@host:1", {"role": "rollout"})
    client.set(two.keys.group("big"), b"x" * 1_000_000)
    client.delete(third.keys.run_record)
    listed = {run["run"]: run for run in read_runs(client)}
    first, second = listed[one.name], listed[two.name]
    assert (first["status"], first["step"], first["reward"], first["live"]) == ("created", 3, 0.5, 0)
    assert second["live"] == 1
    assert second["memory_bytes"] > 1_000_000 > first["memory_bytes"] > 1000
    assert listed[third.name]["status"] == "incomplete"
    (line,) = [line for line in runs.command().stdout.splitlines() if line.startswith(f"{one.name} ")]
    assert line.startswith(f"{one.name}  created  step 3  reward 0.500  0 processes  0.")
    assert two.name in [run["run"] for run in json.loads(runs.command("list", "--json").stdout)["runs"]]
    control.change(client, two, ["trainer.learning_rate=3e-6"], who="a")
    told = json.loads(runs.command("compare", one.name, two.name, "--json").stdout)
    assert told["config"] == {"trainer.learning_rate": {one.name: 1e-5, two.name: 3e-6}}
    assert told["metrics"][one.name]["reward/mean"] == 0.5
    shown = runs.command("compare", one.name, two.name).stdout
    assert "trainer.learning_rate" in shown and "3e-06" in shown


def test_runs_are_compared_as_curves_also_of_folders_without_a_server(tmp_path: Path) -> None:
    for name, better in (("a", 0.0), ("b", 0.25)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(make_config(seed=int(4 * better)).to_yaml())
        lines = [
            {"step": step, "version": step, "reward/mean": step / 8 + better, "entropy": 1.0}
            for step in (1, 2, 2, 3, 4)
        ]
        lines[3] |= {"eval/sums/version": 2, "eval/sums/pass@1": 0.5 + better, "eval/sums/pass@1_stderr": 0.1}
        lines.append({"step": 3, "time": 1.0, "control": "trainer.learning_rate", "old": 1e-5, "new": 2e-5 + better})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text + '{"step": 5, "rew')  # torn
    shown = sluice("runs", "compare", "a", "runs/b", "--png", "out/curves.png", "--html", "<c>.html", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "0.125 ▁▃▆█ 0.5" in shown.stdout and "0.375 ▁▃▆█ 0.75" in shown.stdout
    assert "curves: out/curves.png" in shown.stdout
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "<c>.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("<svg") == 1 and "<script" not in page
    assert "<td>seed</td><td>0</td><td>1</td>" in page and "0.125 ▁▃▆█ 0.5" in page
    told = json.loads(sluice("runs", "compare", "runs/a", "b", "--json", cwd=tmp_path).stdout)
    assert told["config"] == {"seed": {"a": 0, "b": 1}, "trainer.learning_rate": {"a": 2e-5, "b": 0.25002}}
    assert told["evaluations"]["b"] == {"eval/sums/pass@1": 0.75, "eval/sums/pass@1_stderr": 0.1}
    assert told["metrics"]["a"]["step"] == 4
    run = read_run(str(tmp_path / "runs" / "a"))
    assert run.curve("reward/mean") == [(1, 0.125), (2, 0.25), (3, 0.375), (4, 0.5)]
    assert run.evaluated("sums", "pass@1") == [(2, 0.5)], "at the step of its policy, not of its report"
    refused = sluice("runs", "compare", "a", "c", cwd=tmp_path)
    assert refused.returncode == 2 and "c is neither a run folder nor the name of one" in refused.stderr


def test_an_archive_holds_what_the_run_has_told(runs: Runs) -> None:
    client, run, file = runs.client, runs.make(), runs.folder / "archives" / "run.tar"
    archive_run(client, run, file)
    with tarfile.open(file) as tar:
        held = {Path(name).name: tar.extractfile(name) for name in tar.getnames() if "." in Path(name).name}
        texts = {name: member.read().decode() for name, member in held.items() if member}
    assert [path.name for path in file.parent.iterdir()] == ["run.tar"], "nothing half written is left"
    record = json.loads(texts["run.json"])
    assert record["ledger"]["train"]["in_flight"] == 2
    assert record["settings"] == {"sampling.temperature": 0.5}
    assert texts["config.yaml"] == run.config.to_yaml()
    assert [json.loads(line)["step"] for line in texts["metrics.jsonl"].splitlines()] == [3.0]
    assert json.loads(texts["samples.jsonl"])["group"] == "t0"
    assert json.loads(texts["controls.jsonl"])["who"] == "alice"
    assert json.loads(texts["events.jsonl"])["key"] == "sampling.temperature"
    with pytest.raises(ConfigError, match="exists: give another file"):
        archive_run(client, run, file)


@pytest.mark.parametrize("name", ["a/b", "../x", "a*", "/tmp/x", "x/"])
def test_a_name_of_a_run_is_no_path(name: str) -> None:
    with pytest.raises(ConfigError, match="run name"):
        run_folder(make_config(), name)


@pytest.mark.parametrize("stem", ["my config", "a[1]*", "_x", "é", "h" * 200])
def test_a_config_of_any_name_gives_a_run_a_name_that_resume_finds(tmp_path: Path, stem: str) -> None:
    config = make_config(output_dir=str(tmp_path))
    folder = new_folder(config, f"{stem}.yaml")
    (folder / "config.yaml").touch()
    assert newest_run(config.output_dir, prefix=stem) == folder.name == Keys(folder.name).run


def test_a_run_with_a_redis_of_its_own_is_listed_and_deleted_once_it_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    (tmp_path / "another" / "redis").mkdir(parents=True)
    assert "no run folder" in sluice("status", "another", cwd=tmp_path).stderr
    assert not list((tmp_path / "another" / "redis").iterdir()), "a server writes into no other program's folder"
    server = start_server(folder / "redis")
    try:
        client = connect(server.url)
        config = make_config(policy_store={"path": str(tmp_path / "policies")})
        (folder / "config.yaml").write_text(config.to_yaml())
        (tmp_path / "policies" / "x").mkdir(parents=True)
        create_run(client, "x", config, assets={}, folder=str(folder))
        client.close()
        assert sluice("runs", cwd=tmp_path).stdout.startswith("x  running  step 0  0 processes  0.")
        for named, cwd in ((".", folder), (f"../{tmp_path.name}/runs/x/", tmp_path), (str(folder), Path("/"))):
            shown = sluice("ledger", named, cwd=cwd)
            assert shown.returncode == 0, shown.stderr
        for is_silent in (False, True):  # one that loads its data, or has no connection free, is silent too
            server.process.send_signal(signal.SIGSTOP if is_silent else signal.SIGCONT)
            refused = sluice("runs", "delete", "x", "--yes", cwd=tmp_path)
            assert refused.returncode == 2
            assert "run x is alive: it has a Redis" in refused.stderr
        shown = sluice("status", "x", cwd=tmp_path)
        assert shown.returncode == 2 and "is running and does not answer within 10 s" in shown.stderr
        assert (folder / "redis" / "url").read_text() == server.url, "and no second server was started on its data"
        assert "is in progress" in sluice("run", str(folder / "config.yaml"), "--resume", "x", cwd=tmp_path).stderr
    finally:
        server.process.send_signal(signal.SIGCONT)
        server.stop()
    assert sluice("runs", cwd=tmp_path).stdout.startswith("x  ended  step 0  0 processes")
    assert sluice("runs", "archive", "x", cwd=tmp_path).returncode == 0
    assert (tmp_path / "x.tar").is_file()
    assert sluice("runs", "delete", "x", "--yes", cwd=tmp_path).returncode == 0
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert not (tmp_path / "policies" / "x").exists()
