"""One side of `training_step.py`, a process of its own: Sluice's trainer (packed or padded), bare PyTorch, TRL's GRPOTrainer.

    python -m benchmarks.peers.training_side '{"side": "bare", "size": "1M", "device": "cpu", "step_tokens": 4096}'

Makes the model from a seed, prints a JSON line with what it is, then answers each JSON line on stdin with one:

    {"do": "step", "batch": "equal" | "ragged"}  one optimizer step: seconds, and the gradient norm before clipping
    {"do": "memory", "batch": ...}               the same, for the bytes that it takes over those of the weights, at its peak

Seconds are CPU seconds of the process on a CPU, wall seconds between two synchronisations on a GPU. Every side trains float32
weights with fused AdamW, in bfloat16 autocast on a GPU, with the same learning rate, gradient clip and sequences. The TRL side
runs in an environment of its own, without Sluice (`trl_training_side.py`).

Legend: B = sequences, T = completion tokens, V = vocabulary.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shared.models import build_model
from benchmarks.shared.report import installed_versions
from benchmarks.shared.training_batch import (
    ADAMW,
    GROUP_SIZE,
    MAX_GRAD_NORM,
    PASSES,
    WEIGHT_DECAY,
    Sequence,
    Step,
    draw_batch,
    measured_sizes,
)


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
        """Leave what is in memory now out of `peak_bytes`."""
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


def bare_side(model: Any, batches: dict[str, list[Sequence]], *, device: str) -> Step:
    """Return what one would write by hand for sequences of one length: logits of completion tokens only, no metrics."""
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
    """`trainer.step.train_on`, all that the loop does with a batch: advantages, micro-batches, loss, step, metrics."""

    def __init__(
        self, model: Any, batches: dict[str, list[Sequence]], *, device: str, packing: str, budget: int
    ) -> None:
        from sluice.trainer.distributed.parallel import ParallelPolicy
        from sluice.trainer.trained_policy import TrainedPolicy
        from tests.builders import make_config

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


def main() -> None:
    job = json.loads(sys.argv[1])
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be taken for an answer
    torch.set_num_threads(1)
    device, budget = job["device"], job["step_tokens"] // PASSES
    batches = {kind: draw_batch(kind, size=job["size"], step_tokens=job["step_tokens"]) for kind in ("equal", "ragged")}
    model: Any = build_model(job["size"]).to(device).train()
    pads = {"equal": 0.0, "ragged": 0.0}
    if job["side"] == "bare":
        step = bare_side(model, batches, device=device)
    elif job["side"] == "trl":
        from benchmarks.peers.trl_training_side import trl_side

        step, pads["ragged"] = trl_side(model, batches, device=device, budget=budget)
    else:
        packing = "off" if job["side"] == "sluice_padded" else "auto"
        sluice = SluiceSide(model, batches, device=device, packing=packing, budget=budget)
        step = sluice.step
        pads["ragged"] = sluice.pad_share("ragged", budget=budget)
    hello = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": installed_versions(("torch", "transformers", "trl")),
        "pad_share": pads,
        "batches": measured_sizes(batches),
    }
    print(json.dumps(hello), file=replies, flush=True)
    clock = Clock(device)
    clock.note_weights()
    for line in sys.stdin:
        request = json.loads(line)
        work = partial(step, request["batch"])
        try:
            if request["do"] == "memory":
                reply = {"peak_bytes": clock.peak_bytes(work)}
            else:
                seconds, norm = clock.time(work)
                reply = {"s": seconds, "grad_norm": norm}
        except torch.OutOfMemoryError as error:
            reply = {"error": str(error).splitlines()[0]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
