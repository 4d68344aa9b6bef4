"""The documentation as a site: it builds, needs no network, its links lead somewhere, and what it names is there and works."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import pytest
import yaml
from builders import for_each
from harness import ROOT, every_command
from pydantic import BaseModel

from sluice.common.config import Config
from sluice.common.config.file import parse_as
from sluice.common.config.operations import ReplicaRange
from sluice.common.config.sft import RL_ONLY, SftConfig
from sluice.common.monitoring.diagnosis import ALARM_KINDS, STALL_KINDS
from sluice.common.operations.control import SHORT
from sluice.scripts.cli import cli
from sluice.workers.rewards.loading import load_reward_functions

DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"))]
BUILD = ["-m", "sphinx", "--quiet", "--fresh-env", "--fail-on-warning", "--keep-going", "--nitpicky"]
CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
ANOTHERS = re.compile(r"# (TRL|verl|torchforge): ")
"""First line of a block that holds another project's config."""
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\n *$")
"""What stands before a block that no test runs, with the reason. tests/test_docs_commands.py runs the others."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once, as scripts/docs does: without a warning, in less than 15 seconds of a core."""
    folder = tmp_path_factory.mktemp("site")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *BUILD, str(DOCS), str(folder)], capture_output=True, text=True, timeout=200)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 15
    return folder


@cache
def blocks(path: Path, language: str, *, also_not_run: bool = False) -> list[str]:
    """The blocks of a page in a language: those that are run, or all."""
    text = path.read_text()
    found = re.finditer(rf"^ *```{language}\n(.*?)^ *```$", text, re.M | re.S)
    return [block[1] for block in found if also_not_run or not NOT_RUN.search(text[: block.start()])]


def code_of(path: Path) -> Iterator[str]:
    """Inline code, and lines of blocks."""
    text = path.read_text()
    for block in re.findall(r"^ *```.*?\n(.*?)^ *```$", text, re.M | re.S):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S))


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config; `[]` marks the entries of a list."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        is_list = getattr(field.annotation, "__origin__", None) is tuple
        for below in (field.annotation, *get_args(field.annotation)):
            if isinstance(below, type) and issubclass(below, BaseModel) and below is not ReplicaRange:
                yield from keys_of(below, f"{prefix}{name}{'[]' if is_list else ''}.")


PLACEHOLDERS = ("key", "trainer.lerning_rate", "num_steps", "policy_store.path")
"""`key=value`, and what errors are shown with."""
NO_METRICS = ("call", "extra", "heldout", "sluice")
"""What else has a slash in the trainer's code: keys of the ranks' store, columns of a table, a set of an evaluation, a thread."""
ALL_KEYS = {*keys_of(Config), *keys_of(SftConfig), "trainer.preset"}


# The site.


@pytest.mark.slow
def test_the_reference_names_every_key_of_the_config(site: Path) -> None:
    code = re.compile(r'<span class="pre">([\w.\[\]]+)</span>')
    shown = set(code.findall((site / "reference" / "configuration.html").read_text()))
    assert len(shown) > 100
    assert set(keys_of(Config)) <= shown
    ours = {key for key in keys_of(SftConfig) if not key.startswith(("trainer.", "model."))} - {"trainer", "model"}
    assert {*ours, *RL_ONLY} <= set(code.findall((site / "reference" / "sft.html").read_text()))


@pytest.mark.slow
def test_the_script_builds_a_site_that_needs_nothing_else_and_draws_formulas_without_a_script(site: Path) -> None:
    assert f"python {' '.join(BUILD)} docs build/docs" in (ROOT / "scripts" / "docs").read_text()
    assert "build/" in (ROOT / ".gitignore").read_text().splitlines()
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50 and site / "index.html" in pages
    elsewhere = re.compile(r"""<(?:script|link|img|iframe|source|use)\b[^>]*\b(?:src|href)=["'](?:https?:)?//""")
    for page in pages:
        assert not elsewhere.search(page.read_text()), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text()), sheet
    algorithms = (site / "algorithms.html").read_text()
    assert algorithms.count("<math ") > 10
    assert "MathJax" not in algorithms


@pytest.mark.slow
def test_every_link_within_the_site_leads_somewhere(site: Path) -> None:
    pages = [page.resolve() for page in site.rglob("*.html")]
    ids, links = {page: {*re.findall(r'\bid="([^"]+)"', page.read_text()), ""} for page in pages}, 0
    for page in pages:
        for href in re.findall(r'<a\b[^>]*\bhref="([^"]*)"', page.read_text()):
            if re.match(r"https?:|mailto:", href):
                continue
            path, _, anchor = href.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {href}"
            assert target.suffix != ".html" or anchor in ids[target], f"{page.name}: {href}"
            links += 1
    assert links > 3000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_a_reader_without_a_network_finds_a_key_in_both_themes_on_a_phone(site: Path) -> None:
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        backgrounds = set()
        for theme in ("light", "dark"):
            context = browser.new_context(color_scheme=theme, viewport={"width": 390, "height": 844})
            asked: list[str] = []
            page = context.new_page()
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            for name in ("index", "failures", "reference/configuration", "algorithms"):
                page.goto((site / f"{name}.html").as_uri())
                assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            page.goto((site / "search.html").as_uri() + "?q=pickup_alarm_s")
            page.get_by_role("link", name="Configuration", exact=True).last.wait_for(timeout=30_000)
            assert page.locator("ul.search li").count() > 0
            assert all(url.startswith(("file:", "data:")) for url in asked)
            context.close()
        assert len(backgrounds) == 2
        browser.close()


# What the pages name.


NEEDED = {
    "model": {"path": "m"},
    "dataset": {"path": "d.jsonl"},
    "reward": {"functions": [{"function": "sluice.workers.rewards.MathReward"}]},
}


def configs(path: Path) -> Iterator[dict[str, Any]]:
    """The YAML blocks of a page that are ours."""
    for text in blocks(path, "yaml", also_not_run=True):
        data = yaml.safe_load(text)
        assert isinstance(data, dict), text
        if not ANOTHERS.match(text):
            yield data


@for_each("path", PAGES)
def test_yaml_blocks_load_as_a_config(path: Path) -> None:
    for data in configs(path):
        is_sft = "batch_size" in data
        parse_as(SftConfig if is_sft else Config, yaml.safe_dump(data if is_sft else NEEDED | data))


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_blocks_run_and_the_rewards_that_the_page_configures_load(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for text in blocks(path, "python"):
        if named := re.match(r"# (\w+\.py)", text):
            (tmp_path / named[1]).write_text(text)
        exec(compile(text, str(path), "exec"), {"__name__": "docs"})
    for data in configs(path):
        if "reward" in data:
            load_reward_functions(parse_as(Config, yaml.safe_dump(NEEDED | data)).reward.functions)
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)  # another test has a my_rewards of its own


@for_each("path", PAGES)
def test_commands_exist_with_the_options_that_are_shown(path: Path) -> None:
    known = dict(every_command(cli))
    for line in code_of(path):
        for typed in re.findall(r"(?<![\w/.:-])(?<!-n )(?<!-A )sluice ([a-z][^#&;`]*)", line):
            words = tuple(typed.split())
            name = words[:2] if words[:2] in known else words[:1]
            assert name in known, f"sluice {typed}"
            options = {option for p in known[name].params for option in p.opts} | {"--help", "-h"}
            shown = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", typed)) if name != ("worker",) else set()
            assert shown <= options, f"sluice {typed}"
            settings = set(re.findall(r"[ ']([a-z_]+(?:\.[a-z_]+)*)=", typed))
            assert settings <= ALL_KEYS | {*SHORT, *PLACEHOLDERS}, f"sluice {typed}"


@for_each("path", [DOCS / "coming_from" / f"{name}.md" for name in ("trl", "verl", "torchforge")])
def test_every_key_of_ours_in_the_tables_of_other_projects_exists(path: Path) -> None:
    count = 0
    _, _, text = path.read_text().partition("## Keys\n")
    for row in re.findall(r"^\|(?:[^|\n]+)\|([^|\n]+)\|", text.partition("\n## ")[0], re.M):
        for key in re.findall(r"`([^`:]+)(?:: [^`]*)?`", row):
            assert key in ALL_KEYS, key
            count += 1
    assert count > 25


@for_each("path", PAGES)
def test_tests_and_files_that_are_named_exist(path: Path) -> None:
    files = list((ROOT / "tests").glob("*.py"))
    defined = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}
    defined |= {file.stem for file in files}
    for code in re.findall(r"`([^`\n]+)`", path.read_text()):
        if code != "test_list" and re.fullmatch(r"test_\w+(\[\w+\])?", code):  # a column of MBPP
            assert code.partition("[")[0] in defined, code
        if re.fullmatch(r"(common|workers|trainer|dashboard|scripts|tests|benchmarks|config|docs)/[\w./-]+", code):
            assert (ROOT / code).exists(), code


def test_every_stall_and_every_alarm_has_a_section_that_its_alert_names() -> None:
    text = (DOCS / "runbook.md").read_text()
    sections = set(re.findall(r"^### `(\w+)`$", text, re.M))
    assert sections == {*STALL_KINDS, *ALARM_KINDS}
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^### ([\w ]+)$", text, re.M)}
    rules = yaml.safe_load((ROOT / "config" / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    for rule in rules:
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert page == "docs/runbook.md"
        assert anchor in sections | headings, rule["alert"]
        kind = re.search(r'kind="(\w+)"', rule["expr"])
        assert kind is None or kind[1] == anchor


def test_every_environment_variable_is_explained() -> None:
    explained = (DOCS / "reference" / "environment.md").read_text()
    layers = ("common", "workers", "trainer", "dashboard", "scripts")
    files = [p for layer in layers for p in (ROOT / layer).rglob("*") if p.is_file() and p.suffix != ".pyc"]
    files.append(ROOT / "docker-compose.yml")
    named = {name for path in files for name in re.findall(r"\bSLUICE_[A-Z_]+", path.read_text())}
    assert len(named) > 10
    assert {name for name in named if f"`{name}`" not in explained} == set()


def test_every_metric_of_a_step_is_explained() -> None:
    """Names as they stand in the trainer's code; `{...}` there is `<...>` on the page."""
    explained = (DOCS / "reference" / "metrics.md").read_text()
    literal = re.compile(r'f?"((?:[a-z_]+|\{)[\w{}.@]*/[\w{}./@]+)"')
    named = {name for path in (ROOT / "trainer").glob("*.py") for name in literal.findall(path.read_text())}
    metrics = {name for name in named if name.partition("/")[0] not in NO_METRICS}
    assert len(metrics) > 40
    patterns = [re.sub(r"<[^>]+>", "X", name) for name in re.findall(r"`([a-z_]+/[^`]+)`", explained)]
    missing = {name for name in metrics if re.sub(r"\{[^}]+\}", "X", name) not in patterns}
    assert missing == set()


def test_the_readme_is_read_in_minutes_and_every_figure_in_it_is_a_recorded_one() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    assert len(text.split()) <= 1200
    found = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    worst = max(found["chaos"]["runs"], key=lambda run: run["signals"])
    kills = sum(n for name, n in worst["signals_by_role"].items() if name.endswith("SIGKILL"))
    greedy = [run for run in found["staleness"]["runs"] if (run["age"], run["learning_rate"]) == (2, 0.001)]
    at_age_2 = {kind: fmean(run["greedy"] for run in greedy if run["treatment"] == kind) for kind in ("bypass", "none")}
    codec, pause = (found["publication"]["by_lr"]["1e-06"][part] for part in ("codec", "directory"))
    with_start = found["quickstart"]["headline"]["to_threshold_with_start_up_s"]
    for figure in (
        f"{worst['signals']} signals in one run, {kills} of them SIGKILL",
        f"{worst['lost']} groups lost, {worst['trained_twice']} trained twice",
        f"accuracy {worst['eval_before']:g} to {worst['eval_after']:g}",
        f"accuracy {at_age_2['bypass']:.2f} with the default correction, {at_age_2['none']:.2f} without",
        f"{100 * codec['payload_share']:.2f} % of the weights' bytes per step, {1000 * pause['pause_s']:.1f} ms",
        f"64 rollout workers (latencies simulated) take {found['pipeline']['workers']['64']['ratio']:.2f} of the ideal time",
        f"{min(with_start['trl_by_threads']):.1f} s from its start to 0.95 accuracy, ours {with_start['sluice']:.1f} s",
    ):
        assert figure in text, figure
