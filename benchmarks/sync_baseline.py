"""A config's job in one synchronous process: the like-for-like baseline, where the values of config/quickstart.yaml were found.

    OMP_NUM_THREADS=1 python benchmarks/sync_baseline.py [key=value ...] [--policy-age 1]

`--policy-age N` samples every batch with the weights of N steps before: an asynchronous run at its worst. Per evaluation:
greedy and sampled accuracy, and CPU seconds, wall seconds and generated tokens of training so far (evaluations are timed
apart, in eval_cpu_s); and the mean reward of each step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names would hide others

import torch

from benchmarks.shared.processes import CONFIG, ROOT, tiny_settings, typed
from benchmarks.shared.report import new_parser, parse, publish
from benchmarks.shared.sync_run import run
from sluice.common.config.file import load_config


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the quickstart's config")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--policy-age", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench", help="where the tiny model is kept")
    arguments = parse(parser, argv, quick={"overrides": ["trainer.num_steps=2", "sampling.group_size=4"]})
    torch.set_num_threads(1)
    tiny = tiny_settings(arguments.folder, quick=arguments.quick) if arguments.config == CONFIG else {}
    config = load_config(arguments.config, [*typed(tiny), *arguments.overrides])
    publish("sync_baseline", arguments, run(config, policy_age=arguments.policy_age))


if __name__ == "__main__":
    main()
