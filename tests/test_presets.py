"""Presets: what each name sets, that a file's own keys win, and that nothing depends on the name afterwards."""

import pytest
import yaml
from builders import for_each

from sluice.common.config.file import parse_config
from sluice.common.config.presets import PRESETS
from sluice.common.errors import ConfigError

MINIMAL = """
model: {path: m}
dataset: {path: d, max_req_tokens: 8}
sampling: {group_size: 2, max_res_tokens: 40}
reward: {functions: [{function: sluice.workers.rewards.MathReward}]}
trainer: {seq_len: 64}
"""


def trainer_of(preset, *overrides):
    return parse_config(MINIMAL, overrides=[f"trainer.preset={preset}", *overrides]).trainer


def changed(trainer):
    """What differs from the defaults, flat."""
    default = parse_config(MINIMAL).trainer
    loss = {k: v for k, v in trainer.loss.model_dump().items() if v != default.loss.model_dump()[k]}
    rest = trainer.model_dump(exclude={"loss"})
    return loss | {k: v for k, v in rest.items() if v != default.model_dump()[k]}


@for_each(
    ("preset", "expected"),
    [
        ("grpo", {"aggregation": "sequence_mean", "kl_beta": 0.04}),
        ("dr_grpo", {"aggregation": "fixed_horizon", "horizon": 40, "advantage": "none"}),
        (
            "dapo",
            {
                "clip_high": 0.28,
                "overlong_penalty": {"buffer_tokens": 8, "penalty": 1.0},
                "filter_zero_variance": True,
            },
        ),
        ("gspo", {"loss": "gspo", "aggregation": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4}),
        ("cispo", {"loss": "cispo"}),
        ("sapo", {"loss": "sapo", "aggregation": "sequence_mean"}),
        ("reinforce", {"loss": "reinforce", "advantage": "none"}),
        ("rloo", {"loss": "reinforce", "advantage": "rloo", "aggregation": "fixed_horizon", "horizon": 1}),
        ("dppo", {"loss": "dppo", "advantage": "none"}),
    ],
)
def test_what_a_preset_sets(preset, expected):
    assert changed(trainer_of(preset)) == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_the_stored_config_spells_everything_out_and_does_not_name_the_preset(preset):
    config = parse_config(MINIMAL, overrides=[f"trainer.preset={preset}"])
    stored = yaml.safe_load(config.to_yaml())
    assert "preset" not in stored["trainer"]
    assert parse_config(config.to_yaml()) == config


def test_keys_that_are_set_win_over_the_preset():
    trainer = trainer_of(
        "dapo", "trainer.loss.clip_high=0.3", "trainer.overlong_penalty=null", "trainer.advantage=rloo"
    )
    assert changed(trainer) == {"clip_high": 0.3, "advantage": "rloo", "filter_zero_variance": True}
    in_file = MINIMAL.replace("seq_len: 64", "seq_len: 64, preset: grpo, loss: {kl_beta: 0.0}")
    assert changed(parse_config(in_file).trainer) == {"aggregation": "sequence_mean"}


def test_a_horizon_goes_with_the_presets_aggregation_only():
    trainer = trainer_of("dr_grpo", "trainer.loss.aggregation=token_mean")
    assert (trainer.loss.aggregation, trainer.loss.horizon) == ("token_mean", None)
    assert trainer_of("dr_grpo", "trainer.loss.horizon=7").loss.horizon == 7
    assert trainer_of("dr_grpo", "sampling.max_res_tokens=12").loss.horizon == 12


def test_lengths_come_from_the_default_where_the_file_gives_none():
    text = MINIMAL.replace("group_size: 2, max_res_tokens: 40", "group_size: 2").replace("64", "2048")
    assert parse_config(text, overrides=["trainer.preset=dr_grpo"]).trainer.loss.horizon == 1024


def test_no_preset_is_accepted():
    assert trainer_of("null") == parse_config(MINIMAL).trainer


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.preset=dapoo",
            "x.yaml: trainer.preset = 'dapoo' is not known; did you mean 'dapo'? presets: grpo, dr_grpo",
        ),
        ("trainer.preset=7", "trainer.preset = 7 is not known; presets: grpo"),
        ("trainer.presett=dapo", "unknown key 'trainer.presett'; did you mean 'preset'?"),
    ],
)
def test_an_unknown_preset_names_the_nearest(override, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL, overrides=[override], source="x.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.loss=3"], "trainer.loss = 3"),
        (["trainer.loss.importance_sampling=token_truncate"], "double correction"),
        (["sampling.max_res_tokens=many"], "sampling.max_res_tokens = 'many'"),
    ],
)
def test_mistakes_beside_a_preset_are_reported_as_ever(overrides, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL, overrides=["trainer.preset=dr_grpo", *overrides])
    assert message in str(caught.value)
