"""A small copy of a model, of the same architecture with random weights: what a check can run before anything is started."""

from __future__ import annotations

import copy
import logging
from contextlib import suppress
from itertools import product
from typing import Any

import sluice.common.models.compiler  # noqa: F401  # before transformers' models

# isort: split
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sluice.common.models.assets import ModelAssets

MAX_PARAMETERS = 30_000_000
_MAX_LAYERS = 2
log = logging.getLogger(__name__)


def tiny_model(assets: ModelAssets) -> PreTrainedModel | None:
    """Build it on the CPU in float32, in eval mode; none where the architecture allows no copy small enough.

    Raises what transformers raises for a model that is no causal language model, or that cannot run.
    """
    config = AutoConfig.for_model(**assets.config)
    for keep_heads, keep_experts in product((False, True), repeat=2):
        smaller = copy.deepcopy(config)
        try:
            for part in (smaller, *(getattr(smaller, name, None) for name in smaller.sub_configs)):
                if isinstance(part, PreTrainedConfig):
                    _shrink(part, keep_heads=keep_heads, keep_experts=keep_experts)
            if (model := _running(smaller)) is not None:
                return model
        except Exception as error:  # widths that must fit each other in ways of their own
            log.debug("no small copy of %s: %s", config.model_type, error)
    return _running(config)


def _running(config: PreTrainedConfig) -> PreTrainedModel | None:
    """Build a model and run it once; none where it is too large."""
    if sum(parameter.numel() for parameter in _plan(config).parameters()) > MAX_PARAMETERS:
        return None
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _fill(model)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    return model


def _plan(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _shrink(config: Any, *, keep_heads: bool, keep_experts: bool) -> None:
    given = config.to_dict()
    heads, width, kv_heads = (
        _get(config, name) for name in ("num_attention_heads", "hidden_size", "num_key_value_heads")
    )
    if isinstance(heads, int) and isinstance(width, int):
        head_dim = _get(config, "head_dim") or width // heads
        if not keep_heads:
            head_dim = min(head_dim, 16)
            _set(config, "head_dim", head_dim)
        _set(config, "num_attention_heads", min(heads, 2))
        _set(config, "num_key_value_heads", 1 if kv_heads and kv_heads < heads else min(heads, 2))
        _set(config, "hidden_size", min(heads, 2) * head_dim)
    for name, value in given.items():
        if type(value) is not int:
            continue
        if any(part in name for part in ("intermediate", "ffn", "inner")):
            _set(config, name, min(value, 64))
        elif "vocab_size" in name:
            _set(config, name, min(value, 211))
        elif name.endswith("token_id") and value >= 211:
            _set(config, name, 0)
        elif "experts" in name and "per" not in name and not keep_experts:
            _set(config, name, min(value, 4))
    _set(config, "num_hidden_layers", _num_layers(config))


def _num_layers(config: Any) -> int | None:
    """Return the fewest layers, from the first on, that show every kind of layer."""
    number = _get(config, "num_hidden_layers")
    if not isinstance(number, int):
        return None
    kinds = [value for value in config.to_dict().values() if isinstance(value, list) and len(value) == number]
    needed = [1 + max(value.index(kind) for kind in {str(v): v for v in value}.values()) for value in kinds]
    return min(number, max([_MAX_LAYERS, *needed]))


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)  # by the config's attribute_map
    except Exception:  # transformers raises for one that differs from layer to layer
        return None


def _set(config: Any, name: str, value: Any) -> None:
    if value is not None and _get(config, name) is not None:
        with suppress(AttributeError):  # a property, which follows from the others
            setattr(config, name, value)


@torch.no_grad()
def _fill(model: PreTrainedModel) -> None:
    """Draw weights so large that every part of the model shows in its output."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
