"""Prompts by cursor: order, epochs, streams, templates, targets, and every way a dataset can be wrong."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.csv import write_csv
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sluice.common.config import DatasetConfig
from sluice.common.errors import ConfigError
from sluice.workers.prompt_source import Prompt, PromptSource, TooLong

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = ["be", "brief", "what", "is", "hello", *(str(i) for i in range(30))]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    datasets.enable_progress_bars()


def tokenizer(*, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per word."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", *SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", additional_special_tokens=SPECIAL)
    fast.chat_template = template
    return fast


def rows(n: int = 10) -> list[dict[str, Any]]:
    return [{"prompt": f"what is {i}", "target": str(i), "level": i % 3} for i in range(n)]


def jsonl(folder: Path, content: list[dict[str, Any]]) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def source(path: str, *, seed: int = 0, template: str | None = TEMPLATE, **config: Any) -> PromptSource:
    return PromptSource(DatasetConfig(path=path, **config), tokenizer(template=template), seed=seed)


def prompt(prompts: PromptSource, cursor: int = 0) -> Prompt:
    found = prompts.prompt_at(cursor)
    assert isinstance(found, Prompt), found
    return found


def targets(prompts: PromptSource, cursors: Any) -> list[int]:
    return [int(prompt(prompts, cursor).target or "") for cursor in cursors]


def decoded(found: Prompt) -> str:
    return str(tokenizer().decode(found.prompt_ids))


def test_every_epoch_visits_each_row_once_in_its_own_order(tmp_path: Path) -> None:
    prompts = source(jsonl(tmp_path, rows()), seed=3)
    epochs = [targets(prompts, range(start, start + 10)) for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(10))
    assert (prompts.num_rows, prompts.epoch_of(9), prompts.epoch_of(10)) == (10, 0, 1)


def test_order_depends_on_the_seed_and_nothing_else(tmp_path: Path) -> None:
    path = jsonl(tmp_path, rows())
    in_order = targets(source(path, seed=3), range(20))
    backwards = targets(source(path, seed=3), reversed(range(20)))
    assert backwards[::-1] == in_order
    assert targets(source(path, seed=4), range(20)) != in_order


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "folder"])
def test_local_files_of_every_kind_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    table = pa.Table.from_pylist(rows())
    if kind == "folder":
        path.mkdir()
        pq.write_table(table, path / "train-00000-of-00001.parquet")
    elif kind == "parquet":
        pq.write_table(table, path)
    elif kind == "json":
        path.write_text(json.dumps(rows()))
    elif kind == "csv":
        write_csv(table, path)
    else:
        jsonl(tmp_path, rows())
    prompts = source(str(path), shuffle=False)
    assert prompts.num_rows == 10
    assert targets(prompts, range(30)) == [*range(10)] * 3, "in file order"
    assert prompt(prompts, 5).columns["level"] == 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("card", [False, True])
def test_a_hub_repository_on_disk_is_read_by_name_and_split(tmp_path: Path, streaming: bool, card: bool) -> None:
    for name, answer in (("main", "So #### 4"), ("socratic", "Why? #### 5")):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            table = pa.table({"question": [f"{split} question"], "answer": [answer]})
            pq.write_table(table, tmp_path / name / f"{split}-00000-of-00001.parquet")
    if card:
        files = {n: [{"split": s, "path": f"{n}/{s}-*"} for s in ("train", "test")] for n in ("main", "socratic")}
        configs = [{"config_name": name, "data_files": data_files} for name, data_files in files.items()]
        (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    columns: dict[str, Any] = {"prompt_column": "question", "target_column": "answer", "target_delimiter": "#### "}
    found = prompt(source(str(tmp_path), name="socratic", split="test", streaming=streaming, **columns))
    assert (found.prompt, found.target, found.columns) == ("test question", "5", {"answer": "Why? #### 5"})


def test_text_prompts_go_through_the_chat_template_or_stay_plain_without_one(tmp_path: Path) -> None:
    path = jsonl(tmp_path, rows())
    found = prompt(source(path, shuffle=False, system_prompt="be brief"), 7)
    assert decoded(found) == "<|system|> be brief <|end|> <|user|> what is 7 <|end|> <|assistant|>"
    assert (found.prompt_ids.dtype, found.prompt) == (np.int32, "what is 7")
    assert decoded(prompt(source(path, shuffle=False, chat_template=False))) == "what is 0"
    assert decoded(prompt(source(path, shuffle=False, template=None))) == "what is 0"
    plain = source(path, shuffle=False, chat_template=False, system_prompt="be brief")
    assert decoded(prompt(plain)) == "be brief what is 0"


def test_conversational_prompts_stay_messages(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 1"}]
    path = jsonl(tmp_path, [{"prompt": messages, "target": "1"}])
    found = prompt(source(path))
    assert found.prompt == messages
    assert decoded(found) == "<|system|> be brief <|end|> <|user|> what is 1 <|end|> <|assistant|>"
    with pytest.raises(ConfigError, match="need a chat template: set chat_template to true"):
        prompt(source(path, chat_template=False))
    with pytest.raises(ConfigError, match="need a chat template: the tokenizer has none"):
        prompt(source(path, template=None))
    with pytest.raises(ConfigError, match=r"dataset\.system_prompt has no effect"):
        prompt(source(path, system_prompt="be brief"))
    with pytest.raises(ConfigError, match="row 0: the chat template refuses it: no system role"):
        prompt(source(path, template="{{ raise_exception('no system role') }}"))


def test_prompts_over_the_bound_are_marked(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "hello", "target": "1"}, {"prompt": "what is 3", "target": "3"}])
    prompts = source(path, shuffle=False, chat_template=False, max_req_tokens=2)
    assert prompts.prompt_at(1) == TooLong(cursor=1, num_tokens=3)
    assert isinstance(prompts.prompt_at(2), Prompt)
    exact = source(path, shuffle=False, chat_template=False, max_req_tokens=3)
    assert isinstance(exact.prompt_at(1), Prompt)


def test_the_target_follows_the_last_delimiter(tmp_path: Path) -> None:
    answers = "a #### b\n#### 1,234\n", "12"
    path = jsonl(tmp_path, [{"prompt": "hello", "target": answer} for answer in answers])
    prompts = source(path, shuffle=False, target_delimiter="#### ")
    assert prompt(prompts).target == "1,234"
    with pytest.raises(ConfigError, match="row 1: column 'target' lacks the delimiter '#### ', it ends with '12'"):
        prompts.prompt_at(1)


@pytest.mark.parametrize(("value", "expected"), [(42, "42"), (0.5, "0.5"), ("x ", "x "), (["a", "b"], '["a", "b"]')])
def test_targets_become_text(tmp_path: Path, value: Any, expected: str) -> None:
    path = jsonl(tmp_path, [{"prompt": "hello", "target": value}])
    assert prompt(source(path)).target == expected
    found = prompt(source(path, target_column=None))
    assert (found.target, found.columns) == (None, {"target": value})


def test_columns_are_json_values(tmp_path: Path) -> None:
    plain = {"target": "1", "nested": {"a": [1, None], "b": 2.5}, "flag": True}
    row = {"prompt": "hello", **plain, "date": datetime.date(2026, 1, 2), "blob": b"\x00"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "data.parquet")
    assert prompt(source(str(tmp_path / "data.parquet"))).columns == {**plain, "date": "2026-01-02"}


def test_a_stream_shuffles_in_a_window_and_ends_its_epochs(tmp_path: Path) -> None:
    config: dict[str, Any] = {"streaming": True, "shuffle_buffer": 4, "seed": 1}
    prompts = source(jsonl(tmp_path, rows()), **config)
    epochs = [targets(prompts, range(start, start + 10)) for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(10))
    assert (prompts.num_rows, prompts.epoch_of(9), prompts.epoch_of(29)) == (None, 0, 2)


def test_a_stream_gives_the_same_row_however_a_cursor_is_reached(tmp_path: Path) -> None:
    path = jsonl(tmp_path, rows())
    config: dict[str, Any] = {"streaming": True, "shuffle_buffer": 4}
    in_order = targets(source(path, **config), range(30))
    assert all(in_order.index(i) >= i - 4 for i in range(10))  # no row overtakes more than the window of 4
    assert targets(source(path, **config), [1, 4, 8, 13, 29]) == [in_order[i] for i in (1, 4, 8, 13, 29)]
    assert targets(source(path, **config), [27]) == [in_order[27]]  # resumed in a fresh process
    back_and_forth = [12, 3, 3, 25, 0, 19]
    assert targets(source(path, **config), back_and_forth) == [in_order[i] for i in back_and_forth]
    assert targets(source(path, **config, seed=5), range(30)) != in_order


def test_an_unshuffled_stream_keeps_file_order_and_opens_again_once_closed(tmp_path: Path) -> None:
    prompts = source(jsonl(tmp_path, rows()), streaming=True, shuffle=False)
    assert targets(prompts, [0, 3, 9, 10, 25, 3]) == [0, 3, 9, 0, 5, 3]
    prompts.close()
    assert targets(prompts, [4, 11]) == [4, 1]


def test_a_stream_that_breaks_is_not_taken_for_its_end(tmp_path: Path) -> None:
    prompts = source(jsonl(tmp_path, rows()), streaming=True, shuffle=False)
    whole = prompts._rows._rows

    class BreaksOnce:
        broken = False

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for i, row in enumerate(whole):
                if i == 2 and not self.broken:
                    self.broken = True
                    raise OSError("connection lost")
                yield row

    prompts._rows._rows = BreaksOnce()
    with pytest.raises(OSError, match="connection lost"):
        prompts.prompt_at(5)
    assert targets(prompts, [5, 6, 12]) == [5, 6, 2]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path, streaming: bool) -> None:
    path = jsonl(tmp_path, [{"question": "hello", "answer": "1"}])
    wrong, absent = (source(path, prompt_column=name, streaming=streaming) for name in ("qestion", "question"))
    with pytest.raises(
        ConfigError, match=r"dataset\.prompt_column = 'qestion'.* the columns question, answer; did you"
    ):
        wrong.prompt_at(0)
    with pytest.raises(ConfigError, match=r"target_column = 'target'.* set dataset\.target_column to one of them"):
        absent.prompt_at(0)
    config = DatasetConfig(path=path, prompt_column="x")
    with pytest.raises(ConfigError, match=r"evaluation\.datasets\.0\.dataset\.prompt_column = 'x'"):
        PromptSource(config, tokenizer(), seed=0, section="evaluation.datasets.0.dataset").prompt_at(0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"target": None}, r"row 1: column 'target' \(target_column\) is null"),
        ({"prompt": None}, r"row 1: column 'prompt' \(prompt_column\) is null"),
        ({"prompt": ""}, "row 1: the prompt is empty"),
        ({"prompt": 3}, "row 1: column 'prompt' holds int; a prompt is text or a list of messages"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    table = pa.Table.from_pylist([{"prompt": "hello", "target": "1"} | row] * 2)
    pq.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(ConfigError, match=message):
        source(str(tmp_path / "data.parquet"), shuffle=False, chat_template=False).prompt_at(1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_a_dataset_without_rows_is_refused(tmp_path: Path, streaming: bool, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    else:
        path.write_text({"jsonl": "", "json": "[]", "csv": "prompt,target\n"}[kind])
    with pytest.raises(ConfigError, match=r"dataset\.path = .* has no rows"):
        source(str(path), streaming=streaming).prompt_at(0)


@pytest.mark.parametrize(
    ("path", "config", "message"),
    [
        ("nowhere.jsonl", {}, r"dataset\.path = 'nowhere.jsonl': no such file or folder"),
        ("/no/such/folder", {}, "no such file or folder .*, nor is it a hub id"),
        ("notes.txt", {}, "is a file of unknown kind: use one of .jsonl, .json, .parquet, .csv"),
        ("empty", {}, "cannot be read: .*doesn't contain any data files"),
        ("data.jsonl", {"split": "test"}, "cannot be read: Unknown split"),
        ("data.jsonl", {"split": "test", "streaming": True}, "cannot be read: Bad split"),
        ("no-such/dataset", {}, "cannot be read: .*no-such/dataset"),
        ("broken.jsonl", {}, "cannot be read: JSON parse error"),
        ("broken.jsonl", {"streaming": True}, "cannot be read: JSON parse error"),
    ],
)
def test_what_cannot_be_opened_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, config: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # fail at once instead of after five retries
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    (tmp_path / "empty").mkdir()
    jsonl(tmp_path, rows())
    with pytest.raises(ConfigError, match=message) as caught:
        source(path, **config).prompt_at(0)
    assert "\n" not in str(caught.value), "the reason is one line"
    assert caught.value.__suppress_context__ or not caught.value.__context__


def test_reading_shows_no_progress_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source(jsonl(tmp_path, rows())).prompt_at(0)
    assert capfd.readouterr() == ("", "")
    shutil.rmtree(tmp_path)
