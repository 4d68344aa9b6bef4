"""The best checkpoint: found although results come late, from another life of the trainer, or never."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import redis
import torch
from builders import evaluated_payload, make_config, make_ledger, publish_policy, rollout_payload, task_payload
from click.testing import CliRunner

from sluice.common.errors import ConfigError
from sluice.common.keys import Keys
from sluice.common.ledger import evaluations as evaluation
from sluice.common.ledger.evaluations import read_best
from sluice.common.run import Run, create_run
from sluice.scripts.cli import cli
from sluice.trainer.best import best_step, settle_best, update_best
from sluice.trainer.checkpoint import TrainerState, random_state, save_checkpoint, write_tensors

NUM_PROMPTS = 4


@pytest.fixture
def run(client: redis.Redis, keys: Keys, tmp_path: Path) -> Run:
    """A run that keeps the best of its checkpoints beside the newest."""
    config = make_config(
        checkpoint={"keep": 1, "keep_best": "heldout/pass@1"},
        evaluation={"datasets": [{"dataset": {"path": "x"}}], "every_steps": 1},
    )
    return create_run(client, keys.run, config, assets={}, folder=str(tmp_path))


class Trained:
    """What a trainer does about evaluations and checkpoints, without the training."""

    def __init__(self, client: redis.Redis, run: Run) -> None:
        self.client, self.run, self.keys = client, run, run.keys
        self.folder = Path(run.folder) / "checkpoints"
        self.ledger = make_ledger(client, run.keys)
        (self.dataset,) = run.config.evaluation.datasets

    def step(self, step: int, *, version: int | None = None, parent: int | None = None) -> None:
        """Publish, ask for an evaluation, checkpoint."""
        version = step if version is None else version
        self.publish(version, step=step, parent=parent)
        state = TrainerState(step=step, version=version, cursor=0, random_state=random_state())
        protected = update_best(self.folder, self.client, self.run)

        def write(folder: Path) -> dict[str, str]:
            return write_tensors(folder, "model", {"w": torch.zeros(2)}, rank=0)

        save_checkpoint(self.folder, state, write=write, keep=1, protected=protected)

    def publish(self, version: int, *, step: int, parent: int | None = None) -> None:
        publish_policy(self.client, self.keys, version, step=step, parent=parent)
        evaluation.request(self.client, self.keys, self.dataset, version=version)

    def answer(self, version: int, *, num_correct: int, is_seen: bool = True) -> None:
        """The evaluation of a version comes in; a trainer that lives sees it."""
        groups = [f"e{version}.heldout.{i}g" for i in range(NUM_PROMPTS)]
        tasks = {group: task_payload(group) for group in groups}
        self.ledger.admit_eval(f"{version}.heldout", dataset="heldout", version=version, tasks=tasks)
        for i, group in enumerate(groups):
            self.ledger.store(group, "rollout", rollout_payload(version=version), version=version)
            self.ledger.store(group, "reward", evaluated_payload(rewards=(float(i < num_correct),)))
        if is_seen:
            settle_best(self.folder, self.client, self.run)

    def steps(self) -> list[int]:
        """Of the checkpoints on disk."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def best(self) -> tuple[int, float] | None:
        best = read_best(self.folder)
        return None if best is None else (best.step, best.value)


@pytest.fixture
def trained(client: redis.Redis, run: Run) -> Trained:
    return Trained(client, run)


def test_a_checkpoint_waits_for_its_result_and_the_best_one_stays(trained: Trained) -> None:
    for step in (1, 2, 3):
        trained.step(step)
    assert trained.steps() == [1, 2, 3], "it is not known yet which of them is the best"
    assert trained.best() is None
    trained.answer(2, num_correct=3)
    assert (trained.best(), trained.steps()) == ((2, 0.75), [1, 2, 3])
    trained.answer(1, num_correct=2)
    assert (trained.best(), trained.steps()) == ((2, 0.75), [2, 3])
    trained.step(4)
    trained.answer(3, num_correct=1)
    trained.answer(4, num_correct=4)
    assert (trained.best(), trained.steps()) == ((4, 1.0), [4])
    assert json.loads((trained.folder / "best").read_text()) == {
        "step": 4, "version": 4, "evaluated_version": 4, "metric": "heldout/pass@1", "value": 1.0,
    }  # fmt: skip
    assert (trained.folder / "latest").read_text() == "step-00000004"


def test_of_equal_checkpoints_the_earliest_is_the_best_whichever_result_came_first(trained: Trained) -> None:
    for step in (1, 2):
        trained.step(step)
    trained.answer(2, num_correct=3)
    assert trained.best() == (2, 0.75)
    trained.answer(1, num_correct=3)
    assert trained.best() == (1, 0.75)
    trained.step(3)
    trained.answer(3, num_correct=3)
    assert (trained.best(), trained.steps()) == ((1, 0.75), [1, 3])


def test_a_result_that_comes_in_while_no_trainer_lives_counts_after_the_resume(trained: Trained) -> None:
    for step in (1, 2):
        trained.step(step)
    trained.answer(2, num_correct=1)
    trained.publish(3, step=3)  # asked for, and killed before the checkpoint of step 3
    trained.answer(1, num_correct=2, is_seen=False)
    trained.answer(3, num_correct=4, is_seen=False)
    resumed = Trained(trained.client, trained.run)
    resumed.publish(4, step=2, parent=2)  # continues from step 2
    resumed.step(3, version=5, parent=4)
    assert resumed.best() == (1, 0.5), "what version 3 reached is in no checkpoint"
    resumed.answer(5, num_correct=3)
    assert (resumed.best(), resumed.steps()) == ((3, 0.75), [3])


def test_the_evaluation_of_a_policy_published_again_speaks_for_its_checkpoint(trained: Trained) -> None:
    trained.step(1)
    trained.answer(1, num_correct=1)
    trained.step(2)
    trained.client.hdel(trained.keys.evaluations, "2.heldout")  # Redis lost its last second, and so the request
    trained.publish(3, step=2, parent=2)
    trained.client.hset(trained.keys.lineage, "3", "2:2:digest-2")  # bit for bit version 2
    trained.step(4, version=4, parent=3)
    assert trained.steps() == [1, 2, 4], "the evaluation of version 3 is awaited"
    trained.answer(3, num_correct=4)
    best = read_best(trained.folder)
    assert best is not None
    assert (best.step, best.version, best.evaluated_version, best.value) == (2, 2, 3, 1.0)


def test_a_best_checkpoint_outlives_its_result_in_redis(trained: Trained) -> None:
    trained.step(1)
    trained.answer(1, num_correct=3)
    trained.client.delete(trained.keys.evaluation("1.heldout"))
    trained.step(2)
    trained.answer(2, num_correct=2)
    trained.step(3)
    assert (trained.best(), trained.steps()) == ((1, 0.75), [1, 3])


def test_a_step_that_was_trained_again_is_not_judged_by_its_earlier_life(trained: Trained) -> None:
    trained.step(1)
    trained.answer(1, num_correct=4)
    trained.step(1, version=2, parent=0)  # its checkpoint was damaged
    trained.answer(2, num_correct=2)
    assert trained.best() == (1, 0.5)


def test_an_evaluation_whose_prompts_all_died_has_no_say(trained: Trained) -> None:
    ledger = make_ledger(trained.client, trained.keys, lease={"max_attempts": 1})
    trained.step(1)
    trained.answer(1, num_correct=1)
    trained.step(2)
    ledger.admit_eval("2.heldout", dataset="heldout", version=2, tasks={"e2.heldout.0g": task_payload("x")})
    claim = ledger.claim("e2.heldout.0g", "rollout", fields=())
    assert claim is not None
    ledger.fail(claim, reason="EngineError", detail="x")
    trained.step(3)
    assert (trained.best(), trained.steps()) == ((1, 0.25), [1, 3])


def test_without_keep_best_nothing_stays_and_the_export_says_what_it_needs(
    client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    evaluations = {"datasets": [{"dataset": {"path": "x"}}], "every_steps": 1}
    config = make_config(checkpoint={"keep": 1}, evaluation=evaluations)
    trained = Trained(client, create_run(client, keys.run, config, assets={}, folder=str(tmp_path)))
    for step in (1, 2, 3):
        trained.step(step)
    trained.answer(2, num_correct=4)
    assert (trained.best(), trained.steps()) == (None, [3])
    with pytest.raises(ConfigError, match="names no best checkpoint: it needs"):
        best_step(trained.folder)
    both = CliRunner().invoke(cli, ["export", str(tmp_path), "target", "--best", "--step", "3"])
    assert isinstance(both.exception, ConfigError)
