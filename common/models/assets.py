"""What a model is besides its weights: config.json and the tokenizer's files, as they travel with the run.

A worker on another machine needs these and the weights of the policy store, no model hub. This module does not import
torch; building a model from the assets is in `sluice.common.models.causal_lm`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.common.errors import ConfigError
from sluice.common.paths import HUB_ID, cache_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        return {**asdict(self), "config": json.dumps(self.config)}

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> ModelAssets:
        return cls(**{**wire, "config": json.loads(wire["config"]), "eos_token_ids": tuple(wire["eos_token_ids"])})

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer from `tokenizer_files`."""
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory(prefix="sluice-tokenizer-") as folder:
            for name, content in self.tokenizer_files.items():
                (Path(folder) / Path(name).name).write_bytes(content)
            return AutoTokenizer.from_pretrained(folder)


def read_assets(path: str, *, revision: str | None = None) -> ModelAssets:
    """Read config and tokenizer of a folder or a hub id, without the weights. Raises ConfigError."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    with explained(path):
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
    plain.pop("dtype", None)  # each role sets its own
    return ModelAssets(config=plain, tokenizer_files=files, eos_token_ids=tuple(sorted(eos)))


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn an error while reading a model folder into a ConfigError of one paragraph."""
    if not Path(path).exists() and not HUB_ID.fullmatch(path):
        raise ConfigError(
            f"model.path = {path!r}: there is no such folder (relative paths start at {Path.cwd()}), nor is it a hub id"
        )
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"model.path = {path!r} is not a model folder: it holds no config.json")
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        hint = f" ({problem})" if (problem := cache_problem()) else ""
        raise ConfigError(
            f"model.path = {path!r} cannot be loaded as a causal LM with a tokenizer: {reason}{hint}"
        ) from None
