"""A checkpoint as a Hugging Face model folder, or its LoRA adapter as one of peft."""

from __future__ import annotations

from pathlib import Path

import torch

from common.assets import read_assets
from common.config_file import read_training_config
from common.errors import ConfigError
from common.lora import merge_adapter
from common.model import load_pretrained, load_weights, named_weights
from trainer.checkpoint import checkpoint_at
from trainer.lora import Adapter, base_digest, check_base


def export_checkpoint(
    run_folder: Path, target: Path, *, step: int | None = None, dtype: str = "float32", adapter: bool = False
) -> int:
    """Write weights, config, generation config and tokenizer of a checkpoint; returns its step. Raises ConfigError.

    adapter: of a run with trainer.lora write the adapter alone, for `PeftModel.from_pretrained`, not the merged weights.
    """
    config = read_training_config(run_folder)
    found = checkpoint_at(run_folder / "checkpoints", step)
    model = load_pretrained(config.model.path, revision=config.model.revision)
    lora = config.trainer.lora
    if adapter and lora is None:
        raise ConfigError(f"{run_folder} was not trained with trainer.lora: it has no adapter; leave --adapter out")
    base = named_weights(model)
    check_base(found.state.base_digest, base_digest(model, lora) if lora else "")
    if lora is not None and adapter:
        upon = Adapter(model, lora)
        upon.load(found.weights)
        model.to(getattr(torch, dtype))
        upon.save(target)
        return found.state.step
    load_weights(model, merge_adapter(base, found.weights, scale=lora.scale) if lora else found.weights)
    model.to(getattr(torch, dtype)).save_pretrained(target)
    for name, content in read_assets(config.model.path, revision=config.model.revision).tokenizer_files.items():
        (target / name).write_bytes(content)
    return found.state.step
