"""Names, folders and paths of runs on this machine, and opening one for a command that reads or controls it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path

import redis

from sluice.common.config import Config
from sluice.common.config.file import config_name
from sluice.common.connections.client import connect, give_up_after
from sluice.common.connections.secrets import secret
from sluice.common.errors import ConfigError
from sluice.common.keys import Keys
from sluice.common.paths import expanded
from sluice.common.run import Run, list_runs, open_run
from sluice.scripts.launcher.redis_server import reading_server, running_url

READER_WAIT_S = 5.0
"""How long a command that only reads waits for a Redis that becomes unavailable meanwhile."""


def default_name(config_path: str | None) -> str:
    """Return a name of the config's own and the time; what a run's name cannot hold becomes `-` (`my config.yaml`)."""
    return f"{_as_name(config_name(config_path))}-{datetime.now():%Y%m%d-%H%M%S}"


def _as_name(stem: str) -> str:
    return re.sub(r"[^\w.-]", "-", stem, flags=re.ASCII).lstrip("._-")[:80] or "run"


def newest_run(output_dir: str, *, prefix: str) -> str:
    """Return the name of the newest run of a config, whose name is the prefix. Raises ConfigError."""
    # as `default_name` makes them: those of another config may begin with the same words
    made = re.compile(re.escape(_as_name(prefix)) + r"-\d{8}-\d{6}")
    folders = [path for path in Path(output_dir).glob("*/config.yaml") if made.fullmatch(path.parent.name)]
    if not folders:
        raise ConfigError(f"--resume: no run of {prefix} in {output_dir}; one of another name: --resume RUN")
    return max(folders, key=lambda path: path.stat().st_mtime).parent.name


def run_folder(config: Config, name: str) -> Path:
    """Return where a run of that name is. Raises ConfigError for what is no name (`../x` would be a folder elsewhere)."""
    return Path(config.output_dir).resolve() / Keys(name).run


def new_folder(config: Config, config_path: str | None) -> Path:
    """Make a folder for a run without a name: the config's name and the time, of which no two get the same."""
    while True:
        folder = run_folder(config, default_name(config_path))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            time.sleep(0.1)


def existing_folder(name: str | None) -> Path:
    """Return the folder of a run, which is named by it or by its name under runs/; without one the newest. Raises ConfigError."""
    base = Path("runs")
    if name:
        for folder in (base / name, expanded(name)):
            if (folder / "redis" / "lock").is_file():  # each server of ours has made one
                return folder.resolve()
        raise ConfigError(
            f"no run folder {base / name} with a Redis of its own: is this the folder that `sluice run` was started in? With "
            "another output_dir: give the path of the run's folder, or set SLUICE_REDIS_URL"
        )
    newest = max(base.glob("*/redis/lock"), key=lambda path: path.stat().st_ctime, default=None)
    if newest is None:
        raise ConfigError(
            "there is no run here: set SLUICE_REDIS_URL, change to the folder that holds runs/, or give a run's folder"
        )
    return newest.parent.parent.resolve()


@contextmanager
def opened_run(name: str | None) -> Iterator[tuple[redis.Redis, Run, str]]:
    """Open an existing run and its Redis' URL: SLUICE_REDIS_URL's, or the newest (or named) run folder's own Redis.

    A run may be named by its folder, as `export` and `replay` do.
    """
    name = name or os.environ.get("SLUICE_RUN")
    if given := secret("SLUICE_REDIS_URL"):
        server: AbstractContextManager[str] = nullcontext(given)
        name = name and expanded(name).absolute().name
    else:
        folder = existing_folder(name)
        name, server = folder.name, reading_server(folder / "redis")
    with server as url, closing(connect(url)) as client:
        give_up_after(client, READER_WAIT_S)
        if not name:
            runs = list_runs(client)
            if not runs:
                raise ConfigError("there is no run on this Redis yet: `sluice run CONFIG` makes one")
            name = max(runs, key=lambda run: runs[run])
        yield client, open_run(client, name), url


class RunFolders:
    """The run folders of a directory, for the dashboard (its `Folders`): each with a Redis of its own, or with files only."""

    def __init__(self, base: Path) -> None:
        self._base = base

    def created(self) -> dict[str, float]:
        """Return name -> seconds since the epoch, of folders that `sluice run` has made."""
        return {path.parent.name: path.stat().st_mtime for path in self._base.glob("*/config.yaml")}

    def path(self, name: str) -> Path:
        return self._base / name

    def is_live(self, name: str) -> bool:
        """Return whether the Redis of a folder serves a run now."""
        return (self._base / name / "redis").is_dir() and running_url(self._base / name / "redis") is not None

    @contextmanager
    def opened(self, name: str) -> Iterator[tuple[redis.Redis, Run]]:
        """Open a run on its own Redis; of an ended run, one that serves while the context is open. Raises ConfigError."""
        folder = self._base / name
        if not (folder / "redis").is_dir():
            raise ConfigError(f"{folder} holds no Redis: of this run only the files are left")
        with reading_server(folder / "redis") as url, closing(connect(url)) as client:
            give_up_after(client, READER_WAIT_S)
            yield client, open_run(client, name)


def write_config(run: Run) -> None:
    """Write the resolved config, for people, into the run folder."""
    folder = Path(run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(run.config.to_yaml())
