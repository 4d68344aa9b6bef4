"""What runs in vLLM's worker processes: loading a full policy in one call, so that no step ever sees half of one.

vLLM mixes `PolicyLoader` into its worker class (`worker_extension_cls`); `core` calls `load_policy` on every worker.
vLLM's layerwise reload has its weights on the meta device from start to end: spread over several calls, a step between them
ends the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open


class PolicyLoader:
    """Mixed into vLLM's worker, whose `reload_weights` and `model_runner` it uses."""

    reload_weights: Any
    model_runner: Any

    def load_policy(self, tensors: Mapping[str, torch.Tensor] | None = None, path: str | None = None) -> None:
        """Serve these weights (names as in the Hugging Face checkpoint), given by reference or as a safetensors file."""
        weights = _read(path) if path is not None else iter((tensors or {}).items())
        with torch.no_grad():
            self.reload_weights(weights_iterator=weights)
        _repack_heads(self.model_runner.get_model())

    def clear_cache(self) -> None:
        """Overwrite all keys and values: a NaN in a freed block reaches its next owner, through masked positions."""
        for caches in self.model_runner.kv_caches:
            for cache in [caches] if isinstance(caches, torch.Tensor) else caches:
                cache.zero_()


def _read(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            yield name, file.get_tensor(name)


def _repack_heads(model: torch.nn.Module) -> None:
    """Repack heads: the CPU backend multiplies by a packed copy, which the reload of a tied head does not renew.

    Seen in vLLM 0.32: logprobs were off by up to 6 after the second policy.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)
