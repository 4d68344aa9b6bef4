"""Names, folders and paths of runs on this machine."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from sluice.common.config import Config
from sluice.common.config.sft import SftConfig
from sluice.common.errors import ConfigError
from sluice.common.run import Run


def default_name(config_path: str) -> str:
    return f"{Path(config_path).stem}-{datetime.now():%Y%m%d-%H%M%S}"


def newest_run(config: Config | SftConfig, *, prefix: str) -> str:
    """Return the name of the newest run of a config. Raises ConfigError."""
    made = re.compile(
        re.escape(prefix) + r"-\d{8}-\d{6}"
    )  # by `default_name`: not those of a config with a longer name
    base = Path(config.output_dir)
    folders = [path for path in base.glob("*/config.yaml") if made.fullmatch(path.parent.name)]
    if not folders:
        raise ConfigError(
            f"--resume: no run of {prefix} in {base.resolve()}; name one that has another name: --resume RUN"
        )
    return max(folders, key=lambda path: path.stat().st_mtime).parent.name


def run_folder(config: Config, name: str) -> Path:
    return Path(config.output_dir).resolve() / name


def existing_folder(name: str | None) -> Path:
    base = Path("runs")
    if name:
        if (base / name / "redis").is_dir():
            return base / name
        raise ConfigError(
            f"no run folder {base / name} with a Redis of its own: is this the folder that `sluice run` was started in?"
        )
    folders = sorted((p.parent for p in base.glob("*/redis")), key=lambda p: (p / "redis").stat().st_ctime)
    if not folders:
        raise ConfigError("there is no run here: set SLUICE_REDIS_URL, or change to the folder that holds runs/")
    return folders[-1]


def write_config(run: Run) -> None:
    """Write the resolved config, for people, into the run folder."""
    folder = Path(run.folder)
    with suppress(FileExistsError):
        folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(run.config.to_yaml())
