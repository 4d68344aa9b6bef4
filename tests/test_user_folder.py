"""Sluice is started in folders that are full of other things: what lies there is never taken for Sluice or for its dependencies.

The folder holds modules with the names of Sluice's layers, of a standard module and of the Redis client. Each leaves a mark when
it is executed. The rewards that the config names are the user's, and import the user's own `common`.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from harness import LEASE, ROOT, SMALL, counters_of, environment, quickstart_config, tiny_folder, wait_for

STEPS = 2
SETTINGS: dict[str, Any] = {
    **SMALL,
    **{f"lease__{key}": value for key, value in LEASE.items()},
    "evaluation__datasets": [],
    "trainer__num_steps": STEPS,
    "reward__functions": [{"function": "my_rewards.half"}],
}
SOURCES = (
    "common",
    "config",
    "dashboard",
    "scripts",
    "sluice",
    "trainer",
    "workers",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
ROGUE = """
import sys
with open({mark!r}, "a") as file:
    file.write(f"{{__file__}} is {{__name__}} in {{sys.argv}}\\n")
"""
CELERY = """#!{python}
import sys
from celery.__main__ import main
sys.exit(main())
"""


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment with Sluice and, through a path, with the dependencies of this one."""
    folder = tmp_path_factory.mktemp(request.param)
    source, venv = folder / "source", folder / "venv"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python3.*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index", "--no-build-isolation"]
    what = ["--editable", source] if request.param == "editable" else [source]
    subprocess.run([*pip, "--python", venv / "bin" / "python", "install", *options, *what], check=True)
    (venv / "bin" / "celery").write_text(CELERY.format(python=venv / "bin" / "python"))
    (venv / "bin" / "celery").chmod(0o755)
    return venv / "bin"


def user_folder(folder: Path, *, mark: Path, has_dependencies: bool) -> Path:
    folder.mkdir()
    rogues = ["workers/__init__.py", "scripts/__init__.py", "config/__init__.py", "dashboard/__init__.py", "trainer.py"]
    rogues += ["types.py", "redis.py"] if has_dependencies else []
    for name in rogues:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(ROGUE.format(mark=str(mark)))
    (folder / "common").mkdir()
    (folder / "common" / "__init__.py").write_text("score = 0.5\n")
    (folder / "my_rewards.py").write_text(
        "from common import score\n\ndef half(prompts, completions, **columns):\n    return [score] * len(completions)\n"
    )
    return folder


def test_sluice_run_takes_nothing_from_the_folder_but_the_rewards(installed: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = user_folder(tmp_path / "project", mark=mark, has_dependencies=True)
    config = quickstart_config(folder, tiny=tiny_folder(), **SETTINGS)
    argv = [installed / "sluice", "run", config.name, "--name", "mine"]
    done = subprocess.run(argv, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert not mark.exists(), mark.read_text()
    assert done.returncode == 0, done.stderr
    assert f"trained {STEPS * 4} " in done.stderr
    assert "reward     0.500" in done.stderr


def test_role_by_role_takes_nothing_from_the_folder_but_the_rewards(
    installed: Path, tmp_path: Path, redis_url: str
) -> None:
    mark = tmp_path / "mark"
    folder = user_folder(tmp_path / "project", mark=mark, has_dependencies=True)
    plain = user_folder(tmp_path / "plain", mark=mark, has_dependencies=False)
    config = quickstart_config(folder, tiny=tiny_folder(), **SETTINGS)
    run = {"SLUICE_REDIS_URL": redis_url, "SLUICE_RUN": f"{installed.parent.parent.name}-roles"}
    commands = [(folder, ["sluice", "worker", queue]) for queue in ("dataset", "rollout", "reward")]
    for app, queue in (("sluice", "rollout"), ("sluice.workers.app", "dataset"), ("sluice", "reward")):
        commands.append((plain, ["celery", "-A", app, "worker", "-Q", queue, "--loglevel", "INFO"]))
    create = [installed / "sluice", "create", config.name, "--name", run["SLUICE_RUN"]]
    subprocess.run(create, cwd=folder, env=environment(**run), check=True, timeout=100)
    with contextlib.ExitStack() as stack:
        logs = []
        for number, (cwd, (command, *arguments)) in enumerate(commands):
            logs.append(tmp_path / f"{number}.log")
            output = stack.enter_context(logs[-1].open("wb"))
            argv = [installed / command, *arguments]
            process = subprocess.Popen(argv, cwd=cwd, env=environment(**run), stdout=output, stderr=output)
            stack.callback(process.wait, 30)
            stack.callback(process.kill)
        for log in logs:
            wait_for(lambda log=log: " ready." in log.read_text(), timeout=100, what=f"a worker: {log.read_text()}")  # type: ignore[misc]
        train = [installed / "sluice", "train"]
        done = subprocess.run(train, cwd=folder, env=environment(**run), capture_output=True, timeout=200, check=False)
    assert not mark.exists(), mark.read_text()
    assert done.returncode == 0, done.stderr.decode()
    counters = counters_of(run)
    assert (counters.trained, counters.dead) == (STEPS * 4, {})
