"""A run's config from a YAML file and `dotted.key=value` overrides, with errors that name the nearest key."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from common.config import Config
from common.errors import ConfigError
from common.presets import apply_preset


def parse_config(text: str, *, overrides: list[str] | tuple[str, ...] = (), source: str = "config") -> Config:
    """Config from YAML text and `dotted.key=value` overrides (values are YAML). Raises ConfigError with the nearest name.

    `trainer.preset` is replaced by the values it stands for (`common.presets`): the config does not know it.
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
        apply_preset(data)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(e) for e in error.errors())) from None


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Config from a YAML file. Raises ConfigError."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror or error}") from None
    return parse_config(text, overrides=overrides, source=str(path))


def read_run_config(run_folder: Path) -> Config:
    """The config that a run folder holds. Raises ConfigError."""
    path = run_folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_folder} is not a run folder: it holds no config.yaml")
    return load_config(path)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *sections, last = key.strip().split(".")
    for section in sections:
        child = data.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {section} is not a section (lists are set whole, as YAML)")
        data = child
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {error}") from None


def _explain(error: Any) -> str:
    """One pydantic error as a sentence a user can act on."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(error["loc"][:-1]) + (["preset"] if error["loc"][:-1] == ("trainer",) else [])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key {where!r}; {hint}"
    if error["type"] == "missing":
        return f"missing key {where!r}"
    if error["type"] == "value_error":
        return f"{where + ': ' if where else ''}{error['ctx']['error']}"
    return f"{where} = {error['input']!r}: {error['msg']}"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
