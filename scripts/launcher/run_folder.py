"""Names, folders and paths of runs on this machine."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path

from sluice.common.config import Config
from sluice.common.errors import ConfigError
from sluice.common.loading import absolute_function_path
from sluice.common.run import Run


def default_name(config_path: str) -> str:
    return f"{Path(config_path).stem}-{datetime.now():%Y%m%d-%H%M%S}"


def newest_run(config: Config, *, prefix: str) -> str:
    """Return the name of the newest run of a config. Raises ConfigError."""
    folders = sorted(Path(config.output_dir).glob(f"{prefix}-*/config.yaml"), key=lambda p: p.stat().st_mtime)
    if not folders:
        raise ConfigError(f"--resume: no run of {prefix} in {config.output_dir}")
    return folders[-1].parent.name


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


def with_absolute_paths(config: Config) -> Config:
    """Make local paths absolute, so that roles started in any folder find them; hub ids stay as they are."""

    def absolute(path: str) -> str:
        return str(Path(path).resolve()) if Path(path).exists() else path

    data = config.model_dump()
    data["model"]["path"] = absolute(data["model"]["path"])
    for section in (data["dataset"], *(e["dataset"] for e in data["evaluation"]["datasets"])):
        section["path"] = absolute(section["path"])
    trainer, folder = data["trainer"], Path(config.code_folder or ".")
    for section, key in (
        *((function, "function") for function in data["reward"]["functions"]),
        *((trainer["loss"], "loss"), (trainer, "advantage"), (trainer, "objective")),
    ):
        section[key] = section[key] and absolute_function_path(section[key], folder=folder)
    data["output_dir"] = str(Path(data["output_dir"]).resolve())
    if data["policy_store"]["path"]:
        data["policy_store"]["path"] = str(Path(data["policy_store"]["path"]).resolve())
    return Config.model_validate(data)
