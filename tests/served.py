"""An engine over a real tiny Qwen3, threads that call it, and what plain forward passes of its weights give.

SLUICE_TEST_DEVICE and SLUICE_TEST_DTYPE put both on a GPU (`scripts/gpu_check`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from builders import letter_tokenizer, make_config
from transformers import DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from sluice.common.models.assets import ModelAssets
from sluice.common.models.causal_lm import load_weights, named_weights, resolve_device
from sluice.common.types import Completion, SamplingParams
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.torch.kv_cache import cache_argument
from sluice.workers.rollout import make_engine

DEVICE = os.environ.get("SLUICE_TEST_DEVICE", "cpu")
DTYPE = os.environ.get("SLUICE_TEST_DTYPE", "float32")
VOCAB, EOS = 512, (1, 2)
MAX_MODEL_LEN, MAX_SEQUENCES = 448, 16
WAIT_S = 60.0

Weights = dict[str, torch.Tensor]


def build_model(seed: int = 0, *, tied: bool = True, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=tied,
        initializer_range=0.2, **changes,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(dtype=getattr(torch, DTYPE), device=resolve_device(DEVICE)).eval()


scratch_model = functools.cache(build_model)


@functools.cache
def policy(seed: int, *, tied: bool = True) -> Weights:
    model = build_model(seed, tied=tied)
    return {name: weight.detach().cpu().clone() for name, weight in named_weights(model).items()}


@functools.cache
def build_assets(*, tied: bool, eos: tuple[int, ...]) -> ModelAssets:
    config = scratch_model(tied=tied).config.to_dict()
    config.pop("dtype", None)
    return ModelAssets(config=config, tokenizer_files=letter_tokenizer(VOCAB), eos_token_ids=eos)


def request(prompt: int | list[int] = 7, **settings: Any) -> GenerationRequest:
    """`prompt`: token ids, or the length of a prompt drawn by that seed."""
    if isinstance(prompt, int):
        prompt = np.random.default_rng(prompt).integers(3, 48, prompt).tolist()
    names = ("group_id", "min_version", "pinned_version", "priority")
    ours = {name: settings.pop(name) for name in names if name in settings}
    sampling = SamplingParams(**{"n": 4, "max_tokens": 20, "seed": 1, **settings})
    ids = np.array(prompt, dtype=np.int32)
    return GenerationRequest(prompt_ids=ids, sampling=sampling, **{"group_id": "g", **ours})


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.001)


class Served:
    """An engine and threads that call it; every policy staged gets a version of its own.

    In a block of `standing()` the engine's thread stands between two passes, and `advance` says how far it goes.
    """

    def __init__(self, name: str = "torch", *, tied: bool = True, eos: tuple[int, ...] = EOS, **rollout: Any) -> None:
        defaults = {
            "engine": name, "max_sequences": MAX_SEQUENCES, "dtype": DTYPE, "device": DEVICE,
            "max_model_len": MAX_MODEL_LEN, "kv_cache_mib": 64, "gpu_memory_utilization": 0.2,
        }  # fmt: skip
        config = make_config(rollout={**defaults, **rollout}, trainer={"seq_len": MAX_MODEL_LEN})
        self.name, self.tied = name, tied
        self.engine: Any = make_engine(config, build_assets(tied=tied, eos=eos))
        self.threads = ThreadPoolExecutor(max_workers=64)
        self.version = -1
        self.num_passes = 0
        self.admitted: list[str] = []
        "Group ids in the order in which they were admitted."
        self.rows_per_step: list[int] = []
        "Of every forward pass of the torch engine that decodes."
        self._gate = threading.Condition()
        self._goal: Callable[[], bool] | None = None  # where to stand; none = nowhere
        self._stands = False
        self._pass, self.engine._pass = self.engine._pass, self._pass_through_the_gate
        self._start_running, self.engine._start_running = self.engine._start_running, self._admit
        if name == "torch":
            self.engine._model.register_forward_pre_hook(self._count_rows, with_kwargs=True)

    def _pass_through_the_gate(self) -> None:
        with self._gate:
            if self._goal is not None and self._goal():
                self._stands, self._goal = True, None
                self._gate.notify_all()
                while self._stands and not self.engine._is_closed:
                    self._gate.wait(0.01)
        self.num_passes += 1
        self._pass()

    def _admit(self, groups: list[Any]) -> None:
        self.admitted += [group.request.group_id for group in groups]
        self._start_running(groups)

    def _count_rows(self, _: Any, __: Any, inputs: dict[str, Any]) -> None:
        self.rows_per_step.append(len(inputs["input_ids"]))

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        self.advance(lambda: True)
        try:
            yield
        finally:
            with self._gate:
                self._stands, self._goal = False, None

    def advance(self, goal: Callable[[], bool]) -> None:
        """Let the engine pass until, between two passes, the goal is reached; it stands there."""
        with self._gate:
            self._stands, self._goal = False, goal
            with self.engine._condition:
                self.engine._wake()
            assert self._gate.wait_for(lambda: self._stands, WAIT_S), "the engine did not get there"

    def advance_by_passes(self, count: int) -> None:
        target = self.num_passes + count
        self.advance(lambda: self.num_passes == target)

    def advance_by_tokens(self, count: int) -> None:
        target = self.engine.stats().generated_tokens + count
        self.advance(lambda: self.engine.stats().generated_tokens >= target)

    def stage(self, seed: int, *, version: int | None = None, weights: Weights | None = None) -> int:
        """Stage the policy of that seed; returns its version."""
        self.version = self.version + 1 if version is None else version
        self.engine.stage(self.version, f"digest-{self.version}-{seed}", weights or policy(seed, tied=self.tied))
        return self.version

    def serve(self, seed: int, **staged: Any) -> int:
        """Stage, and wait until it is served."""
        version = self.stage(seed, **staged)
        eventually(lambda: self.engine.version == version)
        return version

    def submit(self, what: GenerationRequest) -> Future[list[Completion]]:
        return self.threads.submit(self.engine.generate, what)

    def run(self, *requests: GenerationRequest) -> list[list[Completion]]:
        futures = [self.submit(what) for what in requests]
        return [future.result(WAIT_S) for future in futures]

    def wait(self, *requests: GenerationRequest) -> list[Future[list[Completion]]]:
        """Submit to an engine that stands, in this order: one after the other waits inside."""
        futures = []
        for what in requests:
            waiting = self.engine.stats().waiting_requests + 1
            futures.append(self.submit(what))
            eventually(lambda waiting=waiting: self.engine.stats().waiting_requests == waiting)  # type: ignore[misc]
        return futures

    def close(self) -> None:
        self.engine.close()
        self.threads.shutdown()


@torch.no_grad()
def logits_under(weights: Weights, tokens: np.ndarray, *, old: Weights | None = None, split: int = 0) -> torch.Tensor:
    """[T, V] of one sequence; the first `split` tokens' keys and values are those of the weights `old`."""
    model, cache = scratch_model(tied="lm_head.weight" not in weights), DynamicCache()
    ids = torch.from_numpy(tokens).long()[None].to(model.device)
    parts = []
    if old is not None and split:
        load_weights(model, old)
        parts.append(model(ids[:, :split], use_cache=True, **{cache_argument(model): cache}).logits[0])
    load_weights(model, weights)
    parts.append(model(ids[:, split:], use_cache=True, **{cache_argument(model): cache}).logits[0])
    return torch.cat(parts).float().cpu()


def expected_logprobs(logits: torch.Tensor, what: GenerationRequest, completion: Completion) -> np.ndarray:
    """Of the completion's tokens, from logits [P + T, V]; temperature and the end tokens that min_tokens forbids."""
    rows = logits[len(what.prompt_ids) - 1 : -1] / (what.sampling.temperature or 1.0)
    rows[: what.sampling.min_tokens, EOS] = -torch.inf
    tokens = torch.from_numpy(completion.token_ids).long()
    return rows.log_softmax(-1).gather(1, tokens[:, None])[:, 0].numpy()


def sequence(what: GenerationRequest, completion: Completion) -> np.ndarray:
    return np.concatenate([what.prompt_ids, completion.token_ids])


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    if DTYPE == "float32":
        np.testing.assert_allclose(actual, expected, atol=2e-4)
    elif len(actual):  # a stale cache or head is off by nats
        assert np.abs(actual - expected).mean() < 0.1 and np.abs(actual - expected).max() < 1.0


def assert_scored_by(weights: int | Weights, what: GenerationRequest, group: list[Completion]) -> None:
    """Every completion has the logprobs that a fresh forward pass gives, under weights or the policy of a seed."""
    weights = policy(weights) if isinstance(weights, int) else weights
    for completion in group:
        logits = logits_under(weights, sequence(what, completion))
        assert_close(completion.rollout_logprobs, expected_logprobs(logits, what, completion))


def tokens_of(group: list[Completion]) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in group]
