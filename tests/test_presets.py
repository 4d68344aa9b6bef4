"""Presets: what each name sets, that a file's own keys win, and that nothing depends on the name afterwards."""

import yaml
from builders import for_each, minimal, refusal

from sluice.common.config.file import parse_config
from sluice.common.config.presets import PRESETS

MINIMAL = yaml.safe_dump(minimal(sampling={"max_res_tokens": 40}, trainer={"seq_len": 64}))
OVERLONG = {"buffer_tokens": 8, "penalty": 1.0}


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
        ("dapo", {"clip_high": 0.28, "overlong_penalty": OVERLONG, "filter_zero_variance": True}),
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


@for_each("preset", PRESETS)
def test_the_stored_config_spells_everything_out_and_does_not_name_the_preset(preset):
    config = parse_config(MINIMAL, overrides=[f"trainer.preset={preset}"])
    stored = yaml.safe_load(config.to_yaml())
    assert "preset" not in stored["trainer"]
    assert parse_config(config.to_yaml()) == config


def test_keys_that_are_set_win_over_the_preset():
    own = "trainer.loss.clip_high=0.3", "trainer.overlong_penalty=null", "trainer.advantage=rloo"
    trainer = trainer_of("dapo", *own)
    assert changed(trainer) == {"clip_high": 0.3, "advantage": "rloo", "filter_zero_variance": True}
    in_file = minimal(trainer={"preset": "grpo", "loss": {"kl_beta": 0.0}})
    assert changed(parse_config(yaml.safe_dump(in_file)).trainer) == {"aggregation": "sequence_mean", "seq_len": 16}


def test_a_horizon_goes_with_the_presets_aggregation_only():
    trainer = trainer_of("dr_grpo", "trainer.loss.aggregation=token_mean")
    assert (trainer.loss.aggregation, trainer.loss.horizon) == ("token_mean", None)
    assert trainer_of("dr_grpo", "trainer.loss.horizon=7").loss.horizon == 7
    assert trainer_of("dr_grpo", "sampling.max_res_tokens=12").loss.horizon == 12


def test_lengths_come_from_the_default_where_the_file_gives_none():
    data = minimal(trainer={"preset": "dr_grpo", "seq_len": 2048})
    del data["sampling"]["max_res_tokens"]
    assert parse_config(yaml.safe_dump(data)).trainer.loss.horizon == 1024


def test_no_preset_is_accepted():
    assert trainer_of("null") == parse_config(MINIMAL).trainer


@for_each(
    ("override", "message"),
    [
        ("trainer.preset=dapoo", "trainer.preset = 'dapoo' is not known; did you mean 'dapo'? presets: grpo, dr_grpo"),
        ("trainer.preset=7", "trainer.preset = 7 is not known; presets: grpo"),
        ("trainer.presett=dapo", "unknown key 'trainer.presett'; did you mean 'preset'?"),
        ("trainer.loss=3", "trainer.loss = 3"),
        ("trainer.loss.importance_sampling=token_truncate", "double correction"),
        ("sampling.max_res_tokens=many", "sampling.max_res_tokens = 'many'"),
    ],
)
def test_an_unknown_preset_names_the_nearest_and_mistakes_beside_one_are_reported_as_ever(override, message):
    found = refusal("trainer.preset=dr_grpo", override)
    assert found.startswith("x.yaml: ") and message in found
