"""The layers: who may import whom, what must start without torch, and how long a file may grow.

common <- workers | trainer | dashboard <- scripts
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sluice.common.keys import Keys

ROOT = Path(__file__).parent.parent
LAYERS = ("common", "workers", "trainer", "dashboard", "scripts")
MAY_IMPORT = {
    "common": {"common"},
    "workers": {"common", "workers"},
    "trainer": {"common", "trainer"},
    "dashboard": {"common", "dashboard"},
    "scripts": set(LAYERS),
}
TORCH = {"torch", "transformers", "safetensors"}
TORCH_IN_COMMON = {"torch": {"models", "policies"}, "transformers": {"models", "data"}}
"""Rooms of `common`. `assets` reads tokenizers, for which transformers needs no torch; `data` names their type."""
MODULES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
PYTHON = [*MODULES, *(path for name in ("tests", "benchmarks", "docs") for path in (ROOT / name).rglob("*.py"))]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports_of(path, *, in_functions=True):
    """Absolute dotted names that a file imports, also inside functions."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if in_functions else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ["sluice", *package[: len(package) - node.level + 1]] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_the_walk_finds_every_layer_and_sees_imports_in_functions_and_relative_ones(tmp_path, monkeypatch):
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(LAYERS)
    assert len(MODULES) > 40
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "workers" / "engine" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text("from ..rows import a\ndef f():\n    import sluice.trainer.loop\n    from . import b\n")
    assert imports_of(path) == {"sluice.workers.rows.a", "sluice.trainer.loop", "sluice.workers.engine.b"}


def test_the_package_links_to_every_layer_and_to_the_configs_that_it_ships():
    links = {path.name: path.readlink().as_posix() for path in (ROOT / "sluice").iterdir() if path.is_symlink()}
    assert links == {name: f"../{name}" for name in (*LAYERS, "config")}


def test_nothing_is_imported_by_a_name_that_may_be_a_users():
    bare = {name_of(path): [n for n in imports_of(path) if n.split(".")[0] in LAYERS] for path in PYTHON}
    assert not {path: names for path, names in bare.items() if names}


def test_imports_point_down_the_layers_only():
    for path in MODULES:
        layers = {name.split(".")[1] for name in imports_of(path) if name.startswith("sluice.")}
        assert layers <= MAY_IMPORT[path.relative_to(ROOT).parts[0]], path
        assert not {name.split(".")[0] for name in imports_of(path)} & {"tests", "benchmarks"}, path


def test_common_touches_torch_in_few_rooms_only():
    for library, rooms in TORCH_IN_COMMON.items():
        for path in (ROOT / "common").rglob("*.py"):
            if library in {name.split(".")[0] for name in imports_of(path)}:
                assert path.parent.name in rooms, (path, library)


def test_the_dashboard_never_names_torch():
    for path in (ROOT / "dashboard").rglob("*.py"):
        assert not {n.split(".")[0] for n in imports_of(path)} & TORCH, path


def modules_in(folder):
    return [f"sluice.{folder.replace('/', '.')}.{path.stem}" for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize(
    "modules",
    [
        ["sluice.workers.reward", "sluice.workers.rewards.scoring"],
        modules_in("dashboard"),
        ["sluice", *modules_in("common/ledger"), *modules_in("common/monitoring")],
        ["sluice.common.config", "sluice.common.config.file"],
    ],
    ids=["reward worker", "dashboard", "ledger", "config"],
)
def test_roles_that_need_no_model_start_without_torch(modules):
    absent = ["torch", "transformers", *(["celery"] if "sluice.common.config" in modules else [])]
    probe = f"import sys, {', '.join(modules)}; print([m for m in {absent} if m in sys.modules])"
    shown = subprocess.check_output([sys.executable, "-c", probe], cwd=ROOT, text=True, timeout=60)
    assert shown.strip() == "[]"


def test_only_common_touches_the_keys_of_a_run():
    """Elsewhere one calls its functions: `keys.cursor`, and a key that is spelt out, stand in `common` only."""
    names = "|".join([*(name for name in vars(Keys) if not name.startswith("_") and name not in ("root", "run"))])
    raw = re.compile(rf"keys\.({names})\b|\bkeys\([^)]|sluice:\{{")
    found = {name_of(path): raw.findall(code_of(path)) for path in MODULES if not path.is_relative_to(ROOT / "common")}
    assert not {path: hits for path, hits in found.items() if hits}


def test_keys_are_spelt_in_one_module_and_a_runs_record_is_read_in_one():
    common = {name_of(path): code_of(path) for path in (ROOT / "common").rglob("*.py")}
    spelt = {name for name, code in common.items() if re.search(r"\bkeys\([^)]|\.root \+|sluice:(\{|runs)", code)}
    assert spelt == {"common/keys.py"}
    assert {name for name, code in common.items() if "keys.run_record" in code} == {
        "common/run.py",
        "common/operations/storage.py",  # its removal
    }


def code_of(path):
    """A module without its docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            node.body = kept or [ast.Pass()]
    return ast.unparse(tree)


def circles(graph):
    """Modules that import themselves through others, of module -> what it imports; a function's imports count as well."""
    left = dict(graph)
    while ends := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in ends:
            del left[name]
    return left


def import_graph(folder, *, above="", in_functions=True):
    """Module of a folder -> which others of the folder it imports, all without `above`."""
    files = {".".join(path.relative_to(folder).with_suffix("").parts): path for path in folder.rglob("*.py")}
    graph = {}
    for name, path in files.items():
        found = {imported.removeprefix(above) for imported in imports_of(path, in_functions=in_functions)}
        graph[name] = (found | {imported.rpartition(".")[0] for imported in found}) & files.keys()
    return graph


def test_no_module_of_scripts_or_benchmark_imports_itself_through_others():
    graph = import_graph(ROOT / "scripts", above="sluice.scripts.")
    assert len(graph) > 20 and "launcher.launch" in graph["commands.run"]
    assert not circles(graph)
    assert not circles(import_graph(ROOT / "benchmarks", above="benchmarks.", in_functions=False))


def test_no_room_of_common_imports_itself_through_others():
    def room(name):
        first, _, rest = name.partition(".")
        return first if not rest or (ROOT / "common" / first).is_dir() else name

    graph = {}
    for name, imported in import_graph(ROOT / "common", above="sluice.common.", in_functions=False).items():
        graph.setdefault(room(name), set()).update({room(other) for other in imported} - {room(name)})
    assert len(graph) < 20
    assert not circles(graph)


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}).keys() == {"a", "b", "c", "d"}


def test_files_are_short_enough_to_read_at_a_sitting_and_say_what_they_hold():
    assert not [name_of(path) for path in MODULES if len(path.read_text().splitlines()) > 400]
    assert not [name_of(path) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))]


def test_every_lua_script_says_what_it_does():
    assert not [path for path in (ROOT / "common").rglob("*.lua") if not path.read_text().startswith("-- ")]
