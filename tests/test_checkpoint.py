"""Checkpoints: exact, durable, and a torn one is skipped."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import for_each, micro_batch, tiny_qwen
from transformers import GPT2Config, GPT2LMHeadModel

from sluice.common.config import Config
from sluice.common.config.file import load_config
from sluice.common.errors import ConfigError, Diverged
from sluice.trainer.checkpoint import (
    TrainerState,
    checkpoint_at,
    newest_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from sluice.trainer.loss import policy_loss
from sluice.trainer.trained_policy import MAX_SKIPPED, TrainedPolicy, schedule_factor

ROOT = Path(__file__).resolve().parent.parent


def config(**trainer: object) -> Config:
    return load_config(ROOT / "config/quickstart.yaml", [f"trainer.{key}={value}" for key, value in trainer.items()])


def new_policy(**trainer: object) -> TrainedPolicy:
    return TrainedPolicy.of_run(tiny_qwen(), config(**{"loss": "{kl_beta: 0.0}", **trainer}))


def assert_same_weights(policy: TrainedPolicy, expected: dict[str, torch.Tensor], *, atol: float = 0.0) -> None:
    torch.testing.assert_close(policy.snapshot(torch.float32), expected, rtol=0, atol=atol)


def save(folder: Path, *steps: int) -> Path:
    """Write a checkpoint of each step; the last one's folder."""
    policy = new_policy()
    policy.optimize([micro_batch(0)], step=1)
    for step in steps:
        state = TrainerState(step=step, version=step + 3, cursor=17, random_state=random_state())
        path = save_checkpoint(folder, state, write=policy.save, keep=2)
    return path


def test_random_state_comes_back() -> None:
    torch.manual_seed(5)
    state = random_state()
    expected = torch.rand(3)
    restore_random_state(state)
    assert torch.equal(torch.rand(3), expected)


def test_the_newest_are_kept_and_the_pointer_names_the_last(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    assert (tmp_path / "latest").read_text() == "step-00000003"
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_torn_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    torn = save(tmp_path, 1, 2) / name
    torn.write_bytes(torn.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING, logger="sluice.checkpoint"):
        found = newest_checkpoint(tmp_path)
    assert found is not None and found.state.step == 1
    assert "step-00000002 is damaged and skipped" in caplog.text


def test_a_missing_step_names_those_there_are(tmp_path: Path) -> None:
    save(tmp_path, 4)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 9.*steps there: 4"):
        checkpoint_at(tmp_path, 9)
    assert checkpoint_at(tmp_path, None).state.step == 4


def test_a_step_reports_loss_entropy_and_every_off_policy_metric() -> None:
    metrics = new_policy().optimize([micro_batch(1)], step=1)
    off_policy = ("ratio_mean", "ratio_max", "ess", "masked_fraction", "mismatch_kl", "logprob_abs_diff")
    names = {"loss/policy", "loss/kl", "entropy", "clip_ratio/low", "clip_ratio/high", "grad_norm", "learning_rate"}
    assert metrics.keys() >= names | {f"off_policy/{name}" for name in off_policy}
    assert 0 < metrics["entropy"] <= math.log(50) + 1e-6
    assert 0 < metrics["off_policy/ess"] <= 1 + 1e-6


def test_a_wholly_masked_batch_moves_no_weight_and_its_metrics_are_finite() -> None:
    policy = new_policy()
    before = policy.snapshot(torch.float32)
    batch = micro_batch(1)
    metrics = policy.optimize([replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))], step=1)
    assert metrics["loss/policy"] == metrics["grad_norm"] == metrics["entropy"] == 0.0
    assert all(math.isfinite(value) for value in metrics.values())
    assert_same_weights(policy, before)


@for_each(
    ("schedule", "step", "expected"),
    [
        ("constant", 1, 0.2),  # warm-up over 5 steps
        ("constant", 5, 1.0),
        ("constant", 100, 1.0),
        ("linear", 5, 1.0),
        ("linear", 100, 0.0),
        ("cosine", 100, 0.0),
        ("cosine", 52, 0.508266),  # 0.5 (1 + cos(pi 47/95))
    ],
)
def test_schedule(schedule: str, step: int, expected: float) -> None:
    settings = config(schedule=schedule, num_steps=100, warmup_steps=5)
    assert schedule_factor(settings.trainer, step) == pytest.approx(expected, abs=1e-5)


def test_iterations_of_decoupled_clip_against_the_first_one() -> None:
    """From the second optimizer step on the ratio is that to the policy before the batch: not 1, and the clip acts."""
    settings = {
        "learning_rate": 0.05,
        "warmup_steps": 0,
        "loss": "{kl_beta: 0.0, off_policy: decoupled, clip_high: 0.01}",
    }
    once, thrice = new_policy(**settings), new_policy(num_iterations=3, **settings)
    assert once.optimize([micro_batch(1)], step=1)["clip_ratio/high"] == 0.0
    assert thrice.optimize([micro_batch(1)], step=1)["clip_ratio/high"] > 0.2
    by_hand = new_policy(**settings)
    batch, prox = micro_batch(1), None
    for _ in range(3):
        logprobs, _ = by_hand._scorer(batch.input_ids, batch.prompt_lengths, batch.completion_lengths)
        prox = logprobs.detach() if prox is None else prox
        config = by_hand.config.loss
        loss, _ = policy_loss(config, policy_logprobs=logprobs, **batch.loss_inputs, prox_logprobs=prox)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.model.parameters(), 1.0)
        by_hand.optimizer.param_groups[0]["lr"] = by_hand.optimizer.param_groups[1]["lr"] = 0.05
        by_hand.optimizer.step()
        by_hand.optimizer.zero_grad()
    assert_same_weights(thrice, by_hand.snapshot(torch.float32), atol=1e-6)


def test_a_gradient_that_is_not_finite_moves_nothing_and_many_end_training(caplog: pytest.LogCaptureFixture) -> None:
    policy = new_policy()
    before = policy.snapshot(torch.float32)
    bad = replace(micro_batch(0), advantages=torch.tensor([torch.nan, 1.0, 1.0, 1.0]))
    assert policy.optimize([bad], step=1)["optimizer/skipped_in_a_row"] == 1
    assert_same_weights(policy, before)
    assert "step 1: the gradient is not finite" in caplog.text
    assert policy.optimize([micro_batch(0)], step=2)["optimizer/skipped_in_a_row"] == 0
    assert all(weight.isfinite().all() for weight in policy.snapshot(torch.float32).values())
    with pytest.raises(Diverged, match=r"step 3: the gradients of 10 optimizer steps in a row"):
        for _ in range(MAX_SKIPPED):
            policy.optimize([bad], step=3)


def test_a_model_with_dropout_is_trained_without() -> None:
    """The sampler has none: with it even equal weights would give another distribution."""
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    assert shape.attn_pdrop > 0
    policy = TrainedPolicy.of_run(GPT2LMHeadModel(shape), config(loss="{kl_beta: 0.0}"))
    batch = micro_batch(0)
    first, second = (
        policy._scorer(batch.input_ids, batch.prompt_lengths, batch.completion_lengths)[0].detach() for _ in range(2)
    )
    assert first.equal(second)
    sequences = [(batch.input_ids[0, :4].int().numpy(), batch.input_ids[0, 4:].int().numpy())]
    torch.testing.assert_close(torch.from_numpy(policy.score(sequences)[0].logprobs), first[0], rtol=0, atol=1e-5)
