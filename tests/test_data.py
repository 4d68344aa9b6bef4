"""What a user looks at before training: `sluice data`, `sluice doctor CONFIG`; and the paths that a config may name."""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from builders import for_each, make_config
from click.testing import CliRunner, Result
from harness import ROOT, tiny_folder
from huggingface_hub import constants
from pydantic import BaseModel

from sluice.common.config import Config
from sluice.common.config.file import load_config
from sluice.common.config.sft import SftConfig
from sluice.common.errors import ConfigError
from sluice.common.models.assets import read_assets
from sluice.common.paths import PathKind, cache_problem, expanded, with_absolute_paths
from sluice.scripts import cli
from sluice.scripts.launcher.preflight import preflight
from sluice.scripts.launcher.run_folder import newest_run
from sluice.workers.prompt_source import Prompt, PromptSource

ROWS = [
    {"prompt": "1+1?", "target": 2, "info": {"x": 1}},
    {"prompt": "capital?\u001b[2J", "target": "Paris", "info": {"y": [1, 2]}},
    {"prompt": "no answer", "target": None},
    {"prompt": "long " * 200, "target": "x"},
    {"prompt": "big?", "target": 10**30},
]


@pytest.fixture(scope="module")
def tiny() -> Path:
    return tiny_folder()


@pytest.fixture
def config(tmp_path: Path, tiny: Path) -> Path:
    """A run over ROWS."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {
        "seed": 3,
        "model": {"path": str(tiny / "model")},
        "dataset": {"path": str(tmp_path / "rows.jsonl"), "max_req_tokens": 64},
        "sampling": {"max_res_tokens": 8},
        "reward": {"functions": "sluice.workers.rewards.MathReward"},
        "trainer": {"seq_len": 72},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def shown(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, arguments)


def test_data_shows_prompts_exactly_as_training_sees_them(config: Path) -> None:
    lines = [json.loads(line) for line in shown("data", str(config), "-n", "8", "--json").stdout.splitlines()]
    assert [line["cursor"] for line in lines] == list(range(8))
    read = load_config(config)
    tokenizer = read_assets(read.model.path).tokenizer()
    source = PromptSource(read.dataset, tokenizer, seed=read.seed)
    for line in lines:
        try:
            prompt = source.prompt_at(line["cursor"])
        except ConfigError as error:
            assert (
                line.keys() == {"cursor", "error"}
                and line["error"] == str(error)
                and "(target_column) is null" in str(error)
            )
            continue
        if not isinstance(prompt, Prompt):
            assert f"{prompt.num_tokens} tokens, more than dataset.max_req_tokens = 64" in line["error"]
            continue
        assert line["prompt_ids"] == prompt.prompt_ids.tolist()
        assert (line["prompt"], line["target"], line["columns"]) == (prompt.prompt, prompt.target, prompt.columns)
    assert {line.get("target") for line in lines} == {"2", "Paris", "1" + "0" * 30, None}
    assert {"x": 1} in [line["columns"]["info"] for line in lines if "columns" in line]


def test_data_shows_a_person_the_text_with_the_template_and_no_control_character(config: Path) -> None:
    output = shown("data", str(config), "-n", "5", "dataset.shuffle=off").output
    assert not set(output) & {chr(code) for code in [*range(32), *range(0x7F, 0xA0)] if chr(code) != "\n"}
    assert r"\u001b[2J<|im_end|>\n<|im_start|>assistant" in output
    assert '0  text     "<|im_start|>user\\n1+1?' in output
    assert (
        "tokens   " in output and 'target   "Paris"' in output and 'columns  {"target": 2, "info": {"x": 1}}' in output
    )
    assert "2  error    " in output and "row 2: column 'target'" in output


def test_what_data_cannot_read_at_all_is_an_error(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for override, message in (
        ("dataset.path=no.jsonl", "no such file"),
        ("model.path=~/no", "there is no such folder"),
    ):
        assert message in str(shown("data", str(config), override).exception)
    none_usable = shown("data", str(config), "-n", "2", "dataset.max_req_tokens=1")
    assert none_usable.stdout.count("tokens, more than") + none_usable.stdout.count("is null") == 2
    assert "none of the first 2 rows can be used" in str(none_usable.exception)


def test_doctor_lists_every_problem_and_exits_2(config: Path) -> None:
    assert shown("doctor", str(config), "dataset.shuffle=off").exit_code == 0
    overrides = [
        "trainer.lerning_rate=3",
        "sampling.temperature=0",
        "model.path=/nowhere",
        "dataset.prompt_column=promt",
        "dataset.target_column=y",
        "reward.functions=[a.b, nope.py:f, sluice.workers.rewards.ThinkingReward]",
        "trainer.loss.loss=none.py:f",
        "evaluation.datasets=[{name: first, dataset: {path: no.jsonl}}, {name: second, dataset: {path: no.csv}}]",
    ]
    found = shown("doctor", str(config), *overrides)
    problems = [line.removeprefix("problem  ") for line in found.output.splitlines() if line.startswith("problem")]
    assert found.exit_code == 2
    for part in (
        "unknown key 'trainer.lerning_rate'; did you mean 'learning_rate'?",
        "sampling.temperature=0",
        "model.path = '/nowhere': there is no such folder",
        "dataset.prompt_column = 'promt'",
        "did you mean 'prompt'?",
        "dataset.target_column = 'y'",
        "reward.functions: 'a.b'",
        "'nope.py:f'",
        "trainer.loss.loss",
        "evaluation.datasets[first].dataset.path = ",
        "evaluation.datasets[second].dataset.path = ",
    ):
        assert sum(part in problem for problem in problems) == 1, (part, problems)
    assert "not valid YAML" in shown("doctor", str(ROOT / "README.md")).output


def test_preflight_refuses_a_first_row_without_its_target(config: Path) -> None:
    assert preflight(load_config(config, ["dataset.shuffle=off"]))
    with pytest.raises(ConfigError, match=r"row 0: column 'target' \(target_column\) is null"):
        preflight(load_config(config, ["dataset.shuffle=off", "dataset.split='train[2:]'"]))


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")


@for_each("kind", [Config, SftConfig])
def test_every_key_with_a_path_is_marked_as_one(kind: type[BaseModel]) -> None:
    for key, field in keys_of(kind):
        is_path = key.endswith(("path", "_dir", "_folder"))
        assert is_path <= any(isinstance(mark, PathKind) for mark in field.metadata), key


def test_stored_paths_are_absolute_and_a_tilde_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "r.py").write_text("def f(completions): return [0.0]\n")
    (tmp_path / "set").mkdir()
    config = make_config(
        model={"path": "~/model"},
        dataset={"path": "set"},
        output_dir="~/out",
        code_folder="~",
        policy_store={"path": "store"},
        reward={"functions": ["~/r.py:f", "r.py:f", "pkg.mod.f"]},
        trainer={"objective": "~/r.py:f", "loss": {"loss": "grpo"}},
        evaluation={
            "datasets": [{"dataset": {"path": "~/e.jsonl"}}, {"name": "hub", "dataset": {"path": "openai/gsm8k"}}]
        },
    )
    stored, home = with_absolute_paths(config), str(tmp_path / "home")
    assert (stored.model.path, stored.dataset.path, stored.output_dir) == (
        f"{home}/model",
        f"{tmp_path}/set",
        f"{home}/out",
    )
    assert (stored.code_folder, stored.policy_store.path) == (home, f"{tmp_path}/store")
    assert [f.function for f in stored.reward.functions] == [f"{home}/r.py:f", f"{home}/r.py:f", "pkg.mod.f"]
    assert (stored.trainer.objective, stored.trainer.loss.loss) == (f"{home}/r.py:f", "grpo")
    assert [e.dataset.path for e in stored.evaluation.datasets] == [f"{home}/e.jsonl", "openai/gsm8k"]
    assert with_absolute_paths(stored) == stored
    sft = with_absolute_paths(SftConfig.model_validate({"model": {"path": "~/m"}, "dataset": {"path": "set"}}))
    assert (sft.model.path, sft.dataset.path, sft.output_dir) == (f"{home}/m", f"{tmp_path}/set", f"{tmp_path}/runs")
    assert "num_steps" not in sft.trainer.model_fields_set


def test_resume_takes_the_newest_run_of_that_config_and_of_no_other(tmp_path: Path) -> None:
    names = (
        "job-20260101-000000",
        "job-20260102-000000",
        "job-lora-20260103-000000",
        "job-2-20260104-000000",
        "job-mine",
    )
    for age, name in enumerate(reversed(names)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
        os.utime(tmp_path / name / "config.yaml", (100 - age, 100 - age))
    os.utime(tmp_path / names[1] / "config.yaml", (200, 200))
    config = make_config(output_dir=str(tmp_path))
    for stem, expected in (("job", names[1]), ("job-lora", names[2]), ("job-2", names[3])):
        assert newest_run(config.output_dir, prefix=stem) == expected
    for stem in ("jo", "job-mine", "j*", "lora"):
        with pytest.raises(ConfigError, match="--resume: no run of"):
            newest_run(config.output_dir, prefix=stem)


def test_a_home_or_cache_folder_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_problem() == ""
    file = tmp_path / "file"
    file.write_text("")
    pq.write_table(pa.table({"prompt": ["a"], "target": ["1"]}), tmp_path / "rows.parquet")
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(file))
        patch.setenv("HF_DATASETS_CACHE", str(file / "datasets"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", file / "datasets")
        with pytest.raises(
            ConfigError, match=rf"cannot be read: .*the cache folder {file}/datasets cannot be written \(HOME is"
        ):
            PromptSource(make_config(dataset={"path": str(tmp_path / "rows.parquet")}).dataset, None, seed=0)
        (tmp_path / "rows.csv").write_text("prompt,target\na,1\n")  # needs none
        PromptSource(make_config(dataset={"path": str(tmp_path / "rows.csv")}).dataset, None, seed=0).close()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(file / "hub"))
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        with pytest.raises(ConfigError, match=rf"model\.path = .* \(the cache folder {file}/hub cannot be written"):
            read_assets(str(tmp_path / "model"))
    with monkeypatch.context() as patch:
        patch.delenv("HOME")
        patch.setattr(pwd, "getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
        with pytest.raises(ConfigError, match=r"~/data: HOME is not set and this user has no home folder: set HOME"):
            expanded("~/data")
    with pytest.raises(ConfigError, match=r"~nobody_there/data: there is no user nobody_there"):
        expanded("~nobody_there/data")


def test_doctor_names_folders_that_cannot_hold_files(config: Path) -> None:
    done = shown("doctor", str(config), "policy_store.path=/dev/null", "output_dir=/dev/null/runs")
    assert "policy_store.path = '/dev/null': /dev/null is not a folder" in done.output
    assert "output_dir = '/dev/null/runs': /dev/null is not a folder" in done.output
    assert done.exit_code == 2
