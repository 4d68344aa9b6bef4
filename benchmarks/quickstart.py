"""config/quickstart.yaml measured: what it learns, where its CPU seconds go, and TRL's GRPOTrainer at the same job.

    python benchmarks/quickstart.py [--seeds 3] [--steps 100] [--trl-python PATH]

Per seed, one after the other on an otherwise idle machine, the same warm start for all:
  shipped   `sluice run` as configured, evaluations included: accuracy before and after, wall and CPU seconds
  training  `sluice run` without evaluation: shares of the CPU, and wall seconds to an accuracy
  trl       benchmarks/peers/trl_quickstart.py with one and with two torch threads; left out where trl is not installed
Accuracies along the way are greedy, held-out, computed afterwards from the weights of every step, by the same code for
both: in neither clock. Besides a run of 30 M parameters with random weights (`--large-steps`), for its shares only.

Seconds to an accuracy count from the start of the first step; `with_start_up` from the start of the process. "Everything
else" is all CPU that is not a model's forward or backward pass (benchmarks/shared/cpu_account.py), from the first step on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names would hide others

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks.shared.cpu_account import MODEL_WORK, Watcher, counters
from benchmarks.shared.models import build_model
from benchmarks.shared.processes import (
    CONFIG,
    ROOT,
    check_ended_well,
    environment,
    missing,
    read_lines,
    read_steps,
    start_sluice_run,
    tiny_settings,
    typed,
)
from benchmarks.shared.report import new_parser, parse, publish
from benchmarks.shared.sync_run import SyncRun, read_rows
from sluice.common.config import Config
from sluice.common.config.file import load_config


def curve(config: Config, policies: Path, *, num_steps: int, threshold: float) -> dict[int, float]:
    """Greedy held-out accuracy of a folder of policy-<version>.safetensors: of every step up to the first at `threshold`, of
    every tenth after it, and of the last."""
    held_out = config.evaluation.datasets[0]
    rows = read_rows(held_out.dataset.path)[: held_out.num_prompts]
    found: dict[int, float] = {}
    reached = False
    with closing(SyncRun(config)) as job:
        for step in range(1, num_steps + 1):
            if not reached or step % 10 == 0 or step == num_steps:
                weights = load_file(policies / f"policy-{step:08d}.safetensors")
                found[step] = job.evaluate(rows, weights, num_samples=0)["greedy"]
                reached = reached or found[step] >= threshold
    return found


@contextmanager
def policies_folder() -> Iterator[Path]:
    """Where all policies of a run are kept: in memory, as by default, so that it costs nothing."""
    folder = tempfile.mkdtemp(prefix="sluice-bench-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sluice_run(settings: dict[str, Any], *, folder: Path, policies: Path) -> dict[str, Any]:
    """One `sluice run` of the quickstart, watched; its summary, step times and CPU account."""
    probe = folder / "probe"
    probe.mkdir(parents=True)
    started = time.time()
    process = start_sluice_run(
        "run", {**settings, "policy_store.path": str(policies)}, folder=folder,
        SLUICE_PROBE=str(probe), PYTHONPATH=f"{ROOT / 'benchmarks' / 'probe'}:{ROOT}",
    )  # fmt: skip
    watcher = Watcher(process.pid, run=folder / "run", probe_folder=probe)
    try:
        code = process.wait()
    finally:
        process.terminate()
        process.wait()
        watcher.stop()
    check_ended_well(code, folder / "run.output")
    return _result(folder / "run", watcher, started=started, until=time.time())


def _result(run: Path, watcher: Watcher, *, started: float, until: float) -> dict[str, Any]:
    steps = read_steps(run)
    summary = json.loads((run / "summary.json").read_text())
    began = steps[0]["time"] - steps[0]["time/step"]
    steady = counters(watcher.snapshots, began, read_lines(run)[-1]["time"])
    whole, start_up = (counters(watcher.snapshots, None, moment) for moment in (until, began))
    groups = sum(summary["ledger"][outcome] for outcome in ("trained", "scored"))
    return {
        "wall_s": round(until - started, 2),
        "start_up_s": round(began - started, 2),
        "cpu_s": round(whole["cpu_s"], 2),
        "summary": {name: summary[name] for name in ("eval_before", "eval_after", "reward_first", "reward_last")},
        "restarts": summary["restarts"],
        "steady": {**steady, **shares(steady, num_groups=groups + summary["ledger_eval"]["scored"])},
        "start_up_cpu_s": round(start_up["cpu_s"], 2),
        "start_up_cpu_s_by_role": start_up["cpu_s_by_role"],
        "step_s": round((steps[-1]["time"] - began) / len(steps), 4),
        "idle_fraction_trainer": round(sum(s["time/wait_for_batch"] for s in steps) / (steps[-1]["time"] - began), 3),
        "steps": [{"step": s["step"], "wall_s": round(s["time"] - began, 3)} for s in steps],
    }


def shares(steady: dict[str, Any], *, num_groups: int) -> dict[str, Any]:
    """Return the shares of the CPU, and milliseconds per group and per Celery message."""
    cpu_s, kinds = steady["cpu_s"], steady["by_kind"]
    model = {kind: round(kinds.get(kind, 0.0) / cpu_s, 4) for kind in MODEL_WORK}
    other_s = cpu_s - sum(kinds.get(kind, 0.0) for kind in MODEL_WORK)
    messages = steady["calls"].get("publish_message", 0)
    lua = [c for name, c in steady["redis_commands"].items() if name.startswith("eval")]
    return {
        "share": {**model, "everything_else": round(other_s / cpu_s, 4)},
        "num_groups": num_groups,
        "num_messages": messages,
        "num_ledger_calls": steady["calls"].get("ledger_calls", 0),
        "num_redis_commands": int(sum(c["calls"] for c in steady["redis_commands"].values())),
        "lua_ms_per_call": round(1e3 * sum(c["s"] for c in lua) / max(1, sum(c["calls"] for c in lua)), 4),
        "else_ms_per_group": round(1e3 * other_s / num_groups, 3),
        "else_ms_per_message": round(1e3 * other_s / max(1, messages), 3),
        "else_ms_per_group_by_kind": {
            kind: round(1e3 * seconds / num_groups, 3) for kind, seconds in kinds.items() if kind not in MODEL_WORK
        },
    }


def trl_run(config: Config, *, python: str, threads: int, steps: int, folder: Path) -> dict[str, Any]:
    """Run the peer; its step times, and its weights in `folder`."""
    trainer, loss = config.trainer, config.trainer.loss
    spec = {
        "model": config.model.path, "dataset": config.dataset.path, "seed": config.seed, "num_steps": steps,
        "groups_per_step": config.groups_per_step, "group_size": config.sampling.group_size,
        "max_res_tokens": config.sampling.max_res_tokens, "temperature": config.sampling.temperature,
        "kl_beta": loss.kl_beta, "clip_low": loss.clip_low, "clip_high": loss.clip_high,
        "learning_rate": trainer.learning_rate, "betas": trainer.betas, "weight_decay": trainer.weight_decay,
        "warmup_steps": trainer.warmup_steps, "max_grad_norm": trainer.max_grad_norm, "threads": threads,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    env = environment(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    argv = [python, "-m", "benchmarks.peers.trl_quickstart", str(folder / "spec.json"), str(folder)]
    started = time.time()
    with (folder / "errors").open("w") as errors:
        done = subprocess.run(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the TRL peer failed:\n{(folder / 'errors').read_text()[-3000:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    first, rows = lines[0], lines[1:]
    return {
        "threads": threads,
        "start_up_s": round(first["time"] - started, 2),
        "start_up_cpu_s": round(first["cpu_s"], 2),
        "cpu_s": round(rows[-1]["cpu_s"], 2),
        "step_s": round(rows[-1]["wall_s"] / len(rows), 4),
        "steps": [{"step": row["step"], "wall_s": round(row["wall_s"], 3)} for row in rows],
    }


def seconds_to(result: dict[str, Any], *, threshold: float) -> dict[str, Any]:
    """When a run's curve first reached the threshold; the times of its steps are not kept."""
    steps = {row["step"]: row["wall_s"] for row in result.pop("steps")}
    step = next((step for step, accuracy in result["accuracy"].items() if accuracy >= threshold), None)
    if step is None:
        return {"step": None, "wall_s": None, "with_start_up_s": None}
    wall_s = steps[step]
    return {"step": step, "wall_s": wall_s, "with_start_up_s": round(wall_s + result["start_up_s"], 2)}


def measure_seed(seed: int, arguments: argparse.Namespace, *, scratch: Path) -> dict[str, Any]:
    """Measure everything of one seed."""
    settings = tiny_settings(arguments.folder, seed=seed, quick=arguments.quick) | {
        "trainer.num_steps": arguments.steps,
        "sampling.group_size": arguments.group_size,
    }
    config = load_config(CONFIG, typed(settings))
    until = {"threshold": arguments.threshold}
    result: dict[str, Any] = {"seed": seed, "trl": []}
    say(f"seed {seed}: as shipped")
    with policies_folder() as policies:
        result["shipped"] = sluice_run(settings, folder=scratch / f"shipped-{seed}", policies=policies)
        del result["shipped"]["steps"]
    say(f"seed {seed}: training only")
    with policies_folder() as policies:
        bare = {**settings, "evaluation.datasets": [], "policy_store.keep": arguments.steps + 2}
        training = sluice_run(bare, folder=scratch / f"training-{seed}", policies=policies)
        training["accuracy"] = curve(config, policies / "run", num_steps=arguments.steps, **until)
        result["training"] = training | {"to_threshold": seconds_to(training, **until)}
    for threads in arguments.trl_threads:
        say(f"seed {seed}: TRL with {threads} threads")
        folder = scratch / f"trl-{seed}-{threads}"
        steps = min(arguments.steps, arguments.trl_steps)
        peer = trl_run(config, python=arguments.trl_python, threads=threads, steps=steps, folder=folder)
        peer["accuracy"] = curve(config, folder, num_steps=steps, **until)
        result["trl"].append(peer | {"to_threshold": seconds_to(peer, **until)})
    return result


def measure_large(arguments: argparse.Namespace, *, scratch: Path) -> dict[str, Any]:
    """Shares at 30 M parameters: random weights, few steps, no learning."""
    settings, model_folder = tiny_settings(arguments.folder), scratch / "large-model"
    tokenizer = AutoTokenizer.from_pretrained(settings["model.path"])
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build_model("30M", vocab_size=len(tokenizer), max_position_embeddings=128, **ends)
    model.save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    settings |= {"model.path": str(model_folder), "evaluation.datasets": []}
    say("30 M parameters")
    with policies_folder() as policies:
        settings["trainer.num_steps"] = arguments.large_steps
        result = sluice_run(settings, folder=scratch / "large", policies=policies)
        del result["steps"]
    return {"num_parameters": sum(p.numel() for p in model.parameters()), **result}


def headline(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the seeds."""
    training = [seed["training"] for seed in seeds]

    def middle(values: list[float | None]) -> float | None:
        return None if None in values or not values else round(median(v for v in values if v is not None), 3)

    found: dict[str, Any] = {
        "eval_before": [seed["shipped"]["summary"]["eval_before"] for seed in seeds],
        "eval_after": [seed["shipped"]["summary"]["eval_after"] for seed in seeds],
        "shipped_wall_s": middle([seed["shipped"]["wall_s"] for seed in seeds]),
        "shipped_cpu_s": middle([seed["shipped"]["cpu_s"] for seed in seeds]),
        "training_share": {
            kind: middle([run["steady"]["share"][kind] for run in training]) for kind in training[0]["steady"]["share"]
        },
        "shipped_share": {
            kind: middle([seed["shipped"]["steady"]["share"][kind] for seed in seeds])
            for kind in training[0]["steady"]["share"]
        },
        "else_ms_per_group": middle([run["steady"]["else_ms_per_group"] for run in training]),
        "else_ms_per_message": middle([run["steady"]["else_ms_per_message"] for run in training]),
        "step_s": middle([run["step_s"] for run in training]),
    }
    for clock in ("wall_s", "with_start_up_s"):
        ours = middle([run["to_threshold"][clock] for run in training])
        peers = [middle([seed["trl"][i]["to_threshold"][clock] for seed in seeds]) for i in range(len(seeds[0]["trl"]))]
        reached = [peer for peer in peers if peer is not None]
        theirs = min(reached) if reached else None
        found[f"to_threshold_{clock}"] = {"sluice": ours, "trl_by_threads": peers}
        found[f"to_threshold_{clock}"]["ratio"] = round(ours / theirs, 3) if ours and theirs else None
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of every run")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--large-steps", type=int, default=6, help="of the run of 30 M parameters; 0: none")
    parser.add_argument("--trl-steps", type=int, default=60, help="bound for the peer")
    parser.add_argument("--trl-threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threshold", type=float, default=0.95, help="greedy held-out accuracy that ends the race")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that can import trl")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench", help="where the tiny models are kept")
    quick = {"seeds": 1, "steps": 3, "group_size": 4, "large_steps": 0, "trl_threads": [1]}
    arguments = parse(parser, argv, quick=quick)
    torch.set_num_threads(1)
    absent = missing("trl", arguments.trl_python)
    arguments.trl_threads = [] if absent else arguments.trl_threads
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as scratch:
        seeds = [measure_seed(seed, arguments, scratch=Path(scratch)) for seed in range(arguments.seeds)]
        large = measure_large(arguments, scratch=Path(scratch)) if arguments.large_steps else None
    arguments.trl_python = None  # a path of this machine
    found = {"missing": [absent] if absent else [], "headline": headline(seeds), "seeds": seeds, "large": large}
    publish("quickstart", arguments, found)


if __name__ == "__main__":
    main()
