"""Bad input: one paragraph that says what, where and what to do, exit code 2, no traceback, nothing left running."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from builders import make_config, publish_policy, push_group
from click.testing import CliRunner, Result
from harness import every_command, fork_server, quickstart_config, sluice, tiny_folder

from sluice.common.keys import Keys
from sluice.common.ledger.ledger import Ledger
from sluice.common.run import create_run
from sluice.scripts import cli
from sluice.scripts.launcher.redis_server import start_server

UNREACHABLE = "redis://:secret@127.0.0.1:1/0"


def refused(*arguments: str, cwd: Path, **env: str) -> str:
    """What the command says when it refuses; nothing may be left running."""
    fork_server()
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    done = sluice(*arguments, cwd=cwd, **env)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("arguments", "overrides", "parts"),
    [
        (["trainer.lerning_rate=1e-4"], {}, ["did you mean 'learning_rate'?"]),
        (["sampling.top_p=1.5"], {}, ["sampling.top_p = 1.5"]),
        ([], {"dataset__prompt_column": "question"}, ["question", "prompt", "target"]),
        ([], {"dataset__path": "empty.jsonl"}, ["empty.jsonl"]),
        ([], {"reward__functions": [{"function": "no_such_module.reward"}]}, ["no_such_module"]),
        ([], {"model__path": "."}, ["holds no config.json"]),
        (["seed=1", "--resume"], {}, ["give no key=value with it"]),
        (["--resume"], {}, ["no run of job"]),
    ],
)
def test_a_run_with_bad_input_says_what_is_wrong(
    tmp_path: Path, arguments: list[str], overrides: dict[str, object], parts: list[str]
) -> None:
    (tmp_path / "empty.jsonl").touch()
    config = quickstart_config(tmp_path, tiny=tiny_folder(), **overrides)
    line = refused("run", str(config), *arguments, cwd=tmp_path)
    assert all(part in line for part in parts), line


def test_what_does_not_exist_is_named(tmp_path: Path, server: str) -> None:
    assert "cannot read config file nowhere.yaml" in refused("run", "nowhere.yaml", cwd=tmp_path)
    assert "there is no run 'absent'" in refused("status", "absent", cwd=tmp_path, SLUICE_REDIS_URL=server)
    assert "there is no run here" in refused("ledger", cwd=tmp_path)


@pytest.fixture
def ancient_redis() -> Iterator[str]:
    """A server that answers every command with the INFO of Redis 6.0: no such server can be installed here."""
    info = b"# Server\r\nredis_version:6.0.9\r\n"
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(65536):
                    for _ in range(data.count(b"*")):
                        connection.sendall(b"$%d\r\n%s\r\n" % (len(info), info) if b"INFO" in data else b"+OK\r\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def test_a_redis_that_is_unreachable_or_too_old(tmp_path: Path, ancient_redis: str) -> None:
    config = str(quickstart_config(tmp_path, tiny=tiny_folder()))
    line = refused("create", config, cwd=tmp_path, SLUICE_REDIS_URL=UNREACHABLE)
    assert "cannot reach Redis at redis://:***@127.0.0.1:1/0" in line
    assert "secret" not in line
    assert "cannot reach Redis" in refused("status", cwd=tmp_path, SLUICE_REDIS_URL=UNREACHABLE)
    line = refused("create", config, cwd=tmp_path, SLUICE_REDIS_URL=ancient_redis)
    assert "is version 6.0.9; Sluice needs 6.2 or newer" in line


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with start_server(tmp_path_factory.mktemp("redis")) as running:
        yield running.url


def test_a_run_name_in_use(tmp_path: Path, server: str) -> None:
    config = str(quickstart_config(tmp_path, tiny=tiny_folder()))
    taken = ("create", config, "--name", "taken")
    assert sluice(*taken, cwd=tmp_path, SLUICE_REDIS_URL=server).returncode == 0
    again = sluice(*taken, cwd=tmp_path, SLUICE_REDIS_URL=server)
    assert again.returncode == 0, "the very same run may be created again: compose does at every start"
    for arguments in ((*taken, "trainer.num_steps=7"), ("run", *taken[1:])):
        assert "run name 'taken' is in use" in refused(*arguments, cwd=tmp_path, SLUICE_REDIS_URL=server)


def test_roles_say_what_is_not_set(tmp_path: Path, server: str) -> None:
    assert "SLUICE_REDIS_URL is not set" in refused("train", cwd=tmp_path)
    assert "SLUICE_REDIS_URL is not set" in refused("worker", "reward", cwd=tmp_path, SLUICE_RUN="x")
    for role in (["train"], ["worker", "reward"]):
        assert "SLUICE_RUN is not set" in refused(*role, cwd=tmp_path, SLUICE_REDIS_URL=server)


def test_the_ledger_command_fails_when_the_identity_does_not_hold(tmp_path: Path, server: str) -> None:
    config = quickstart_config(tmp_path, tiny=tiny_folder())
    sluice("create", str(config), "--name", "cooked", cwd=tmp_path, SLUICE_REDIS_URL=server)
    with redis.Redis.from_url(server) as client:
        client.hincrby("sluice:{cooked}:counts:train", "admitted", 1)
    done = sluice("ledger", "cooked", "--json", cwd=tmp_path, SLUICE_REDIS_URL=server)
    assert (done.returncode, json.loads(done.stdout)["holds"]) == (1, False)
    assert "BROKEN" in sluice("ledger", "cooked", cwd=tmp_path, SLUICE_REDIS_URL=server).stdout


def test_every_command_has_a_help_text_with_an_example_and_is_listed_in_its_section() -> None:
    for name, command in every_command(cli.cli):
        shown = CliRunner().invoke(command, ["--help"])
        assert shown.exit_code == 0 and command.help, name
        assert not name or f"sluice {' '.join(name)}" in shown.output.partition("Example:")[2], name
    shown = CliRunner().invoke(cli.cli, ["--help"]).output
    assert "..." not in shown.partition("Options:")[2]
    assert [line[:-1] for line in shown.splitlines() if line.rstrip(":") in cli.SECTIONS] == list(cli.SECTIONS)
    for command in cli.cli.commands.values():
        assert " ".join(command.get_short_help_str(limit=1000).split()) in " ".join(shown.split()), command.name


def test_doctor_examines_a_config(tmp_path: Path) -> None:
    config = quickstart_config(tmp_path, tiny=tiny_folder())
    good = sluice("doctor", str(config), cwd=tmp_path)
    assert good.returncode == 0, good.stdout
    assert "config, model, datasets and reward functions load" in good.stdout
    config.write_text(config.read_text().replace("temperature: 1.0", "temprature: 1.0"))
    bad = sluice("doctor", str(config), cwd=tmp_path)
    assert bad.returncode == 2
    assert "did you mean 'temperature'?" in bad.stdout


def test_dead_letters_are_shown_discarded_and_requeued(
    client: redis.Redis, keys: Keys, redis_url: str, tmp_path: Path
) -> None:
    config = make_config(lease={"max_attempts": 1}, replay_buffer={"batch_size": 4})
    create_run(client, keys.run, config, assets={}, folder=str(tmp_path))
    publish_policy(client, keys, 0)
    ledger = Ledger(client, keys, config)
    for _ in range(3):
        claim = ledger.claim(push_group(ledger, until="task"), "rollout", fields=())
        assert claim is not None
        ledger.fail(claim, reason="EngineError", detail="it broke")

    def dead(*arguments: str) -> Result:
        return CliRunner().invoke(cli.cli, ["dead", keys.run, *arguments], env={"SLUICE_REDIS_URL": redis_url})

    def letters() -> list[str]:
        return [letter["group"] for letter in json.loads(dead("--json").stdout)["dead"]]

    assert sorted(letters()) == ["t0", "t1", "t2"]
    assert "it broke" in dead("--show", "t1").stdout
    assert dead("--discard", "t1").stdout == "discarded: 1\n"
    assert sorted(letters()) == ["t0", "t2"]
    assert dead("--requeue", "t0").stdout == "sent again: t0\n"
    for option in ("--show", "--discard", "--requeue"):
        assert "group t1 is not a dead letter of this run" in str(dead(option, "t1").exception)
    assert dead("--requeue", "all", "--discard", "all").exit_code == 2
    assert dead("--discard", "all").stdout == "discarded: 1\n"
    last = dead()
    assert (last.stdout, letters()) == ("", [])
    assert last.stderr == (
        "no dead letters\n2 others were discarded: on request, or beyond replay_buffer.max_dead_bytes\n"
    )
    assert (ledger.counters().dead, ledger.counters().in_flight) == ({"EngineError": 2}, 1)
