"""Where a live function or class was written: a statement in a file, or in a cell of a notebook or of IPython.

Python keeps the text of both in `linecache`. A function is found by the first line of its code, and the text must compile to the
very code that the function has: what was edited meanwhile, or stands beside others on its line, is not taken for it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import os
import symtable
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_FLAGS = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
"""Cells may await at their top level."""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class NoSource(Exception):
    """The statement that made an object is not known; the message says why, as the end of a sentence."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """The statement that defines a function or class."""

    name: str
    "that it binds"
    text: str
    has_decorators: bool
    has_future_annotations: bool
    "its annotations are not evaluated"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One file or cell."""

    filename: str
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def has_future_annotations(self) -> bool:
        futures = (node for node in self.tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__")
        return any(alias.name == "annotations" for node in futures for alias in node.names)

    def statement(self, node: Definition | ast.Assign, name: str) -> Statement:
        """Return a definition as text that stands at the left margin."""
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        is_flat = node.col_offset == 0 and not isinstance(node, ast.Assign)
        # unparsed, a text of several lines keeps its indentation
        text = "\n".join(self.text.splitlines()[first - 1 : node.end_lineno]) if is_flat else ast.unparse(node)
        return Statement(
            name=name, text=text, has_decorators=bool(decorators), has_future_annotations=self.has_future_annotations
        )

    def has_code(self, wanted: types.CodeType) -> bool:
        """Return whether the unit, compiled again, holds this code."""
        compiled = compile(self.text, self.filename, "exec", flags=_FLAGS, dont_inherit=True)
        return any(_fingerprint(code) == _fingerprint(wanted) for code in _nested(compiled))


def units(namespace: Mapping[str, Any], *, file: str | None = None) -> Iterator[Unit]:
    """Yield a file, that of a namespace, else the cells that were run, the newest first."""
    own = namespace.get("__file__")
    cells = [] if own else [name for name in reversed(linecache.cache) if not os.path.exists(name)]
    for name in dict.fromkeys(filter(None, [file, own, *cells])):
        if unit := _unit(name, namespace):
            yield unit


def _unit(filename: str, namespace: Mapping[str, Any]) -> Unit | None:
    unit = _parsed(filename, "".join(linecache.getlines(filename, dict(namespace))))
    try:
        return unit if unit.tree.body else None
    except (SyntaxError, ValueError):  # a cell that was not Python
        return None


@functools.lru_cache(maxsize=256)
def _parsed(filename: str, text: str) -> Unit:
    return Unit(filename=filename, text=text)


def statement_of(made: types.FunctionType | type, namespace: Mapping[str, Any]) -> Statement:
    """Return the statement that defines a function or class. Raises NoSource."""
    return _of_class(made, namespace) if isinstance(made, type) else _of_function(made)


def _of_function(function: types.FunctionType) -> Statement:
    code = function.__code__
    unit = _unit(code.co_filename, function.__globals__)
    if unit is None:
        return _by_inspect(function)
    found = [
        (node, name) for node, name in _named(unit.tree) if name and _first_line(node) == code.co_firstlineno
    ]  # fmt: skip
    if code.co_name == "<lambda>":
        found = [(node, name) for node, name in found if isinstance(node, ast.Assign)]
        if not found:
            raise NoSource("is a lambda inside of a statement, which has no name: write it as `def name(...):`")
    else:
        found = [(node, name) for node, name in found if name == code.co_name]
    if not found or not unit.has_code(code):
        raise NoSource(
            f"was changed in {unit.filename} after it was defined here: run its definition again, in a script start it anew"
        )
    return unit.statement(*found[-1])


def _by_inspect(function: types.FunctionType) -> Statement:
    """Ask `inspect`, which may know more than `linecache` says (Python 3.13's prompt)."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
        node = ast.parse(text).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        node = None
    if not isinstance(node, Definition):
        raise NoSource(
            "was typed at Python's own prompt, or made by `exec`, which keep no source: define it in a file, in IPython or in a "
            "notebook"
        )
    return Unit(filename="<source>", text=text).statement(node, node.name)


def _of_class(made: type, namespace: Mapping[str, Any]) -> Statement:
    methods = [getattr(method, "__func__", method) for method in vars(made).values()]
    codes = [method.__code__ for method in methods if isinstance(method, types.FunctionType)]
    found = list(units(namespace))
    # those that a decorator added (dataclass) were written elsewhere
    written = [code for code in codes if code.co_filename in {unit.filename for unit in found}]
    for unit in found:
        for node, name in reversed(list(_named(unit.tree))):
            if isinstance(node, ast.ClassDef) and name == made.__name__ and all(map(unit.has_code, written)):
                return unit.statement(node, name)
    raise NoSource(
        "is a class whose source is not known, or was changed since: define it in a file, or run its cell again"
    )


def _named(tree: ast.Module) -> Iterator[tuple[Any, str]]:
    """Yield every definition, however deep, and every name that is given to a lambda at the top level."""
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            yield node, node.name
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda) and len(node.targets) == 1:
            yield node, getattr(node.targets[0], "id", "")


def _first_line(node: Any) -> int:
    """Return what the code of a definition has as its first line: that of its first decorator, or of a lambda itself."""
    if isinstance(node, ast.Assign):
        return node.value.lineno
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _fingerprint(code: types.CodeType) -> tuple[Any, ...]:
    """Return what a code does, wherever it stands."""
    constants = tuple(
        _fingerprint(each) if isinstance(each, types.CodeType) else _constant(each) for each in code.co_consts
    )
    return code.co_name, code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants


def _constant(value: Any) -> tuple[Any, ...]:
    return type(value), sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def names_used(statement: Statement) -> tuple[set[str], set[str]]:
    """Return the names that a statement looks up outside of itself, and those that only its unevaluated annotations name.

    Raises NoSource for a function that assigns to a variable of the one around it.
    """
    future = "from __future__ import annotations\n" if statement.has_future_annotations else ""
    try:
        top = symtable.symtable(future + statement.text, "<source>", "exec")
    except SyntaxError as error:
        if "nonlocal" not in str(error):
            raise
        raise NoSource(
            "keeps state in a variable of the function around it (nonlocal): write it as a class, whose __init__ makes the state"
        ) from None
    used: set[str] = set()
    annotations: set[str] = set()
    for table in _tables(top):
        is_top, is_text = table.get_type() == "module", table.get_type() == "annotation" and bool(future)
        for symbol in table.get_symbols():
            is_outside = symbol.is_referenced() and not symbol.is_assigned() if is_top else symbol.is_global()
            if is_outside and not (is_top and symbol.is_imported()):
                (annotations if is_text else used).add(symbol.get_name())
    own = {statement.name}
    return used - own, annotations - used - own


def _tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _tables(child)


def imports_in(unit: Unit) -> Iterator[tuple[str, str, str, str]]:
    """Yield (name, module, attribute or "", statement) of every absolute import outside of functions, the last first."""
    found = []
    for node in _outside_of_functions(unit.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                module = alias.name if alias.asname else bound
                found.append(
                    (bound, module, "", f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else ""))
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level and node.module != "__future__":
            for alias in node.names:
                text = f"from {node.module} import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
                found.append((alias.asname or alias.name, node.module, alias.name, text))
    yield from reversed(found)


def _outside_of_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (Definition, ast.Lambda)):
            yield child
            yield from _outside_of_functions(child)
