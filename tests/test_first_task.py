"""From an empty folder to a task of one's own: `sluice init`, shipped configs, runs without a file, mistyped words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import for_each, make_config
from click.testing import CliRunner, Result
from harness import ROOT, metrics_of, only_run, sluice, tiny_folder

from sluice.common.config import DatasetConfig, RewardFunction
from sluice.common.config.file import find_config, load_config, parse_config, shipped_configs
from sluice.common.errors import ConfigError
from sluice.common.paths import with_absolute_paths
from sluice.scripts import cli
from sluice.workers.prompt_source import LeftOut, Prompt, PromptSource
from sluice.workers.rewards.loading import load_reward_functions


@pytest.fixture(scope="module")
def tiny() -> Path:
    return tiny_folder()


@pytest.fixture
def folder(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, but for the tiny model where `init` looks for it."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(tiny)
    monkeypatch.setattr("sluice.scripts.commands.init.prepare_tiny", lambda folder: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, arguments)


def rows_file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_init_writes_a_task_that_runs_as_it_is(folder: Path) -> None:
    made = typed("init", "--yes")
    assert made.exit_code == 0, made.output
    assert "sluice run run.yaml" in made.output
    done = sluice("run", "run.yaml", "trainer.num_steps=6", "evaluation.every_steps=3", cwd=folder)
    assert done.returncode == 0, done.stderr
    run = only_run(folder)
    assert json.loads((run / "summary.json").read_text())["ledger_holds"]
    assert {"reward/math/mean", "reward/short/mean"} <= metrics_of(run)[-1].keys()
    kept = (folder / "run.yaml").read_text()
    again = typed("init", "--yes")
    assert "exists, and init overwrites nothing" in str(again.exception) and (folder / "run.yaml").read_text() == kept


@for_each("task", ["math", "code", "custom"])
def test_every_task_of_init_is_a_config_whose_rewards_load(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sluice.scripts.commands.init.prepare_tiny", lambda folder: None)
    words = rows_file(tmp_path / "words.jsonl", [{"question": f"q{i}", "answer": f"so\n#### {i}"} for i in range(20)])
    for number, flags in enumerate(([], ["--data", words], ["--model", "org/model"])):
        made = typed("init", f"{task}{number}", "--task", task, "--yes", *flags)
        assert made.exit_code == 0, (made.output, made.exception)
        config = with_absolute_paths(load_config(tmp_path / f"{task}{number}" / "run.yaml"))
        load_reward_functions(config.reward.functions, code_folder=config.code_folder)
        if flags and flags[0] == "--data":
            assert (config.dataset.prompt_column, config.dataset.target_delimiter) == (
                "question",
                "#### " if task != "code" else None,
            )


def test_shipped_configs_are_found_by_name_and_a_users_file_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "gsm8k_qwen3_1.7b", "sft/sums"} <= set(shipped_configs())
    assert find_config("quickstart") == ROOT / "common" / ".." / "config" / "quickstart.yaml" or find_config(
        "quickstart"
    ).samefile(ROOT / "config" / "quickstart.yaml")
    assert load_config("quickstart", ["trainer.num_steps=3"]).trainer.num_steps == 3
    with pytest.raises(ConfigError, match=r"cannot read config file quikstart: .*did you mean 'quickstart'\?"):
        load_config("quikstart")
    (tmp_path / "quickstart").write_text((ROOT / "config" / "gsm8k_qwen3_1.7b.yaml").read_text())
    assert load_config("quickstart").model.path == "Qwen/Qwen3-1.7B"


def test_a_run_without_a_file(folder: Path) -> None:
    (folder / "rewards.py").write_text(
        "def brief(completions, **_):\n    return [1 / (1 + len(c)) for c in completions]\n"
    )
    model = ["--model", "runs/tiny/model", "--data", "runs/tiny/train.jsonl"]
    settings = ["dataset.max_req_tokens=24", "sampling.max_res_tokens=16", "trainer.seq_len=64", "trainer.num_steps=2"]
    rewards = ["--reward", "rewards.py:brief", "--reward", "math"]
    done = sluice("run", *model, *rewards, *settings, "replay_buffer.batch_size=2", "--name", "bare", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert {"reward/brief/mean", "reward/math/mean"} <= metrics_of(folder / "runs" / "bare")[-1].keys()
    assert "resumes" not in done.stderr
    for missing, message in (
        ([], "name what to run: a config file"),
        (model, "needs --model, --data and --reward: add --reward"),
        (["trainer.num_steps=2"], "name what to run"),
    ):
        refused = sluice("run", *missing, cwd=folder)
        assert refused.returncode == 2 and message in refused.stderr


@for_each(
    ("override", "message"),
    [
        ("num_steps=5", "unknown key 'num_steps'; did you mean 'trainer.num_steps'?"),
        ("group_size=5", "unknown key 'group_size'; did you mean 'sampling.group_size'?"),
        ("temperatur=5", "unknown key 'temperatur'; did you mean 'sampling.temperature'?"),
        ("trainer.group_size=5", "unknown key 'trainer.group_size'; did you mean 'sampling.group_size'?"),
        ("trainer.lerning_rate=5", "unknown key 'trainer.lerning_rate'; did you mean 'learning_rate'?"),
    ],
)
def test_a_key_in_the_wrong_place_is_answered_with_the_right_one(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", [override])
    assert message in str(caught.value)


def test_a_mistyped_model_is_one_paragraph_at_once(folder: Path) -> None:
    for path, hints in (
        ("runs/tiny/modle", ["there is no", "Did you mean 'runs/tiny/model'?"]),
        ("./runs/tiny/modle", ["there is no such folder", "Did you mean 'runs/tiny/model'?"]),
    ):
        refused = sluice("run", "quickstart", f"model.path={path}", cwd=folder, timeout=60, HF_HUB_OFFLINE="1")
        assert refused.returncode == 2
        error = refused.stderr[refused.stderr.index("error: ") :]
        assert all(hint in error for hint in hints) and len(error.splitlines()) == 1, error


@for_each(
    ("entry", "name"),
    [("math", "math"), ("thinking", "thinking"), ("code", "code"), ("sluice.workers.rewards.MathReward", "MathReward")],
)
def test_rewards_of_ours_have_short_names(entry: str, name: str) -> None:
    (reward,) = load_reward_functions([RewardFunction(function=entry)])
    assert reward.name == name
    with pytest.raises(
        ConfigError,
        match=r"'maths' is none of Sluice's rewards; did you mean 'math'\? One of your own is rewards.py:maths",
    ):
        load_reward_functions([RewardFunction(function="maths")])


class _Bytes:
    """A tokenizer of bytes: what these tests read is the text."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def prompts(path: str, *, count: int = 2, **config: Any) -> list[Any]:
    reader = PromptSource(DatasetConfig(path=path, shuffle=False, **config), _Bytes(), seed=0)  # type: ignore[arg-type]
    return [reader.prompt_at(i) for i in range(count)]


def test_a_template_makes_the_prompt_of_columns_and_they_stay_columns(tmp_path: Path) -> None:
    rows = [{"word": "{gate}", "n": 2, "target": "x"}, {"word": "sluice", "n": [1], "target": "y"}]
    path = rows_file(tmp_path / "rows.jsonl", rows)
    first, second = prompts(path, prompt_template="Reverse {word} {{{n}}} {word}")
    assert (first.prompt, second.prompt) == ("Reverse {gate} {2} {gate}", "Reverse sluice {[1]} sluice")
    assert first.columns == rows[0]
    for template, message in (
        ("Reverse", "names no column, so all prompts would be the same"),
        ("Reverse {}", "names no column; write {column}"),
        ("Reverse {word!r}", "names no column; write {column}"),
        ("Reverse {word", "write {column} for a column"),
    ):
        with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
            DatasetConfig(path=path, prompt_template=template)
    with pytest.raises(ConfigError, match=r"dataset\.prompt_template = 'wrod': .*did you mean 'word'"):
        prompts(path, prompt_template="{wrod}")
    with pytest.raises(ValueError, match="prompt_column has no effect with prompt_template"):
        make_config(dataset={"path": path, "prompt_template": "{word}", "prompt_column": "word"})
    with pytest.raises(ConfigError, match="put it in quotes"):
        parse_config(
            yaml.safe_dump({"model": {"path": "m"}, "reward": {"functions": "math"}})
            + "dataset: {path: d, prompt_template: {word}}"
        )


def test_a_function_makes_rows_of_rows_and_leaves_some_out(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", [{"q": str(i), "a": i} for i in range(4)])
    (tmp_path / "mine.py").write_text(
        "def shape(row):\n    return None if row['a'] % 2 else {'prompt': 'Q' + row['q'], 'target': row['a']}\n"
        "def broken(row):\n    return row['nothing']\n"
        "def text(row):\n    return 'text'\n"
    )
    for streaming in (False, True):
        found = prompts(path, count=4, function=f"{tmp_path / 'mine.py'}:shape", streaming=streaming)
        assert [p.prompt if isinstance(p, Prompt) else None for p in found] == ["Q0", None, "Q2", None]
        assert isinstance(found[1], LeftOut) and found[2].target == "2"
    with pytest.raises(ConfigError, match=rf"raised KeyError: 'nothing' at {tmp_path}/mine.py:4, for row 0"):
        prompts(path, function=f"{tmp_path / 'mine.py'}:broken")
    with pytest.raises(ConfigError, match=r"returned str for row 0 .* return the row as a dictionary, or None"):
        prompts(path, function=f"{tmp_path / 'mine.py'}:text")


def test_rows_that_a_function_leaves_out_are_counted_and_the_rest_is_trained(folder: Path) -> None:
    (folder / "mine.py").write_text("def even(row):\n    return row if int(row['target']) % 2 == 0 else None\n")
    config = yaml.safe_load((ROOT / "config" / "quickstart.yaml").read_text())
    config["dataset"] |= {"function": "mine.py:even"}
    config["evaluation"] = {"every_steps": 0}
    config["trainer"]["num_steps"] = 2
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    done = sluice("run", "job.yaml", "--name", "even", cwd=folder)
    assert done.returncode == 0, done.stderr
    ledger = json.loads((folder / "runs" / "even" / "summary.json").read_text())["ledger"]
    assert ledger["holds"]
    assert ledger["dropped"]["left_out"] > 0 and ledger["trained"] == 16
