"""Building a causal LM and its tokenizer from a folder, a hub id, or the assets that travel in the run.

Imports torch and transformers: only roles that hold a model import this module. `ModelAssets` is what a worker on
another machine needs besides the weights (which come from the policy store): config.json and the tokenizer's files.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.errors import ConfigError, DigestMismatch

_TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelAssets:
    """Everything of a model but its weights."""

    config: dict[str, Any]
    "config.json"
    tokenizer_files: dict[str, bytes]
    "file name -> content"
    eos_token_ids: tuple[int, ...]
    "tokens that end a completion"

    def to_wire(self) -> dict[str, Any]:
        return {
            "config": json.dumps(self.config),
            "tokenizer_files": self.tokenizer_files,
            "eos_token_ids": list(self.eos_token_ids),
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> ModelAssets:
        return cls(
            config=json.loads(wire["config"]),
            tokenizer_files=wire["tokenizer_files"],
            eos_token_ids=tuple(wire["eos_token_ids"]),
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, from the files that travelled."""
        with tempfile.TemporaryDirectory(prefix="sluice-tokenizer-") as folder:
            for name, content in self.tokenizer_files.items():
                (Path(folder) / Path(name).name).write_bytes(content)
            return AutoTokenizer.from_pretrained(folder)

    def build(self, *, dtype: str, device: str) -> PreTrainedModel:
        """The architecture with uninitialised weights, in eval mode, on its device; fill it with `load_weights`."""
        config = AutoConfig.for_model(**self.config)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        return model.to(resolve_device(device)).eval()


def load_pretrained(path: str, *, revision: str | None = None) -> tuple[PreTrainedModel, ModelAssets]:
    """A float32 model and its assets from a folder or a hub id. Raises ConfigError."""
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"model.path = {path!r} is not a model folder: it holds no config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.path = {path!r} cannot be loaded as a causal LM with a tokenizer: {reason}") from None
    return model, _assets_of(model, tokenizer)


def _assets_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ModelAssets:
    with tempfile.TemporaryDirectory(prefix="sluice-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        files = {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name.startswith(_TOKENIZER_FILES)}
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if not isinstance(tokenizer.eos_token_id, int) and not ends:
        raise ConfigError("the model has no end-of-sequence token: set eos_token_id in its generation_config.json or tokenizer")
    if isinstance(tokenizer.eos_token_id, int):
        ends.append(tokenizer.eos_token_id)
    config = model.config.to_dict()
    config.pop("dtype", None)  # the role decides
    return ModelAssets(config=config, tokenizer_files=files, eos_token_ids=tuple(sorted(set(ends))))


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> parameter or persistent buffer, tied ones once: what a policy version consists of."""
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    persistent = set(model.state_dict(keep_vars=True))
    weights.update({name: buffer for name, buffer in model.named_buffers() if name in persistent})
    return weights


@torch.no_grad()
def load_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy a policy into a model, in place, casting to its dtype. Raises DigestMismatch when names or shapes differ."""
    weights = named_weights(model)
    if weights.keys() != tensors.keys():
        odd = sorted(weights.keys() ^ tensors.keys())[:5]
        raise DigestMismatch(f"policy and model differ in {len(weights.keys() ^ tensors.keys())} tensors, e.g. {odd}")
    for name, weight in weights.items():
        if weight.shape != tensors[name].shape:
            raise DigestMismatch(f"{name}: policy has shape {tuple(tensors[name].shape)}, model {tuple(weight.shape)}")
        weight.copy_(tensors[name])


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
