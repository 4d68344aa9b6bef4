"""Named algorithms: what `trainer.preset` sets over the separate choices of `trainer` and `trainer.loss`.

A preset is applied when a config file is read, before validation, and does not remain: the config that is stored spells
out every value, so that no run depends on what a preset means later. A key that the file (or an override) sets itself wins.
Sources and what each name leaves to the separate keys: docs/algorithms.md.
"""

from __future__ import annotations

from typing import Any

from sluice.common.config import SamplingConfig
from sluice.common.errors import ConfigError, did_you_mean

PRESETS = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "reinforce", "rloo", "dppo")


def preset_values(name: str, *, max_res_tokens: int) -> dict[str, Any]:
    """Return the keys of section `trainer` that a preset sets. max_res_tokens: the run's `sampling.max_res_tokens`."""
    per_token = {"aggregation": "token_mean", "kl_beta": 0.0, "off_policy": "bypass"}
    per_sequence = {**per_token, "aggregation": "sequence_mean"}
    clipped = {"loss": "grpo", "clip_low": 0.2, "clip_high": 0.2}
    capped = {"loss": "reinforce", "importance_max": 2.0}
    over_length = {**per_token, "aggregation": "fixed_horizon", "horizon": max_res_tokens}
    values: dict[str, dict[str, Any]] = {
        "grpo": {"advantage": "group", "loss": {**per_sequence, **clipped, "kl_beta": 0.04, "kl_estimator": "k3"}},
        "dr_grpo": {"advantage": "none", "loss": {**over_length, **clipped}},
        "dapo": {
            "advantage": "group",
            "loss": {**per_token, **clipped, "clip_high": 0.28},
            "overlong_penalty": {"buffer_tokens": max(1, max_res_tokens // 5), "penalty": 1.0},
            "filter_zero_variance": True,
        },
        "gspo": {"advantage": "group", "loss": {**per_sequence, "loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}},
        "cispo": {"advantage": "group", "loss": {**per_token, "loss": "cispo", "cispo_cap": 5.0}},
        "sapo": {
            "advantage": "group",
            "loss": {**per_sequence, "loss": "sapo", "sapo_tau_pos": 1.0, "sapo_tau_neg": 1.05},
        },
        "reinforce": {"advantage": "none", "loss": {**per_token, **capped}},
        "rloo": {"advantage": "rloo", "loss": {**over_length, **capped, "horizon": 1}},
        "dppo": {"advantage": "none", "loss": {**per_token, **clipped, "loss": "dppo"}},
    }
    return values[name]


def apply_preset(data: dict[str, Any]) -> None:
    """Replace `trainer.preset` in the data of a config file by its values. Raises ConfigError for an unknown name.

    What is not a mapping where one should be is left as it is, for validation to refuse.
    """
    trainer = data.get("trainer")
    if not isinstance(trainer, dict) or (name := trainer.pop("preset", None)) is None:
        return
    if name not in PRESETS:
        hint = f"{near} " if (near := did_you_mean(name, PRESETS)) else ""
        raise ConfigError(f"trainer.preset = {name!r} is not known; {hint}presets: {', '.join(PRESETS)}")
    sampling = data.get("sampling")
    longest = sampling.get("max_res_tokens") if isinstance(sampling, dict) else None
    if not isinstance(longest, int):
        longest = SamplingConfig.model_fields["max_res_tokens"].default
    values = preset_values(name, max_res_tokens=longest)
    aggregation = trainer["loss"].get("aggregation") if isinstance(trainer.get("loss"), dict) else None
    if aggregation not in (None, values["loss"]["aggregation"]):
        values["loss"].pop("horizon", None)  # it belongs to the preset's aggregation, which the file replaces
    for key, value in values.items():
        if key == "loss" and isinstance(trainer.setdefault(key, {}), dict):
            trainer[key].update(value | trainer[key])
        elif key not in trainer:
            trainer[key] = value
