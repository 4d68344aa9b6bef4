"""A LoRA adapter on a frozen model: made by peft, trained, published and checkpointed instead of the model.

peft replaces the targeted linear layers inside the model, which otherwise stays what it is: only lora_A and lora_B have
gradients, and B = 0 at first, so that the model computes what it did before. `common/models/lora.py` has formula and names.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sluice.common.config.trainer import PEFT_MISSING, LoraConfig
from sluice.common.errors import ConfigError
from sluice.common.models.causal_lm import named_weights
from sluice.common.models.lora import PREFIX
from sluice.common.policies.digest import policy_digest, weights_digest

_NAME = "default"
"""What peft calls the only adapter of a model."""


class Adapter:
    """The adapter of one model, which it changes in place."""

    def __init__(self, model: Any, config: LoraConfig) -> None:
        """Insert the adapter. Raises ConfigError where peft is not installed, or the model lacks a target module."""
        try:
            import peft
            import torch.distributed.tensor  # peft asks for its DTensor, which common/models/compiler.py leaves out
        except ImportError:
            raise ConfigError(PEFT_MISSING) from None
        self.base_digest = base_digest(model, config)
        "of the base as loaded"
        targets = config.target_modules
        alpha: Any = config.alpha  # peft declares a whole number, and computes with any
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=alpha,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        )
        _check_targets(model, targets)
        with warnings.catch_warnings():
            # peft 0.21 asks a property that transformers 5.24 has renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)  # refused below
            self._peft = peft.get_peft_model(model, settings)
        self._model = model
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and type(module.base_layer) is not torch.nn.Linear:
                raise ConfigError(
                    f"trainer.lora.target_modules: {name} is a {type(module.base_layer).__name__}; name linear layers only"
                )

    def weights(self) -> dict[str, Tensor]:
        """Return the adapter's own parameters, by the names of peft's files."""
        return {
            PREFIX + name.replace(f".{_NAME}.", "."): parameter
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }

    def base_weights(self) -> dict[str, Tensor]:
        """Return the frozen weights, by the names that they have in a model without an adapter."""
        return {
            name.replace(".base_layer.", "."): weight
            for name, weight in named_weights(self._model).items()
            if not weight.requires_grad
        }

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuse tensors of these names and shapes, unless they are those of `weights`. Raises ConfigError."""
        if shapes != {name: tuple(weight.shape) for name, weight in self.weights().items()}:
            raise ConfigError(
                "the adapter in the checkpoint was made with another trainer.lora (rank or target_modules): resume with "
                "the config of its run"
            )

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Invert `weights`. Raises ConfigError for the adapter of another config."""
        self.check({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        for name, weight in self.weights().items():
            weight.copy_(tensors[name])

    def disabled(self) -> AbstractContextManager[Any]:
        """Return a context in which the model is its base."""
        return self._peft.disable_adapter()

    def save(self, target: Path, *, revision: str | None = None) -> None:
        """Write a folder that `PeftModel.from_pretrained` loads on the base, whose revision (of a hub id) it names."""
        self._peft.peft_config[_NAME].revision = revision
        self._peft.save_pretrained(str(target), save_embedding_layers=False)


def base_digest(model: torch.nn.Module, config: LoraConfig) -> str:
    """Return the digest of what an adapter's tensors do not say themselves: the weights of the base, and their scale."""
    return policy_digest({"weights": weights_digest(named_weights(model)), "scale": repr(config.scale)})


def check_base(found: str, expected: str) -> None:
    """Refuse a checkpoint of another kind of training, or on other weights: its `base_digest` and the one at hand.

    Both are empty where full weights are trained. Raises ConfigError.
    """
    if found == expected:
        return
    if not expected:
        raise ConfigError("the checkpoint holds a LoRA adapter, but trainer.lora is none: use the config of its run")
    if not found:
        raise ConfigError("the checkpoint holds full weights, but trainer.lora is set: use the config of its run")
    raise ConfigError(
        "the checkpoint holds a LoRA adapter on other weights than those of model.path (was that folder changed?), or of "
        "another trainer.lora (alpha / rank): put back what it was trained with"
    )


def _check_targets(model: Any, targets: str | tuple[str, ...]) -> None:
    """Check that every name is the end of a module's, and none is the output head, whose logits are computed separately."""
    if isinstance(targets, str):
        return
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    linear = {name for name in names if model.get_submodule(name) is not model.get_output_embeddings()}
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ConfigError(f"trainer.lora.target_modules: no linear layer is called {target} (there are {known})")
