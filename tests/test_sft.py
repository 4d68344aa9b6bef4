"""Supervised training: the loss is transformers' own, it trains on what RL will sample, and a run resumes bit for bit."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from builders import for_each
from harness import ROOT, environment, metrics_lines, tiny_folder, wait_for
from test_config_sft import settings

from sluice.common.config import DatasetConfig
from sluice.common.config.sft import ExamplesConfig, SftConfig
from sluice.common.config.trainer import TrainerConfig
from sluice.common.errors import ConfigError
from sluice.common.models.assets import ModelAssets, read_assets
from sluice.common.models.causal_lm import load_pretrained
from sluice.scripts import cli
from sluice.trainer.examples import Example, ExampleSource, end_of_turn, micro_batches_of
from sluice.trainer.export import export_checkpoint
from sluice.trainer.sft import SftTrainer, completion_nll
from sluice.trainer.trained_policy import TrainedPolicy
from sluice.workers.prompt_source import Prompt, PromptSource

PAIRS = [(a, b) for a in range(10, 40) for b in range(10, 12)]
ROWS = [{"prompt": f"What is {a}+{b}?", "completion": f"<answer>{a + b}</answer>" * (a % 3 + 1)} for a, b in PAIRS]
CONVERSATIONS = [
    {"turns": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in ROWS
]


@pytest.fixture(autouse=True)
def _private_cache_and_one_thread(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """One thread, because sums of two depend on the load of the machine, and a `sluice sft` of these tests has one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def model() -> str:
    return str(tiny_folder(3) / "model")


@pytest.fixture(scope="module")
def assets(model: str) -> ModelAssets:
    return read_assets(model)


def jsonl(folder: Path, rows: list[dict[str, Any]], name: str = "examples") -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trainer(model: str, path: str, folder: Path, **changes: Any) -> SftTrainer:
    return SftTrainer(SftConfig.model_validate(settings(model, path, **changes)), folder)


def source(assets: ModelAssets, path: str, *, max_tokens: int = 64, **config: Any) -> ExampleSource:
    return ExampleSource(
        ExamplesConfig(path=path, shuffle=False, **config),
        assets.tokenizer(),
        eos_token_ids=assets.eos_token_ids,
        max_tokens=max_tokens,
        seed=0,
    )


def some_examples(assets: ModelAssets, folder: Path, count: int = 7) -> list[Example]:
    read = source(assets, jsonl(folder, ROWS))
    examples = [read.example_at(cursor) for cursor in range(count)]
    return [example for example in examples if example]


def loss_of_transformers(model: Any, examples: list[Example]) -> torch.Tensor:
    """model(input_ids, labels).loss of right-padded rows, prompts and pads labelled -100."""
    width = max(example.num_tokens for example in examples)
    input_ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full_like(input_ids, -100)
    for row, example in enumerate(examples):
        ids = torch.tensor([*example.prompt_ids, *example.token_ids])
        input_ids[row, : len(ids)] = ids
        labels[row, len(example.prompt_ids) : len(ids)] = ids[len(example.prompt_ids) :]
    return model(input_ids=input_ids, labels=labels, use_cache=False).loss


def lines_of(folder: Path, key: str = "loss") -> list[dict[str, float]]:
    return [line for line in metrics_lines(folder) if key in line]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(str(folder / "model")).state_dict()


def test_loss_and_gradient_are_those_of_transformers(model: str, assets: ModelAssets, tmp_path: Path) -> None:
    """Also the mask: were a prompt token in the loss, or an end token not, both would differ."""
    examples = some_examples(assets, tmp_path)
    theirs = load_pretrained(model).train()
    loss = loss_of_transformers(theirs, examples)
    loss.backward()
    micro_batches = micro_batches_of(examples, max_tokens=120)
    assert len(micro_batches) > 1
    config = TrainerConfig(device="cpu", max_grad_norm=1e9)
    ours = TrainedPolicy(load_pretrained(model), config, objective=completion_nll)
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in ours.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: gradients.__setitem__(name, p.grad.detach().clone())
        )
    metrics = ours.optimize(micro_batches, step=1)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert metrics["loss/num_tokens"] == sum(len(example.token_ids) for example in examples)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    norm = torch.cat([gradient.flatten().double() for gradient in gradients.values()]).norm()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_masked_tokens_carry_no_gradient() -> None:
    logprobs, mask = torch.tensor([[-2.0, -2.0, -9.0]], requires_grad=True), torch.tensor([[True, True, False]])
    loss, metrics = completion_nll(policy_logprobs=logprobs, loss_mask=mask, num_tokens=4)
    loss.backward()
    assert (loss.item(), metrics["loss"].item()) == (1.0, 2.0)  # 2 nats a token, half of the step's tokens
    assert logprobs.grad is not None and logprobs.grad.tolist() == [[-0.25, -0.25, 0.0]]


def test_held_out_loss_is_that_of_transformers_and_computed_once(
    model: str, assets: ModelAssets, tmp_path: Path
) -> None:
    """With a fresh adapter as without."""
    held_out = {"dataset": {"path": jsonl(tmp_path, ROWS[:7], "held_out")}}
    examples = some_examples(assets, tmp_path)
    with torch.no_grad():
        expected = loss_of_transformers(load_pretrained(model), examples).item()
    num_tokens = sum(example.num_tokens for example in examples)
    for lora in (None, {"rank": 2}):
        changes: dict[str, Any] = {"held_out": held_out, "trainer": {"lora": lora}}
        made = trainer(model, jsonl(tmp_path, ROWS), tmp_path / str(lora), **changes)
        passes: list[int] = []
        made.policy.model.get_input_embeddings().register_forward_hook(
            lambda module, given, found, passes=passes: passes.append(given[0].numel())
        )
        assert made.held_out_loss() == pytest.approx(expected, abs=1e-6)
        assert 0.9 * num_tokens < sum(passes) < 1.5 * num_tokens


def test_prompt_is_that_of_rl_and_completion_is_verbatim_with_the_end_of_the_turn(
    assets: ModelAssets, tmp_path: Path
) -> None:
    path, tokenizer = jsonl(tmp_path, ROWS), assets.tokenizer()
    settings = {"path": path, "shuffle": False, "system_prompt": "Add."}
    prompts = PromptSource(DatasetConfig(**settings, target_column="completion"), tokenizer, seed=0)
    read = source(assets, path, system_prompt="Add.")
    for cursor in range(3):
        example, prompt = read.example_at(cursor), prompts.prompt_at(cursor)
        assert example and isinstance(prompt, Prompt)
        assert example.prompt_ids.tolist() == prompt.prompt_ids.tolist()
        assert tokenizer.decode(example.token_ids) == ROWS[cursor]["completion"] + "<|im_end|>"


def test_conversations_give_the_same_examples_as_prompts_and_completions(assets: ModelAssets, tmp_path: Path) -> None:
    plain = source(assets, jsonl(tmp_path, ROWS))
    whole = source(assets, jsonl(tmp_path, CONVERSATIONS, "whole"), prompt_column="turns", completion_column=None)
    split = [{"prompt": row["turns"][:1], "completion": row["turns"][1:]} for row in CONVERSATIONS]
    halves = source(assets, jsonl(tmp_path, split, "split"))
    ended = [{**row, "completion": row["completion"] + "<|im_end|>"} for row in ROWS]  # not written twice
    closed = source(assets, jsonl(tmp_path, ended, "ended"))
    for cursor in range(5):
        first, *others = (read.example_at(cursor) for read in (plain, whole, halves, closed))
        for other in others:
            assert first and other
            assert first.prompt_ids.tolist() == other.prompt_ids.tolist()
            assert first.token_ids.tolist() == other.token_ids.tolist()


def test_end_of_turn_is_what_the_template_writes_and_generation_stops_at(assets: ModelAssets) -> None:
    tokenizer = assets.tokenizer()
    start, end, other = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    tokenizer.eos_token = "<|endoftext|>"  # as in Gemma: the end of a text is not the end of a turn
    for eos_token_ids, chat_template, expected in (
        ((other, end), True, end),
        ((other, end), False, other),
        ((other,), True, other),  # generation stops at nothing else
        ((start,), True, start),
    ):
        assert end_of_turn(tokenizer, eos_token_ids=eos_token_ids, chat_template=chat_template) == expected


def test_one_epoch_sees_every_row_once_and_skips_and_counts_what_does_not_fit(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [*ROWS[:10], {"prompt": "What is 9+9?", "completion": "9" * 80}, *ROWS[10:14]]
    rows.insert(5, {"prompt": "What is 8+8?", "completion": None})
    changes: dict[str, Any] = {"batch_size": 5, "num_epochs": 1, "trainer": {"num_steps": None}}
    made = trainer(model, jsonl(tmp_path, rows), tmp_path / "run", **changes)
    assert made.config.trainer.num_steps == 3  # 14 of 16 rows; 16 would be 4 steps
    seen: list[Example] = []
    read = ExampleSource.example_at

    def spy(self: ExampleSource, cursor: int) -> Example | None:
        if example := read(self, cursor):
            seen.append(example)
        return example

    monkeypatch.setattr(ExampleSource, "example_at", spy)
    shown: list[dict[str, float]] = []
    with caplog.at_level(logging.WARNING, logger="sluice.sft"):
        assert made.train(shown.append)
    assert len({tuple(row.prompt_ids) for row in seen[:14]}) == 14, "each row that fits once, before any comes again"
    assert len(seen) == 15
    assert shown[0]["num_tokens"] == sum(len(row.token_ids) for row in seen[:5])
    assert shown[1]["num_skipped"] <= 2 <= shown[2]["num_skipped"]
    assert shown[2]["epoch"] == (15 + shown[2]["num_skipped"]) / 16 > 1.0
    assert "row 5: column 'completion' (completion_column) is null" in caplog.text


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole weights", "adapter"])
def test_a_run_that_was_ended_goes_on_bit_for_bit(lora: dict[str, int] | None, model: str, tmp_path: Path) -> None:
    rows, changes = jsonl(tmp_path, ROWS), {"trainer": {"schedule": "cosine", "lora": lora}}
    assert trainer(model, rows, tmp_path / "straight", **changes).train(lambda metrics: None)
    first = trainer(model, rows, tmp_path / "halves", **changes)
    assert not first.train(lambda metrics: None, stop=lambda: first.step == 3)
    assert not (tmp_path / "halves" / "model").exists()
    second = trainer(model, rows, tmp_path / "halves", **changes)
    assert second.step == 3
    assert second.train(lambda metrics: None)
    straight, halves = (lines_of(tmp_path / name) for name in ("straight", "halves"))
    assert [line["loss"] for line in straight] == [line["loss"] for line in halves]
    assert straight[0]["loss"] > straight[-1]["loss"]
    a, b = weights_of(tmp_path / "straight"), weights_of(tmp_path / "halves")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    before = load_pretrained(model).state_dict()
    moved = {name for name in a if not torch.equal(a[name], before[name])}
    assert "model.layers.0.mlp.up_proj.weight" in moved, "the model that is left has the adapter in it"
    assert ("model.norm.weight" in moved) == (lora is None)
    third = trainer(model, rows, tmp_path / "halves", **changes)  # finished: nothing is left to do
    assert third.train(lambda metrics: None)
    assert len(lines_of(tmp_path / "halves")) == 6


def test_the_command_trains_stops_at_sigterm_resumes_and_leaves_a_model(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {"dataset": {"path": jsonl(tmp_path, ROWS[:9], "held_out")}, "every_steps": 50}
    data = settings(model, jsonl(tmp_path, ROWS), trainer={"num_steps": 60}, held_out=held)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(data))
    env = environment(PYTHONPATH=str(ROOT), HF_DATASETS_CACHE=str(tmp_path / "cache"))
    run = tmp_path / "runs" / "sft-job-20260101-000000"
    argv = [sys.executable, "-m", "sluice.scripts.cli", "sft", "job.yaml", "--name", "sft-job-20260101-000000"]
    process = subprocess.Popen(argv, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (run / "metrics.jsonl").exists() and lines_of(run), timeout=120, what="the first step")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    stopped_at = int(lines_of(run)[-1]["step"])
    assert f"stopped after step {stopped_at}; resume with: sluice sft job.yaml --resume sft-job-20260101-000000" in said
    assert (run / "checkpoints" / "latest").read_text() == f"step-{stopped_at:08d}"

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["sft", "job.yaml", "--resume"])
    said = capsys.readouterr().err
    assert ended.value.code == 0, said
    assert f"from step {stopped_at} on" in said
    assert "step 60/60  loss " in said and "held out " in said
    assert [line["step"] for line in lines_of(run)] == list(range(1, 61))
    held_out = lines_of(run, "held_out/loss")
    assert [line["step"] for line in held_out] == [0, 50, 60]
    assert held_out[-1]["held_out/loss"] < 0.8 * held_out[0]["held_out/loss"]

    made = read_assets(str(run / "model"))
    assert made.eos_token_ids == read_assets(model).eos_token_ids
    assert made.tokenizer().chat_template == read_assets(model).tokenizer().chat_template
    assert load_pretrained(str(run / "model")).generation_config.do_sample
    assert export_checkpoint(run, tmp_path / "exported") == 60
    exported = load_pretrained(str(tmp_path / "exported")).state_dict()
    torch.testing.assert_close(weights_of(run), exported, rtol=0, atol=0)


@for_each(
    ("row", "config", "message"),
    [
        ({"prompt": "a", "completion": " "}, {}, "row 0: the completion is empty"),
        ({"prompt": "a", "completion": 3}, {}, "column 'completion' holds int; a completion is text"),
        ({"prompt": "a", "answer": "b"}, {"completion_column": "anwser"}, "columns prompt, answer; did you mean 'answer'"),
        ({"prompt": "a", "completion": "b"}, {"completion_column": None}, "is not a conversation of two turns"),
        ({"prompt": CONVERSATIONS[0]["turns"][:1] * 2}, {"completion_column": None}, "the last turn is not the assistant's"),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": ["f"]}]},
            {"completion_column": None},
            "tool_calls of the last turn: only its content is trained on",
        ),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_learnt_says_why(
    row: dict[str, Any], config: dict[str, Any], message: str, assets: ModelAssets, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        source(assets, jsonl(tmp_path, [row]), **config).example_at(0)


def test_a_dataset_of_which_nothing_fits_and_epochs_of_a_stream_are_refused(model: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "What is 1+1?", "completion": "2" * 90}] * 3)
    with pytest.raises(ConfigError, match=r"no row can be trained on; all are longer than trainer\.seq_len = 64"):
        trainer(model, path, tmp_path / "run").train(lambda metrics: None)
    with pytest.raises(ConfigError, match=r"no row can be trained on"):
        trainer(model, path, tmp_path / "run", num_epochs=2, trainer={"num_steps": None})
    with pytest.raises(ConfigError, match=r"held_out\.dataset\.path = .*no row can be trained on"):
        trainer(model, jsonl(tmp_path, ROWS, "good"), tmp_path / "run", held_out={"dataset": {"path": path}})
    changes = {"num_epochs": 1, "dataset": {"streaming": True}, "trainer": {"num_steps": None}}
    with pytest.raises(ConfigError, match="num_epochs counts passes over a table"):
        trainer(model, path, tmp_path / "run", **changes)


def test_bad_input_of_the_command_is_one_paragraph(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(config: Path, *arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["sft", str(config), *arguments])
        assert ended.value.code == 2
        return capsys.readouterr().err

    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(settings(model, jsonl(tmp_path, ROWS))))
    assert refused(job, "dataset.completion_colum=answer") == (
        f"error: {job}: unknown key 'dataset.completion_colum'; did you mean 'completion_column'?\n"
    )
    assert "no run of sft-job in" in refused(job, "--resume")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert "start it without torchrun" in refused(job)
    (tmp_path / "taken").mkdir()
    assert "taken exists: choose another --name" in refused(job, "--name", "taken", f"output_dir={tmp_path}")
