"""A config from a YAML file and `dotted.key=value` overrides, with errors that name the nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from sluice.common.config import Config
from sluice.common.config.presets import apply_preset
from sluice.common.config.sft import SftConfig
from sluice.common.errors import ConfigError, did_you_mean

AnyConfig = TypeVar("AnyConfig", bound=BaseModel)


def parse_config(text: str, *, overrides: list[str] | tuple[str, ...] = (), source: str = "config") -> Config:
    """Return a run's config from YAML text and `dotted.key=value` overrides (values are YAML). Raises ConfigError.

    `trainer.preset` is replaced by the values it names (`sluice.common.config.presets`): the config does not have the key.
    """
    return parse_as(Config, text, overrides=overrides, source=source)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Return a run's config from a YAML file. Raises ConfigError."""
    return load_as(Config, path, overrides)


def load_as(kind: type[AnyConfig], path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> AnyConfig:
    """Do the same as `parse_as`, from a file."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror or error}") from None
    return parse_as(kind, text, overrides=overrides, source=str(path), folder=Path(path).parent)


def parse_as(
    kind: type[AnyConfig],
    text: str,
    *,
    overrides: list[str] | tuple[str, ...] = (),
    source: str = "config",
    folder: Path | None = None,
) -> AnyConfig:
    """Return a config of that kind from YAML text and overrides. Raises ConfigError with the nearest name of a wrong key.

    folder: that of the file, which is the `code_folder` of a run unless it names another.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{source} must be a mapping of sections, found {type(data).__name__}")
    for override in overrides:
        _apply_override(data, override)
    try:
        if kind is Config:
            apply_preset(data)
            if folder is not None:
                data["code_folder"] = str((folder / str(data.get("code_folder") or ".")).resolve())
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(e, kind) for e in error.errors())) from None


def read_run_config(run_folder: Path) -> Config:
    """Return the config that a run folder holds. Raises ConfigError."""
    return load_config(_config_file(run_folder))


def read_training_config(run_folder: Path) -> Config | SftConfig:
    """Do the same as `read_run_config`, also for a folder that `sluice sft` made. Raises ConfigError."""
    path = _config_file(run_folder)
    is_run = "reward" in yaml.safe_load(path.read_text())
    return load_as(Config, path) if is_run else load_as(SftConfig, path)


def _config_file(run_folder: Path) -> Path:
    path = run_folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_folder} is not a run folder: it holds no config.yaml")
    return path


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *sections, last = key.strip().split(".")
    for section in sections:
        child = data.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {section} is not a section (a list is set as a whole, as YAML)")
        data = child
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {error}") from None


_RENAMED = {"is_weight": "importance_sampling", "is_low": "importance_min", "is_high": "importance_max"}
"""Former names that do not resemble the present ones: errors about them name the present one."""


def _explain(error: Any, kind: type[BaseModel]) -> str:
    """Turn one pydantic error into a sentence a user can act on."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(error["loc"][:-1], kind)
        known += ["preset"] if kind is Config and error["loc"][:-1] == ("trainer",) else []
        key = str(error["loc"][-1])
        hint = did_you_mean(_RENAMED.get(key, key), known) or f"known keys: {', '.join(sorted(known))}"
        return f"unknown key {where!r}; {hint}"
    if error["type"] == "missing":
        return f"missing key {where!r}"
    if error["type"] == "value_error":
        return f"{where + ': ' if where else ''}{error['ctx']['error']}"
    return f"{where} = {error['input']!r}: {error['msg']}"


def _fields_at(location: tuple[Any, ...], kind: type[BaseModel]) -> list[str]:
    model: Any = kind
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
