"""What reaches the loss: truncated completions, tool tokens, and the penalty for length."""

import math
from dataclasses import replace

import pytest
from builders import for_each, make_completion, make_config, make_episode, make_group, tiny_qwen
from pydantic import ValidationError

from sluice.trainer.distributed.parallel import ParallelPolicy
from sluice.trainer.reward_shaping import loss_tokens, mask_metrics, overlong_penalty, rewards_of
from sluice.trainer.step import train_on
from sluice.trainer.trained_policy import TrainedPolicy


def episode_of(length, *tool_spans, reward=1.0, finish_reason="stop"):
    completion = replace(make_completion(length=length), finish_reason=finish_reason, tool_spans=tool_spans)
    return make_episode(completion, reward=reward)


def masking(**trainer):
    """A config of at most 100 tokens per completion."""
    return make_config(sampling={"max_res_tokens": 100}, trainer={"seq_len": 200, **trainer})


@for_each("span", [(-1, 2), (3, 2), (0, 5)])
def test_a_tool_span_outside_its_completion_is_our_own_mistake(span):
    with pytest.raises(AssertionError, match="tool span"):
        loss_tokens(episode_of(4, span), mask_truncated=False)


@for_each(("num_tokens", "expected"), [(0, 0.0), (80, 0.0), (81, 0.05), (90, 0.5), (100, 1.0), (101, 1.0), (500, 1.0)])
def test_the_overlong_penalty_grows_over_the_buffer(num_tokens, expected):
    # L = 100, buffer 20: (T - 80) / 20, between 0 and 1
    for penalty in (1.0, 0.3):
        found = overlong_penalty(num_tokens, max_res_tokens=100, buffer_tokens=20, penalty=penalty)
        assert found == pytest.approx(penalty * expected)


def test_rewards_are_lowered_by_the_penalty_and_the_unscorable_stay_so():
    group = make_group(episode_of(90), episode_of(100), episode_of(10), episode_of(90, reward=None))
    found = rewards_of(group, masking(overlong_penalty={"buffer_tokens": 20})).tolist()
    assert found[:3] == [0.5, 0.0, 1.0]
    assert math.isnan(found[3])
    assert rewards_of(group, masking()).tolist()[:3] == [1.0, 1.0, 1.0]


def test_what_is_left_out_is_reported():
    group = make_group(episode_of(90, (0, 30)), episode_of(100, finish_reason="length"), episode_of(10, reward=None))
    assert mask_metrics([group], masking()) == {
        "completions/masked_ratio": pytest.approx(1 / 3),
        "completions/tool_token_ratio": pytest.approx(30 / 200),
    }
    metrics = mask_metrics([group], masking(mask_truncated=True, overlong_penalty={"buffer_tokens": 20}))
    assert metrics["completions/masked_ratio"] == pytest.approx(2 / 3)
    assert metrics["reward/overlong_penalty/mean"] == pytest.approx(-(0.5 + 1.0) / 3)


def test_a_step_trains_on_penalised_rewards_and_without_truncated_completions():
    """Which count for the baseline all the same."""
    group = make_group(episode_of(90), episode_of(10), episode_of(20, finish_reason="length"))
    lowered = {"mask_truncated": True, "overlong_penalty": {"buffer_tokens": 20}}
    for trainer, advantages, num_tokens in (({}, [0.0, 0.0, 0.0], 120), (lowered, [-1 / 3, 1 / 6, 1 / 6], 100)):
        config = masking(advantage="none", skip_zero_gradient="off", **trainer)
        policy = ParallelPolicy(TrainedPolicy.of_run(tiny_qwen(vocab_size=100), config))
        metrics, (found,) = train_on(policy, [group], config, step=1)
        assert found.tolist() == pytest.approx(advantages)
        assert metrics["loss/num_tokens"] == num_tokens
        assert metrics["completions/masked_ratio"] == pytest.approx(config.trainer.mask_truncated / 3)


@for_each(
    ("trainer", "message"),
    [
        ({"overlong_penalty": {"buffer_tokens": 101}}, "buffer_tokens = 101 exceeds sampling.max_res_tokens = 100"),
        ({"overlong_penalty": {"buffer_tokens": 0}}, "buffer_tokens"),
        ({"overlong_penalty": {"buffer_tokens": 9, "penalty": 0}}, "penalty"),
        ({"overlong_penalty": {"buffer_tokens": 9}, "advantage": "maxrl"}, "advantage=maxrl needs rewards >= 0"),
    ],
)
def test_penalties_that_do_not_fit_are_refused(trainer, message):
    with pytest.raises(ValidationError, match=message):
        masking(**trainer)
