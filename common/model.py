"""Building a causal LM and its tokenizer from a folder, a hub id, or the assets that travel in the run.

Imports torch and transformers: only roles that hold a model import this module. `ModelAssets` is what a worker on
another machine needs besides the weights (which come from the policy store): config.json and the tokenizer's files.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

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


def load_pretrained(path: str, *, revision: str | None = None) -> PreTrainedModel:
    """The model of a folder or a hub id, in float32. Raises ConfigError."""
    with _explained(path):
        return AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=torch.float32)


def read_assets(path: str, *, revision: str | None = None) -> ModelAssets:
    """Config and tokenizer of a folder or a hub id, without the weights. Raises ConfigError."""
    with _explained(path):
        config = AutoConfig.from_pretrained(path, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        try:
            ends = GenerationConfig.from_pretrained(path, revision=revision or "main").eos_token_id
        except OSError:  # generation_config.json is optional
            ends = config.eos_token_id
    eos = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    if not eos:
        raise ConfigError(
            f"model.path = {path!r} has no end-of-sequence token: set eos_token_id in its generation_config.json"
        )
    with tempfile.TemporaryDirectory(prefix="sluice-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        files = {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name.startswith(_TOKENIZER_FILES)}
    plain = config.to_dict()
    plain.pop("dtype", None)  # the role decides
    return ModelAssets(config=plain, tokenizer_files=files, eos_token_ids=tuple(sorted(eos)))


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """What goes wrong while reading a model folder, as a ConfigError in one paragraph."""
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"model.path = {path!r} is not a model folder: it holds no config.json")
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(f"model.path = {path!r} cannot be loaded as a causal LM with a tokenizer: {reason}") from None


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
    for (
        name,
        weight,
    ) in weights.items():  # all are checked before the first is written: a refused policy changes nothing
        if weight.shape != tensors[name].shape:
            raise DigestMismatch(f"{name}: policy has shape {tuple(tensors[name].shape)}, model {tuple(weight.shape)}")
    for name, weight in weights.items():
        weight.copy_(tensors[name])


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
