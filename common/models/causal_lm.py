"""Building a causal LM from assets or a folder, and moving weights in and out of it.

Imports torch and transformers: only roles that hold a model import this module.
"""

from __future__ import annotations

from collections.abc import Mapping

import sluice.common.models.compiler  # noqa: F401  # before transformers' models

# isort: split
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sluice.common.errors import DigestMismatch
from sluice.common.models.assets import ModelAssets, explained


def build_model(assets: ModelAssets, *, dtype: str, device: str) -> PreTrainedModel:
    """Build the architecture with uninitialised weights, in eval mode, on its device; fill it with `load_weights`."""
    config = AutoConfig.for_model(**assets.config)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.to(resolve_device(device)).eval()


def load_pretrained(path: str, *, revision: str | None = None) -> PreTrainedModel:
    """Load the model of a folder or a hub id, in float32. Raises ConfigError."""
    with explained(path):
        return AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=torch.float32)


def kept_dtype(weight: torch.Tensor, precision: torch.dtype) -> torch.dtype:
    """Return the dtype in which a policy version of this sampling precision holds a weight: counts stay as they are."""
    return precision if weight.is_floating_point() else weight.dtype


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Map name to parameter or persistent buffer, tied ones once: the tensors of a policy version."""
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    persistent = set(model.state_dict(keep_vars=True))
    weights.update({name: buffer for name, buffer in model.named_buffers() if name in persistent})
    return weights


@torch.no_grad()
def load_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy a policy into a model, in place, casting to its dtype. Raises DigestMismatch when names or shapes differ."""
    for weight, tensor in _matched(model, tensors):
        weight.copy_(tensor)


@torch.no_grad()
def adopt_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load as `load_weights` does, but on the CPU make the tensors themselves the weights, cast where needed.

    `tensors` must not be written to afterwards; a later policy replaces them. On other devices the weights are the model's
    own and receive a copy.
    """
    for weight, tensor in _matched(model, tensors):
        if weight.device.type == "cpu" and tensor.device.type == "cpu":
            weight.data = tensor.to(weight.dtype).contiguous()
        else:
            weight.copy_(tensor)


def _matched(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pair each weight with its tensor. All are checked before the first is used: a refused policy changes nothing."""
    weights = named_weights(model)
    if weights.keys() != tensors.keys():
        odd = sorted(weights.keys() ^ tensors.keys())[:5]
        raise DigestMismatch(f"policy and model differ in {len(weights.keys() ^ tensors.keys())} tensors, e.g. {odd}")
    for name, weight in weights.items():
        if weight.shape != tensors[name].shape:
            raise DigestMismatch(f"{name}: policy has shape {tuple(tensors[name].shape)}, model {tuple(weight.shape)}")
    return [(weight, tensors[name]) for name, weight in weights.items()]


def resolve_device(device: str) -> torch.device:
    """Return the device; `auto` is CUDA where available."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def device_name(device: str) -> str:
    """Return the device's name for people: `cpu`, or the GPU's model."""
    resolved = resolve_device(device)
    return torch.cuda.get_device_name(resolved) if resolved.type == "cuda" else str(resolved)
