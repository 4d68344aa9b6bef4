"""One side of `trainer.py` in a process of its own: Sluice's trainer (packed or padded), bare PyTorch, or TRL's GRPOTrainer.

    python benchmarks/trainer_side.py '{"side": "bare", "size": "1M", "device": "cpu", "step_tokens": 4096}'

Makes the model from a seed, prints a JSON line with what it is, then answers each JSON line on stdin with one:

    {"do": "step", "batch": "equal" | "ragged"}  one optimizer step: seconds, and the gradient norm before clipping
    {"do": "memory", "batch": ...}               the same, for the bytes that it takes over those of the weights, at its peak
    {"do": "entropy", "batch": ...}              sluice only: seconds of the scores of a step, with entropy and without
    {"do": "publish", "version": n}              sluice only: wall seconds and bytes of one publication in bfloat16

Seconds are CPU seconds of the process on a CPU, wall seconds between two synchronisations on a GPU. Every side trains float32
weights with fused AdamW, in bfloat16 autocast on a GPU, with the same learning rate, gradient clip and sequences. The TRL side
runs in an environment of its own, without Sluice (`trainer_trl.py`).

Legend: B = sequences, P = prompt tokens, T = completion tokens, S = P + T.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen3Config, Qwen3ForCausalLM

SHAPES: dict[str, tuple[int, ...]] = {
    "tiny": (256, 32, 64, 1, 2, 1, 16),
    "1M": (2048, 128, 384, 4, 4, 2, 32),
    "29M": (8192, 512, 1536, 8, 8, 4, 64),
    "qwen3-0.6b": (151936, 1024, 3072, 28, 16, 8, 128),
    "qwen3-1.7b": (151936, 2048, 6144, 28, 16, 8, 128),
}
"""Vocabulary, hidden, intermediate, layers, heads, key heads, width of a head; the head is tied."""
ADAMW: dict[str, Any] = {"lr": 1e-6, "betas": (0.9, 0.95), "eps": 1e-8}
WEIGHT_DECAY, MAX_GRAD_NORM, GROUP_SIZE = 0.1, 1.0, 4
PASSES = 2
"""A step's tokens are trained in so many micro-batches."""
SIGMA, MEDIAN_SHARE = 0.8, 0.2
"""Of the ragged batch's completion lengths, a log-normal: standard deviation of ln T, and median over the bound."""


@dataclass(frozen=True, slots=True)
class Sequence:
    prompt: NDArray[np.int32]
    "[P]"
    completion: NDArray[np.int32]
    "[T]"
    advantage: float


def build_model(size: str) -> Qwen3ForCausalLM:
    """Random weights of the size, the same for every side."""
    vocab, hidden, intermediate, layers, heads, key_heads, width = SHAPES[size]
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=width, tie_word_embeddings=True,
            max_position_embeddings=8192, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def draw_batch(kind: str, *, size: str, step_tokens: int) -> list[Sequence]:
    """Groups of 4 until the step's tokens are full. Lengths scale with the step: `equal` is 1/64 of it as prompt and 3/64 as
    completion; `ragged` has prompts of 1/128 to 1/64 and log-normal completions of at most 7/64."""
    rng = np.random.default_rng(kind == "ragged")
    vocab_size, unit = SHAPES[size][0], step_tokens // 128
    bound = 14 * unit
    sequences: list[Sequence] = []
    while sum(len(s.prompt) + len(s.completion) for s in sequences) < step_tokens:
        prompt = _tokens(rng, 2 * unit if kind == "equal" else int(rng.integers(unit, 2 * unit + 1)), vocab_size)
        scores = rng.normal(size=GROUP_SIZE)
        for score in scores - scores.mean():
            drawn = 6 * unit if kind == "equal" else rng.lognormal(math.log(MEDIAN_SHARE * bound), SIGMA)
            completion = _tokens(rng, int(np.clip(drawn, 1, bound)), vocab_size)
            sequences.append(Sequence(prompt, completion, float(score)))
    return sequences


def _tokens(rng: np.random.Generator, count: int, vocab_size: int) -> NDArray[np.int32]:
    return rng.integers(1, vocab_size, count).astype(np.int32)


class Clock:
    """Seconds and peak memory of what a side does."""

    def __init__(self, device: str) -> None:
        self.device = device

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.monotonic()

    def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        began = self.now()
        found = work()
        return self.now() - began, found

    def note_weights(self) -> None:
        """What is in memory now is what `peak_bytes` leaves out."""
        self._reset()
        self._base = _status_bytes("VmRSS") if self.device == "cpu" else torch.cuda.memory_allocated()

    def peak_bytes(self, work: Callable[[], Any]) -> int:
        self._reset()
        work()
        return (_status_bytes("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated()) - self._base

    def _reset(self) -> None:
        gc.collect()
        if self.device == "cpu":
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
        else:
            torch.cuda.reset_peak_memory_stats()


def _status_bytes(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


Step = Callable[[str], float]
"""One optimizer step on the batch of that name; the gradient norm before clipping."""


def bare_side(model: Any, batches: dict[str, list[Sequence]], *, device: str) -> Step:
    """What one would write by hand for sequences of one length: logits where a completion token is predicted, no metrics."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        **ADAMW,
        fused=True,
    )
    rows = batches["equal"]
    prompt_length, num_tokens = len(rows[0].prompt), sum(len(row.completion) for row in rows)
    ids = torch.from_numpy(np.stack([np.concatenate([row.prompt, row.completion]) for row in rows])).long().to(device)
    advantages = torch.tensor([row.advantage for row in rows], device=device)

    def step(kind: str) -> float:
        assert kind == "equal"
        for part, weights in zip(ids.chunk(PASSES), advantages.chunk(PASSES), strict=True):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device != "cpu"):
                hidden = model.model(input_ids=part, use_cache=False).last_hidden_state
                logits = model.lm_head(hidden[:, prompt_length - 1 : -1]).float()  # [B, T, V]
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part[:, prompt_length:].flatten(), reduction="none"
            )
            ((losses.view(len(part), -1) * weights.unsqueeze(-1)).sum() / num_tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    return step


class SluiceSide:
    """`trainer.step.train_on`, the whole of what the loop does with a batch: advantages, micro-batches, loss, step, metrics."""

    def __init__(
        self, model: Any, batches: dict[str, list[Sequence]], *, device: str, packing: str, budget: int
    ) -> None:
        from builders import make_config

        from sluice.trainer.distributed.parallel import ParallelPolicy
        from sluice.trainer.trained_policy import TrainedPolicy

        self.config = make_config(
            trainer={
                "device": device, "packing": packing, "autocast": "float32" if device == "cpu" else "bfloat16",
                "seq_len": budget, "max_tokens_per_microbatch": budget, "learning_rate": ADAMW["lr"], "warmup_steps": 0,
                "betas": ADAMW["betas"], "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM, "advantage": "none",
            },
            sampling={"max_res_tokens": budget // 2}, dataset={"max_req_tokens": budget // 2},
        )  # fmt: skip
        self.policy = TrainedPolicy.of_run(model, self.config)
        self._parallel = ParallelPolicy(self.policy)
        self._groups = {kind: self._scored_groups(rows) for kind, rows in batches.items()}
        self._step = 0

    def _scored_groups(self, rows: list[Sequence]) -> list[Any]:
        """With the model's own logprobs as the sampler's: the ratio of the first step is 1."""
        from sluice.common.models.logprobs import score_sequences
        from sluice.common.types import Completion, Episode, Group

        device = self.policy.device.type
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=device != "cpu"):
            scored = score_sequences(self.policy.model, [(r.prompt, r.completion) for r in rows], max_batch_tokens=4096)
        spans = [((0, len(row.completion)),) for row in rows]
        completions = [
            Completion(token_ids=row.completion, rollout_logprobs=logprobs, policy_versions=span, finish_reason="stop")
            for row, logprobs, span in zip(rows, scored, spans, strict=True)
        ]
        episodes = [
            Episode(completion=completion, reward=row.advantage, rewards={}, ref_logprobs=None)
            for row, completion in zip(rows, completions, strict=True)
        ]
        return [
            Group(
                group_id=str(start), policy_version=0, prompt_ids=rows[start].prompt, prompt="", target=None,
                episodes=episodes[start : start + GROUP_SIZE], timestamps={},
            )
            for start in range(0, len(rows), GROUP_SIZE)
        ]  # fmt: skip

    def pad_share(self, kind: str, *, budget: int) -> float:
        from sluice.trainer.micro_batches import build_micro_batches, padding_share

        advantages = [torch.zeros(GROUP_SIZE)] * len(self._groups[kind])
        packed = self.policy.is_packed
        batches = build_micro_batches(self._groups[kind], advantages, max_tokens=budget, packed=packed)
        return padding_share(batches, packed=packed)

    def step(self, kind: str) -> float:
        from sluice.trainer.step import train_on

        self._step += 1
        metrics, _ = train_on(self._parallel, self._groups[kind], self.config, step=self._step)
        return metrics["grad_norm"]

    def entropy(self, kind: str, clock: Clock) -> dict[str, float]:
        """Seconds for the scores of one step's completion tokens from their logits, forward and backward."""
        from sluice.common.models.logprobs import UNTRUNCATED, _score

        num_tokens = sum(len(e.completion.token_ids) for group in self._groups[kind] for e in group.episodes)
        logits = torch.randn(1024, self.policy.vocab_size, device=self.policy.device, requires_grad=True)
        targets = torch.randint(self.policy.vocab_size, (1024,), device=self.policy.device)

        def score(with_entropy: bool) -> None:
            for _ in range(max(1, num_tokens // 1024)):
                logprobs, _ = _score(logits, None, None, (targets, 1.0, UNTRUNCATED, targets < 0), with_entropy)
                logprobs.sum().backward()
                logits.grad = None

        return {name: clock.time(lambda: score(name == "with"))[0] for name in ("without", "with")}  # noqa: B023

    def publisher(self, stack: ExitStack) -> Callable[[int], dict[str, float]]:
        """Versions published through a directory in memory, with a Redis of its own."""
        from sluice.common.config import PolicyStoreConfig
        from sluice.common.connections.client import connect
        from sluice.common.keys import Keys
        from sluice.common.policies.store import PolicyStore
        from sluice.scripts.launcher.redis_server import start_server

        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = start_server(folder)
        stack.callback(server.stop)
        shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
        path = stack.enter_context(tempfile.TemporaryDirectory(dir=shared))
        client = connect(server.url)
        stack.callback(client.close)
        store = PolicyStore(client, Keys("trainer"), PolicyStoreConfig(transport="directory", path=path))

        def publish(version: int) -> dict[str, float]:
            began = time.monotonic()
            tensors = self.policy.snapshot(torch.bfloat16)
            copied = time.monotonic()
            found = store.publish(version, tensors, step=version, parent=version - 1)
            sizes = {"whole_bytes": found.num_bytes, "delta_bytes": found.delta_bytes}
            return {"snapshot_s": copied - began, "publish_s": time.monotonic() - copied, **sizes}

        return publish


def measured_sizes(batches: dict[str, list[Sequence]]) -> dict[str, dict[str, int]]:
    """Per batch: tokens, completion tokens, sequences, and the sum of squared lengths."""
    lengths = {kind: [len(row.prompt) + len(row.completion) for row in rows] for kind, rows in batches.items()}
    return {
        kind: {
            "tokens": sum(lengths[kind]),
            "completion_tokens": sum(len(row.completion) for row in rows),
            "sequences": len(rows),
            "longest": max(lengths[kind]),
            "sum_of_squares": sum(length**2 for length in lengths[kind]),
        }
        for kind, rows in batches.items()
    }


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "trl"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main() -> None:
    job = json.loads(sys.argv[1])
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be taken for an answer
    torch.set_num_threads(1)
    device, budget = job["device"], job["step_tokens"] // PASSES
    batches = {kind: draw_batch(kind, size=job["size"], step_tokens=job["step_tokens"]) for kind in ("equal", "ragged")}
    model: Any = build_model(job["size"]).to(device).train()
    sluice: Any = None
    pads = {"equal": 0.0, "ragged": 0.0}
    if job["side"] == "bare":
        step = bare_side(model, batches, device=device)
    elif job["side"] == "trl":
        from trainer_trl import trl_side

        step, pads["ragged"] = trl_side(model, batches, device=device, budget=budget)
    else:
        packing = "off" if job["side"] == "sluice_padded" else "auto"
        sluice = SluiceSide(model, batches, device=device, packing=packing, budget=budget)
        step = sluice.step
        pads["ragged"] = sluice.pad_share("ragged", budget=budget)
    hello = {"parameters": sum(p.numel() for p in model.parameters()), "versions": versions(), "pad_share": pads}
    print(json.dumps({**hello, "batches": measured_sizes(batches)}), file=replies, flush=True)
    clock = Clock(device)
    clock.note_weights()
    with ExitStack() as stack:
        publish: Callable[[int], dict[str, float]] | None = None

        def answer(request: dict[str, Any]) -> dict[str, Any]:
            nonlocal publish
            match request["do"]:
                case "step":
                    seconds, norm = clock.time(lambda: step(request["batch"]))
                    return {"s": seconds, "grad_norm": norm}
                case "memory":
                    return {"peak_bytes": clock.peak_bytes(lambda: step(request["batch"]))}
                case "entropy":
                    return sluice.entropy(request["batch"], clock)
                case _:
                    publish = publish or sluice.publisher(stack)
                    return publish(request["version"])

        for line in sys.stdin:
            try:
                reply = answer(json.loads(line))
            except torch.OutOfMemoryError as error:
                reply = {"error": str(error).splitlines()[0]}
            print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
