"""The main job as a user runs it: one command, real processes, and the reward rises."""

from __future__ import annotations

import json
from pathlib import Path

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
from sluice.common.policies.manifest import Manifest
from sluice.common.policies.signing import Signer
from sluice.scripts.cli import cli
from sluice.scripts.launcher.redis_server import reading_server

STEPS = 24
EVALUATE_EVERY = 12
NUM_HELDOUT = 100
GROUPS_PER_STEP = 8


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of the quickstart, shortened; the folder it was started in and what it printed."""
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
    return folder, done.stderr


def test_held_out_accuracy_rises(finished: tuple[Path, str]) -> None:
    summary = json.loads((only_run(finished[0]) / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["eval_before"] < 0.5  # an imperfect start, or nothing is shown
    assert summary["eval_after"] > 0.85
    assert summary["reward_last"] > summary["reward_first"]


def test_evaluations_are_listed_by_version_and_the_best_checkpoint_is_kept(finished: tuple[Path, str]) -> None:
    run = only_run(finished[0])
    listed = sluice("eval", "--list", "--json", cwd=finished[0])
    assert listed.returncode == 0, listed.stderr
    entries = json.loads(listed.stdout)["evaluations"]
    assert entries == json.loads((run / "summary.json").read_text())["evaluations"]
    assert [entry["step"] for entry in entries] == [0, EVALUATE_EVERY, STEPS]
    lines = metrics_lines(run)
    for entry in entries:
        assert entry["pass@4"] >= entry["sampled_pass@1"] > 0
        assert 0 < entry["sampled_pass@1_stderr"] < 0.06
        assert 15 < entry["mean_length"] < 40
        assert (entry["num_prompts"], entry["num_dead"]) == (NUM_HELDOUT, 0)
        assert any(
            line.get("eval/heldout/version") == entry["version"] and line["eval/heldout/maj@4"] == entry["maj@4"]
            for line in lines
        )
    assert entries[-1]["maj@4"] >= entries[-1]["sampled_pass@1"], "the vote is better than its voters"
    best = max(entries[1:], key=lambda entry: entry["sampled_pass@1"])
    assert [entry for entry in entries if entry["best"]] == [best]
    found = read_best(run / "checkpoints")
    assert found is not None and (found.step, found.value) == (best["step"], best["sampled_pass@1"])
    exported = CliRunner().invoke(cli, ["export", str(run), str(finished[0] / "best"), "--best"])
    assert exported.stdout.startswith(f"step {found.step} of "), exported.output


def test_every_group_is_accounted_for(finished: tuple[Path, str]) -> None:
    summary = json.loads((only_run(finished[0]) / "summary.json").read_text())
    ledger = summary["ledger"]
    assert summary["ledger_holds"]
    assert ledger["trained"] == STEPS * GROUPS_PER_STEP
    assert ledger["dead"] == {}
    assert ledger["in_flight"] == 0
    assert ledger["admitted"] == ledger["trained"] + sum(ledger["dropped"].values())
    assert sum(summary["policy_age"].values()) == STEPS * GROUPS_PER_STEP
    assert max(int(age) for age in summary["policy_age"]) <= 1  # config: max_policy_age
    assert summary["generated_tokens"] >= summary["trained_tokens"] > 0
    assert not summary["restarts"]


def test_what_is_printed_names_the_result(finished: tuple[Path, str]) -> None:
    for expected in ("held-out greedy accuracy", "reward", "policy age", "tokens", "in_flight 0: holds"):
        assert expected in finished[1]


def test_trainer_and_sampler_agree(finished: tuple[Path, str]) -> None:
    """What the engine says it sampled with is what the trainer computes, one policy version later at most."""
    for metrics in metrics_of(only_run(finished[0])):
        if metrics["staleness/max"] == 0:
            assert metrics["off_policy/logprob_abs_diff"] < 1e-4
        assert metrics["off_policy/mismatch_kl"] < 0.015
        assert metrics["off_policy/ess"] > 0.9


def test_the_reference_is_in_the_loss(finished: tuple[Path, str]) -> None:
    steps = metrics_of(only_run(finished[0]))
    assert steps[0]["loss/kl"] == pytest.approx(0.0, abs=1e-6)  # the policy is the reference
    assert steps[-1]["loss/kl"] > 1e-3


def test_what_was_published_is_signed_with_the_key_of_the_run_folder(finished: tuple[Path, str]) -> None:
    run = only_run(finished[0])
    key = (run / "run.key").read_text().strip()
    assert (run / "run.key").stat().st_mode & 0o077 == 0
    with reading_server(run / "redis") as url:
        client = connect(url)
        keys = Keys(run.name)
        sealed = client.hgetall(keys.manifests)
        client.close()
    assert len(sealed) >= 2
    for version, manifest in sealed.items():
        assert Manifest.from_signed_bytes(manifest, Signer(run.name, key), version=int(version)).version == int(version)
    for file in [*run.glob("logs/*"), run / "config.yaml", run / "summary.json", *run.glob("redis/**/*.aof")]:
        assert key.encode() not in file.read_bytes(), file


def test_commands_read_the_ended_run(finished: tuple[Path, str]) -> None:
    folder = finished[0]
    ledger = sluice("ledger", "--json", cwd=folder)
    assert ledger.returncode == 0, ledger.stderr
    assert json.loads(ledger.stdout)["trained"] == STEPS * GROUPS_PER_STEP
    status = json.loads(sluice("status", "--json", cwd=folder).stdout)
    assert (status["step"], status["status"], status["stalled_by"]) == (STEPS, "finished", None)
    samples = json.loads(sluice("samples", "-n", "2", "--json", cwd=folder).stdout)["samples"]
    assert [sample["step"] for sample in samples] == [STEPS, STEPS]
    assert "<answer>" in samples[0]["completions"][0]["text"]


def test_the_export_loads_in_transformers_and_answers(finished: tuple[Path, str]) -> None:
    folder = finished[0]
    done = sluice("export", str(only_run(folder)), str(folder / "exported"), cwd=folder)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(folder / "exported")
    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    chat = [{"role": "user", "content": "What is 47+38?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    assert "<answer>85</answer>" in tokenizer.decode(answer[0])


def test_the_recorded_stream_gives_the_same_weights_again(finished: tuple[Path, str]) -> None:
    """An asynchronous run over many processes, computed again from its records in one: the same bits at every step."""
    done = sluice("replay", str(only_run(finished[0])), "--json", cwd=finished[0], timeout=120)
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)["steps"]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert all(step["began_with_same_weights"] for step in steps)
    assert [step["step"] for step in steps if step["ended_with_same_weights"]] == [20, STEPS]  # those with a checkpoint


def test_trackers_and_completions_show_every_step(finished: tuple[Path, str]) -> None:
    run = only_run(finished[0])
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


def test_the_curve_is_drawn(finished: tuple[Path, str]) -> None:
    assert (only_run(finished[0]) / "reward.png").read_bytes().startswith(b"\x89PNG")
