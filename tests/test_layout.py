"""The floors of the house: who may import whom, what must start without torch, and how long a file may grow.

common <- workers | trainer | dashboard <- scripts
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("common", "workers", "trainer", "dashboard", "scripts")
MAY_IMPORT = {
    "common": {"common"},
    "workers": {"common", "workers"},
    "trainer": {"common", "trainer"},
    "dashboard": {"common", "dashboard"},
    "scripts": set(PACKAGES),
}
TORCH = {"torch", "transformers", "safetensors"}
TORCH_IN_COMMON = {
    "torch": {
        "policy_store",
        "weights_transport",
        "delta",
        "digest",
        "logprobs",
        "manifest",
        "lora",
        "model",
        "packing",
        "truncation",
    },
    "transformers": {"model", "packing", "assets", "prompts"},
}
"""`assets` reads tokenizers, for which transformers needs no torch; `prompts` names their type."""
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports_of(path):
    """Absolute dotted names that a file imports, also inside functions."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_the_walk_finds_every_package():
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(PACKAGES)
    assert len(MODULES) > 40


def test_the_walk_sees_imports_in_functions_and_relative_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "workers" / "engine" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text("from ..rows import a\ndef f():\n    import trainer.loop\n    from . import b\n")
    assert imports_of(path) == {"workers.rows.a", "trainer.loop", "workers.engine.b"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down_the_floors_only(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name in imports_of(path)} & {*PACKAGES, "tests", "benchmarks"}
    assert ours <= MAY_IMPORT[package]


@pytest.mark.parametrize("library", TORCH_IN_COMMON)
def test_common_touches_torch_in_few_modules_only(library):
    modules = (ROOT / "common").glob("*.py")
    users = {path.stem for path in modules if library in {name.split(".")[0] for name in imports_of(path)}}
    assert users <= TORCH_IN_COMMON[library]


def test_the_dashboard_never_names_torch():
    for path in (ROOT / "dashboard").rglob("*.py"):
        assert not {n.split(".")[0] for n in imports_of(path)} & TORCH, path


@pytest.mark.parametrize(
    "modules",
    [
        ["workers.reward", "workers.rewards.scoring"],
        sorted(f"dashboard.{path.stem}" for path in (ROOT / "dashboard").glob("*.py") if path.stem != "__init__"),
        ["common.ledger", "common.replay_buffer", "common.run", "common.evaluation", "common.diagnosis"],
    ],
    ids=["reward worker", "dashboard", "ledger"],
)
def test_roles_that_need_no_model_start_without_torch(modules):
    probe = f"import sys, {', '.join(modules)}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert shown.strip() == "[]"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_are_short_enough_to_read_at_a_sitting(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_holds(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", sorted((ROOT / "common" / "lua").glob("*.lua")), ids=lambda path: path.stem)
def test_every_lua_script_says_what_it_does(path):
    assert path.read_text().startswith("-- ")


def test_every_test_that_the_failure_matrix_names_exists():
    named = set(re.findall(r"`(test_\w+)", (ROOT / "docs" / "failures.md").read_text()))
    defined = {
        name
        for path in (ROOT / "tests").glob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(named) > 50
    files = {path.stem for path in (ROOT / "tests").glob("*.py")}
    assert named <= defined | files, named - defined - files
