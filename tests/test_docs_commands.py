"""Every command in the docs is run, by a test that is named here or by this file, or is marked as not run, with the reason."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders import for_each
from harness import ROOT, environment, quickstart_config, sluice, tiny_folder
from test_docs import NOT_RUN, PAGES, blocks, name_of

RUN_BY_OTHERS = {
    r"sluice pause": "test_a_paused_run_stands_still_also_over_the_death_of_every_process",
    r"sluice resume": "test_a_paused_run_stands_still_also_over_the_death_of_every_process",
    r"sluice set \S+=": "test_settings_act_within_a_step_and_every_step_can_be_computed_again",
    r"sluice drain": "test_a_drained_run_ends_in_good_order_and_is_gone_on_with",
    r"sluice eval(?! --list)": "test_evaluations_are_listed_by_version_and_the_best_checkpoint_is_kept",
    r".*sluice dashboard": "test_other_machines_need_the_token",
    r"sluice metrics .*--listen": "test_the_command_prints_and_serves_the_exposition",
    r"sluice quickstart": "test_held_out_accuracy_rises_and_what_is_printed_and_drawn_says_so",
    r"scripts/": "test_every_command_has_a_help_text_with_an_example_and_is_listed_in_its_section",
    r"sluice run quickstart": "test_held_out_accuracy_rises_and_what_is_printed_and_drawn_says_so",
    r"WANDB_MODE=offline sluice run": "test_trackers_and_completions_show_every_step",
    r"sluice runs compare": "test_runs_are_listed_with_what_they_hold_and_compared_side_by_side",
    r"sluice data quickstart": "test_commands_read_the_ended_run",
}
"""Commands that need a run in progress, never end, or train: the test that runs them."""
COMMAND = re.compile(
    r"^ *(?:\$ )?(?:[A-Z_]+=\S+ +)*(?:sluice|celery|scripts/\w+|pip|torchrun|docker|kubectl|sbatch) .*", re.M
)
IS_TRANSCRIPT = re.compile(
    r"^#(SBATCH|!)|^\[Service\]|^sluice run starts|: command not found|^run \S+ in |^scripts/quickstart +#", re.M
)


def is_command_of_ours(line: str) -> bool:
    return bool(COMMAND.match(line))


def existing_tests() -> set[str]:
    return {
        name
        for file in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }


def is_run_elsewhere(line: str) -> bool:
    return any(re.match(pattern, line.strip()) for pattern in RUN_BY_OTHERS)


@for_each("path", PAGES)
def test_commands_stand_in_blocks_that_are_run_or_say_why_not(path: Path) -> None:
    text = path.read_text()
    for block in re.finditer(r"^ *```(\w*)\n(.*?)^ *```$", text, re.M | re.S):
        if block[1] != "bash":
            is_shown = block[1] in ("python", "yaml", "ini") or IS_TRANSCRIPT.search(block[2])
            assert is_shown or not COMMAND.search(block[2]), f"not marked as bash: {block[2]}"
        elif mark := NOT_RUN.search(text[: block.start()]):
            assert len(mark[1]) > 10


def test_tests_that_are_said_to_run_commands_exist() -> None:
    assert set(RUN_BY_OTHERS.values()) <= existing_tests()
    for path in PAGES:
        named = re.findall(r"<!-- not run: .*?(?<![\w/])(test_\w+).*? -->", path.read_text())
        assert set(named) <= existing_tests(), path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has ended, `my-run`, as the pages have it."""
    folder = tmp_path_factory.mktemp("docs")
    heldout = {"path": str(tiny_folder(700) / "heldout.jsonl"), "max_req_tokens": 24}
    config = quickstart_config(
        folder,
        tiny=tiny_folder(700),
        trainer={"num_steps": 3},
        evaluation={"every_steps": 2, "datasets": [{"name": "heldout", "dataset": heldout, "num_prompts": 8}]},
        checkpoint={"every_steps": 1, "keep_best": "heldout/pass@1"},
    )
    done = sluice("run", str(config), "--name", "my-run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


RUNNABLE = [path for path in PAGES if any(map(is_command_of_ours, "".join(blocks(path, "bash")).splitlines()))]


@pytest.mark.slow
@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
def test_blocks_run(path: Path, finished: Path, tmp_path: Path) -> None:
    """In a copy of the folder, one after the other, without the lines that other tests run."""
    folder = tmp_path / "home"
    shutil.copytree(finished, folder)
    path_variable = f"{Path(sys.executable).parent}:{environment()['PATH']}"
    for block in blocks(path, "bash"):
        lines = [":" if is_run_elsewhere(line) else line for line in block.replace("\\\n", " ").splitlines()]
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
            cwd=folder,
            env=environment(PATH=path_variable),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{name_of(path)}\n{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
