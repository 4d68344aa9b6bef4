"""A config from a YAML file and `dotted.key=value` overrides, with errors that name the nearest key.

The file is named by its path, or by its name where it is shipped with Sluice (`quickstart`); without one the overrides are all.
"""

from __future__ import annotations

import difflib
import functools
import operator
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from sluice.common.config import Config
from sluice.common.config.presets import apply_preset
from sluice.common.config.schema import INSPECTION
from sluice.common.config.sft import SftConfig
from sluice.common.config.yaml_text import Scalar, as_meant, load_yaml
from sluice.common.errors import ConfigError, did_you_mean
from sluice.common.paths import expanded

AnyConfig = TypeVar("AnyConfig", bound=BaseModel)
SHIPPED = Path(__file__).parents[2] / "config"
"""Configs inside the package; of a checkout the folder `config`, which holds other files as well."""


def shipped_configs() -> list[str]:
    """Return the names of the configs that are shipped."""
    files = [*SHIPPED.glob("*.yaml"), *SHIPPED.glob("sft/*.yaml")]
    return sorted(file.relative_to(SHIPPED).with_suffix("").as_posix() for file in files)


def _is_shipped(path: str | Path) -> bool:
    return str(path) in shipped_configs() and not expanded(path).is_file()


def find_config(path: str | Path) -> Path:
    """Return the file of a config: a path, or the name of a shipped one. It need not exist."""
    return SHIPPED / f"{path}.yaml" if _is_shipped(path) else expanded(path)


def config_name(path: str | Path | None) -> str:
    """Return what the runs of a config are called by default; `run` where there is no file."""
    return "run" if path is None else find_config(path).stem


def parse_config(text: str, *, overrides: list[str] | tuple[str, ...] = (), source: str = "config") -> Config:
    """Return a run's config from YAML text and `dotted.key=value` overrides (values are YAML). Raises ConfigError.

    `trainer.preset` is replaced by the values it names (`sluice.common.config.presets`): the config does not have the key.
    """
    return parse_as(Config, text, overrides=overrides, source=source)


def load_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Return a run's config from a YAML file, or from the overrides alone. Raises ConfigError."""
    return load_as(Config, path, overrides)


def load_as(kind: type[AnyConfig], path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> AnyConfig:
    """Do the same as `parse_as`, from a file, or from the overrides alone."""
    if path is None:
        return parse_as(kind, "{}", overrides=overrides, source="command line", folder=Path())
    return parse_as(kind, read_text(path), overrides=overrides, source=str(path), folder=_code_folder(path))


def _code_folder(path: str | Path) -> Path:
    """Return where the functions of a config are: beside a user's file; a shipped one has none, so in the working directory."""
    return Path() if _is_shipped(path) else expanded(path).parent


def read_text(path: str | Path) -> str:
    """Return the text of a config file. Raises ConfigError."""
    try:
        return find_config(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        shipped = shipped_configs()
        hint = did_you_mean(Path(path).stem, shipped) or f"those that are shipped are {', '.join(shipped)}"
        raise ConfigError(f"cannot read config file {path}: {error.strerror or error}; {hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 ({error.reason}): save it as UTF-8") from None


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
    data, problems = _data_of(kind, text, overrides, source, folder)
    try:
        config = kind.model_validate(data)
    except ValidationError as error:
        problems += [_explain(each, kind) for each in error.errors()]
    if problems:
        raise ConfigError(f"{source}: " + "; ".join(problems))
    return config


def examine(
    kind: type[AnyConfig], path: str | Path, overrides: list[str] | tuple[str, ...] = ()
) -> tuple[AnyConfig | None, list[str]]:
    """Do the same as `load_as`, but return every problem, and a config without the keys that are wrong if there is one.

    Raises ConfigError where the file is not YAML.
    """
    data, found = _data_of(kind, read_text(path), overrides, str(path), _code_folder(path))
    problems = dict.fromkeys(found)
    removed: set[tuple[Any, ...]] = set()
    context = None
    while True:
        try:
            return kind.model_validate(data, context=context), list(problems)
        except ValidationError as error:
            errors = [e for e in error.errors() if e["loc"] not in removed]  # of these the removal is to blame
        problems |= dict.fromkeys(_explain(e, kind) for e in errors)
        places = {_key_at(data, e["loc"]) for e in errors} - {()}
        if not places and (context is INSPECTION or any(e["loc"] for e in errors)):
            return None, list(problems)
        context = None if places else INSPECTION  # what is left to refuse is how the sections fit
        for *parents, key in places:
            with suppress(KeyError):  # gone with its section
                del functools.reduce(operator.getitem, parents, data)[key]
        removed |= places


def _data_of(
    kind: type[BaseModel], text: str, overrides: list[str] | tuple[str, ...], source: str, folder: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """Return what a file and overrides say, preset and code folder applied; and what is wrong with the preset."""
    data = _read(text, source)
    for override in overrides:
        _apply_override(data, override)
    try:
        data = as_meant(data, kind)
    except RecursionError:
        raise ConfigError(f"{source}: an alias (*) stands within what it names, without end") from None
    problems = []
    if kind is Config:
        try:
            apply_preset(data)
        except ConfigError as error:
            problems.append(str(error))
        if folder is not None:
            data["code_folder"] = str((folder / expanded(str(data.get("code_folder") or "."))).resolve())
    return data, problems


def _key_at(data: Any, location: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the path of the innermost key of the data that a validation error is about; () of none."""
    path: tuple[Any, ...] = ()
    for i, part in enumerate(location, 1):
        if isinstance(data, dict) and part in data:
            path = location[:i]
        elif not (isinstance(data, list) and part in range(len(data))):
            break
        data = data[part]
    return path


def _read(text: str, source: str) -> dict[str, Any]:
    try:
        data = load_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        meant = as_meant(data)
        found = "nothing: it is empty" if meant is None else type(meant).__name__
        raise ConfigError(f"{source} must be a mapping of sections, found {found}")
    return data


def read_run_config(run_folder: Path) -> Config:
    """Return the config that a run folder holds. Raises ConfigError."""
    return load_config(config_file(run_folder))


def read_training_config(run_folder: Path) -> Config | SftConfig:
    """Do the same as `read_run_config`, also for a folder that `sluice sft` made. Raises ConfigError."""
    path = config_file(run_folder)
    is_run = "reward" in _read(read_text(path), str(path))
    return load_as(Config, path) if is_run else load_as(SftConfig, path)


def config_file(run_folder: Path) -> Path:
    """Return the file of a run folder's config. Raises ConfigError where there is none."""
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
        child = data.get(section)
        if isinstance(child, Scalar) and child.value is None:  # every key of the section is a comment
            child = None
        child = data[section] = {} if child is None else child
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {section} is not a section (a list is set as a whole, as YAML)")
        data = child
    try:
        parsed = load_yaml(value)
    except ValueError as error:  # of a key that holds text no YAML is needed
        parsed = ConfigError(f"override {override!r}: {error}")
    if isinstance(parsed, Scalar):
        parsed = parsed.value
    is_quoted = value.lstrip().startswith(("'", '"'))
    data[last] = parsed if is_quoted else Scalar(parsed, value)  # of text, also blanks and # are part


_RENAMED = {"is_weight": "importance_sampling", "is_low": "importance_min", "is_high": "importance_max"}
"""Former names that do not resemble the present ones: errors about them name the present one."""


def _explain(error: Any, kind: type[BaseModel]) -> str:
    """Turn one pydantic error into a sentence a user can act on."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(error["loc"][:-1], kind)
        known += ["preset"] if kind is Config and error["loc"][:-1] == ("trainer",) else []
        return f"unknown key {where!r}; {_nearest(error['loc'], known, kind)}"
    if error["type"] == "missing":
        return f"missing key {where!r}"
    if error["type"] == "value_error":
        return f"{where + ': ' if where else ''}{error['ctx']['error']}"
    return f"{where} = {error['input']!r}: {error['msg']}"


def _nearest(location: tuple[Any, ...], known: list[str], kind: type[BaseModel]) -> str:
    """Name the key that is meant: the same in another section, else the most similar of this one, or of all at the top."""
    key = _RENAMED.get(str(location[-1]), str(location[-1]))
    every = list(_dotted_keys(kind))
    elsewhere = [name for name in every if name.rpartition(".")[2] == key]
    if elsewhere and key not in known:
        return f"did you mean {', '.join(map(repr, elsewhere[:-1]))}{' or ' * (len(elsewhere) > 1)}{elsewhere[-1]!r}?"
    names = {name.rpartition(".")[2]: name for name in reversed(every)} if len(location) == 1 else {}
    near = difflib.get_close_matches(key, [*known, *names], n=1, cutoff=0.5)
    if not near:
        return f"known keys: {', '.join(sorted(known))}"
    return f"did you mean {near[0] if near[0] in known else names[near[0]]!r}?"


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every key that an override can set by itself; of sections in lists there are none."""
    for name, field in model.model_fields.items():
        yield prefix + name
        is_list = get_origin(field.annotation) is tuple
        for inner in () if is_list else (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _dotted_keys(inner, f"{prefix}{name}.")


def _fields_at(location: tuple[Any, ...], kind: type[BaseModel]) -> list[str]:
    model: Any = kind
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
