"""max_policy_age = 0: every trained token was sampled by the very weights that are trained."""

from __future__ import annotations

import json
from pathlib import Path

from harness import metrics_of, only_run, quickstart_config, sluice, tiny_folder

STEPS = 20


def test_twenty_steps_on_policy(tmp_path: Path) -> None:
    config = quickstart_config(
        tmp_path,
        tiny=tiny_folder(),
        trainer__num_steps=STEPS,
        trainer__loss={"kl_beta": 0.0},
        replay_buffer__max_policy_age=0,
        evaluation__datasets=[],
        policy_store__transport="redis",  # the other transport is used by every other run
    )
    done = sluice("run", str(config), cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["policy_age"] == {"0": STEPS * 8}
    assert summary["ledger"]["dropped"] == {}, (
        "admission must not let a group be generated that is too old when it is ready"
    )
    for metrics in metrics_of(only_run(tmp_path)):
        assert metrics["staleness/max"] == 0
        assert abs(metrics["off_policy/ratio_max"] - 1) < 1e-3  # of thousands of tokens, the worst, in float32
        assert abs(metrics["off_policy/ratio_mean"] - 1) < 1e-4
        assert metrics["off_policy/logprob_abs_diff"] < 1e-4
