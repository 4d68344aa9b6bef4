"""The config: every shipped file parses, and whatever is wrong is refused with a message one can act on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from builders import for_each, make_config, minimal, refusal
from pydantic import ValidationError

from sluice.common.config import Config
from sluice.common.config.file import load_config, parse_config
from sluice.common.config.trainer import LossConfig
from sluice.common.errors import ConfigError

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(ROOT.glob("config/*.yaml"))


def test_shipped_configs_are_found():
    assert {path.stem for path in SHIPPED} >= {"quickstart", "gsm8k_qwen3_1.7b"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_parses_and_survives_its_own_resolved_yaml(path):
    config = load_config(path)
    assert parse_config(config.to_yaml()) == config
    assert path.read_text().startswith("# "), "the first line says what the run is and what it reached"


def test_the_tutorial_numbers_stand_in_the_gsm8k_config():
    expected = yaml.safe_load("""
        model: {path: Qwen/Qwen3-1.7B}
        dataset: {path: openai/gsm8k, revision: main, split: train, streaming: true, target_delimiter: "#### "}
        rollout: {tensor_parallel_size: 1, pipeline_parallel_size: 1, enforce_eager: false}
        sampling: {temperature: 1.0, top_p: 1.0, group_size: 8, max_res_tokens: 1024}
        trainer: {learning_rate: 1.0e-5, local_batch_size: 2, seq_len: 2048, betas: [0.9, 0.95], eps: 1.0e-8,
                  weight_decay: 0.1, warmup_steps: 1}
        replay_buffer: {batch_size: 2, max_policy_age: 1, dp_size: 1}
        reference: {dtype: bfloat16}
        replicas: {rollout: 8, reward: 16, dataset: 2}
        reward: {aggregation: mean}
    """)
    found = load_config(ROOT / "config/gsm8k_qwen3_1.7b.yaml").model_dump(mode="json")
    assert {section: {key: found[section][key] for key in keys} for section, keys in expected.items()} == expected
    functions = [function["function"].rpartition(".")[2] for function in found["reward"]["functions"]]
    assert functions == ["MathReward", "ThinkingReward"]


def test_defaults_of_the_loss_are_those_of_the_contract():
    loss = LossConfig()
    assert (loss.loss, loss.clip_low, loss.clip_high, loss.dual_clip, loss.cispo_cap) == ("grpo", 0.2, 0.2, None, 5.0)
    assert (loss.sapo_tau_pos, loss.sapo_tau_neg, loss.aggregation, loss.horizon) == (1.0, 1.05, "token_mean", None)
    assert (loss.kl_beta, loss.kl_estimator, loss.off_policy) == (0.0, "k3", "bypass")
    assert (loss.importance_sampling, loss.importance_min, loss.importance_max) == (None, None, 2.0)


def test_overrides_replace_single_values_and_make_missing_sections():
    overrides = [
        "trainer.learning_rate=3e-4",
        "trainer.loss.kl_beta=0.1",
        "dataset.path=other.jsonl",
        "rollout.enforce_eager=true",
        "replay_buffer.max_resample_count=null",
        "trainer.betas=[0.8, 0.99]",
    ]
    config = parse_config(yaml.safe_dump(minimal(trainer={"learning_rate": 1e-6})), overrides=overrides)
    trainer = config.trainer
    assert (trainer.learning_rate, trainer.loss.kl_beta, trainer.betas, trainer.seq_len) == (3e-4, 0.1, (0.8, 0.99), 16)
    assert (config.dataset.path, config.rollout.enforce_eager) == ("other.jsonl", True)
    assert config.replay_buffer.max_resample_count is None


def evaluated(extra=""):
    return f"evaluation.datasets=[{{dataset: {{path: a}}{extra}}}]"


@for_each(
    "case",  # one or more overrides, then what the message says
    [
        # not an override
        ("trainer.learning_rate", "is not of the form section.key=value"),
        ("=3", "is not of the form section.key=value"),
        ("reward.functions.weight=2", "functions is not a section"),
        ("model.path.x=2", "path is not a section"),
        ("trainer.betas=[0.9", "override 'trainer.betas=[0.9'"),
        # unknown keys
        ("trainr.num_steps=5", "unknown key 'trainr'; did you mean 'trainer'?"),
        ("trainer.lerning_rate=5", "unknown key 'trainer.lerning_rate'; did you mean 'learning_rate'?"),
        ("sampling.grup_size=5", "unknown key 'sampling.grup_size'; did you mean 'group_size'?"),
        ("trainer.loss.kl_betta=5", "unknown key 'trainer.loss.kl_betta'; did you mean 'kl_beta'?"),
        ("replay_buffer.max_age=5", "did you mean 'max_policy_age'?"),
        ("policy_store.anchor_every=5", "did you mean 'full_every'?"),
        ("trainer.loss.is_weight=token_mask", "did you mean 'importance_sampling'?"),
        ("checkpoint.zzz=1", "unknown key 'checkpoint.zzz'; known keys: every_steps, keep"),
        ("reward.functions=[{function: f, wieght: 2}]", "did you mean 'weight'?"),
        (
            "evaluation.datasets=[{dataset: {path: p, splitt: x}}]",
            "unknown key 'evaluation.datasets.0.dataset.splitt'; did you mean 'split'?",
        ),
        # values out of range
        ("trainer.learning_rate=fast", "x.yaml: trainer.learning_rate = 'fast'"),
        ("trainer.learning_rate=0", "trainer.learning_rate = 0"),
        ("trainer.num_steps=0", "trainer.num_steps = 0"),
        ("rollout.engine=sglang", "rollout.engine = 'sglang'"),
        ("replay_buffer.max_policy_age=-1", "replay_buffer.max_policy_age = -1"),
        ("sampling.top_p=1.5", "sampling.top_p = 1.5"),
        ("sampling.top_p=0", "sampling.top_p = 0"),
        ("sampling.stop=['']", "sampling.stop.0 = ''"),
        ("rollout.pipeline_parallel_size=2", "rollout.pipeline_parallel_size = 2"),
        ("policy_store.keep=1", "policy_store.keep = 1"),
        ("policy_store.full_every=1", "policy_store.full_every = 1"),
        ("lease.running_s=0", "lease.running_s = 0"),
        ("reward.functions=[]", "reward.functions = []"),
        ("seed=-1", "seed = -1"),
        ("trainer.max_refill=0", "trainer.max_refill = 0"),
        ("trainer.loss.dual_clip=1.0", "trainer.loss.dual_clip = 1.0"),
        # settings that contradict each other
        (
            "trainer.seq_len=15",
            "x.yaml: dataset.max_req_tokens + sampling.max_res_tokens = 16 exceeds trainer.seq_len = 15: raise seq_len or lower",
        ),
        ("rollout.max_model_len=15", "exceeds rollout.max_model_len = 15: every such group would be refused"),
        ("sampling.min_tokens=9", "sampling.min_tokens = 9 exceeds sampling.max_res_tokens = 8"),
        (
            "trainer.overlong_penalty={buffer_tokens: 9}",
            "trainer.overlong_penalty.buffer_tokens = 9 exceeds sampling.max_res_tokens = 8: every completion would be",
        ),
        ("sampling.group_size=1", "sampling.group_size=1 gives every completion an advantage of 0"),
        ("sampling.temperature=0", "sampling.temperature=0 makes all completions of a group equal"),
        (
            "evaluation.datasets=[{dataset: {path: a}}, {dataset: {path: b}}]",
            "evaluation.datasets: names must differ, got ['heldout', 'heldout']",
        ),
        (evaluated(", num_samples: 2, pass_at: [4]"), "needs num_samples of at least 4"),
        (evaluated(", num_samples: 2, pass_at: [2, 2]"), "pass_at: values must differ"),
        (evaluated(", answer: '(x)'"), "answer has no effect with num_samples under 2"),
        (evaluated(", num_samples: 2, answer: 'x'"), "answer = 'x' has no group"),
        (evaluated(", num_samples: 2, answer: '('"), "is not a regular expression"),
        (
            evaluated(", num_samples: 4"),
            "checkpoint.keep_best=heldout/pass@2",
            "use one of heldout/pass@1, heldout/sampled_pass@1, heldout/pass@4, heldout/maj@4",
        ),
        ("checkpoint.keep_best=heldout/pass@1", "is not a score of evaluation.datasets: use one of none"),
        (evaluated(), "checkpoint.keep_best=heldout/pass@1", "nothing to compare with evaluation.every_steps=0"),
        (
            "reward.functions=[{function: f, weight: 2.0}]",
            "reward: weights have no effect with aggregation=mean: set reward.aggregation=sum",
        ),
        ("trainer.max_refill=5", "trainer: max_refill has no effect without filter_zero_variance"),
        # several mistakes are reported at once
        ("seed=-1", "rollout.devise=cpu", "seed = -1"),
        ("seed=-1", "rollout.devise=cpu", "did you mean 'device'?"),
        # parts that are missing
        ("reward.functions=[{name: x}]", "missing key 'reward.functions.0.function'"),
    ],
)
def test_what_is_wrong_is_refused_with_key_and_value(case):
    *overrides, message = case
    assert message in refusal(*overrides)


DECOUPLED = "off_policy: decoupled"
NEEDS_BOTH = "needs importance_min and importance_max"


@for_each(
    ("settings", "message"),
    [
        ("importance_sampling: token_truncate", "double correction"),
        (f"{DECOUPLED}, importance_sampling: geometric_mask", NEEDS_BOTH),
        (f"{DECOUPLED}, importance_sampling: geometric_mask, importance_min: 0.99", NEEDS_BOTH),
        (f"{DECOUPLED}, importance_sampling: token_mask", "=token_mask needs importance_min"),
        (f"{DECOUPLED}, importance_sampling: sequence_mask", "=sequence_mask needs importance_min"),
        ("importance_min: 0.5", "importance_min is the lower bound of an importance_sampling that masks"),
        (f"{DECOUPLED}, importance_sampling: token_truncate, importance_min: 0.5", "is the lower bound"),
        (f"{DECOUPLED}, importance_sampling: token_mask, importance_min: 2.0", "must be under importance_max"),
        (f"{DECOUPLED}, loss: dppo", "loss=dppo bounds the distance to the sampler itself"),
        ("loss: cispo, dual_clip: 3.0", "dual_clip belongs to loss=grpo or gspo"),
        ("dual_clip: 1.1", "must be over 1 + clip_high"),
        ("aggregation: fixed_horizon", "set both or neither"),
        ("horizon: 100", "set both or neither"),
        (f"{DECOUPLED}, importance_sampling: geometric_mask, importance_min: 0.99, importance_max: 1.01", ""),
        (f"{DECOUPLED}, importance_sampling: token_mask, importance_min: 0.5", ""),
        (DECOUPLED, ""),
        ("dual_clip: 3.0", ""),
        ("loss: dppo", ""),
        ("aggregation: fixed_horizon, horizon: 100", ""),
    ],
)
def test_choices_of_a_loss_that_fit_together_are_accepted_and_others_refused(settings, message):
    data = yaml.safe_load(f"{{{settings}}}")
    if message:
        with pytest.raises(ValidationError, match=re.escape(message)):
            LossConfig(**data)
    else:
        LossConfig(**data)


def test_missing_keys_and_what_is_not_a_mapping_are_named():
    assert "missing key 'model'; missing key 'dataset'; missing key 'reward'" in refusal(text="{}")
    assert "must be a mapping of sections, found list" in refusal(text="[1]")
    assert "must be a mapping of sections, found NoneType" in refusal(text="")
    assert "x.yaml is not valid YAML" in refusal(text="a: [")


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read config file .*absent.yaml: No such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot read config file"):
        load_config(tmp_path)


def test_a_config_is_frozen():
    config = make_config()
    with pytest.raises(ValidationError):
        config.trainer.num_steps = 3  # type: ignore[misc]


def test_derived_values_follow_from_their_sections():
    config = make_config(replay_buffer={"batch_size": 3, "dp_size": 2, "max_policy_age": 2})
    assert (config.groups_per_step, config.max_in_flight) == (6, 18)
    assert make_config(replay_buffer={"max_policy_age": 0}).max_in_flight == 2
    with_kl = make_config(trainer={"loss": {"kl_beta": 0.1}, "local_batch_size": 3})
    assert with_kl.trainer.microbatch_tokens == 48
    assert make_config(trainer={"max_tokens_per_microbatch": 7}).trainer.microbatch_tokens == 7


def test_every_field_of_every_section_has_a_description():
    def undocumented(model, path):
        for name, field in model.model_fields.items():
            where = f"{path}.{name}"
            if not field.description:
                yield where
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                yield from undocumented(field.annotation, where)

    assert list(undocumented(Config, "config")) == []
