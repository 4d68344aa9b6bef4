"""The main job as a user runs it: one command, real processes, and the reward rises."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner
from harness import metrics_lines, metrics_of, only_run, quickstart_config, sluice, tiny_folder
from pyarrow import parquet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trackers import trackio_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from sluice.common.connections.client import connect
from sluice.common.keys import Keys
from sluice.common.ledger.evaluations import read_best
from sluice.common.policies.lineage import read_lineage
from sluice.common.policies.manifest import Manifest
from sluice.common.policies.signing import Signer
from sluice.scripts.cli import cli
from sluice.scripts.launcher.redis_server import reading_server

STEPS = 24
EVALUATE_EVERY = 12
NUM_HELDOUT = 100
GROUPS_PER_STEP = 8


class Finished(NamedTuple):
    """A run of the quickstart, shortened, that has ended."""

    folder: Path
    "where it was started"
    run: Path
    output: str
    summary: dict[str, Any]

    def sluice(self, *arguments: str) -> str:
        """What a command prints that reads it."""
        done = sluice(*arguments, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("quickstart")
    heldout = {
        "dataset": {"path": str(tiny_folder(700) / "heldout.jsonl"), "max_req_tokens": 24},
        "num_prompts": NUM_HELDOUT,
        "num_samples": 4,
        "function": "MathReward",
    }
    config = quickstart_config(
        folder,
        tiny=tiny_folder(700),
        trainer__num_steps=STEPS,
        audit="all",
        metrics={"completions": True, "tensorboard": True, "trackio": True},
        checkpoint__keep_best="heldout/sampled_pass@1",
        evaluation={"every_steps": EVALUATE_EVERY, "datasets": [heldout]},
    )
    done = sluice("run", str(config), cwd=folder, timeout=280)
    assert done.returncode == 0, done.stderr
    run = only_run(folder)
    return Finished(folder, run, done.stderr, json.loads((run / "summary.json").read_text()))


def test_held_out_accuracy_rises_and_what_is_printed_and_drawn_says_so(finished: Finished) -> None:
    summary = finished.summary
    assert summary["steps"] == STEPS
    assert summary["eval_before"] < 0.5  # an imperfect start, or nothing is shown
    assert summary["eval_after"] > 0.85
    assert summary["reward_last"] > summary["reward_first"]
    assert finished.output.startswith("loading torch, transformers and Celery, once for all roles\n")
    assert f"  sluice chat {finished.run.relative_to(finished.folder)} " in finished.output
    start = re.split(r"^step \d", finished.output, maxsplit=1, flags=re.MULTILINE)[0]
    assert "loading: " in start and not re.search("stall|still serves|no step|workers on", start), "nothing failed"
    for expected in ("held-out greedy accuracy", "reward", "policy age", "tokens", "in_flight 0: holds"):
        assert expected in finished.output
    assert (finished.run / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_evaluations_are_listed_by_version_and_the_best_checkpoint_is_kept(finished: Finished) -> None:
    entries = json.loads(finished.sluice("eval", "--list", "--json"))["evaluations"]
    assert entries == finished.summary["evaluations"]
    assert [entry["step"] for entry in entries] == [0, EVALUATE_EVERY, STEPS]
    key = "eval/heldout/maj@4"
    lines = {line["eval/heldout/version"]: line for line in metrics_lines(finished.run) if key in line}
    for entry in entries:
        assert entry["pass@4"] >= entry["sampled_pass@1"] > 0
        assert 0 < entry["sampled_pass@1_stderr"] < 0.06
        assert 15 < entry["mean_length"] < 40
        assert (entry["num_prompts"], entry["num_dead"]) == (NUM_HELDOUT, 0)
        assert lines[entry["version"]][key] == entry["maj@4"]
    assert entries[-1]["maj@4"] >= entries[-1]["sampled_pass@1"], "the vote is better than its voters"
    best = max(entries[1:], key=lambda entry: entry["sampled_pass@1"])
    assert [entry for entry in entries if entry["best"]] == [best]
    found = read_best(finished.run / "checkpoints")
    assert found is not None and (found.step, found.value) == (best["step"], best["sampled_pass@1"])
    exported = CliRunner().invoke(cli, ["export", str(finished.run), str(finished.folder / "best"), "--best"])
    assert exported.stdout.startswith(f"step {found.step} of "), exported.output


def test_every_group_is_accounted_for(finished: Finished) -> None:
    summary, ledger = finished.summary, finished.summary["ledger"]
    assert summary["ledger_holds"]
    assert (ledger["trained"], ledger["dead"], ledger["in_flight"]) == (STEPS * GROUPS_PER_STEP, {}, 0)
    assert ledger["admitted"] == ledger["trained"] + sum(ledger["dropped"].values())
    assert sum(summary["policy_age"].values()) == STEPS * GROUPS_PER_STEP
    assert max(int(age) for age in summary["policy_age"]) <= 1  # config: max_policy_age
    assert summary["generated_tokens"] >= summary["trained_tokens"] > 0
    assert not summary["restarts"]


def test_trainer_and_sampler_agree_and_the_reference_is_in_the_loss(finished: Finished) -> None:
    """What the engine says it sampled with is what the trainer computes, one policy version later at most."""
    steps = metrics_of(finished.run)
    for metrics in steps:
        if metrics["staleness/max"] == 0:
            assert metrics["off_policy/logprob_abs_diff"] < 1e-4
        assert metrics["off_policy/mismatch_kl"] < 0.015
        assert metrics["off_policy/ess"] > 0.9
    assert steps[0]["loss/kl"] == pytest.approx(0.0, abs=1e-6)  # the policy is the reference
    assert steps[-1]["loss/kl"] > 1e-3


def test_what_was_published_is_signed_with_the_key_of_the_run_folder(finished: Finished) -> None:
    run = finished.run
    key = (run / "run.key").read_text().strip()
    assert not [path for path in (run, *run.rglob("*")) if path.stat().st_mode & 0o077], "no other user reads it"
    with reading_server(run / "redis") as url, closing(connect(url)) as client:
        sealed = client.hgetall(Keys(run.name).manifests)
    assert len(sealed) >= 2
    for version, manifest in sealed.items():
        assert Manifest.from_signed_bytes(manifest, Signer(run.name, key), version=int(version)).version == int(version)
    for file in [*run.glob("logs/*"), run / "config.yaml", run / "summary.json", *run.glob("redis/**/*.aof")]:
        assert key.encode() not in file.read_bytes(), file


def test_commands_read_the_ended_run(finished: Finished) -> None:
    assert json.loads(finished.sluice("ledger", "--json"))["trained"] == STEPS * GROUPS_PER_STEP
    status = json.loads(finished.sluice("status", "--json"))
    assert (status["step"], status["status"], status["stalled_by"]) == (STEPS, "finished", None)
    samples = json.loads(finished.sluice("samples", "-n", "2", "--json"))["samples"]
    assert [sample["step"] for sample in samples] == [STEPS, STEPS]
    assert "<answer>" in samples[0]["completions"][0]["text"]


def test_the_export_loads_in_transformers_and_answers(finished: Finished) -> None:
    exported = finished.folder / "exported"
    finished.sluice("export", str(finished.run), str(exported))
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o644}, "it is made to be handed on"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    chat = [{"role": "user", "content": "What is 47+38?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    assert "<answer>85</answer>" in tokenizer.decode(answer[0])


def test_the_recorded_stream_gives_the_same_weights_again(finished: Finished) -> None:
    """An asynchronous run over many processes, computed again from its records in one: the same bits at every step."""
    steps = json.loads(finished.sluice("replay", str(finished.run), "--json"))["steps"]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert all(step["began_with_same_weights"] for step in steps)
    assert [step["step"] for step in steps if step["ended_with_same_weights"]] == [20, STEPS]  # those with a checkpoint


def test_trackers_and_completions_show_every_step(finished: Finished) -> None:
    run = finished.run
    means = {line["step"]: line["reward/mean"] for line in metrics_of(run)}
    rows = [(step, metrics["reward/mean"]) for _, step, metrics in trackio_rows(run) if "reward/mean" in metrics]
    assert rows == [(step, pytest.approx(means[step])) for step in range(1, STEPS + 1)]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("reward/mean")] == list(range(1, STEPS + 1))
    table = parquet.read_table(run / "completions").to_pandas()
    assert list(table.groupby("step").group_id.nunique()) == [GROUPS_PER_STEP] * STEPS
    assert table.groupby("step").reward.mean().to_dict() == pytest.approx(means)
    assert table.completion.str.contains("<answer>").mean() > 0.5


def test_a_run_resumed_after_its_last_step_shows_that_step_and_neither_publishes_nor_evaluates_again(
    finished: Finished,
) -> None:
    before = metrics_lines(finished.run)
    done = sluice(
        "run", str(finished.folder / "job.yaml"), "--resume", str(finished.run), cwd=finished.folder, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"step {STEPS} of {STEPS}: every step is trained already" in done.stderr
    assert f"{finished.run.name}: {STEPS} steps in " in done.stderr
    summary = json.loads((finished.run / "summary.json").read_text())
    assert summary["evaluations"] == finished.summary["evaluations"]
    assert metrics_lines(finished.run) == before
    with reading_server(finished.run / "redis") as url, closing(connect(url)) as client:
        assert max(read_lineage(client, Keys(finished.run.name))) == STEPS
