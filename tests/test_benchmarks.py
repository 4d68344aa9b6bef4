"""The benchmarks still run, name only functions that exist, and their page shows what is recorded."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, environment

from benchmarks import plots
from benchmarks.probe.sitecustomize import TARGETS
from benchmarks.run_all import NAMES, PAGE, filled_page
from benchmarks.shared.report import RESULTS
from benchmarks.shared.tables import table_of

FOLDER = ROOT / "benchmarks"


def test_every_benchmark_says_how_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    for name in (*NAMES, "run_all"):
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"benchmarks.{name}").main(["--help"])
        assert ended.value.code == 0, name
        shown = capsys.readouterr().out
        assert "--quick" in shown, name
        assert "--out" in shown or name == "run_all", name


def test_no_benchmark_imports_another_and_what_they_share_imports_none() -> None:
    assert len(NAMES) > 8
    for path in FOLDER.rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        ours = {node.module for node in nodes if node.module and node.module.startswith("benchmarks")}
        assert all(len(module.split(".")) == 3 for module in ours), (path, ours)


def test_every_function_that_the_probe_measures_exists() -> None:
    for module, kinds in TARGETS.items():
        for name in kinds:
            assert callable(functools.reduce(getattr, name.split("."), importlib.import_module(module))), (module, name)


def test_the_page_shows_the_recorded_results() -> None:
    assert filled_page() == PAGE.read_text(), "python benchmarks/run_all.py --only-tables writes it"
    for path in RESULTS.glob("*.json"):
        report = json.loads(path.read_text())
        assert (report["benchmark"], report["quick"]) == (path.stem, False)


def test_plots_are_drawn_for_light_and_dark_and_those_of_the_page_show_the_recorded_results(tmp_path: Path) -> None:
    plots.main(["--quick", "--out", str(tmp_path)])
    for name in plots.PLOTS:
        drawn = (tmp_path / f"benchmark-{name}.svg").read_text()
        assert all(f"var(--{variable})" in drawn for variable in ("ground", "ink"))
        assert "@media(prefers-color-scheme:dark)" in drawn
        source = f"<!-- {name}.json {plots.digest_of(name)} -->"
        assert source in drawn
        shown = plots.IMAGES / f"benchmark-{name}.svg"
        assert source in shown.read_text(), "python benchmarks/plots.py draws it again"
        assert f"images/{shown.name}" in PAGE.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_reports_what_it_found_and_records_nothing(name: str, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in RESULTS.iterdir()}
    out = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--out", str(out)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert report["quick"] is True
    assert report["machine"]["cpu"] and report["machine"]["torch"] and report["machine"]["commit"]
    assert table_of(report) in done.stdout
    assert {path: path.read_bytes() for path in RESULTS.iterdir()} == before
