"""Bad input: one paragraph that says what, where and what to do, exit code 2, no traceback, nothing left running."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import psutil
import pytest
from click.testing import CliRunner
from harness import fork_server, quickstart_config, sluice, tiny_folder

from sluice.scripts import cli
from sluice.scripts.launcher.redis_server import start_server


@pytest.fixture(scope="module")
def tiny() -> Path:
    return tiny_folder()


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


def test_a_misspelt_key_names_the_nearest(tmp_path: Path, tiny: Path) -> None:
    config = quickstart_config(tmp_path, tiny=tiny)
    assert "did you mean 'learning_rate'?" in refused("run", str(config), "trainer.lerning_rate=1e-4", cwd=tmp_path)


def test_a_wrong_value_names_the_key(tmp_path: Path, tiny: Path) -> None:
    config = quickstart_config(tmp_path, tiny=tiny)
    assert "sampling.top_p = 1.5" in refused("run", str(config), "sampling.top_p=1.5", cwd=tmp_path)


def test_a_missing_config_file(tmp_path: Path) -> None:
    assert "cannot read config file nowhere.yaml" in refused("run", "nowhere.yaml", cwd=tmp_path)


def test_a_missing_dataset_column_names_those_there_are(tmp_path: Path, tiny: Path) -> None:
    config = quickstart_config(tmp_path, tiny=tiny, dataset__prompt_column="question")
    line = refused("run", str(config), cwd=tmp_path)
    assert "question" in line and "prompt" in line and "target" in line


def test_an_empty_dataset(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    config = quickstart_config(tmp_path, tiny=tiny, dataset__path=str(tmp_path / "empty.jsonl"))
    assert "empty.jsonl" in refused("run", str(config), cwd=tmp_path)


def test_a_reward_that_does_not_import(tmp_path: Path, tiny: Path) -> None:
    config = quickstart_config(tmp_path, tiny=tiny, reward__functions=[{"function": "no_such_module.reward"}])
    assert "no_such_module" in refused("run", str(config), cwd=tmp_path)


def test_a_model_folder_that_is_none(tmp_path: Path, tiny: Path) -> None:
    config = quickstart_config(tmp_path, tiny=tiny, model__path=str(tmp_path))
    assert "holds no config.json" in refused("run", str(config), cwd=tmp_path)


def test_an_unreachable_redis(tmp_path: Path, tiny: Path) -> None:
    config = quickstart_config(tmp_path, tiny=tiny)
    url = "redis://:secret@127.0.0.1:1/0"
    line = refused("create", str(config), cwd=tmp_path, SLUICE_REDIS_URL=url)
    assert "cannot reach Redis at redis://:***@127.0.0.1:1/0" in line
    assert "secret" not in line
    assert "cannot reach Redis" in refused("status", cwd=tmp_path, SLUICE_REDIS_URL=url)


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


def test_a_redis_that_is_too_old(tmp_path: Path, tiny: Path, ancient_redis: str) -> None:
    config = quickstart_config(tmp_path, tiny=tiny)
    assert "is version 6.0.9; Sluice needs 6.2 or newer" in refused(
        "create", str(config), cwd=tmp_path, SLUICE_REDIS_URL=ancient_redis
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    running = start_server(tmp_path_factory.mktemp("redis"))
    yield running.url
    running.stop()


def test_a_run_name_in_use(tmp_path: Path, tiny: Path, server: str) -> None:
    config = quickstart_config(tmp_path, tiny=tiny)
    assert sluice("create", str(config), "--name", "taken", cwd=tmp_path, SLUICE_REDIS_URL=server).returncode == 0
    again = sluice("create", str(config), "--name", "taken", cwd=tmp_path, SLUICE_REDIS_URL=server)
    assert again.returncode == 0, "the very same run may be created again: compose does at every start"
    line = refused(
        "create", str(config), "trainer.num_steps=7", "--name", "taken", cwd=tmp_path, SLUICE_REDIS_URL=server
    )
    assert "run name 'taken' is in use" in line
    assert "run name 'taken' is in use" in refused(
        "run", str(config), "--name", "taken", cwd=tmp_path, SLUICE_REDIS_URL=server
    )


def test_a_run_that_does_not_exist(tmp_path: Path, server: str) -> None:
    assert "there is no run 'absent'" in refused("status", "absent", cwd=tmp_path, SLUICE_REDIS_URL=server)
    assert "there is no run here" in refused("ledger", cwd=tmp_path)


def test_roles_say_what_is_not_set(tmp_path: Path, server: str) -> None:
    assert "SLUICE_REDIS_URL is not set" in refused("train", cwd=tmp_path)
    assert "SLUICE_RUN is not set" in refused("train", cwd=tmp_path, SLUICE_REDIS_URL=server)
    assert "SLUICE_REDIS_URL is not set" in refused("worker", "reward", cwd=tmp_path, SLUICE_RUN="x")
    assert "SLUICE_RUN is not set" in refused("worker", "reward", cwd=tmp_path, SLUICE_REDIS_URL=server)


def test_resume_takes_no_overrides(tmp_path: Path, tiny: Path) -> None:
    config = quickstart_config(tmp_path, tiny=tiny)
    assert "give no key=value with it" in refused("run", str(config), "seed=1", "--resume", cwd=tmp_path)
    assert "no run of job" in refused("run", str(config), "--resume", cwd=tmp_path)


def test_the_ledger_command_fails_when_the_identity_does_not_hold(tmp_path: Path, tiny: Path, server: str) -> None:
    config = quickstart_config(tmp_path, tiny=tiny)
    sluice("create", str(config), "--name", "cooked", cwd=tmp_path, SLUICE_REDIS_URL=server)
    import redis

    client = redis.Redis.from_url(server)
    client.hincrby("sluice:{cooked}:counts:train", "admitted", 1)
    client.close()
    done = sluice("ledger", "cooked", "--json", cwd=tmp_path, SLUICE_REDIS_URL=server)
    assert done.returncode == 1
    assert json.loads(done.stdout)["holds"] is False
    assert "BROKEN" in sluice("ledger", "cooked", cwd=tmp_path, SLUICE_REDIS_URL=server).stdout


def walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for child, below in command.commands.items():
            yield from walk(f"{name} {child}", below)


def test_every_command_has_a_help_text_with_an_example() -> None:
    for name, command in walk("sluice", cli.cli):
        shown = CliRunner().invoke(command, ["--help"])
        assert shown.exit_code == 0 and command.help, name
        assert name == "sluice" or f"{name}" in shown.output.partition("Example:")[2], name


def test_the_help_lists_every_command_in_its_section_and_cuts_none() -> None:
    shown = CliRunner().invoke(cli.cli, ["--help"]).output
    assert "..." not in shown.partition("Options:")[2]
    assert [line[:-1] for line in shown.splitlines() if line.rstrip(":") in cli.SECTIONS] == list(cli.SECTIONS)
    for command in cli.cli.commands.values():
        assert " ".join(command.get_short_help_str(limit=1000).split()) in " ".join(shown.split()), command.name


def test_doctor_examines_a_config(tmp_path: Path, tiny: Path) -> None:
    config = quickstart_config(tmp_path, tiny=tiny)
    good = sluice("doctor", str(config), cwd=tmp_path)
    assert good.returncode == 0, good.stdout
    assert "config, model, datasets and reward functions load" in good.stdout
    config.write_text(config.read_text().replace("temperature: 1.0", "temprature: 1.0"))
    bad = sluice("doctor", str(config), cwd=tmp_path)
    assert bad.returncode == 2
    assert "did you mean 'temperature'?" in bad.stdout
