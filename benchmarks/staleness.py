"""What the age of the policy costs, and what each off-policy treatment saves, on the quickstart's task with forced ages.

    python -m sluice.scripts.prepare_tiny runs/tiny
    OMP_NUM_THREADS=1 python benchmarks/staleness.py --jobs 2 --out benchmarks/results/staleness.json

Every batch is sampled by the policy of exactly `age` steps before (benchmarks/sync_baseline.py: the real model, rewards,
loss and optimizer in one process; a run of the system is at most as old). Treatments, one optimizer step per batch:

    none      the batch is taken as on-policy: ratio 1, no clip, no weight (recomputed old logprobs, AReaL's "naive PPO")
    bypass    ratio to the sampler's logprobs, PPO-clip 0.2/0.28                        (the default)
    truncate  decoupled: importance weight per token, truncated at 2                    (TIS)
    mask      decoupled: importance weight per token, 0 outside 0.5..2                  (IcePop)

`--learning-rates`: the quickstart's own, and a larger one at which the policy moves far enough in a step for age to matter.
Per cell and seed: held-out greedy and sampled accuracy after the last step, the mean reward of the last tenth of the steps,
and the lowest mean reward of any ten consecutive steps after the first tenth (a dip). A run that is in `--out` already is
not made again; so a stopped benchmark goes on where it was. CPU seconds: about 40 per run.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TREATMENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "bypass": {"off_policy": "bypass"},
    "truncate": {"off_policy": "decoupled", "importance_sampling": "token_truncate", "importance_max": 2.0},
    "mask": {
        "off_policy": "decoupled",
        "importance_sampling": "token_mask",
        "importance_min": 0.5,
        "importance_max": 2.0,
    },
}
AGES = (0, 1, 2, 4, 8)


def one_run(treatment: str, *, age: int, seed: int, learning_rate: float, num_steps: int) -> dict[str, Any]:
    """One training run in this process."""
    import torch

    from benchmarks.sync_baseline import run
    from sluice.common.config.file import load_config

    torch.set_num_threads(1)
    loss = {"clip_low": 0.2, "clip_high": 0.28, **TREATMENTS[treatment]}
    config = load_config(
        ROOT / "config" / "quickstart.yaml",
        [
            f"seed={seed}",
            f"trainer.num_steps={num_steps}",
            f"trainer.learning_rate={learning_rate}",
            f"trainer.loss={json.dumps(loss)}",
            "evaluation.every_steps=0",
        ],
    )
    report = run(config, policy_age=age, corrected=treatment != "none")
    rewards, tenth = report.rewards, max(1, num_steps // 10)
    windows = [fmean(rewards[i : i + 10]) for i in range(tenth, len(rewards) - 9)]
    last = report.evaluations[-1]
    return {
        "treatment": treatment, "age": age, "seed": seed, "learning_rate": learning_rate, "num_steps": num_steps,
        "greedy": last["greedy"], "sampled": last["sampled"],
        "reward_last": fmean(rewards[-tenth:]), "reward_lowest": min(windows, default=None),
    }  # fmt: skip


def table(runs: list[dict[str, Any]], *, learning_rate: float, value: str) -> str:
    """Rows are treatments, columns ages; each cell the values of the seeds."""
    rows = [f"| lr {learning_rate:g}, {value} | " + " | ".join(f"age {age}" for age in AGES) + " |"]
    rows.append("|---" * (len(AGES) + 1) + "|")
    for treatment in TREATMENTS:
        cells = []
        for age in AGES:
            found = [
                r for r in runs if (r["treatment"], r["age"], r["learning_rate"]) == (treatment, age, learning_rate)
            ]
            cells.append(" ".join(f"{r[value]:.2f}" for r in sorted(found, key=lambda r: r["seed"])) or "-")
        rows.append(f"| {treatment} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Policy age x off-policy treatment on the quickstart's task.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-steps", type=int, default=60)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-4, 1e-3])
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one run, as JSON: what a child process does
    args = parser.parse_args()
    if args.only:
        print(json.dumps(one_run(**json.loads(args.only))))
        return
    runs: list[dict[str, Any]] = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    settings = ("treatment", "age", "seed", "learning_rate", "num_steps")
    done = {tuple(found[name] for name in settings) for found in runs}
    wanted = product(args.learning_rates, range(args.seeds), AGES, TREATMENTS)
    cells = [
        dict(zip(settings, (treatment, age, seed, rate, args.num_steps), strict=True))
        for rate, seed, age, treatment in wanted
        if (treatment, age, seed, rate, args.num_steps) not in done
    ]

    def make(cell: dict[str, Any]) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--out", str(args.out), "--only", json.dumps(cell)]
        made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()[-1]
        runs.append(json.loads(made))
        machine = {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()}
        args.out.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n")
        print(f"{len(runs)}/{len(done) + len(cells)}  {made}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(make, cells))
    for rate, value in product(args.learning_rates, ("greedy", "sampled", "reward_last")):
        print("\n" + table(runs, learning_rate=rate, value=value))


if __name__ == "__main__":
    main()
