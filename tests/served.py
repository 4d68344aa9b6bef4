"""A torch engine over a real tiny Qwen3 (fp32), threads that call it, and what plain forward passes of its weights give."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from sluice.common.models.causal_lm import load_weights, named_weights
from sluice.common.types import Completion, SamplingParams
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.torch.engine import TorchEngine
from sluice.workers.engine.torch.kv_cache import cache_argument

VOCAB = 48
EOS = (1, 2)
WAIT_S = 60.0

Weights = dict[str, torch.Tensor]


def build_model(seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: dict[str, Any] = {
        "head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
    }
    config = Qwen3Config(**{**shape, **heads, "tie_word_embeddings": True, "initializer_range": 0.2, **changes})
    return Qwen3ForCausalLM(config).eval()


scratch_model = functools.cache(build_model)


@functools.cache
def policy(seed: int) -> Weights:
    return {name: weight.detach().clone() for name, weight in named_weights(build_model(seed)).items()}


def request(prompt: int | list[int] = 7, **settings: Any) -> GenerationRequest:
    """`prompt`: token ids, or the length of a prompt drawn by that seed."""
    if isinstance(prompt, int):
        prompt = np.random.default_rng(prompt).integers(3, VOCAB, prompt).tolist()
    ours = {
        name: settings.pop(name)
        for name in ("group_id", "min_version", "pinned_version", "priority")
        if name in settings
    }
    sampling = SamplingParams(**{"n": 4, "max_tokens": 20, "seed": 1, **settings})
    ids = np.array(prompt, dtype=np.int32)
    return GenerationRequest(prompt_ids=ids, sampling=sampling, **{"group_id": "g", **ours})


class Served:
    """An engine, threads that call it, and a hook on its decode steps."""

    def __init__(self, **settings: Any) -> None:
        self.model = build_model(seed=99)
        self.num_steps = 0
        self.rows_per_step: list[int] = []
        self.at_step: dict[int, Callable[[], object]] = {}
        self.model.register_forward_pre_hook(self._before_step, with_kwargs=True)
        defaults: dict[str, Any] = {"eos_token_ids": EOS, "max_sequences": 64, "max_model_len": 256}
        self.engine = TorchEngine(self.model, **{**defaults, **settings})
        self.threads = ThreadPoolExecutor(max_workers=64)

    def _before_step(self, _: Any, __: Any, inputs: dict[str, Any]) -> None:
        self.num_steps += 1
        self.rows_per_step.append(len(inputs["input_ids"]))
        self.at_step.pop(self.num_steps, lambda: None)()

    def stage(self, version: int, seed: int | None = None) -> Weights:
        weights = policy(version if seed is None else seed)
        self.engine.stage(version, f"digest-{version}", weights)
        return weights

    def submit(self, what: GenerationRequest) -> Future[list[Completion]]:
        return self.threads.submit(self.engine.generate, what)

    def together(self, requests: list[GenerationRequest], *, version: int = 0) -> list[Future[list[Completion]]]:
        """Submit before the first policy is there, so that all are admitted at once."""
        futures = []
        for waiting, what in enumerate(requests, start=1):
            futures.append(self.submit(what))
            eventually(lambda expected=waiting: self.engine.stats().waiting_requests == expected)  # type: ignore[misc]
        self.stage(version)
        return futures

    def run(self, requests: list[GenerationRequest], *, version: int = 0) -> list[list[Completion]]:
        return [future.result(WAIT_S) for future in self.together(requests, version=version)]

    def close(self) -> None:
        self.engine.close()
        self.threads.shutdown()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.001)


@torch.no_grad()
def logits_under(weights: Weights, tokens: np.ndarray, *, old: Weights | None = None, split: int = 0) -> torch.Tensor:
    """[T, V] of one sequence; with `old`, the first `split` tokens' keys and values are those of the old weights."""
    model, cache = scratch_model(), DynamicCache()
    ids = torch.from_numpy(tokens).long()[None]
    parts = []
    if old is not None:
        load_weights(model, old)
        parts.append(model(ids[:, :split], use_cache=True, **{cache_argument(model): cache}).logits[0])
    load_weights(model, weights)
    parts.append(model(ids[:, split:], use_cache=True, **{cache_argument(model): cache}).logits[0])
    return torch.cat(parts)


def expected_logprobs(logits: torch.Tensor, what: GenerationRequest, completion: Completion) -> np.ndarray:
    """Of the completion's tokens, from logits [P + T, V]; temperature only."""
    rows = logits[len(what.prompt_ids) - 1 : -1] / (what.sampling.temperature or 1.0)
    tokens = torch.from_numpy(completion.token_ids).long()
    return rows.log_softmax(-1).gather(1, tokens[:, None])[:, 0].numpy()


def sequence(what: GenerationRequest, completion: Completion) -> np.ndarray:
    return np.concatenate([what.prompt_ids, completion.token_ids])
