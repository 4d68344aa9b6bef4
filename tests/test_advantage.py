"""Advantages: worked numbers, groups that lost a sample, groups without a preference."""

import math
from typing import get_args

import pytest
import torch
from builders import for_each

from sluice.common.config.trainer import AdvantageName
from sluice.trainer.advantage import batch_advantages, compute_advantages

METHODS = get_args(AdvantageName)
NAN = float("nan")


def advantages_of(rewards, method="group"):
    return compute_advantages(torch.tensor(rewards, dtype=torch.float64), method=method).tolist()


@for_each(
    ("method", "rewards", "expected"),
    [
        # mean 1/4, std = sqrt((9/16 + 3/16) / 3) = 1/2: 0.75 / 0.5001 = 1.49970, -0.25 / 0.5001 = -0.49990
        ("group", [1, 0, 0, 0], [1.49970, -0.49990, -0.49990, -0.49990]),
        ("none", [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),
        # the others' mean is 0 for the first, 1/3 for the rest
        ("rloo", [1, 0, 0, 0], [1.0, -1 / 3, -1 / 3, -1 / 3]),
        # 0.75 / 0.25, -0.25 / 0.25
        ("maxrl", [1, 0, 0, 0], [3.0, -1.0, -1.0, -1.0]),
        ("batch", [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),
        ("reinforce_pp", [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),
    ],
)
def test_worked_numbers(method, rewards, expected):
    assert advantages_of(rewards, method) == pytest.approx(expected, abs=5e-6)


@for_each("method", METHODS)
def test_a_group_that_lost_a_sample_is_normalised_alone(method):
    seven = [1.0, 0.0, 0.5, 0.25, 0.0, 1.0, 0.0]
    with_hole = advantages_of([*seven[:3], NAN, *seven[3:]], method)
    assert with_hole[3] == 0.0
    assert with_hole[:3] + with_hole[4:] == pytest.approx(advantages_of(seven, method))
    assert max(map(abs, with_hole)) < 10


@for_each("method", METHODS)
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_rewards(method):
    rewards = [0.3, 0.9, 0.1, 0.4, 0.4]
    advantages = advantages_of(rewards, method)
    assert sum(advantages) == pytest.approx(0, abs=1e-9)
    assert sorted(range(5), key=advantages.__getitem__) == sorted(range(5), key=rewards.__getitem__)


def test_reinforce_pp_whitens_the_centred_rewards_and_leaves_out_the_unscorable():
    # centred: 1, -1 | 0, 0 (nan left out): variance 2 / 3
    first, second = batch_advantages([torch.tensor([2.0, 0.0]), torch.tensor([5.0, NAN, 5.0])], method="reinforce_pp")
    scale = math.sqrt(2 / 3) + 1e-4
    assert first.tolist() == pytest.approx([1 / scale, -1 / scale], rel=1e-5)
    assert second.tolist() == [0.0, 0.0, 0.0]


@for_each("method", METHODS)
@for_each(
    "groups",
    [
        [],
        [[NAN]],
        [[1.0]],
        [[1.0, 1.0], [1.0]],
        [[NAN, NAN], [NAN]],
        [[0.1] * 3, [0.0] * 8, [NAN, 0.7], [0.7, NAN, 0.7]],
    ],
)
def test_groups_without_a_preference_give_exact_zeros(method, groups):
    advantages = batch_advantages([torch.tensor(rewards) for rewards in groups], method=method)
    assert [a.tolist() for a in advantages] == [[0.0] * len(rewards) for rewards in groups]


def test_whole_number_rewards_are_accepted():
    assert compute_advantages(torch.tensor([1, 0]), method="none").tolist() == [0.5, -0.5]


def test_an_unknown_method_and_negative_rewards_for_maxrl_are_refused():
    with pytest.raises(ValueError, match="unknown advantage method 'grpo': use one of group"):
        advantages_of([1.0, 0.0], "grpo")
    with pytest.raises(ValueError, match="maxrl divides by the mean reward"):
        advantages_of([1.0, -1.0], "maxrl")
