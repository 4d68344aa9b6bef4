"""config/quickstart.yaml measured: what it learns, where its CPU seconds go, and TRL's GRPOTrainer at the same job.

    python benchmarks/quickstart.py [--seeds 3] [--steps 100] [--trl-python PATH | --skip-trl] [--large]

Per seed, one after the other on an otherwise idle machine, the same warm start for all:
  shipped   `sluice run` as configured, evaluations included: accuracy before and after, wall and CPU seconds
  training  `sluice run` without evaluation: shares of the CPU, and wall seconds to an accuracy
  trl       benchmarks/trl_peer.py with one and with two torch threads; the faster one is compared
Accuracies along the way are greedy, held-out, computed afterwards from the weights of every step, by the same code for
both: in neither clock. `--large` adds a run of 30 M parameters with random weights, for its shares only.

Seconds to an accuracy count from the start of the first step; `with_start_up` from the start of the process. "Everything
else" is all CPU that is not a model's forward or backward pass (benchmarks/cpu_account.py), from the first step on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.cpu_account import MODEL_WORK, Watcher, counters
from benchmarks.generation import processor
from benchmarks.sync_baseline import generate
from sluice.common.config import Config
from sluice.common.config.file import load_config
from sluice.common.models.causal_lm import load_pretrained, load_weights
from sluice.workers.rewards import MathReward

CONFIG = ROOT / "config" / "quickstart.yaml"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
LARGE = {"hidden_size": 512, "intermediate_size": 1920, "num_hidden_layers": 8, "num_attention_heads": 8}
LARGE |= {"num_key_value_heads": 4, "head_dim": 64}  # 29.7 M parameters with the tiny tokenizer
LARGE_STEPS = 6


class Accuracy:
    """Greedy accuracy on held-out prompts of the weights in a folder of policy-<version>.safetensors."""

    def __init__(self, config: Config) -> None:
        self._model = load_pretrained(config.model.path).eval()
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        held_out = config.evaluation.datasets[0]
        lines = Path(held_out.dataset.path).read_text().splitlines()[: held_out.num_prompts]
        self._rows = [json.loads(line) for line in lines]
        messages = [[{"role": "user", "content": row["prompt"]}] for row in self._rows]
        self._prompts = torch.tensor(
            [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in messages]
        )
        self._tokenizer, self._max_tokens = tokenizer, config.sampling.max_res_tokens

    def of(self, path: Path) -> float:
        load_weights(self._model, load_file(path))
        eos = int(self._tokenizer.eos_token_id)
        rollouts = generate(self._model, self._prompts, n=1, max_tokens=self._max_tokens, temperature=0.0, eos=eos)
        completions = rollouts.token_ids[:, self._prompts.shape[1] :]
        lengths = rollouts.mask.sum(1).long()
        texts = [self._tokenizer.decode(ids[:n]) for ids, n in zip(completions, lengths, strict=True)]
        pairs = zip(self._rows, texts, strict=True)
        return sum(MathReward()(row["prompt"], text, row["target"]) == 1 for row, text in pairs) / len(texts)

    def curve(self, folder: Path, *, num_steps: int, threshold: float) -> dict[int, float]:
        """Step -> accuracy: every step up to the first at `threshold`, every tenth after it, and the last."""
        found: dict[int, float] = {}
        reached = False
        for step in range(1, num_steps + 1):
            if not reached or step % 10 == 0 or step == num_steps:
                found[step] = self.of(folder / f"policy-{step:08d}.safetensors")
                reached = reached or found[step] >= threshold
        return found


def prepare(folder: Path, *, seed: int) -> None:
    """The tiny model of a seed; one made before is used again."""
    argv = [sys.executable, "-m", "sluice.scripts.prepare_tiny", str(folder), "--seed", str(seed)]
    subprocess.run(argv, check=True, cwd=ROOT, env={**os.environ, **ONE_THREAD}, stdout=sys.stderr)


def sluice_run(overrides: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    """One `sluice run` of the quickstart, watched; its summary, step times and CPU account."""
    probe = folder / "probe"
    probe.mkdir(parents=True)
    values = {**overrides, "output_dir": str(folder), "policy_store.path": _policies(folder)}
    argv = [sys.executable, "-c", "from sluice.scripts.cli import main; main()", "run", str(CONFIG)]
    argv += [f"{key}={json.dumps(value)}" for key, value in values.items()] + ["--name", "run"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")} | ONE_THREAD
    env |= {"SLUICE_PROBE": str(probe), "PYTHONPATH": f"{ROOT / 'benchmarks' / 'probe'}:{ROOT}"}
    url = folder / "run" / "redis" / "url"
    started = time.time()
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
        watcher = Watcher(
            process.pid, probe_folder=probe, find_redis_url=lambda: url.read_text() if url.exists() else None
        )
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
            watcher.stop()
    if code != 0:
        raise SystemExit(f"sluice run failed ({code}):\n{(folder / 'output').read_text()[-3000:]}")
    return _result(folder / "run", watcher, started=started, until=time.time())


def _policies(folder: Path) -> str:
    """Where a run's policies go: memory, as by default, so that keeping all of them costs nothing."""
    shm = Path("/dev/shm")
    return str(shm / "sluice-bench" / str(os.getpid()) / folder.name if shm.is_dir() else folder / "policies")


def _result(run: Path, watcher: Watcher, *, started: float, until: float) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward/mean" in line]
    summary = json.loads((run / "summary.json").read_text())
    began = steps[0]["time"] - steps[0]["time/step"]
    steady = counters(watcher.snapshots, began, lines[-1]["time"])
    whole, start_up = (counters(watcher.snapshots, None, moment) for moment in (until, began))
    groups = sum(summary["ledger"][outcome] for outcome in ("trained", "scored"))
    return {
        "wall_s": round(until - started, 2),
        "start_up_s": round(began - started, 2),
        "cpu_s": round(whole["cpu_s"], 2),
        "summary": {name: summary[name] for name in ("eval_before", "eval_after", "reward_first", "reward_last")},
        "restarts": summary["restarts"],
        "steady": {**steady, **shards(steady, num_groups=groups + summary["ledger_eval"]["scored"])},
        "start_up_cpu_s": round(start_up["cpu_s"], 2),
        "start_up_cpu_s_by_role": start_up["cpu_s_by_role"],
        "step_s": round((steps[-1]["time"] - began) / len(steps), 4),
        "idle_fraction_trainer": round(sum(s["time/wait_for_batch"] for s in steps) / (steps[-1]["time"] - began), 3),
        "steps": [
            {"step": s["step"], "wall_s": round(s["time"] - began, 3), "wait_s": round(s["time/wait_for_batch"], 3)}
            for s in steps
        ],
    }


def shards(steady: dict[str, Any], *, num_groups: int) -> dict[str, Any]:
    """The account as the issue asks for it; milliseconds per group and per Celery message."""
    cpu_s, kinds = steady["cpu_s"], steady["by_kind"]
    model = {kind: round(kinds.get(kind, 0.0) / cpu_s, 4) for kind in MODEL_WORK}
    other_s = cpu_s - sum(kinds.get(kind, 0.0) for kind in MODEL_WORK)
    messages = steady["calls"].get("publish_message", 0)
    lua = [c for name, c in steady["redis_commands"].items() if name.startswith("eval")]
    return {
        "shard": {**model, "everything_else": round(other_s / cpu_s, 4)},
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
    """The peer's step times; its weights are in `folder`."""
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
    env = {**os.environ, **ONE_THREAD} | {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    argv = [python, "-m", "benchmarks.trl_peer", str(folder / "spec.json"), str(folder)]
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
    """When a run's curve first reached the threshold."""
    step = next((step for step, accuracy in result["accuracy"].items() if accuracy >= threshold), None)
    if step is None:
        return {"step": None, "wall_s": None, "with_start_up_s": None}
    wall_s = next(row["wall_s"] for row in result["steps"] if row["step"] == step)
    return {"step": step, "wall_s": wall_s, "with_start_up_s": round(wall_s + result["start_up_s"], 2)}


def measure_seed(seed: int, arguments: argparse.Namespace, *, scratch: Path) -> dict[str, Any]:
    """Everything of one seed."""
    tiny = arguments.folder / f"tiny-{seed}"
    prepare(tiny, seed=seed)
    overrides = {"seed": seed, "model.path": str(tiny / "model"), "dataset.path": str(tiny / "train.jsonl")}
    overrides["trainer.num_steps"] = arguments.steps
    datasets = yaml.safe_load(CONFIG.read_text())["evaluation"]["datasets"]
    datasets[0]["dataset"]["path"] = str(tiny / "heldout.jsonl")
    with_eval = {**overrides, "evaluation.datasets": datasets}
    config = load_config(CONFIG, [f"{key}={json.dumps(value)}" for key, value in with_eval.items()])
    accuracy = Accuracy(config)

    say(f"seed {seed}: as shipped")
    result: dict[str, Any] = {"seed": seed, "shipped": sluice_run(with_eval, folder=scratch / f"shipped-{seed}")}
    say(f"seed {seed}: training only")
    folder = scratch / f"training-{seed}"
    bare = {**overrides, "evaluation.datasets": [], "policy_store.keep": arguments.steps + 2}
    training = result["training"] = sluice_run(bare, folder=folder)
    runs = [(training, Path(_policies(folder)) / "run")]
    result["trl"] = []
    for threads in () if arguments.skip_trl else (1, 2):
        say(f"seed {seed}: TRL with {threads} threads")
        folder = scratch / f"trl-{seed}-{threads}"
        steps = min(arguments.steps, arguments.trl_steps)
        peer = trl_run(config, python=arguments.trl_python, threads=threads, steps=steps, folder=folder)
        result["trl"].append(peer)
        runs.append((peer, folder))
    for run, policies in runs:
        run["accuracy"] = accuracy.curve(policies, num_steps=len(run["steps"]), threshold=arguments.threshold)
        run["to_threshold"] = seconds_to(run, threshold=arguments.threshold)
    return result


def measure_large(arguments: argparse.Namespace, *, scratch: Path) -> dict[str, Any]:
    """Shares at 30 M parameters: random weights, few steps, nothing is learnt."""
    tiny, model_folder = arguments.folder / "tiny-0", scratch / "large-model"
    prepare(tiny, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **LARGE,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    say("30 M parameters")
    result = sluice_run(
        {
            "model.path": str(model_folder),
            "dataset.path": str(tiny / "train.jsonl"),
            "evaluation.datasets": [],
            "trainer.num_steps": LARGE_STEPS,
        },
        folder=scratch / "large",
    )
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
            kind: middle([run["steady"]["shard"][kind] for run in training]) for kind in training[0]["steady"]["shard"]
        },
        "shipped_share": {
            kind: middle([seed["shipped"]["steady"]["shard"][kind] for seed in seeds])
            for kind in training[0]["steady"]["shard"]
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


def machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of every run")
    parser.add_argument("--trl-steps", type=int, default=60, help="at most so many for the peer")
    parser.add_argument("--threshold", type=float, default=0.95, help="greedy held-out accuracy that ends the race")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that can import trl")
    parser.add_argument("--skip-trl", action="store_true")
    parser.add_argument("--large", action="store_true", help="also 30 M parameters")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench", help="where the tiny models are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quickstart.json")
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()
    if not arguments.skip_trl and subprocess.run([arguments.trl_python, "-c", "import trl"], check=False).returncode:
        parser.error(
            f"{arguments.trl_python} cannot import trl: pip install 'sluice-rl[trl]', or give --trl-python PATH"
        )
    torch.set_num_threads(1)
    report: dict[str, Any] = {"benchmark": "quickstart", "date": f"{datetime.date.today()}", "machine": machine()}
    report["threshold"] = arguments.threshold
    try:
        with tempfile.TemporaryDirectory(prefix="sluice-bench-") as scratch:
            seeds = [measure_seed(seed, arguments, scratch=Path(scratch)) for seed in range(arguments.seeds)]
            if seeds:
                report |= {"headline": headline(seeds), "seeds": seeds}
            if arguments.large:
                report["large"] = measure_large(arguments, scratch=Path(scratch))
    finally:
        remove_policies()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report.get("headline", {}), indent=2))
    if "large" in report:
        print(json.dumps(report["large"]["steady"]["shard"], indent=2))
    say(f"written to {arguments.out}")


def remove_policies() -> None:
    import shutil

    shutil.rmtree(Path("/dev/shm/sluice-bench") / str(os.getpid()), ignore_errors=True)


if __name__ == "__main__":
    main()
