"""A checkpoint as a Hugging Face model folder, or its LoRA adapter as one of peft."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from sluice.common.config import Config
from sluice.common.config.file import read_training_config
from sluice.common.config.sft import SftConfig
from sluice.common.disk import needing_room
from sluice.common.errors import ConfigError
from sluice.common.models.assets import read_assets
from sluice.common.models.causal_lm import load_pretrained, load_weights, named_weights
from sluice.common.models.lora import merge_adapter
from sluice.trainer.adapter import Adapter, base_digest, check_base
from sluice.trainer.checkpoint import Checkpoint, checkpoint_at


def export_checkpoint(
    run_folder: Path, target: Path, *, step: int | None = None, dtype: str = "float32", adapter: bool = False
) -> int:
    """Write weights, config, generation config and tokenizer of a checkpoint; return its step. Raises ConfigError, DiskFull.

    adapter: of a run with trainer.lora write the adapter alone, for `PeftModel.from_pretrained`, not the merged weights.
    """
    config = read_training_config(run_folder)
    found = checkpoint_at(run_folder / "checkpoints", step)
    lora, path, revision = config.trainer.lora, config.model.path, config.model.revision
    if adapter and lora is None:
        raise ConfigError(f"{run_folder} was not trained with trainer.lora: it has no adapter; leave --adapter out")
    own_adapter = None
    if lora is not None and adapter:
        model = load_pretrained(path, revision=revision)
        own_adapter = Adapter(model, lora)
        check_base(found.state.base_digest, own_adapter.base_digest)
        own_adapter.load(found.weights)
    else:
        model = trained_model(config, found)
    model.to(getattr(torch, dtype))
    target.mkdir(parents=True, exist_ok=True)
    with needing_room(target, what="the model"):
        if own_adapter is not None:
            own_adapter.save(target, revision=revision)
            return found.state.step
        model.save_pretrained(target)
        for name, content in read_assets(path, revision=revision).tokenizer_files.items():
            (target / name).write_bytes(content)
    return found.state.step


def trained_model(config: Config | SftConfig, checkpoint: Checkpoint) -> PreTrainedModel:
    """Load the model of a config with the weights of a checkpoint, in float32. Raises ConfigError."""
    lora = config.trainer.lora
    model = load_pretrained(config.model.path, revision=config.model.revision)
    check_base(checkpoint.state.base_digest, base_digest(model, lora) if lora else "")
    base = named_weights(model)
    load_weights(model, merge_adapter(base, checkpoint.weights, scale=lora.scale) if lora else checkpoint.weights)
    return model
