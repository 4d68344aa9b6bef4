"""A checkpoint as a Hugging Face model folder."""

from __future__ import annotations

from pathlib import Path

import torch

from common.assets import read_assets
from common.config_file import parse_config
from common.errors import ConfigError
from common.model import load_pretrained, load_weights
from trainer.checkpoint import checkpoint_at


def export_checkpoint(run_folder: Path, target: Path, *, step: int | None = None, dtype: str = "float32") -> int:
    """Write weights, config, generation config and tokenizer of a checkpoint; returns its step. Raises ConfigError."""
    config_file = run_folder / "config.yaml"
    if not config_file.is_file():
        raise ConfigError(f"{run_folder} is not a run folder: it holds no config.yaml")
    config = parse_config(config_file.read_text(), source=str(config_file))
    found = checkpoint_at(run_folder / "checkpoints", step)
    model = load_pretrained(config.model.path, revision=config.model.revision)
    load_weights(model, found.weights)
    model.to(getattr(torch, dtype)).save_pretrained(target)
    for name, content in read_assets(config.model.path, revision=config.model.revision).tokenizer_files.items():
        (target / name).write_bytes(content)
    return found.state.step
