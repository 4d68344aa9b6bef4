"""Paths that a user writes: `~` in any of them, absolute where they are stored, and the home and cache folders behind them.

The keys of a config that hold one are marked: `path: Annotated[str, PathKind.SOURCE]`.
"""

from __future__ import annotations

import os
import re
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from sluice.common.errors import ConfigError
from sluice.common.loading import absolute_function_path

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
AnyModel = TypeVar("AnyModel", bound=BaseModel)


class PathKind(Enum):
    """What a marked key holds."""

    FOLDER = "a folder, which need not exist yet"
    SOURCE = "a file or folder, or else a hub id"
    FUNCTION = "a function: a dotted path, or file.py:function"


def expanded(path: str | Path) -> Path:
    """Return the path with `~` replaced. Raises ConfigError where there is no home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0].removeprefix("~")
        why = f"there is no user {user}" if user else "HOME is not set and this user has no home folder"
        raise ConfigError(f"{path}: {why}: set HOME, or write the path in full") from None


def check_folder(key: str, path: str) -> None:
    """Check that files can be written under a folder, which need not exist yet. Raises ConfigError."""
    folder = expanded(path)
    near = next(each for each in (folder, *folder.parents) if each.exists())
    if not near.is_dir():
        raise ConfigError(f"{key} = {path!r}: {near} is not a folder; name another")
    if not os.access(near, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{key} = {path!r}: {near} cannot be written by this user; name another, or change its rights"
        )


def with_absolute_paths(config: AnyModel, *, code_folder: Path | None = None) -> AnyModel:
    """Return a config whose local paths hold for roles started in any folder; hub ids and dotted paths stay as they are.

    code_folder: where relative files of functions are looked for, before the working directory.
    """
    code_folder = code_folder or expanded(getattr(config, "code_folder", None) or ".")

    def absolute(value: Any, kind: PathKind | None) -> Any:
        if isinstance(value, BaseModel):
            return with_absolute_paths(value, code_folder=code_folder)
        if isinstance(value, tuple):
            return tuple(absolute(item, kind) for item in value)
        if kind is None or value is None:
            return value
        if kind is PathKind.FUNCTION:
            return absolute_function_path(value, folder=code_folder)
        path = expanded(value)
        is_local = kind is PathKind.FOLDER or value.startswith("~") or path.exists()
        return str(path.resolve()) if is_local else value

    changed = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        kind = next((mark for mark in field.metadata if isinstance(mark, PathKind)), None)
        if (made := absolute(value, kind)) != value:
            changed[name] = made
    return config.model_copy(update=changed) if changed else config


def cache_problem() -> str:
    """Return what is wrong with the folders in which the Hugging Face libraries keep what they read; "" where nothing is."""
    from huggingface_hub import constants

    home = Path(constants.HF_HOME)
    folders = {"HF_HUB_CACHE": Path(constants.HF_HUB_CACHE)}
    folders["HF_DATASETS_CACHE"] = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))
    for name, folder in folders.items():
        near = next(path for path in (folder, *folder.parents) if path.exists())
        if near.is_dir() and os.access(near, os.W_OK | os.X_OK) and "~" not in folder.parts:
            continue
        home_is = f"HOME is {os.environ['HOME']}" if os.environ.get("HOME") else "HOME is not set"
        return f"the cache folder {folder} cannot be written ({home_is}): set HF_HOME or {name} to a folder that can, or HOME"
    return ""
