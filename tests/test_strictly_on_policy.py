"""max_policy_age = 0: every trained token was sampled by the very weights that are trained.

With top_p 0.8, so that it also shows that the trainer reproduces the truncated distribution (a trainer that does not gets a
mean ratio of 0.82), and with evaluations on the same engine, which goes back to their version and returns.
"""

from __future__ import annotations

import json
from pathlib import Path

from harness import metrics_of, only_run, quickstart_config, sluice, tiny_folder

STEPS = 20


def test_twenty_steps_on_policy(tmp_path: Path) -> None:
    tiny = tiny_folder(700)
    prompts = {"path": str(tiny / "heldout.jsonl"), "max_req_tokens": 24}
    heldout = {"name": "heldout", "dataset": prompts, "num_prompts": 40, "function": "MathReward"}
    config = quickstart_config(
        tmp_path,
        tiny=tiny,
        trainer__num_steps=STEPS,
        trainer__loss={"kl_beta": 0.0},
        replay_buffer__max_policy_age=0,
        sampling__top_p=0.8,
        replicas={"eval": 0},
        evaluation={"every_steps": 10, "datasets": [heldout]},
        policy_store__transport="redis",  # the other transport is used by every other run
    )
    done = sluice("run", str(config), cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["policy_age"] == {"0": STEPS * 8}
    assert summary["ledger"]["dropped"] == {}, "no group may be generated that is too old when it is ready"
    assert sorted(record["step"] for record in summary["evaluations"]) == [0, 10, STEPS]
    assert not list(only_run(tmp_path).glob("logs/eval-*")), "the rollout worker evaluates"
    for metrics in metrics_of(only_run(tmp_path)):
        assert metrics["staleness/max"] == 0
        assert abs(metrics["off_policy/ratio_max"] - 1) < 1e-3  # of thousands of tokens, the worst, in float32
        assert abs(metrics["off_policy/ratio_mean"] - 1) < 1e-4
        assert metrics["off_policy/logprob_abs_diff"] < 1e-4
