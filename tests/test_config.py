"""The config: every shipped file parses, and whatever is wrong is refused with a message one can act on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from builders import for_each, make_config, minimal, refusal
from pydantic import ValidationError

from sluice.common.config import Config
from sluice.common.config.file import examine, load_config, parse_config
from sluice.common.config.trainer import LossConfig, TrainerConfig
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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainer.learning_rate", ".inf", "finite"),
        ("trainer.learning_rate", "1e400", "finite"),
        ("trainer.num_steps", "9" * 30, "is beyond 64 bits"),
        ("replay_buffer.batch_size", "9" * 30, "is beyond 64 bits"),
        ("trainer.seq_len", "9" * 20, "is beyond 64 bits"),
        *(
            ("evaluation.datasets", f'[{{name: "{name}", dataset: {{path: x.jsonl}}}}]', "should match pattern")
            for name in ("a/b", "a b", "a\\nb", "", "h" * 101)
        ),
    ],
)
def test_numbers_and_names_that_fail_only_later_are_refused(key, value, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(MINIMAL, overrides=[f"{key}={value}"])


def test_missing_keys_and_what_is_not_a_mapping_are_named():
    assert "missing key 'model'; missing key 'dataset'; missing key 'reward'" in refusal(text="{}")
    assert "must be a mapping of sections, found list" in refusal(text="[1]")
    assert "must be a mapping of sections, found nothing: it is empty" in refusal(text="")
    assert "x.yaml is not valid YAML" in refusal(text="a: [")


@for_each(
    ("text", "message"),
    [
        ("trainer: {seq_len: 16}\nmodel: {path: m}\ntrainer:\n  num_steps: 3\n", "'trainer' is on lines 1 and 3"),
        ("trainer:\n  num_steps: 1\n  num_steps: 1\n", "'num_steps' is on lines 2 and 3"),
        ("trainer: {loss: {kl_beta: 1, kl_beta: 2}}", "'kl_beta' is on line 1, twice"),
        (
            "reward:\n  functions:\n    - function: f\n      kwargs:\n        a: 1\n        'a': 2\n",
            "'a' is on lines 5 and 6",
        ),
    ],
)
def test_a_key_that_is_written_twice_is_refused_with_both_lines(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(text, source="x.yaml")


def test_an_anchor_may_be_merged_and_its_keys_replaced():
    config = parse_config(MINIMAL + "checkpoint: &c {every_steps: 5, keep: 3}\nlease: {}\n")
    merged = parse_config(MINIMAL + "checkpoint: {<<: &c {every_steps: 5, keep: 9}, keep: 3}\n")
    assert merged.checkpoint == config.checkpoint
    with pytest.raises(ConfigError, match=r"an alias \(\*\) stands within what it names"):
        parse_config("trainer: &a [*a]\n")


def test_a_section_without_keys_is_its_defaults():
    text = MINIMAL.replace("trainer: {seq_len: 16}", "trainer:\n#  num_steps: 3\n").replace("max_req_tokens: 8", "")
    assert parse_config(text).trainer == TrainerConfig()
    assert parse_config(text, overrides=["trainer.loss.kl_beta=0.5", "lease="]).trainer.loss.kl_beta == 0.5
    assert parse_config(text + "  lora:\n").trainer.lora is None  # off: not the defaults of a section that is on
    assert "missing key 'model'" in refusal(text=text.replace("model: {path: m}", "model:"))
    empty = "evaluation:\n  datasets:\ncheckpoint: ~\nlease: {running_s: }\nseed:\n"
    assert parse_config(MINIMAL + empty) == parse_config(MINIMAL)
    empty = MINIMAL.replace("function: sluice", "kwargs: , function: sluice")
    assert parse_config(empty) == parse_config(MINIMAL)
    assert "seed = None" in refusal("seed=null")  # a null that is written is none


@for_each(
    ("key", "written", "meant"),
    [
        ("trainer.packing", "off", "off"),
        ("dataset.split", "no", "no"),
        ("dataset.name", "1.0", "1.0"),
        ("dataset.name", "true", "true"),
        ("dataset.revision", "0123456", "0123456"),
        ("dataset.revision", "1e5", "1e5"),
        ("dataset.target_column", "2024-01-15", "2024-01-15"),
        ("dataset.target_column", "null", None),
        ("dataset.target_column", "'null'", "null"),
        ("sampling.stop", "[no, 12:30, 1_0, ' x']", ("no", "12:30", "1_0", " x")),
        ("dataset.shuffle", "off", False),
        ("dataset.streaming", "Yes", True),
        ("rollout.enforce_eager", "true", True),
        ("trainer.learning_rate", "1e-5", 1e-5),
        ("trainer.num_steps", "1_000", 1000),
        ("trainer.lora", "~", None),
        (
            "reward.functions",
            "[{function: f.g, kwargs: {a: off, b: 1e-5, c: 2024-01-15, d: false, e: '1e-5', f: 12:30, g: '08', h: 1.5, i: ~}}]",
            {
                "a": "off",
                "b": 1e-5,
                "c": "2024-01-15",
                "d": False,
                "e": "1e-5",
                "f": "12:30",
                "g": "08",
                "h": 1.5,
                "i": None,
            },
        ),
    ],
)
def test_a_value_is_read_as_its_key_means_it(key, written, meant):
    """In the file, in an override, and in the resolved config that a run stores."""
    data = yaml.safe_load(MINIMAL)
    section, _, name = key.partition(".")
    data.setdefault(section, {})[name] = "@"
    in_file = yaml.safe_dump(data).replace("'@'", written)
    for config in (parse_config(in_file), parse_config(MINIMAL, overrides=[f"{key}={written}"])):
        for read in (config, parse_config(config.to_yaml())):
            value = getattr(getattr(read, section), name)
            value = value[0].kwargs if name == "functions" else value
            assert repr(value) == repr(meant)
    assert yaml.safe_load(config.to_yaml()) == config.model_dump(mode="json")  # what other readers of YAML see


@for_each(
    ("override", "meant"),
    [
        ("dataset.target_delimiter=#### ", "#### "),
        ("dataset.target_delimiter=' # '", " # "),
        ("dataset.system_prompt=Answer: in one word # please", "Answer: in one word # please"),
        ("dataset.target_column=", None),
    ],
)
def test_an_override_of_a_text_is_the_text_as_it_stands(override, meant):
    key = override.partition("=")[0].split(".")[1]
    assert getattr(parse_config(MINIMAL, overrides=[override]).dataset, key) == meant


@for_each(
    "written",
    [
        "[sluice.workers.rewards.MathReward]",
        "sluice.workers.rewards.MathReward",
        "{function: sluice.workers.rewards.MathReward}",
    ],
)
def test_a_plain_string_is_a_reward_function(written):
    config = parse_config(MINIMAL, overrides=[f"reward.functions={written}"])
    assert config == parse_config(MINIMAL) == parse_config(config.to_yaml())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MINIMAL.encode("utf-16"), r"x\.yaml is not UTF-8 \(.*\): save it as UTF-8"),
        (MINIMAL.encode("utf-16-le"), r"x\.yaml is not valid YAML: unacceptable character #x0000"),
        (b"dataset: {path: caf\xe9}", r"x\.yaml is not UTF-8"),
        (b"\xff", "is not UTF-8"),
        (b"a: [" * 3000, "is not valid YAML: lists or mappings are nested too deeply"),
        (b"a: !!timestamp abc", "could not determine a constructor for the tag"),
        (b"a: !!set {0.9, 0.95}", "could not determine a constructor for the tag"),
        (b'model: {path: "\\ud800"}', r"is not valid YAML: line 1, column 15: half a surrogate pair"),
        (b'model: {path: "a\\0b"}', r"is not valid YAML: line 1, column 15: text with a null byte"),
        (
            b"".join(
                b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1) if c > 97 else b"x"] * 9))
                for c in range(97, 107)
            ),
            r"is not valid YAML: aliases \(\*\) repeat it to more than 1,000,000 values",
        ),
        (b"# nothing\n", "must be a mapping of sections, found nothing: it is empty"),
        (
            b"a: 'x\nb: 2\n",
            "is not valid YAML: line 3, column 1: found unexpected end of stream while scanning a quoted",
        ),
    ],
)
def test_a_file_that_is_no_yaml_gives_one_paragraph(tmp_path, content, message):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(tmp_path / "x.yaml")
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_and_a_home_folder_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load_config("~/x.yaml").model == parse_config(MINIMAL).model


def test_every_mistake_of_a_config_is_found_at_once(tmp_path):
    (tmp_path / "x.yaml").write_text(MINIMAL)
    overrides = [
        "trainer.lerning_rate=3",
        "seed=-1",
        "sampling.group_size=1",
        "sampling.temperature=0",
        "trainer.seq_len=2",
    ]
    config, problems = examine(Config, tmp_path / "x.yaml", overrides)
    assert config is not None and config.dataset.path == "d"
    for found in (
        "lerning_rate'; did you mean",
        "seed = -1",
        "group_size=1 gives",
        "temperature=0 makes",
        "seq_len = 2",
    ):
        assert sum(found in problem for problem in problems) == 1, found
    config, problems = examine(Config, tmp_path / "x.yaml", ["model.path=3.0", "reward.aggregation=max", "dataset={}"])
    assert config is None
    assert [p.partition(":")[0] for p in problems] == ["missing key 'dataset.path'", "reward.aggregation = 'max'"]
    overrides = [
        "trainer.lora={target_modules: [[a], b]}",
        "trainer.preset=grop",
        "trainer.betas=[1]",
        "sampling.stop=[{}]",
    ]
    config, problems = examine(Config, tmp_path / "x.yaml", overrides)
    assert config is not None and config.trainer.lora is not None
    for found in (
        "did you mean 'grpo'",
        "trainer.lora.target_modules",
        "missing key 'trainer.betas.1'",
        "sampling.stop.0 = {}",
    ):
        assert any(found in problem for problem in problems), found
    message = refusal("trainer.seq_lenn=16", "dataset.max_req_tokens=4000")
    assert message == "x.yaml: unknown key 'trainer.seq_lenn'; did you mean 'seq_len'?", (
        "a run's error guesses no further"
    )


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
    assert (config.groups_per_step, config.max_credits) == (6, 18)
    assert make_config(replay_buffer={"max_policy_age": 0}).max_credits == 2
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
