"""A user's reward functions for other processes: by name where they lie in a module, else as source. Never as pickles.

A function of a script's own file, of a notebook or of IPython is written into a module of its own, `rewards_<hash>.py`, with
what it uses: imports, constants, functions and classes, and what those use. Names have the values that they have now. Refused
is what no source stands for: a live object (a client, a model, an open file), a lambda in a list, a method of an object, a
function in C.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import math
import re
import subprocess
import sys
import sysconfig
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from sluice.common.errors import ConfigError
from sluice.scripts.api.source import NoSource, Statement, imports_in, names_used, statement_of, units

MAX_CONSTANT_BYTES = 1 << 20
"""Of one constant as text."""
_INSTEAD = (
    "make it inside the function, or in the __init__ of a class that you give as {'function': Class, 'kwargs': {...}}; or put "
    "all of it into a file and give 'rewards.py:function'"
)


@dataclass(frozen=True, kw_only=True)
class FoundReward:
    """Where the roles of a run find a function."""

    path: str
    "`package.module:function`, or `rewards_<hash>.py:function` of `files`"
    files: dict[str, str] = field(default_factory=dict)
    "name -> text of the modules to write"
    folders: frozenset[str] = frozenset()
    "of the user's modules that it imports"

    def path_in(self, folder: Path) -> str:
        """Return the path for a config, where the files are in a folder."""
        return str(folder / self.path) if self.files else self.path


def find_reward(reward: object, *, where: str) -> FoundReward:
    """Return where the roles find a function or class. `where` begins the errors. Raises ConfigError for what cannot travel."""
    name = _name_of(reward)
    _refuse_other_kinds(reward, where=f"{where}: {name}")
    try:
        if module := importable(reward):
            return FoundReward(path=f"{module}:{_name_of(reward)}", folders=folder_of(module))
        collected = Collected()
        named = collected.add_definition(reward)
        text = collected.text()
    except NoSource as error:
        raise ConfigError(f"{where}: {name} {error}") from None
    file = f"rewards_{hashlib.sha256(text.encode()).hexdigest()[:8]}.py"
    return FoundReward(path=f"{file}:{named}", files={file: text}, folders=frozenset(collected.folders))


def _name_of(reward: object) -> str:
    return str(getattr(reward, "__qualname__", type(reward).__qualname__)).replace("<locals>.", "")


def _refuse_other_kinds(reward: object, *, where: str) -> None:
    """Refuse what is neither a function nor a class. Raises ConfigError."""
    if isinstance(reward, (types.FunctionType, type)) or hasattr(reward, "__wrapped__"):
        return
    kind = type(reward)
    if isinstance(reward, functools.partial):
        problem = f"is a partial: give {{'function': {_name_of(reward.func)}, 'kwargs': {{...}}}} instead"
    elif isinstance(reward, types.MethodType):
        problem = (
            f"is a method of an object, whose state cannot travel: write a function, or give {type(reward.__self__).__name__} a "
            "__call__ and pass the class as {'function': Class, 'kwargs': {...}}; each scoring process then makes its own object"
        )
    elif any(isinstance(vars(base).get("__call__"), types.FunctionType) for base in kind.__mro__):
        problem = (
            f"is an object, whose state cannot travel: pass its class as {{'function': {kind.__name__}, 'kwargs': {{...}}}}, and "
            "each scoring process makes an object of its own"
        )
    elif callable(reward):
        problem = "is not written in Python and has no source: call it from a function of yours, and give that"
    else:
        problem = f"is of type {kind.__name__}, no reward: give a function, a class, 'math', or the path of one, 'rewards.py:f'"
    raise ConfigError(f"{where} {problem}")


def importable(made: Any) -> str:
    """Return the module in which other processes find a function or class by its name; "" where there is none."""
    module, name = str(getattr(made, "__module__", "")), str(getattr(made, "__qualname__", ""))
    found: Any = sys.modules.get(module)
    if module in ("__main__", "__mp_main__") or found is None or not getattr(found, "__spec__", None):
        return ""
    for part in name.split("."):
        found = getattr(found, part, None)
    return module if found is made else ""


def folder_of(module: str) -> frozenset[str]:
    """Return the folder from which a module is imported, if the roles do not look there by themselves."""
    root = sys.modules.get(module.partition(".")[0])
    file = getattr(root, "__file__", None)
    if not file or root is sys.modules["sluice"]:
        return frozenset()  # built in, or a folder without __init__.py; or ours
    path = Path(file).resolve()
    folder = str(path.parent.parent if path.name == "__init__.py" else path.parent)
    known = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    if folder in {str(Path(each).resolve()) for each in known} or folder not in {
        str(Path(p).resolve()) for p in sys.path
    }:
        return frozenset()  # what is imported from elsewhere has a finder that is installed
    return frozenset() if folder in _path_of_roles() else frozenset({folder})


@functools.cache
def _path_of_roles() -> frozenset[str]:
    argv = [sys.executable, "-P", "-c", "import os, sys; print(*map(os.path.realpath, sys.path), sep='\\n')"]
    return frozenset(subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines())


class Collected:
    """The statements of one module, in an order in which it can be imported."""

    def __init__(self) -> None:
        self.folders: set[str] = set()
        self._imports: dict[str, None] = {}
        self._parts: list[str] = []
        self._values: dict[str, Any] = {}
        "of every name that the module binds"
        self._has_future_annotations = False

    def text(self) -> str:
        future = ["from __future__ import annotations\n"] if self._has_future_annotations else []
        imports = ["\n".join(self._imports) + "\n"] if self._imports else []
        head = "# A reward function and what it uses, as sluice found them in the program that started this run.\n"
        text = "\n".join([head, *future, *imports, *(f"\n{part}\n" for part in self._parts)])
        compile(text, "<rewards>", "exec")
        return text

    def add_definition(self, made: Any) -> str:
        """Add a function or class and what it uses; return the name that its definition binds. Raises NoSource."""
        inner = _unwrapped(made)
        statement = statement_of(inner, _namespace(inner))
        _check_decorators(made, statement)
        if not self._binds(statement.name, made):
            return statement.name
        self._has_future_annotations |= statement.has_future_annotations
        used, annotations = names_used(statement)
        scope = _scope_of(inner)
        for name in sorted(used):
            if name in scope:
                self._add(name, scope[name], inner)
            elif not hasattr(builtins, name):
                raise NoSource(f"uses {name!r}, which is not defined: define it before, or remove it")
        for name in sorted(annotations & scope.keys()):
            try:
                self._add(name, scope[name], inner)
            except NoSource:  # it is not evaluated
                continue
        self._parts.append(statement.text.rstrip())
        return statement.name

    def _binds(self, name: str, value: Any) -> bool:
        """Return whether a name is new. Raises NoSource where it has another value already."""
        if name not in self._values:
            self._values[name] = value
            return True
        if self._values[name] is value or (type(self._values[name]), self._values[name]) == (type(value), value):
            return False
        raise NoSource(f"and what it uses have two meanings of the name {name!r}: rename one of them")

    def _add(self, name: str, value: Any, user: Any) -> None:
        """Add what a name means where `user` is defined. Raises NoSource."""
        if name in ("__name__", "__file__", "__doc__", "__spec__"):
            return
        if statement := self._import_of(name, value, user):
            if self._binds(name, value):
                self._imports[statement] = None
        elif isinstance(value, (types.FunctionType, type)) or hasattr(value, "__wrapped__"):
            defined = self.add_definition(value)
            if defined != name and self._binds(name, value):
                self._parts.append(f"{name} = {defined}")
        elif (text := literal(value)) is None:
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.").removeprefix(
                "__main__."
            )
            raise NoSource(f"uses {name!r}, an object of type {kind}, which no source stands for: {_INSTEAD}")
        elif len(text) > MAX_CONSTANT_BYTES:
            raise NoSource(
                f"uses {name!r}, which is {len(text) >> 20} MiB as text: write it to a file, and read that in the function"
            )
        elif self._binds(name, value):
            if isinstance(value, re.Pattern):
                self._imports["import re"] = None
            elif isinstance(value, PurePath):
                self._imports["import pathlib"] = None
            self._parts.append(f"{name} = {text}")

    def _import_of(self, name: str, value: Any, user: Any) -> str:
        """Return what imports a value by this name; "" where it is not imported."""
        file = getattr(getattr(user, "__code__", None), "co_filename", None)
        for unit in units(_namespace(user), file=file):
            found = [
                (module, statement)
                for bound, module, attribute, statement in imports_in(unit)
                if bound == name and _imported(module, attribute) is value
            ]
            if found:
                self.folders |= folder_of(found[0][0])
                # `import a.b` and `import a.c` bind the same name
                is_package = isinstance(value, types.ModuleType) and " as " not in found[0][1]
                return "\n".join(dict.fromkeys(statement for _, statement in (found if is_package else found[:1])))
        if isinstance(value, types.ModuleType) and sys.modules.get(value.__name__) is value:
            self.folders |= folder_of(value.__name__)
            is_plain = value.__name__ == name
            return f"import {name}" if is_plain else f"import {value.__name__} as {name}"
        module = importable(value)
        qualname = str(getattr(value, "__qualname__", ""))
        if module and qualname.isidentifier():
            self.folders |= folder_of(module)
            return f"from {module} import {qualname}" + ("" if qualname == name else f" as {name}")
        return ""


def _imported(module: str, attribute: str) -> Any:
    found = sys.modules.get(module)
    return getattr(found, attribute, None) if attribute else found


def _unwrapped(made: Any) -> Any:
    while hasattr(made, "__wrapped__"):  # functools.wraps, lru_cache
        made = made.__wrapped__
    if not isinstance(made, (types.FunctionType, type)):
        raise NoSource("wraps what is not written in Python: give the function itself")
    return made


def _namespace(made: Any) -> Mapping[str, Any]:
    if isinstance(made, type):
        return vars(sys.modules[made.__module__]) if made.__module__ in sys.modules else {}
    return dict(made.__globals__)


def _scope_of(made: Any) -> dict[str, Any]:
    """Return what the names that a definition uses may mean: its closure's, then its module's."""
    scope = dict(_namespace(made))
    if isinstance(made, type):
        if "<locals>" in made.__qualname__:
            raise NoSource("is a class that is defined inside of a function: define it outside")
        return scope
    for name, cell in zip(made.__code__.co_freevars, made.__closure__ or (), strict=True):
        try:
            scope[name] = cell.cell_contents
        except ValueError:
            raise NoSource(f"uses {name!r}, which has no value yet in the function around it") from None
    return scope


def _check_decorators(made: Any, statement: Statement) -> None:
    """Refuse a definition that would be decorated otherwise than the object at hand is. Raises NoSource."""
    if (
        statement.has_decorators
        and not isinstance(made, type)
        and _namespace(_unwrapped(made)).get(statement.name) is not made
    ):
        raise NoSource(
            "is inside of a decorator, or has one that does not use functools.wraps: add `@functools.wraps(function)` there, or "
            "call the decorator inside of the function"
        )


def literal(value: Any) -> str | None:
    """Return an expression for a constant; None for what is none."""
    if value is None or type(value) in (bool, int, str, bytes, complex, range) or value is Ellipsis:
        return repr(value)
    if type(value) is float:
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if isinstance(value, re.Pattern):
        return f"re.compile({value.pattern!r}, {int(value.flags)})"
    if isinstance(value, PurePath):
        return f"pathlib.{type(value).__name__}({str(value)!r})"
    if type(value) is dict:
        pairs = [(literal(key), literal(each)) for key, each in value.items()]
        whole = all(key is not None and each is not None for key, each in pairs)
        return "{" + ", ".join(f"{key}: {each}" for key, each in pairs) + "}" if whole else None
    if type(value) in (list, tuple, set, frozenset):
        items = [literal(each) for each in value]
        if None in items:
            return None
        inside = ", ".join(str(item) for item in items)
        if type(value) is tuple:
            return f"({inside}{',' if len(items) == 1 else ''})"
        if type(value) is list:
            return f"[{inside}]"
        braces = "{" + inside + "}" if items else "()"
        return braces if type(value) is set and items else f"{type(value).__name__}({braces})"
    return None
