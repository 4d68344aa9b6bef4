"""A checkpoint as a Hugging Face model folder."""

from __future__ import annotations

from pathlib import Path

import torch

from common.assets import read_assets
from common.config_file import read_training_config
from common.model import load_pretrained, load_weights
from trainer.checkpoint import checkpoint_at


def export_checkpoint(run_folder: Path, target: Path, *, step: int | None = None, dtype: str = "float32") -> int:
    """Write weights, config, generation config and tokenizer of a checkpoint; returns its step. Raises ConfigError."""
    config = read_training_config(run_folder)
    found = checkpoint_at(run_folder / "checkpoints", step)
    model = load_pretrained(config.model.path, revision=config.model.revision)
    load_weights(model, found.weights)
    model.to(getattr(torch, dtype)).save_pretrained(target)
    for name, content in read_assets(config.model.path, revision=config.model.revision).tokenizer_files.items():
        (target / name).write_bytes(content)
    return found.state.step
