"""Metrics of a step reach every sink under the names that the docs list."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from builders import make_completion, make_episode, make_group, make_run

from sluice.common.disk import rotated
from sluice.common.keys import Keys
from sluice.common.ledger import evaluations as evaluation
from sluice.common.monitoring.metric_stream import last_metrics, read_metrics
from sluice.common.types import Group
from sluice.dashboard.samples import read_samples
from sluice.trainer.control_state import ControlReader
from sluice.trainer.samples import Samples
from sluice.trainer.step_metrics import REWARD_BINS, Reporter, append_line, batch_metrics, token_age


def group(rewards: list[float | None], *, tokens: int = 4, version: int = 3) -> Group:
    completion = make_completion(version=version, length=tokens)
    episodes = [
        make_episode(
            replace(completion, finish_reason="stop" if reward else "length"), reward=reward, rewards={"Math": reward}
        )
        for reward in rewards
    ]
    timestamps = {"ready": 10.0, "leased": 10.5}
    return make_group(*episodes, policy_version=version, prompt="p", target="1", timestamps=timestamps)


def test_batch_metrics_by_hand() -> None:
    metrics = batch_metrics([group([1.0, 0.0]), group([1.0, 1.0], tokens=8), group([None, 0.0])], ages=[0, 1, 1])
    assert metrics["reward/mean"] == pytest.approx(3 / 5)  # the unscorable completion is left out
    assert metrics["reward/Math/mean"] == pytest.approx(3 / 5)
    assert metrics["frac_reward_zero_std"] == pytest.approx(2 / 3)  # equal rewards, and a single scorable one
    assert metrics["completions/mean_length"] == pytest.approx((4 * 4 + 2 * 8) / 6)
    assert (metrics["completions/min_length"], metrics["completions/max_length"]) == (4, 8)
    assert metrics["completions/clipped_ratio"] == pytest.approx(3 / 6)
    assert (metrics["staleness/mean"], metrics["staleness/max"]) == (pytest.approx(2 / 3), 1)
    assert metrics["staleness/in_queue"] == pytest.approx(0.5)
    assert (metrics["policy_age/0"], metrics["policy_age/1"]) == (1, 2)
    assert metrics["num_tokens"] == 32
    bins = [metrics[f"reward_histogram/{i}"] for i in range(REWARD_BINS)]
    assert (bins, metrics["reward_histogram/low"], metrics["reward_histogram/high"]) == ([2] + [0] * 8 + [3], 0, 1)
    same = batch_metrics([group([0.5, 0.5])], ages=[0])
    assert (same["reward_histogram/0"], same["reward_histogram/high"]) == (2, 0.5)


def test_the_age_of_tokens_is_weighed_by_their_number(client: redis.Redis, keys: Keys) -> None:
    client.hset(keys.lineage, mapping={"3": "2:3", "4": "3:4", "5": "4:5"})
    mixed = group([1.0, 0.0], tokens=4, version=3)
    spans = ((3, 1), (4, 2), (5, 1))
    mixed.episodes[0] = make_episode(replace(mixed.episodes[0].completion, policy_versions=spans))
    # ages 2, 1, 1, 0 of one completion, 2 four times of the other, 0 eight times of the second group
    assert token_age(client, keys, [mixed, group([1.0], tokens=8, version=5)], current=5) == pytest.approx(12 / 16)
    assert math.isnan(token_age(client, keys, [group([1.0], version=1)], current=5)), "Redis has forgotten that version"


def test_a_step_is_in_redis_and_jsonl(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    reporter = Reporter(client, make_run(keys, tmp_path))
    reporter.report(7, 9, {"reward/mean": 0.25, "learning_rate": 3e-9, "eval/x/pass@1": float("nan")})
    ((_, metrics),) = read_metrics(client, keys)
    assert (metrics["step"], metrics["version"], metrics["reward/mean"]) == (7, 9, 0.25)
    assert metrics["learning_rate"] == pytest.approx(3e-9)
    assert last_metrics(client, keys)["step"] == 7
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["reward/mean"] == 0.25
    assert "eval/x/pass@1" not in line  # JSON has no nan


def test_the_file_of_metrics_is_bounded_and_what_was_reported_is_known_from_all_its_parts(
    client: redis.Redis, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sluice.trainer.step_metrics.MAX_BYTES", 300)
    monkeypatch.setattr("sluice.trainer.step_metrics.MAX_PARTS", 3)
    path, run = tmp_path / "metrics.jsonl", make_run(keys, tmp_path)
    append_line(path, {"step": 0, "control": "paused", "entry": "7-0"})
    for step in range(1, 12):
        append_line(path, {"step": step, "version": step, "filler": "x" * 100})
    lines = [json.loads(line)["step"] for part in rotated(path) for line in part.read_text().splitlines()]
    assert lines == list(range(12)), "every line, in order"
    assert len(rotated(path)) == 4
    os.truncate(path, 0)  # as just after a rotation
    assert Reporter(client, run).last_version == json.loads(rotated(path)[-2].read_text().splitlines()[-1])["step"]
    assert ControlReader(client, run)._last_entry == "7-0"
    for step in range(12, 40):
        append_line(path, {"step": step, "filler": "x" * 100})
    assert len(rotated(path)) == 4 and sum(part.stat().st_size for part in rotated(path)) < 4 * 500


def test_an_evaluation_is_marked_as_reported_after_its_line_was_written(
    client: redis.Redis, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(keys, tmp_path, evaluation={"datasets": [{"dataset": {"path": "x"}}]})
    (dataset,) = run.config.evaluation.datasets
    evaluation.request(client, keys, dataset, version=2)
    reporter, metrics = Reporter(client, run), {"eval/heldout/version": 2.0, "eval/heldout/pass@1": 0.5}
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr("sluice.trainer.step_metrics.append_line", None)  # killed there
        reporter.report(3, 3, metrics)
    assert evaluation.unreported(client, run) == {("heldout", 2)}
    reporter.report(3, 3, metrics)
    assert evaluation.unreported(client, run) == set()
    reporter.close()


def test_samples_are_kept_for_reading(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    samples = Samples(client, make_run(keys, tmp_path))
    for step in (1, 2):
        samples.keep(step, [group([1.0, 0.0])] * 3, [[0.7, -0.7]] * 3, lambda sequences: [None] * len(sequences))
    newest = read_samples(client, keys, count=10)
    assert [sample["step"] for sample in newest] == [2, 2, 1, 1]  # two groups a step
    assert [c["advantage"] for c in newest[0]["completions"]] == [0.7, -0.7]
    assert [s["step"] for s in read_samples(client, keys, count=10, step=1)] == [1, 1]
