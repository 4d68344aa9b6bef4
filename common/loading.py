"""A user's code by name: resolve a dotted path or a file to the function or class that it names.

    pkg.module.attribute    pkg.module:attribute    path/to/file.py:attribute

Dotted paths are found like any import, and last of all in the folder of the run's config (`code_folder`) and in the working
directory, which are at the end of `sys.path`: a file there shadows nothing that is installed. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import operator
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from sluice.common.errors import ConfigError, did_you_mean


def is_function_path(name: str) -> bool:
    """Return whether a name is a path to a user's code, and not a built-in name."""
    return "." in name or ":" in name


def add_code_folder(folder: str | None) -> None:
    """Let dotted paths be found in a folder and in the working directory as well, after everything that is installed.

    `python -m` and Celery's command put the working directory first; from here on it is last, so that a user's modules are
    not taken from a checkout of Sluice that a role happens to be started in.
    """
    code = [str(Path(each).resolve()) for each in (folder, ".") if each]
    sys.path[:] = [path for path in sys.path if str(Path(path).resolve()) not in code] + list(dict.fromkeys(code))


def absolute_function_path(path: str, *, folder: Path) -> str:
    """Make a path independent of where it is read: files, relative to `folder` or to the working directory, become absolute."""
    file, colon, attribute = path.rpartition(":")
    file = os.path.expanduser(file)
    found = next((base / file for base in (folder, Path()) if colon and (base / file).is_file()), None)
    return f"{found.resolve()}:{attribute}" if found else path


def find_function(path: str, *, where: str) -> Any:
    """Return what a path names. Raises ConfigError, which begins with `where`: not found, not importable, not callable."""
    where = f"{where}: {path!r}"
    source, colon, attribute = path.rpartition(":" if ":" in path else ".")
    if not source or not attribute:
        raise ConfigError(
            f"{where} names no function: write pkg.module.function, pkg.module:function or file.py:function"
        )
    try:
        if source not in sys.modules:
            importlib.invalidate_caches()  # for a file created since its folder was last read
        is_file = source.endswith(".py") and colon == ":"
        module = _import_file(source, where) if is_file else importlib.import_module(source)
    except ConfigError:
        raise
    except Exception as error:  # user code runs on import
        hint = f"it must be installed, or be in the folder of the config or in {Path.cwd()}, where this process runs"
        if isinstance(error, ModuleNotFoundError) and _is_ours(source):
            hint = f"did you mean 'sluice.{path}'?"
        raise ConfigError(f"{where}: importing {source} failed with {type(error).__name__}: {error}; {hint}") from error
    try:
        found = operator.attrgetter(attribute)(module)
    except AttributeError:
        hint = did_you_mean(attribute, vars(module)) or f"define it in {module.__file__}"
        raise ConfigError(f"{where}: {source} has no {attribute!r}; {hint}") from None
    if not callable(found):
        raise ConfigError(f"{where} is of type {type(found).__name__}, not callable: name a function or a class")
    return found


def _is_ours(name: str) -> bool:
    """Return whether a module that was not found is one of Sluice's, named without `sluice.`."""
    try:
        return importlib.util.find_spec(f"sluice.{name}") is not None
    except ModuleNotFoundError:  # nor is the package around it
        return False


def _import_file(source: str, where: str) -> ModuleType:
    """Return the module of a file, loaded once per process."""
    file = Path(os.path.expanduser(source)).resolve()
    if not file.is_file():
        raise ConfigError(
            f"{where}: there is no file {file}: relative paths start where the process runs, {Path.cwd()}"
        )
    name = f"sluice_user_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None, file
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
