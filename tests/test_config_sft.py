"""Config of supervised training: defaults, what has no effect there and is refused, and the shipped files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import ROOT
from pydantic import ValidationError

from sluice.common.config.file import load_as, parse_as
from sluice.common.config.sft import RL_ONLY, SftConfig
from sluice.common.config.trainer import TrainerConfig


def settings(model: str, path: str, **changes: Any) -> dict[str, Any]:
    """A small config as data; a keyword replaces keys of one section."""
    data: dict[str, Any] = {
        "model": {"path": model},
        "dataset": {"path": path},
        "batch_size": 8,
        "trainer": {"num_steps": 6, "seq_len": 64, "local_batch_size": 3, "device": "cpu", "learning_rate": 1e-3},
    }
    for name, value in changes.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) else value
    data["trainer"] = {name: value for name, value in data["trainer"].items() if value is not None}
    return data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": {"advantage": "none"}}, r"trainer\.advantage has no effect in supervised"),
        ({"trainer": {"loss": {}}}, r"trainer\.loss has no effect in supervised"),
        ({"checkpoint": {"keep_best": "a/b"}}, r"checkpoint\.keep_best\n  Extra inputs"),
        ({"num_epochs": 2}, r"num_epochs and trainer\.num_steps both set the end"),
        ({"held_out": {"dataset": {"path": "d", "streaming": True}}}, "a streaming set needs num_examples"),
        ({"dataset": {"target_column": "a"}}, "Extra inputs"),
    ],
)
def test_a_setting_without_effect_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SftConfig.model_validate(settings("m", "d", **changes))


def test_every_key_of_the_trainer_acts_here_or_is_refused() -> None:
    """Whoever adds one says which."""
    acts = {
        "num_steps", "local_batch_size", "seq_len", "device", "autocast", "gradient_checkpointing", "learning_rate",
        "betas", "eps", "weight_decay", "warmup_steps", "schedule", "max_grad_norm", "max_tokens_per_microbatch",
        "packing", "lora",
    }  # fmt: skip
    assert set(TrainerConfig.model_fields) == acts | set(RL_ONLY)


@pytest.mark.parametrize("path", sorted((ROOT / "config" / "sft").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_parse_and_survive_their_own_resolved_yaml(path: Path) -> None:
    assert SftConfig.model_validate(settings("m", "d", checkpoint={"keep": 3})).checkpoint.every_steps == 100
    config = load_as(SftConfig, path).for_examples(100)
    assert parse_as(SftConfig, config.to_yaml()) == config
    assert path.read_text().startswith("# "), "the first line says what the run is and what it reached"
