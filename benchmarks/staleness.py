"""What the age of the policy costs, and what each off-policy treatment saves, on the quickstart's task with forced ages.

    OMP_NUM_THREADS=1 python benchmarks/staleness.py --jobs 2

Every batch is sampled by the policy of exactly `age` steps before (benchmarks/shared/sync_run.py: the real model, rewards,
loss and optimizer in one process; a run of the system is at most as old). Treatments, one optimizer step per batch:

    none      the batch is taken as on-policy: ratio 1, no clip, no weight (recomputed old logprobs, AReaL's "naive PPO")
    bypass    ratio to the sampler's logprobs, PPO-clip 0.2/0.28                        (the default)
    truncate  decoupled: importance weight per token, truncated at 2                    (TIS)
    mask      decoupled: importance weight per token, 0 outside 0.5..2                  (IcePop)

`--learning-rates`: the quickstart's own, and a larger one at which the policy moves far enough in a step for age to matter.
Per cell and seed: held-out greedy and sampled accuracy after the last step, the mean reward of the last tenth of the steps,
and the lowest mean reward of any ten consecutive steps after the first tenth (a dip). CPU seconds: about 40 per run.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names would hide others

import torch

from benchmarks.shared.processes import CONFIG, ROOT, tiny_settings, typed
from benchmarks.shared.report import new_parser, parse, publish
from benchmarks.shared.sync_run import run
from sluice.common.config.file import load_config

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


def one_run(cell: tuple[float, int, int, str], settings: dict[str, Any]) -> dict[str, Any]:
    """Make the training run of (learning rate, seed, age, treatment)."""
    learning_rate, seed, age, treatment = cell
    torch.set_num_threads(1)
    loss = {"clip_low": 0.2, "clip_high": 0.28, **TREATMENTS[treatment]}
    of_cell = {"seed": seed, "trainer.learning_rate": learning_rate, "trainer.loss": loss, "evaluation.every_steps": 0}
    report = run(load_config(CONFIG, typed(settings | of_cell)), policy_age=age, corrected=treatment != "none")
    rewards, last = report["rewards"], report["evaluations"][-1]
    tenth = max(1, len(rewards) // 10)
    windows = [fmean(rewards[i : i + 10]) for i in range(tenth, len(rewards) - 9)]
    return {
        "treatment": treatment, "age": age, "seed": seed, "learning_rate": learning_rate, "num_steps": len(rewards),
        "greedy": last["greedy"], "sampled": last["sampled"],
        "reward_last": fmean(rewards[-tenth:]), "reward_lowest": min(windows, default=None),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-steps", type=int, default=60)
    parser.add_argument("--ages", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--treatments", nargs="+", choices=list(TREATMENTS), default=list(TREATMENTS))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-4, 1e-3])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench", help="where the tiny model is kept")
    quick = {"seeds": 1, "num_steps": 2, "ages": [0, 1], "treatments": ["none", "mask"], "learning_rates": [2e-4]}
    arguments = parse(parser, argv, quick=quick)
    settings = tiny_settings(arguments.folder, quick=arguments.quick) | {"trainer.num_steps": arguments.num_steps}
    cells = list(product(arguments.learning_rates, range(arguments.seeds), arguments.ages, arguments.treatments))
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as processes:
        runs = []
        for found in processes.map(one_run, cells, [settings] * len(cells)):
            runs.append(found)
            print(f"{len(runs)}/{len(cells)}  {json.dumps(found)}", file=sys.stderr, flush=True)
    publish("staleness", arguments, {"runs": runs})


if __name__ == "__main__":
    main()
