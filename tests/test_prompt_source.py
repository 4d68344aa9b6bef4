"""Prompts by cursor: order, epochs, streams, templates, targets, and every way a dataset can be wrong."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.csv import write_csv
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sluice.common.config import DatasetConfig
from sluice.common.data.rows import open_rows
from sluice.common.data.text_files import TextFile, TextStream
from sluice.common.errors import ConfigError
from sluice.common.serialization import decode, encode
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
    assert prompt(prompts, 5).columns["level"] == ("2" if kind == "csv" else 2)


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


# name, content, and of each row the target and the columns, or the error.
EXACT: dict[str, tuple[str, str | bytes, list[Any]]] = {
    "dates stay text": ("a.jsonl", '{"prompt": "be", "target": "2024-01-15"}\n', ["2024-01-15"]),
    "integers are exact": (
        "a.jsonl",
        '{"prompt": "be", "target": 1000000000000000000000000000000, "n": [-18446744073709551617]}\n'
        '{"prompt": "be", "target": 9007199254740993, "n": 9007199254740993}\n{"prompt": "be", "target": 0.5, "n": 0.5}\n',
        [("1" + "0" * 30, [-(2**64) - 1]), ("9007199254740993", 2**53 + 1), ("0.5", 0.5)],
    ),
    "types may differ from row to row, also within": (
        "a.jsonl",
        '{"prompt": "be", "target": 2, "n": {"x": 1}}\n\n  {"prompt": "be", "target": "Paris", "n": {"y": [1, "2"]}}\r\n'
        '{"prompt": "be", "target": ["\u00e9", null, true]}',
        [("2", {"x": 1}), ("Paris", {"y": [1, "2"]}), ('["\u00e9", null, true]', None)],
    ),
    "an array over many lines": (
        "a.json",
        '\n[\n {"prompt": "be",\n  "target": "02134"},\n {"prompt": "be", "target": "x", "n": "2024"}\n]\n',
        [("02134", None), ("x", "2024")],
    ),
    "a byte order mark": ("a.jsonl", b'\xef\xbb\xbf{"prompt": "be", "target": "1"}\n', ["1"]),
    "cells are text": (
        "a.csv",
        "\ufeffprompt,target,n\r\nbe,02134,1e5\r\nbe,None,NA\r\nbe,True, 4 \r\n\r\nbe,2024-01-15,\r\n",
        [("02134", "1e5"), ("None", "NA"), ("True", " 4 "), ("2024-01-15", None)],
    ),
    "cells in quotes": (
        "a.csv",
        'prompt,target,n\nbe,"a ""b"", c\n\nd","x\u2028y"\nbe,' + "9" * 200_000 + "\n",
        [('a "b", c\n\nd', "x\u2028y"), ("9" * 200_000, None)],
    ),
    "tabs": ("a.tsv", "prompt\ttarget\tn\nbe\t1,5\t\n", [("1,5", None)]),
    "a cell with nothing in it is no target": (
        "a.csv",
        "prompt,target\nbe,4\nbe,\n",
        ["4", "row 1: column 'target' .* is null"],
    ),
    "half a surrogate pair": (
        "a.jsonl",
        '{"prompt": "be", "target": "1", "n": ["\\ud83d\\ude00"]}\n{"prompt": "be", "target": "1", "n": ["\\ud83d"]}\n',
        [("1", ["\U0001f600"]), "row 1: column 'n': 'utf-8' codec can't encode .*; correct or remove that row"],
    ),
    "half a pair in a column's name": (
        "a.jsonl",
        '{"prompt": "be", "target": "1", "n\\ud83d": 1}\n',
        [r"row 0: column 'n.ud83d': 'utf-8' codec can't encode"],
    ),
    "too deep": (
        "a.jsonl",
        '{"prompt": "be", "target": "1", "n": ' + "[" * 300 + "]" * 300 + "}\n",
        ["row 0: column 'n': nested more than 100 deep"],
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", EXACT)
def test_a_reward_gets_what_the_file_says(tmp_path: Path, case: str, streaming: bool) -> None:
    name, content, expected = EXACT[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    prompts = source(str(tmp_path / name), shuffle=False, streaming=streaming)
    for cursor, row in enumerate(expected):
        if isinstance(row, str) and row.startswith("row "):
            with pytest.raises(ConfigError, match=row.replace(":", ".*:", 1) if streaming else row):
                prompts.prompt_at(cursor)
            continue
        found = prompt(prompts, cursor)
        wire = decode(encode({"target": found.target, "columns": found.columns}))  # as it travels to the reward worker
        if isinstance(row, str):
            assert wire["target"] == row
        else:
            assert repr((wire["target"], wire["columns"].get("n"))) == repr(row)
    assert prompts.num_rows in (None, len(expected))
    prompts.close()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False) | TEXT,
    lambda child: st.lists(child, max_size=3) | st.dictionaries(TEXT, child, max_size=3),
    max_leaves=6,
)


@given(
    st.lists(st.dictionaries(TEXT, VALUES, min_size=1, max_size=4), min_size=1, max_size=5),
    st.sampled_from(["\n", "\r\n", "\n \n"]),
)
@settings(deadline=None, max_examples=60, database=None)
def test_any_json_is_read_as_json_reads_it_and_any_csv_as_text(rows: list[dict[str, Any]], end: str) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    full = [dict.fromkeys(names) | row for row in rows]
    header = list(names)
    cells = [["" if row[name] is None else str(row[name]).replace("\0", "") for name in header] for row in full]
    with tempfile.TemporaryDirectory() as made:
        for name, expected in (("a.jsonl", full), ("a.json", full), ("a.csv", None)):
            with (Path(made) / name).open("w", newline="") as file:
                if name == "a.csv":
                    csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator=end.replace(" ", "")).writerows(
                        [header, *cells]
                    )
                    expected = [dict(zip(header, (cell or None for cell in row), strict=True)) for row in cells]
                else:
                    file.write(json.dumps(rows, indent=1) if name == "a.json" else end.join(map(json.dumps, rows)))
            config = DatasetConfig(path=f"{made}/{name}", shuffle=False)
            table = open_rows(config, seed=0, section="dataset")
            assert repr([table.row_at(i)[0] for i in range(len(rows))]) == repr(expected)
            stream = open_rows(config.model_copy(update={"streaming": True}), seed=0, section="dataset")
            found = [stream.row_at(i)[0] for i in range(len(rows))]
            assert [{name: row.get(name) for name in names} for row in found] == expected
            stream.close()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"prompt": "be"}\n\n{"prompt": be}\n',
            "a.jsonl, line 3, column 12: not JSON: Expecting value; write",
        ),
        ("a.jsonl", '{"prompt": "be"}\n["be"]\n', "line 2: a row is an object with a key per column, this is an array"),
        ("a.jsonl", '{"prompt": "be"}\nnull\n', "line 2: a row is an object with a key per column, this is null"),
        ("a.jsonl", b'{"prompt": "be"}\n{"prompt": "\xe9"}\n', r"line 2: not UTF-8 \(.*\): save the file as UTF-8"),
        (
            "a.jsonl",
            '{"prompt": "be"}\n{"prompt": ' + "1" * 5000 + "}\n",
            "line 2: an integer has more than 4300 digits",
        ),
        ("a.json", '[{"prompt": "be"},\n {"prompt" "be"}]', "line 2, column 12: not JSON: Expecting ':' delimiter"),
        (
            "a.json",
            '{\n  "data": [{"prompt": "be"}]\n}',
            "line 1, column 2: not JSON: .*; write one object per line, or one",
        ),
        ("a.csv", "prompt,target\nbe,1\nbe,1,2\n", "line 3: 3 cells under 2 columns: quote cells with a comma"),
        ("a.csv", 'prompt,target\nbe,"1\nbe,2\n', "line 2: not CSV: unexpected end of data"),
        (
            "a.csv",
            "prompt,target,prompt\nbe,1,2\n",
            "line 1: two columns have the same name, of prompt, target, prompt",
        ),
        ("a.csv", "prompt,target\nbe,é\n".encode("latin-1"), "line 2: not UTF-8"),
        ("a.csv", "prompt,target\nbe,1\n".encode("utf-16"), "line 1: not UTF-8"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=f"dataset.path = .*{message}") as caught:
        source(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    stream = source(str(tmp_path / name), streaming=True, shuffle=False, target_column=None)
    errors = []
    for cursor in range(4):  # one bad row costs a stream that row; what is bad as a whole, all of them
        try:
            assert prompt(stream, cursor).prompt == "be"
        except ConfigError as error:
            errors.append(str(error))
    assert errors[0] == str(caught.value)
    assert len(errors) == 4 or len(errors) <= 2


def test_the_named_file_is_read_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for number, name in enumerate(
        ("a*.jsonl", "ab.jsonl", "[x]/train.jsonl", "x/train.jsonl", "a?.parquet", "ab.parquet")
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"prompt": ["hello"], "target": [str(number)]}), path)
        else:
            path.write_text(json.dumps({"prompt": "hello", "target": str(number)}) + "\n")
    for name, number in (("a*.jsonl", 0), ("[x]/train.jsonl", 2), ("[x]", 2), ("a?.parquet", 4)):
        for path in (tmp_path / name, f"~/{name}"):
            for streaming in (False, True):
                prompts = source(str(path), streaming=streaming)
                assert [targets(prompts, range(2)), prompts.num_rows] == [[number] * 2, None if streaming else 1], path
                prompts.close()
    with pytest.raises(ConfigError, match="no such file or folder"):
        source(str(tmp_path / "b*.jsonl"))


def test_splits_of_a_folder_and_slices_of_a_split(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("test", 20)):
        for shard in range(2):
            content = [{"prompt": "hello", "target": first + 5 * shard + i} for i in range(5)]
            text = "".join(json.dumps(row) + "\n" for row in content)
            path = tmp_path / f"{split}-{shard}.jsonl.gz"
            path.write_bytes(gzip.compress(text.encode())) if shard else path.with_suffix("").write_text(text)
    for split, expected in (("train", range(10)), ("test[:3]", range(20, 23)), ("train[90%:]+test[-1:]", (9, 29))):
        prompts = source(str(tmp_path), split=split, shuffle=False)
        assert targets(prompts, range(prompts.num_rows or 0)) == list(expected)
    assert targets(source(str(tmp_path), split="test", streaming=True, shuffle=False), range(11)) == [
        *range(20, 30),
        20,
    ]


def test_a_folder_that_datasets_saved_is_read_with_its_types(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    datasets.Dataset.from_list([{"prompt": "hello", "target": 1, "n": [0.5]}]).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "saved", *(tmp_path / "saved").glob("*.arrow")):
        found = prompt(source(str(path)))
        assert (found.target, found.columns) == ("1", {"target": 1, "n": [0.5]})
    assert "its arrow files are read, those of json are left out" in caplog.text


def test_rows_of_another_machine_are_read_line_by_line() -> None:
    with fsspec.open("memory://rows.jsonl", "wb") as file:
        file.write(b'{"a": 1}\n{"a": 2\n{"b": 3}\n')
    first, second, third = TextStream([TextFile("memory://rows.jsonl", source="here")])
    assert (first, third) == ({"a": 1}, {"a": None, "b": 3})
    assert "here, rows.jsonl, line 2, column 8: not JSON" in str(second)


def test_a_file_that_changes_meanwhile_is_named(tmp_path: Path) -> None:
    prompts = source(jsonl(tmp_path, rows()), shuffle=False)
    assert targets(prompts, [3]) == [3]
    jsonl(tmp_path, [*rows(4), {"prompt": "what is 4", "target": "5"}, *rows(20)])
    assert targets(prompts, range(4)) == [0, 1, 2, 3]  # these are as they were
    for cursor in (4, 9):
        with pytest.raises(ConfigError, match=r"data.jsonl was changed there after this process read it"):
            prompts.prompt_at(cursor)


def test_columns_of_bytes_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = {"bytes": b"\x89PNG", "path": None}
    row = {"prompt": "hello", "target": "1", "image": image, "pages": [image], "raw": b"\x00", "n": {"deep": [b"x"]}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "data.parquet")
    for streaming in (False, True):
        caplog.clear()
        prompts = source(str(tmp_path / "data.parquet"), streaming=streaming)
        assert prompt(prompts).columns == {"target": "1"}
        assert "left out, since images, audio and bytes are no JSON: image, pages, raw, n" in caplog.text
        prompts.close()
    with pytest.raises(ConfigError, match=r"dataset\.prompt_column = 'image': .* is images, audio or bytes, not text"):
        source(str(tmp_path / "data.parquet"), prompt_column="image").prompt_at(0)


def test_json_of_a_repository_is_what_json_reads(tmp_path: Path) -> None:
    """Types that its card declares change nothing: the reader of datasets makes 2024-01-15 00:00:00 of that string."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "hello", "target": "2024-01-15", "label": 1}\n')
    features = [{"name": name, "dtype": "string"} for name in ("prompt", "target", "label")]
    for card in ({"license": "mit"}, {"dataset_info": {"features": features}}):
        (tmp_path / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
        for streaming in (False, True):
            found = prompt(source(str(tmp_path), streaming=streaming))
            assert (found.target, found.columns["label"]) == ("2024-01-15", 1)


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
    (tmp_path / "data.csv").write_text("prompt;target\nhello;1\n")
    with pytest.raises(ConfigError, match=r"columns prompt;target; the cells of a \.csv are separated by commas"):
        source(str(tmp_path / "data.csv"), streaming=streaming).prompt_at(0)
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
        ("notes.txt", {}, "is a file of unknown kind: use one of .jsonl, .json, .csv, .tsv, .parquet, .arrow"),
        ("pipe.jsonl", {}, "is neither a file nor a folder"),
        ("map.parquet", {}, r"Arrow type map<.* \(remove the column of that type, or write it as text\)"),
        ("twice.parquet", {}, "two columns have the same name: rename one"),
        ("empty", {}, "cannot be read: .*doesn't contain any data files"),
        ("data.jsonl", {"split": "test"}, "cannot be read: Unknown split"),
        ("data.jsonl", {"split": "test", "streaming": True}, "Bad split 'test': a stream's split is one of train"),
        ("no-such/dataset", {}, "there is no no-such/dataset here, and the Hugging Face hub could not be asked"),
        ("broken.jsonl", {}, "broken.jsonl, line 1, column 2: not JSON: Expecting property name"),
        ("broken.jsonl", {"streaming": True}, "broken.jsonl, line 1, column 2: not JSON: Expecting property name"),
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
    os.mkfifo(tmp_path / "pipe.jsonl")
    text, pairs = pa.array(["x"]), pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int32()))
    pq.write_table(pa.table({"prompt": text, "pairs": pairs}), tmp_path / "map.parquet")
    pq.write_table(pa.Table.from_arrays([text, text], names=["prompt", "prompt"]), tmp_path / "twice.parquet")
    jsonl(tmp_path, rows())
    with pytest.raises(ConfigError, match=message) as caught:
        source(path, **config).prompt_at(0)
    assert "\n" not in str(caught.value), "the reason is one line"
    assert caught.value.__suppress_context__ or not caught.value.__context__


def test_reading_shows_no_progress_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source(jsonl(tmp_path, rows())).prompt_at(0)
    assert capfd.readouterr() == ("", "")
    shutil.rmtree(tmp_path)
