"""What a model is besides its weights: config.json and the tokenizer's files, as they travel with the run.

A worker on another machine needs these and the weights of the policy store, no model hub. This module does not import
torch; building a model from the assets is in `sluice.common.models.causal_lm`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.common.data.hub import hub_problem, near_path
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
    from transformers import AutoConfig, AutoTokenizer

    with explained(path):
        if not Path(path).exists() and (problem := hub_problem(path, kind="model", revision=revision)):
            raise ConfigError(f"model.path = {path!r}: {problem}")
        config = AutoConfig.from_pretrained(path, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        generation = _generation_config(path, revision=revision)
        text_config = config.get_text_config()
        vocab_size = int(text_config.vocab_size)
    ends = generation.get("eos_token_id", getattr(text_config, "eos_token_id", None))
    eos = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    if not eos:
        raise ConfigError(
            f"model.path = {path!r} has no end-of-sequence token: set eos_token_id in its generation_config.json"
        )
    _check_tokens(path, tokenizer, eos, vocab_size=vocab_size)
    with tempfile.TemporaryDirectory(prefix="sluice-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        files = {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name.startswith(_TOKENIZER_FILES)}
    plain = config.to_dict()
    plain.pop("dtype", None)  # each role sets its own
    return ModelAssets(config=plain, tokenizer_files=files, eos_token_ids=tuple(sorted(eos)))


def _generation_config(path: str, *, revision: str | None) -> dict[str, Any]:
    """Return generation_config.json, which is optional. Raises ValueError where it is broken: transformers would ignore it."""
    from transformers.utils import cached_file

    name = "generation_config.json"
    found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return {}
    try:
        generation = json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"its {name} is broken ({error}): correct or remove it") from None
    if not isinstance(generation, dict):
        raise ValueError(f"its {name} holds no object: correct or remove it")
    return generation


def _check_tokens(path: str, tokenizer: PreTrainedTokenizerBase, eos: Set[Any], *, vocab_size: int) -> None:
    """Refuse tokens that the model has no embedding for, and templates of which none is the one to use. Raises ConfigError."""
    if wrong := [token for token in eos if type(token) is not int or not 0 <= token < vocab_size]:
        raise ConfigError(
            f"model.path = {path!r}: eos_token_id {wrong} is not in the vocabulary of {vocab_size}; correct its "
            "generation_config.json, config.json or tokenizer"
        )
    token, largest = max(tokenizer.get_vocab().items(), key=lambda found: found[1], default=("", -1))
    if largest >= vocab_size:
        raise ConfigError(
            f"model.path = {path!r}: its tokenizer has tokens up to id {largest} ({token!r}), its embedding {vocab_size} rows. "
            f"Use the model's own tokenizer, or call model.resize_token_embeddings({largest + 1}) and save the model again"
        )
    templates: Any = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise ConfigError(
            f"model.path = {path!r}: its tokenizer has the chat templates {', '.join(sorted(templates))}, and none named "
            "default: save the one to use as chat_template.jinja"
        )


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn an error while reading a model folder into a ConfigError of one paragraph."""
    if not Path(path).exists() and not HUB_ID.fullmatch(path):
        raise ConfigError(
            f"model.path = {path!r}: there is no such folder (relative paths start at {Path.cwd()}), nor is it a hub "
            f"id{near_path(path)}"
        )
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"model.path = {path!r} is not a model folder: it holds no config.json")
    try:
        yield
    except (MemoryError, ConfigError):
        raise
    except Exception as error:  # whatever an unusual or broken folder makes transformers raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        hint = f" ({problem})" if (problem := cache_problem()) else ""
        raise ConfigError(
            f"model.path = {path!r} cannot be loaded as a causal LM with a tokenizer: {reason}{hint}"
        ) from None
