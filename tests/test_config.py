"""The config: every shipped file parses, and whatever is wrong is refused with a message one can act on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from builders import for_each, make_config
from pydantic import ValidationError

from sluice.common.config import Config
from sluice.common.config.file import load_config, parse_config
from sluice.common.config.trainer import LossConfig
from sluice.common.errors import ConfigError

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(ROOT.glob("config/*.yaml"))
MINIMAL = """
model: {path: m}
dataset: {path: d, max_req_tokens: 8}
sampling: {group_size: 2, max_res_tokens: 8}
reward: {functions: [{function: sluice.workers.rewards.MathReward}]}
trainer: {seq_len: 16}
"""


def test_shipped_configs_are_found():
    assert {path.stem for path in SHIPPED} >= {"quickstart", "gsm8k_qwen3_1.7b"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_parses_and_survives_its_own_resolved_yaml(path):
    config = load_config(path)
    assert parse_config(config.to_yaml()) == config
    assert path.read_text().startswith("# "), "the first line says what the run is and what it reached"


def test_the_tutorial_numbers_stand_in_the_gsm8k_config():
    c = load_config(ROOT / "config/gsm8k_qwen3_1.7b.yaml")
    assert c.model.path == "Qwen/Qwen3-1.7B"
    d = c.dataset
    assert (d.path, d.revision, d.split, d.streaming, d.target_delimiter) == (
        "openai/gsm8k",
        "main",
        "train",
        True,
        "#### ",
    )
    r = c.rollout
    assert (r.tensor_parallel_size, r.pipeline_parallel_size, r.enforce_eager) == (1, 1, False)
    s = c.sampling
    assert (s.temperature, s.top_p, s.group_size, s.max_res_tokens) == (1.0, 1.0, 8, 1024)
    t = c.trainer
    assert (t.learning_rate, t.local_batch_size, t.seq_len) == (1e-5, 2, 2048)
    assert (t.betas, t.eps, t.weight_decay, t.warmup_steps) == ((0.9, 0.95), 1e-8, 0.1, 1)
    b = c.replay_buffer
    assert (b.batch_size, b.max_policy_age, b.dp_size) == (2, 1, 1)
    assert c.reference.dtype == "bfloat16"
    assert (c.replicas.rollout, c.replicas.reward, c.replicas.dataset) == (8, 16, 2)
    assert [f.function for f in c.reward.functions] == [
        "sluice.workers.rewards.MathReward",
        "sluice.workers.rewards.ThinkingReward",
    ]
    assert c.reward.aggregation == "mean"


def test_defaults_of_the_loss_are_those_of_the_contract():
    loss = LossConfig()
    assert (loss.loss, loss.clip_low, loss.clip_high, loss.dual_clip, loss.cispo_cap) == ("grpo", 0.2, 0.2, None, 5.0)
    assert (loss.sapo_tau_pos, loss.sapo_tau_neg, loss.aggregation, loss.horizon) == (1.0, 1.05, "token_mean", None)
    assert (loss.kl_beta, loss.kl_estimator, loss.off_policy) == (0.0, "k3", "bypass")
    assert (loss.importance_sampling, loss.importance_min, loss.importance_max) == (None, None, 2.0)


def test_overrides_replace_single_values_and_make_missing_sections():
    overrides = [
        "trainer.learning_rate=3e-4",
        "replay_buffer.max_policy_age=0",
        "trainer.loss.kl_beta=0.1",
        "dataset.path=other.jsonl",
        "rollout.enforce_eager=true",
        "replay_buffer.max_resample_count=null",
        "trainer.betas=[0.8, 0.99]",
    ]
    config = parse_config(MINIMAL.replace("seq_len: 16", "seq_len: 16, learning_rate: 1.0e-6"), overrides=overrides)
    assert config.trainer.learning_rate == 3e-4
    assert config.replay_buffer.max_policy_age == 0
    assert config.trainer.loss.kl_beta == 0.1
    assert config.trainer.seq_len == 16
    assert config.dataset.path == "other.jsonl"
    assert config.rollout.enforce_eager is True
    assert config.replay_buffer.max_resample_count is None
    assert config.trainer.betas == (0.8, 0.99)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.learning_rate", "is not of the form section.key=value"),
        ("=3", "is not of the form section.key=value"),
        ("reward.functions.weight=2", "functions is not a section"),
        ("model.path.x=2", "path is not a section"),
        ("trainer.betas=[0.9", "override 'trainer.betas=\\[0.9'"),
    ],
)
def test_malformed_overrides_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(MINIMAL, overrides=[override])


@for_each(
    ("override", "message"),
    [
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
    ],
)
def test_unknown_keys_name_the_nearest_known_one(override, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL, overrides=[override])
    assert message in str(caught.value)


@for_each(
    ("override", "message"),
    [
        ("trainer.learning_rate=fast", "trainer.learning_rate = 'fast'"),
        ("trainer.learning_rate=0", "trainer.learning_rate = 0"),
        ("trainer.num_steps=0", "trainer.num_steps = 0"),
        ("rollout.engine=sglang", "rollout.engine = 'sglang'"),
        ("replay_buffer.max_policy_age=-1", "replay_buffer.max_policy_age = -1"),
        ("sampling.top_p=1.5", "sampling.top_p = 1.5"),
        ("sampling.top_p=0", "sampling.top_p = 0"),
        ("sampling.stop=['']", "sampling.stop.0 = ''"),
        ("sampling.min_tokens=9", "sampling.min_tokens = 9 exceeds sampling.max_res_tokens = 8"),
        ("rollout.max_model_len=15", "exceeds rollout.max_model_len = 15"),
        ("rollout.pipeline_parallel_size=2", "rollout.pipeline_parallel_size = 2"),
        ("policy_store.keep=1", "policy_store.keep = 1"),
        ("policy_store.full_every=1", "policy_store.full_every = 1"),
        ("lease.running_s=0", "lease.running_s = 0"),
        ("reward.functions=[]", "reward.functions = []"),
        ("seed=-1", "seed = -1"),
        ("trainer.max_refill=0", "trainer.max_refill = 0"),
        ("trainer.loss.dual_clip=1.0", "trainer.loss.dual_clip = 1.0"),
    ],
)
def test_wrong_values_are_refused_with_key_and_value(override, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL, overrides=[override], source="x.yaml")
    assert str(caught.value).startswith("x.yaml: ")
    assert message in str(caught.value)


@for_each(
    ("overrides", "message"),
    [
        (
            ["trainer.seq_len=15"],
            "dataset.max_req_tokens + sampling.max_res_tokens = 16 exceeds trainer.seq_len = 15: raise seq_len or lower",
        ),
        (["sampling.group_size=1"], "sampling.group_size=1 gives every completion an advantage of 0"),
        (["sampling.temperature=0"], "sampling.temperature=0 makes all completions of a group equal"),
        (
            ["evaluation.datasets=[{dataset: {path: a}}, {dataset: {path: b}}]"],
            "evaluation.datasets: names must differ, got ['heldout', 'heldout']",
        ),
        (
            ["evaluation.datasets=[{dataset: {path: a}, num_samples: 2, pass_at: [4]}]"],
            "needs num_samples of at least 4",
        ),
        (
            ["evaluation.datasets=[{dataset: {path: a}, num_samples: 2, pass_at: [2, 2]}]"],
            "pass_at: values must differ",
        ),
        (
            ["evaluation.datasets=[{dataset: {path: a}, answer: '(x)'}]"],
            "answer has no effect with num_samples under 2",
        ),
        (["evaluation.datasets=[{dataset: {path: a}, num_samples: 2, answer: 'x'}]"], "answer = 'x' has no group"),
        (["evaluation.datasets=[{dataset: {path: a}, num_samples: 2, answer: '('}]"], "is not a regular expression"),
        (
            ["evaluation.datasets=[{dataset: {path: a}, num_samples: 4}]", "checkpoint.keep_best=heldout/pass@2"],
            "use one of heldout/pass@1, heldout/sampled_pass@1, heldout/pass@4, heldout/maj@4",
        ),
        (["checkpoint.keep_best=heldout/pass@1"], "is not a score of evaluation.datasets: use one of none"),
        (
            ["evaluation.datasets=[{dataset: {path: a}}]", "checkpoint.keep_best=heldout/pass@1"],
            "has nothing to compare with evaluation.every_steps=0",
        ),
        (
            ["reward.functions=[{function: f, weight: 2.0}]"],
            "reward: weights have no effect with aggregation=mean: set reward.aggregation=sum",
        ),
        (["trainer.max_refill=5"], "trainer: max_refill has no effect without filter_zero_variance"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL, overrides=overrides)
    assert message in str(caught.value)


@for_each(
    ("settings", "message"),
    [
        ({"importance_sampling": "token_truncate"}, "double correction"),
        (
            {"off_policy": "decoupled", "importance_sampling": "geometric_mask"},
            "needs importance_min and importance_max",
        ),
        (
            {"off_policy": "decoupled", "importance_sampling": "geometric_mask", "importance_min": 0.99},
            "needs importance_min and importance_max",
        ),
        (
            {"off_policy": "decoupled", "importance_sampling": "token_mask"},
            "importance_sampling=token_mask needs importance_min",
        ),
        (
            {"off_policy": "decoupled", "importance_sampling": "sequence_mask"},
            "importance_sampling=sequence_mask needs importance_min",
        ),
        ({"importance_min": 0.5}, "importance_min is the lower bound of an importance_sampling that masks"),
        (
            {"off_policy": "decoupled", "importance_sampling": "token_truncate", "importance_min": 0.5},
            "importance_min is the lower bound",
        ),
        (
            {"off_policy": "decoupled", "importance_sampling": "token_mask", "importance_min": 2.0},
            "must be under importance_max",
        ),
        ({"loss": "dppo", "off_policy": "decoupled"}, "loss=dppo bounds the distance to the sampler itself"),
        ({"loss": "cispo", "dual_clip": 3.0}, "dual_clip belongs to loss=grpo or gspo"),
        ({"dual_clip": 1.1}, "must be over 1 \\+ clip_high"),
        ({"aggregation": "fixed_horizon"}, "set both or neither"),
        ({"horizon": 100}, "set both or neither"),
    ],
)
def test_losses_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        LossConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "off_policy": "decoupled",
            "importance_sampling": "geometric_mask",
            "importance_min": 0.99,
            "importance_max": 1.01,
        },
        {"off_policy": "decoupled", "importance_sampling": "token_mask", "importance_min": 0.5},
        {"off_policy": "decoupled"},
        {"dual_clip": 3.0},
        {"loss": "dppo"},
        {"aggregation": "fixed_horizon", "horizon": 100},
    ],
)
def test_losses_that_fit_together_are_accepted(settings):
    LossConfig(**settings)


def test_several_mistakes_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL, overrides=["seed=-1", "trainer.num_steps=x", "rollout.devise=cpu"])
    for expected in ("seed = -1", "trainer.num_steps = 'x'", "did you mean 'device'?"):
        assert expected in str(caught.value)


def test_missing_keys_and_what_is_not_a_mapping_are_named():
    with pytest.raises(ConfigError, match=r"missing key 'model'.*missing key 'dataset'.*missing key 'reward'"):
        parse_config("{}")
    with pytest.raises(ConfigError, match=r"missing key 'reward\.functions\.0\.function'"):
        parse_config(MINIMAL, overrides=["reward.functions=[{name: x}]"])
    with pytest.raises(ConfigError, match="must be a mapping of sections, found list"):
        parse_config("[1]")
    with pytest.raises(ConfigError, match="must be a mapping of sections, found NoneType"):
        parse_config("")
    with pytest.raises(ConfigError, match=r"x\.yaml is not valid YAML"):
        parse_config("a: [", source="x.yaml")


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


def test_importing_the_config_loads_neither_torch_nor_transformers():
    probe = (
        "import sys, sluice.common.config; print([m for m in ('torch', 'transformers', 'celery') if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert shown.strip() == "[]"
