"""What a program calls `sluice.train` with: rows, settings and functions as a run folder, or one paragraph of what is wrong."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from builders import for_each
from harness import ROOT, environment

import sluice
from sluice.common.config import DatasetConfig
from sluice.common.config.file import load_config
from sluice.common.data.rows import open_rows
from sluice.common.errors import ConfigError
from sluice.scripts.api.call import Call
from sluice.workers.rewards import MathReward

ROWS = [{"prompt": "1+1", "target": "2", "level": 1}, {"prompt": "2+2", "target": "4", "level": None}]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(**given: Any) -> Path:
    """The run folder of a call."""
    settings = {"model": "some/model", "dataset": ROWS, "rewards": MathReward, **given.pop("settings", {})}
    return Call(settings=given, **settings).make_folder(None)


def refusal(*, settings: dict[str, Any] | None = None, **given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Call(**{"model": "some/model", "dataset": ROWS, "rewards": MathReward, **given, "settings": settings or {}})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What the dataset workers read."""
    config = load_config(folder / "run.yaml").dataset
    table = open_rows(DatasetConfig(path=config.path, shuffle=False), seed=0, section="dataset")
    assert table.num_rows is not None
    return [table.row_at(cursor)[0] for cursor in range(table.num_rows)]


def test_importing_sluice_loads_nothing_and_every_name_is_there() -> None:
    probe = (
        "import sys, sluice; print(len([m for m in sys.modules if m.startswith('sluice.')]), 'pydantic' in sys.modules)"
    )
    argv = [sys.executable, "-c", probe]
    done = subprocess.run(argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["0", "False"]
    assert all(getattr(sluice, name) for name in sluice.__all__) and set(sluice.__all__) <= set(dir(sluice))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        sluice.trian  # noqa: B018


def test_a_call_becomes_a_folder_that_only_its_user_reads() -> None:
    folder = made(trainer__learning_rate=1e-5, replay_buffer={"batch_size": 4}, settings={"steps": 7, "group_size": 3})
    config = load_config(folder / "run.yaml")
    assert folder.name.startswith("model-") and folder.parent == Path("runs").resolve()
    assert (config.model.path, config.trainer.num_steps, config.sampling.group_size) == ("some/model", 7, 3)
    assert (config.trainer.learning_rate, config.replay_buffer.batch_size) == (1e-5, 4)
    assert config.reward.functions[0].function == "sluice.workers.rewards.math_reward:MathReward"
    assert config.code_folder == str(Path.cwd())
    assert rows_of(folder) == ROWS
    assert not [path for path in (folder, *folder.iterdir()) if stat.S_IMODE(path.stat().st_mode) & 0o077]


def test_settings_may_be_written_in_four_ways() -> None:
    for given in (
        {"trainer__learning_rate": 0.5},
        {"trainer": {"learning_rate": 0.5}},
        {"trainer.learning_rate": 0.5},
        {"settings": {"trainer.learning_rate": 0.5}},
    ):
        call = Call(model="m", dataset="d.jsonl", rewards="a.b", settings=given)
        assert call.config.trainer.learning_rate == 0.5


def test_a_config_file_is_the_base_of_what_is_given() -> None:
    Path("job.yaml").write_text(
        "model: {path: other/model}\ndataset: {path: d.jsonl}\nreward: {functions: [sluice.workers.rewards.MathReward]}\n"
        "trainer: {num_steps: 3, learning_rate: 0.25}\n"
    )
    folder = Call(config="job.yaml", steps=9, settings={"dataset__prompt_column": "q"}).make_folder(None)
    config = load_config(folder / "run.yaml")
    assert folder.name.startswith("job-")
    assert (config.model.path, config.trainer.num_steps, config.trainer.learning_rate) == ("other/model", 9, 0.25)
    assert (config.dataset.prompt_column, config.dataset.path) == ("q", "d.jsonl")


def test_what_is_wrong_is_one_paragraph() -> None:
    for text, *parts in (
        (
            refusal(settings={"trainer__lerning_rate": 1}),
            "sluice.train: unknown key 'trainer.lerning_rate'",
            "'learning_rate'",
        ),
        (refusal(settings={"trainer.num_steps": 3}, steps=4), "trainer.num_steps is given twice"),
        (refusal(group_size=1), "group_size=1"),
        (refusal(model=None), "missing key 'model'"),
        (refusal(dataset=[]), "dataset has no rows"),
        (refusal(dataset=["a prompt"]), "dataset[0] is of type str", "{'prompt':"),
        (refusal(dataset=[*ROWS, {"prompt": object()}]), "dataset[2]['prompt']", "object"),
        (refusal(dataset=iter(ROWS)), "list_iterator", "a list of rows"),
        (
            refusal(dataset=datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))),
            "splits train",
            "dataset['train']",
        ),
        (
            refusal(settings={"evaluation": {"datasets": [{"dataset": {"path": object()}}]}}),
            "evaluation.datasets: an object of type object",
        ),
        (refusal(settings={"code_folder": print}), "code_folder: print is not written in Python"),
        (refusal(rewards=[print]), "rewards[0]: print is not written in Python"),
        (refusal(config="nowhere.yaml"), "cannot read config file nowhere.yaml"),
    ):
        assert all(part in text for part in parts), text


@for_each(
    "dataset",
    [
        ROWS,
        tuple(ROWS),
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list([ROWS[1], *ROWS]).select([1, 2]),
        pandas.DataFrame(ROWS, index=[5, 9]).astype({"level": "Int64"}),
    ],
)
def test_rows_of_every_kind_arrive(dataset: Any) -> None:
    assert rows_of(made(settings={"dataset": dataset})) == ROWS


def test_values_of_other_types_become_those_of_json() -> None:
    row = {
        "prompt": "a",
        "target": Decimal("1.5"),
        "when": date(2026, 1, 2),
        "n": np.int64(3),
        "v": np.array([1.0, 2.0]),
    }
    folder = made(settings={"dataset": [row]})
    (line,) = (folder / "rows.jsonl").read_text().splitlines()
    assert json.loads(line) == {"prompt": "a", "target": "1.5", "when": "2026-01-02", "n": 3, "v": [1.0, 2.0]}


def test_rows_without_a_target_have_none_where_functions_alone_score_them() -> None:
    rows = [{"prompt": "a", "answer": "b"}]
    assert load_config(made(settings={"dataset": rows}) / "run.yaml").dataset.target_column is None
    by_name = made(settings={"dataset": rows, "rewards": ["sluice.workers.rewards.MathReward"]})
    assert load_config(by_name / "run.yaml").dataset.target_column == "target"  # and preflight says that there is none
    named = made(settings={"dataset": rows}, dataset__target_column="answer")
    assert load_config(named / "run.yaml").dataset.target_column == "answer"


def test_any_key_may_hold_a_function_or_a_number_of_numpy() -> None:
    config = Call(
        model="m",
        dataset=ROWS,
        rewards="a.b",
        settings={"trainer__loss__loss": MathReward, "trainer__num_steps": np.int64(5)},
    ).config
    assert config.trainer.loss.loss == "sluice.workers.rewards.math_reward:MathReward"
    assert config.trainer.num_steps == 5


def test_entries_keep_their_keys_and_two_runs_of_a_name_are_refused() -> None:
    entry = {"function": MathReward, "kwargs": {"tolerance": 0.1}, "weight": 2.0}
    call = Call(model="m", dataset=ROWS, rewards=[entry, "a.b:c"], settings={"reward__aggregation": "sum"})
    first, second = call.config.reward.functions
    assert (first.kwargs, first.weight, second.function) == ({"tolerance": 0.1}, 2.0, "a.b:c")
    call.make_folder("mine")
    with pytest.raises(ConfigError, match="'mine' is in use"):
        call.make_folder("mine")
    with pytest.raises(ConfigError, match="run name"):
        call.make_folder("../other")
