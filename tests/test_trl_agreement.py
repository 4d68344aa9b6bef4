"""Loss, gradient and advantages agree with TRL's own, recorded by tests/fixtures/trl_numbers.py, to 1e-6 in float64.

`loss_config` and `ADVANTAGES` are the dictionary between the two: arguments of GRPOConfig in, ours out. Where the two
differ on purpose a test says by how much; docs/algorithms.md says why.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import for_each, make_completion, make_episode

from sluice.common.config.presets import preset_values
from sluice.common.config.trainer import LossConfig
from sluice.trainer.advantage import batch_advantages
from sluice.trainer.loss import policy_loss
from sluice.trainer.reward_shaping import loss_tokens, overlong_penalty

NUMBERS = json.loads((Path(__file__).parent / "fixtures" / "trl_numbers.json").read_text())
BATCH, CASES = NUMBERS["batch"], NUMBERS["cases"]
LOGPROBS = {name: torch.tensor(values, dtype=torch.float64) for name, values in BATCH["logprobs"].items()}
ADVANTAGES = {"group": "group", "batch": "batch", "none": "none"}
"""scale_rewards -> trainer.advantage."""
AGGREGATIONS = {
    "grpo": {"aggregation": "sequence_mean"},
    "sapo": {"aggregation": "sequence_mean"},
    "bnpo": {"aggregation": "token_mean"},
    "dapo": {"aggregation": "token_mean"},
    "cispo": {"aggregation": "token_mean"},
    "dr_grpo": {"aggregation": "fixed_horizon", "horizon": BATCH["horizon"]},
    "luspo": {"aggregation": "fixed_horizon", "horizon": 1},
}
"""loss_type -> aggregation: TRL's names choose both loss and aggregation."""
NO_LOWER_BOUND = 1e-9
"""Under exp(-20), where log-ratios are clamped."""
DIFFERS = {"kl_bias_correction", "truncated_grpo", "truncated_dr_grpo", "unscorable_dapo", "rloo", "rloo_unscorable"}
"""Cases with a test of their own."""


def loss_config(trl):
    """The LossConfig of a case's GRPOConfig arguments; `decoupled` where TRL corrects for vLLM, else `bypass`."""
    loss_type = trl["loss_type"]
    loss = loss_type if loss_type in ("cispo", "sapo") else "grpo"
    if trl.get("importance_sampling_level") == "sequence":
        loss = "gspo"
    settings = {"loss": loss, **AGGREGATIONS[loss_type], "kl_beta": trl.get("beta", 0.0)}
    if loss == "cispo":
        settings["cispo_cap"] = trl.get("epsilon_high", 0.2)
    else:
        settings |= {"clip_low": trl.get("epsilon", 0.2), "clip_high": trl.get("epsilon_high", trl.get("epsilon", 0.2))}
    names = {"delta": "dual_clip", "sapo_temperature_pos": "sapo_tau_pos", "sapo_temperature_neg": "sapo_tau_neg"}
    settings |= {ours: trl[theirs] for theirs, ours in names.items() if theirs in trl}
    if trl.get("use_vllm"):
        mode = trl["vllm_importance_sampling_mode"]
        settings |= {"off_policy": "decoupled", "importance_sampling": mode}
        settings["importance_max"] = trl["vllm_importance_sampling_clip_max"]
        if mode.endswith("mask"):
            settings["importance_min"] = trl.get("vllm_importance_sampling_clip_min", NO_LOWER_BOUND)
    return LossConfig(**settings)


def episodes_of(trl):
    """The recorded completions as the trainer gets them: lengths, finish reasons, tool spans, rewards."""
    for i, length in enumerate(BATCH["lengths"]):
        tools = tuple((t, 1) for t in range(length) if trl.get("tools") and not BATCH["tool_mask"][i][t])
        finish_reason = "length" if i in BATCH["truncated"] else "stop"
        completion = replace(make_completion(length=length), finish_reason=finish_reason, tool_spans=tools)
        reward = None if trl.get("unscorable") and i == 2 else BATCH["rewards"][i]
        yield make_episode(completion, reward=reward)


def masks_of(trl):
    """Loss mask [B, T]."""
    mask = torch.zeros(LOGPROBS["policy"].shape, dtype=torch.bool)
    for row, episode in zip(mask, episodes_of(trl), strict=True):
        tokens = loss_tokens(episode, mask_truncated=trl.get("mask_truncated_completions", False))
        row[: len(tokens)] = torch.from_numpy(tokens)
    return mask


def advantages_of(trl):
    """Advantages [B]."""
    method = "rloo" if trl.get("rloo") else ADVANTAGES[trl.get("scale_rewards", "group")]
    rewards = [float("nan") if e.reward is None else e.reward for e in episodes_of(trl)]
    groups = torch.tensor(rewards, dtype=torch.float64).split(BATCH["group_size"])
    return torch.cat(batch_advantages(list(groups), method=method))


def ours(config, trl):
    """Loss and gradient [B, T] of what TRL was given."""
    policy = LOGPROBS["policy"].clone().requires_grad_()
    sampler = LOGPROBS["sampler" if config.off_policy == "decoupled" else "old"]
    loss, _ = policy_loss(
        config,
        policy_logprobs=policy,
        rollout_logprobs=policy.detach() if trl.get("rloo") else sampler,
        prox_logprobs=LOGPROBS["old"],
        ref_logprobs=LOGPROBS["reference"],
        advantages=advantages_of(trl),
        loss_mask=masks_of(trl),
    )
    loss.backward()
    return loss.detach(), policy.grad


def assert_same(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_fixture_is_of_the_version_that_the_docs_name():
    assert NUMBERS["versions"]["trl"] == "1.16.0"
    assert len(CASES) >= 35


@for_each("name", sorted(set(CASES) - DIFFERS))
def test_loss_and_gradient_are_trls(name):
    trl = CASES[name]["trl"]
    loss, gradient = ours(loss_config(trl), trl)
    assert_same(loss, CASES[name]["loss"])
    assert_same(gradient, CASES[name]["gradient"])
    assert gradient.abs().max() > 1e-3, "the case must say something"


@for_each("name", sorted(CASES))
def test_advantages_are_trls(name):
    assert_same(advantages_of(CASES[name]["trl"]), CASES[name]["advantages"])


def test_a_case_tells_its_setting_from_the_default():
    """Every clip, cap and mask acts on the batch: without it the case would not agree."""
    without = {
        "two_sided": {"dual_clip": None},
        "cispo": {"cispo_cap": 5.0},
        "gspo": {"loss": "grpo"},
        "token_truncate": {"importance_max": 9.0},
        "token_mask": {"importance_max": 9.0},
        "sequence_truncate": {"importance_max": 99.0},
        "sequence_mask": {"importance_max": 99.0},
        "sapo_temperatures": {"sapo_tau_neg": 1.05},
        "kl_grpo": {"kl_estimator": "k2"},
    }
    for name, change in without.items():
        trl = CASES[name]["trl"]
        changed = LossConfig(**{**loss_config(trl).model_dump(), **change})
        assert float((ours(changed, trl)[1] - torch.tensor(CASES[name]["gradient"])).abs().max()) > 1e-4, name


def test_our_kl_is_not_importance_weighted():
    # TRL's default multiplies each token's KL by its ratio: beta * sum (rho - 1) k3 / 32 tokens more
    trl = CASES["kl_bias_correction"]["trl"]
    policy, old, reference = (LOGPROBS[name] for name in ("policy", "old", "reference"))
    x = reference - policy
    more = torch.where(masks_of(trl), ((policy - old).exp() - 1) * (x.exp() - x - 1), 0.0).sum() / 32
    assert_same(ours(loss_config(trl), trl)[0] + 0.3 * more, CASES["kl_bias_correction"]["loss"])


@for_each(
    ("name", "share"),
    [
        ("truncated_grpo", 6 / 8),  # TRL divides by all 8 sequences, ours by the 6 that have a token in the loss
        ("truncated_dr_grpo", 6 / 8),
        ("unscorable_dapo", 27 / 32),  # 32 tokens, 5 of them of the unscorable completion
    ],
)
def test_what_is_not_in_the_loss_is_not_in_our_divisor(name, share):
    loss, gradient = ours(loss_config(CASES[name]["trl"]), CASES[name]["trl"])
    assert_same(loss * share, CASES[name]["loss"])
    assert_same(gradient * share, CASES[name]["gradient"])


@for_each(
    ("preset", "trl"),
    [
        ("grpo", {"loss_type": "grpo", "beta": 0.04}),
        ("dr_grpo", CASES["dr_grpo"]["trl"]),
        ("dapo", CASES["dapo"]["trl"]),
        ("gspo", CASES["gspo_of_the_paper"]["trl"]),
        ("cispo", {"loss_type": "cispo", "epsilon_high": 5.0}),
        ("sapo", CASES["sapo"]["trl"]),
    ],
)
def test_a_preset_is_what_trl_calls_by_that_name(preset, trl):
    values = preset_values(preset, max_res_tokens=BATCH["horizon"])
    assert LossConfig(**values["loss"]) == loss_config(trl)
    assert values["advantage"] == ADVANTAGES[trl.get("scale_rewards", "group")]


def test_the_rloo_preset_has_the_gradient_of_trls_rloo_on_policy():
    # TRL's loss is the surrogate -mean(ratio A) = -mean(A), ours -mean(A sum lp): other values, the same gradient
    values = preset_values("rloo", max_res_tokens=BATCH["horizon"])
    assert values["advantage"] == "rloo"
    _, gradient = ours(LossConfig(**values["loss"]), CASES["rloo"]["trl"])
    assert_same(gradient, CASES["rloo"]["gradient"])


def test_the_overlong_penalty_is_trls_punishment_with_the_sign_turned():
    recorded = NUMBERS["overlong"]
    for length, reward in zip(recorded["lengths"], recorded["rewards"], strict=True):
        assert overlong_penalty(length, max_res_tokens=100, buffer_tokens=20) == pytest.approx(-reward, abs=1e-12)
