"""Audit and replay: what a step was trained on is kept, and computing it again gives the same loss and the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import make_completion, make_config, make_episode, make_group, save_tiny_qwen

from sluice.common.config import Config
from sluice.common.errors import ConfigError
from sluice.common.policies.digest import weights_digest
from sluice.common.types import Group
from sluice.trainer.audit import Audit, StepRecord, audit_folder, read_record, recorded_steps
from sluice.trainer.checkpoint import TrainerState, checkpoint_steps, random_state, save_checkpoint
from sluice.trainer.distributed.parallel import open_policy
from sluice.trainer.replay import replay
from sluice.trainer.step import train_on

STEPS = 5


def random_group(seed: int) -> Group:
    draw = np.random.default_rng(seed)
    episodes = [
        make_episode(
            replace(
                make_completion(length=length),
                token_ids=draw.integers(0, 50, length, dtype=np.int32),
                rollout_logprobs=-4.0 - draw.random(length, dtype=np.float32) * 0.1,
                policy_versions=((seed, 1), (seed + 1, length - 1)),
            ),
            reward=reward,
            rewards={"MathReward": reward, "other": None},
            ref_logprobs=-4.0 - draw.random(length, dtype=np.float32),
        )
        for length, reward in ((5, 1.0), (3, 0.0), (7, 0.1), (2, None))
    ]
    ids, prompt = draw.integers(0, 50, 4, dtype=np.int32), [{"role": "user", "content": "?"}]
    return make_group(*episodes, group_id=f"t{seed}", prompt_ids=ids, prompt=prompt, timestamps={"ready": 1.5})


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return save_tiny_qwen(tmp_path / "model")


def run_of(
    folder: Path, model: Path, *, audit: str = "all", every_steps: int = 2, keep: int = 2, **trainer: Any
) -> Config:
    """A run folder as the trainer leaves it, of STEPS steps on made-up groups."""
    config = make_config(
        model={"path": str(model)},
        audit=audit,
        checkpoint={"every_steps": every_steps, "keep": keep},
        trainer={"num_steps": 10, "learning_rate": 0.01, "loss": {"kl_beta": 0.1}, **trainer},
    )
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml())
    policy = open_policy(config, end_token_ids=[1])
    written = Audit(folder, config)
    for step in range(1, STEPS + 1):
        before = weights_digest(policy.snapshot(torch.float32, full=step == 1))  # step 1 begins with version 0
        groups = [random_group(step), random_group(step + 100)]
        metrics, _ = train_on(policy, groups, config, step=step)
        record = StepRecord(step=step, parent_digest=before, groups=groups, metrics=metrics)
        written.record(record, saved_step=(step - 1) // every_steps * every_steps)
        if step % every_steps == 0:
            state = TrainerState(
                step=step, version=step, cursor=0, random_state=random_state(), base_digest=policy.base_digest
            )
            save_checkpoint(folder / "checkpoints", state, write=policy.save, keep=keep)
            written.keep_only_replayable(checkpoint_steps(folder / "checkpoints"))
    return config


def test_a_record_reads_back_as_it_was(tmp_path: Path) -> None:
    record = StepRecord(
        step=3, parent_digest="d", groups=[random_group(1), random_group(2)], metrics={"loss/policy": 0.5}
    )
    Audit(tmp_path, make_config(audit="all")).record(record, saved_step=0)
    read = read_record(audit_folder(tmp_path), 3)
    assert (read.step, read.parent_digest, read.metrics) == (3, "d", {"loss/policy": 0.5})
    for group, written in zip(read.groups, record.groups, strict=True):
        assert (group.group_id, group.timestamps, group.prompt) == (written.group_id, {"ready": 1.5}, written.prompt)
        np.testing.assert_array_equal(group.prompt_ids, written.prompt_ids)
        for episode, before in zip(group.episodes, written.episodes, strict=True):
            assert (episode.reward, episode.rewards) == (before.reward, before.rewards)
            assert episode.completion.policy_versions == before.completion.policy_versions
            np.testing.assert_array_equal(episode.completion.token_ids, before.completion.token_ids)
            np.testing.assert_array_equal(episode.completion.rollout_logprobs, before.completion.rollout_logprobs)
            np.testing.assert_array_equal(episode.ref_logprobs, before.ref_logprobs)


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["weights", "lora"])
def test_the_whole_stream_gives_the_same_bits(tmp_path: Path, model_folder: Path, lora: dict[str, int] | None) -> None:
    """And one step of it, from the nearest checkpoint."""
    run_of(tmp_path / "run", model_folder, lora=lora)
    steps = list(replay(tmp_path / "run"))
    assert [step.step for step in steps] == [1, 2, 3, 4, 5]
    assert all(step.recorded_loss == step.replayed_loss and step.began_with_same_weights for step in steps)
    assert [step.ended_with_same_weights for step in steps] == [None, True, None, True, None]
    assert [step.step for step in replay(tmp_path / "run", step=4)] == [3, 4]
    assert all(step.agrees and step.began_with_same_weights for step in replay(tmp_path / "run", step=5))


def test_a_step_trained_on_something_else_does_not_agree(tmp_path: Path, model_folder: Path) -> None:
    config = run_of(tmp_path / "run", model_folder)
    record = read_record(audit_folder(tmp_path / "run"), 2)
    Audit(tmp_path / "run", config).record(
        StepRecord(step=2, parent_digest=record.parent_digest, groups=[random_group(77)], metrics=record.metrics),
        saved_step=0,
    )
    first, second, third = list(replay(tmp_path / "run"))[:3]
    assert first.agrees and not second.agrees and not second.ended_with_same_weights
    assert not third.began_with_same_weights
    Audit(tmp_path / "run", config).forget_after(3)  # the others are of an abandoned branch
    assert recorded_steps(audit_folder(tmp_path / "run")) == [1, 2, 3]


def test_a_sample_is_what_kept_checkpoints_can_replay(tmp_path: Path, model_folder: Path) -> None:
    run_of(tmp_path / "run", model_folder, audit="sample", every_steps=1, keep=2)
    assert recorded_steps(audit_folder(tmp_path / "run")) == [1, 5]  # 4 and 5 are kept; 6 is not trained yet
    steps = list(replay(tmp_path / "run"))
    assert [step.step for step in steps] == [1, 5]
    assert all(step.agrees and step.began_with_same_weights for step in steps) and steps[1].ended_with_same_weights
    with pytest.raises(ConfigError, match=r"step 3 is not in .*recorded steps: 1, 5"):
        list(replay(tmp_path / "run", step=3))


def test_a_step_whose_checkpoint_is_gone_says_what_is_missing(tmp_path: Path, model_folder: Path) -> None:
    run_of(tmp_path / "run", model_folder, every_steps=5)
    (audit_folder(tmp_path / "run") / "step-00000002.zst").unlink()
    with pytest.raises(ConfigError, match=r"step 4 is replayed from the base model, but step 2 is not recorded"):
        list(replay(tmp_path / "run", step=4))
    assert [step.step for step in replay(tmp_path / "run")] == [1], "of the rest none has its checkpoint"


def test_a_damaged_checkpoint_or_record_is_named(tmp_path: Path, model_folder: Path) -> None:
    run_of(tmp_path / "run", model_folder)
    weights = tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors"
    record = audit_folder(tmp_path / "run") / "step-00000002.zst"
    for path, step, message in ((weights, 5, "step-00000004 is damaged"), (record, None, "2.zst is damaged")):
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(ConfigError, match=message):
            list(replay(tmp_path / "run", step=step))


def test_none_keeps_nothing_and_a_full_disk_costs_no_run(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_of(tmp_path / "run", model_folder, audit="none")
    assert recorded_steps(audit_folder(tmp_path / "run")) == []
    (tmp_path / "blocked").write_text("a file where the run folder should be")
    record = StepRecord(step=1, parent_digest="", groups=[], metrics={})
    Audit(tmp_path / "blocked", make_config(audit="all")).record(record, saved_step=0)
    assert "step 1 is not in the audit" in caplog.text
