"""vLLM's synchronous engine as `engine` drives it: built once, then one step after the other, all in one thread.

Invariants:
* the scheduler runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0, no asynchronous scheduling): between two steps nothing
  runs, so weights are exchanged there without pausing, and the number of tokens of every sequence is known exactly;
* every completion is a request of its own with a seed of its own: vLLM gives child i of a group the seed + i, so groups
  with neighbouring seeds would share noise;
* logprobs are "processed": of the distribution sampled from; vLLM's default omits the temperature;
* a prompt matches cached blocks of its own `salt` only.

vLLM is imported when a core is built, after the variables that it reads at import are set.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from sluice.common.config import Config
from sluice.common.errors import ConfigError
from sluice.common.models.assets import ModelAssets
from sluice.common.models.causal_lm import build_model, named_weights
from sluice.common.types import SamplingParams

_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a worker has threads and open connections: it must not fork
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # 0.26's second runner dies of NaN weights (seen on an H100)
}
"""Read by vLLM at import; a value that the environment sets already is kept."""
_CPU_KV_CACHE_MIB = 512
"""Instead of vLLM's default on a CPU, a share of all memory."""
_CPU_STEP_TOKENS = 2048
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A request that has ended."""

    request_id: str
    token_ids: NDArray[np.int32]
    "[T]"
    logprobs: NDArray[np.float32]
    "[T]"
    prompt_logprobs: NDArray[np.float32]
    "[P - 1], of every prompt token but the first, at temperature 1; empty unless asked for"
    reason: str
    "stop, length, or vLLM's name of the failure"


class VllmCore:
    """One model in vLLM, with random weights until the first `load`; not thread-safe."""

    def __init__(self, config: Config, assets: ModelAssets) -> None:
        """Build the engine. Raises ConfigError where the config asks for what this vLLM cannot do."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if config.rollout.dtype == "float32":
            os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # else TF32: logprobs 1.6e-3 off
        import vllm

        self._vllm = vllm
        with torch.device("meta"):
            model = build_model(assets, dtype=config.rollout.dtype, device="meta")
        self._shapes = {name: tuple(weight.shape) for name, weight in named_weights(model).items()}
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.has_tokenizer = bool(assets.tokenizer_files)
        self._eos_token_ids = assets.eos_token_ids
        self._num_workers = config.rollout.tensor_parallel_size * config.rollout.pipeline_parallel_size
        longest = config.rollout.max_model_len or config.trainer.seq_len
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest + 1
        # scoring a sequence of full length samples one more token
        self.max_model_len = min(longest + 1, max(limit, longest))
        with tempfile.TemporaryDirectory(prefix="sluice-vllm-") as folder:
            _write_model(Path(folder), assets, architecture=type(model).__name__)
            arguments = _arguments(config, folder=folder, max_model_len=self.max_model_len)
            arguments["skip_tokenizer_init"] = not self.has_tokenizer
            self._engine: Any = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments))
        self._serial = 0
        self._internal_ids: dict[str, str] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a step has work."""
        return bool(self._internal_ids)

    def add(self, prompt_ids: NDArray[np.int32], *, sampling: SamplingParams, seed: int, salt: str) -> str:
        """Queue one completion (`sampling.n` is not read); returns the id of the request. Raises ValueError."""
        return self._add(
            prompt_ids,
            salt=salt,
            priority=0,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            min_tokens=sampling.min_tokens,
            stop_token_ids=list(self._eos_token_ids),
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            detokenize=bool(sampling.stop),
            seed=seed,
            logprobs=0,
        )

    def add_score(self, token_ids: NDArray[np.int32], *, salt: str) -> str:
        """Queue one sequence for its `prompt_logprobs`, ahead of all completions."""
        return self._add(
            token_ids, salt=salt, priority=-1, max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False
        )

    def _add(self, prompt_ids: NDArray[np.int32], *, salt: str, priority: int, **sampling: Any) -> str:
        self._serial += 1
        request_id = str(self._serial)
        final_only = self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY  # an object per sequence, not per token
        params = self._vllm.SamplingParams(ignore_eos=True, flat_logprobs=True, output_kind=final_only, **sampling)
        prompt = {"type": "token", "prompt_token_ids": np.asarray(prompt_ids).tolist(), "cache_salt": salt}
        internal_id = self._engine.add_request(request_id, prompt, params, priority=priority)
        self._internal_ids[request_id] = internal_id
        return request_id

    def abort(self, request_id: str) -> None:
        """Drop a request."""
        del self._internal_ids[request_id]
        self._engine.abort_request([request_id])

    def num_tokens(self, request_id: str) -> int:
        """Return the tokens that a running request has so far."""
        state = self._engine.output_processor.request_states[self._internal_ids[request_id]]
        return int(state.detokenizer.num_output_tokens())

    def step(self) -> list[Finished]:
        """Run one forward pass; return the requests that it ended."""
        finished = []
        for output in self._engine.step():
            if output.finished and self._internal_ids.pop(output.request_id, None) is not None:
                [completion] = output.outputs
                finished.append(
                    Finished(
                        request_id=output.request_id,
                        token_ids=np.array(completion.token_ids, np.int32),
                        logprobs=_flat(completion.logprobs),
                        prompt_logprobs=_flat(output.prompt_logprobs),
                        reason=str(completion.finish_reason),
                    )
                )
        return finished

    def mismatch(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Return why these tensors are not a policy of this model, or none: vLLM itself loads what it finds and warns."""
        if odd := sorted(self._shapes.keys() ^ tensors.keys()):
            return f"policy and model differ in {len(odd)} tensors, e.g. {odd[:5]}"
        for name, shape in self._shapes.items():
            if tuple(tensors[name].shape) != shape:
                return f"{name}: policy has shape {tuple(tensors[name].shape)}, model {shape}"
        return None

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Exchange the weights in place. After an error they are undefined."""
        if self._num_workers == 1:
            self._engine.collective_rpc("load_policy", kwargs={"tensors": tensors})
            return
        folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None  # tensors cannot be sent to other processes
        with tempfile.TemporaryDirectory(prefix="sluice-policy-", dir=folder) as name:
            path = str(Path(name) / "policy.safetensors")
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            self._engine.collective_rpc("load_policy", kwargs={"path": path})

    def drop_cache(self, *, of_running: bool) -> None:
        """Forget all cached blocks; with `of_running` those of running sequences too, which are then computed again."""
        self._engine.reset_prefix_cache(reset_running_requests=of_running)

    def clear_cache(self) -> None:
        """Forget all cached blocks and overwrite them; what runs is computed again."""
        self.drop_cache(of_running=True)
        self._engine.collective_rpc("clear_cache")

    def close(self) -> None:
        """Release memory and worker processes."""
        self._engine.engine_core.shutdown()
        self._engine = None
        gc.collect()


def is_temperature(value: float) -> bool:
    """Return whether vLLM samples at it: smaller ones are silently raised to 0.01, larger ones refused."""
    return 0.01 <= value <= 2.0


def check_config(config: Config) -> None:
    """Refuse what vLLM refuses, before it is loaded. Raises ConfigError."""
    rollout, temperature = config.rollout, config.sampling.temperature
    if not is_temperature(temperature):
        raise ConfigError(
            f"sampling.temperature={temperature}: vLLM samples at 0.01 to 2.0; rollout.engine=torch takes any"
        )
    if rollout.device not in ("auto", "cpu", "cuda"):
        index = rollout.device.partition(":")[2]
        raise ConfigError(
            f"rollout.device={rollout.device}: for vLLM set rollout.device=auto and start the worker with "
            f"CUDA_VISIBLE_DEVICES={index}"
        )


def _arguments(config: Config, *, folder: str, max_model_len: int) -> dict[str, Any]:
    """Return the arguments of vLLM's EngineArgs."""
    from vllm.platforms import current_platform

    rollout = config.rollout
    is_cpu = bool(current_platform.is_cpu())
    if rollout.device != "auto" and rollout.device != current_platform.device_type:
        raise ConfigError(
            f"rollout.device={rollout.device}: the installed vLLM runs on {current_platform.device_type}; use device=auto"
        )
    max_num_seqs = rollout.max_sequences + 1  # scoring does not wait for a sequence to finish
    kv_cache_mib = rollout.kv_cache_mib or (_CPU_KV_CACHE_MIB if is_cpu else None)
    arguments: dict[str, Any] = {
        "model": folder,
        "load_format": "dummy",
        "dtype": rollout.dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "kv_cache_memory_bytes": kv_cache_mib and kv_cache_mib * 2**20,
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "pipeline_parallel_size": rollout.pipeline_parallel_size,
        "enforce_eager": rollout.enforce_eager or is_cpu,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "scheduling_policy": "priority",
        "async_scheduling": False,
        "worker_extension_cls": "sluice.workers.engine.vllm.worker.PolicyLoader",
        "generation_config": "vllm",  # sampling defaults are ours
        "disable_log_stats": True,
    }
    if is_cpu:
        # A prompt computed in chunks rewinds its random generator, which a CPU generator cannot: the engine would die.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(_CPU_STEP_TOKENS, max_model_len, max_num_seqs)
        torch._dynamo.config.disable = True  # vLLM compiles its logprobs, which needs a C++ compiler and 10 to 20 s
    return arguments


def _write_model(folder: Path, assets: ModelAssets, *, architecture: str) -> None:
    """Write config.json and the tokenizer into the folder that vLLM loads."""
    for name, content in assets.tokenizer_files.items():
        (folder / Path(name).name).write_bytes(content)
    architectures = assets.config.get("architectures") or [architecture]
    (folder / "config.json").write_text(json.dumps({**assets.config, "architectures": architectures}))


def _flat(logprobs: Any) -> NDArray[np.float32]:
    """Return one number per position of vLLM's FlatLogprobs; the first position of a prompt has none."""
    return np.array(logprobs.logprobs if logprobs is not None else [], np.float32)
