"""Micro-batches: every episode once, within the budget, with masks from lengths, reward and finish reason."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import for_each, make_completion, make_episode, make_group

from sluice.trainer.micro_batches import build_micro_batches, find_logprobs, padding_share, step_normaliser


def episode_of(length, *, first_token=1, reward=1.0, finish_reason="stop", with_reference=False):
    tokens = np.arange(first_token, first_token + length, dtype=np.int32)
    logprobs = -tokens.astype(np.float32)
    completion = replace(
        make_completion(length=length), token_ids=tokens, rollout_logprobs=logprobs, finish_reason=finish_reason
    )
    return make_episode(completion, reward=reward, ref_logprobs=2 * logprobs if with_reference else None)


def build(*groups, max_tokens=64, packed=False):
    """Micro-batches with the advantages 0, 1, 2, ... over all episodes in order."""
    first, advantages = 0, []
    for group in groups:
        advantages.append(torch.arange(first, first + len(group.episodes)).float())
        first += len(group.episodes)
    return build_micro_batches(list(groups), advantages, max_tokens=max_tokens, packed=packed)


def random_groups(seed, *, num_groups=5):
    draw = np.random.default_rng(seed)
    return [
        make_group(
            *(episode_of(int(t)) for t in draw.integers(0, 12, 4)),
            prompt_ids=np.full(int(draw.integers(1, 9)), 50 + i, np.int32),
        )
        for i in range(num_groups)
    ]


def test_a_row_holds_its_episode():
    """A token that equals the pad is in the loss as any other."""
    (batch,) = build(make_group(episode_of(2, first_token=0, with_reference=True), episode_of(1, with_reference=True)))
    assert batch.input_ids.tolist() == [[50, 50, 50, 0, 1], [50, 50, 50, 1, 0]]
    assert (batch.prompt_lengths.tolist(), batch.completion_lengths.tolist()) == ([3, 3], [2, 1])
    assert batch.rollout_logprobs.tolist() == [[0.0, -1.0], [-1.0, 0.0]]
    assert batch.ref_logprobs.tolist() == [[0.0, -2.0], [-2.0, 0.0]]
    assert batch.advantages.tolist() == [0.0, 1.0]
    assert batch.loss_mask.tolist() == [[True, True], [True, False]]
    assert (batch.num_tokens, batch.num_padded_tokens) == (9, 10)


@for_each("packed", [False, True])
@for_each("seed", range(5))
def test_every_episode_is_trained_once_within_the_budget(seed, packed):
    groups = random_groups(seed)
    batches = build(*groups, max_tokens=40, packed=packed)
    assert sorted(a for b in batches for a in b.advantages.tolist()) == list(range(20))
    prompts = [{(int(p), int(ids[0])) for p, ids in zip(b.prompt_lengths, b.input_ids, strict=True)} for b in batches]
    once = [sum(p for p, _ in own) + int(b.completion_lengths.sum()) for own, b in zip(prompts, batches, strict=True)]
    assert all(tokens <= 40 for tokens in (once if packed else [b.num_padded_tokens for b in batches]))
    for batch in batches:  # no column is pad in every row
        assert batch.input_ids.shape[1] == int((batch.prompt_lengths + batch.completion_lengths).max())
    assert step_normaliser([b.loss_mask for b in batches], aggregation="token_mean") == sum(
        len(e.completion.token_ids) for g in groups for e in g.episodes
    )


def test_micro_batches_are_few_equally_full_and_longest_first():
    # total lengths 9, 4, 4, 3, 3 under 12: three at least when pads count, [9], [4, 4], [3, 3] instead of [4, 4, 3], [3];
    # where the prompt of 3 counts once, all are 3 + 8
    group = make_group(*(episode_of(t) for t in (1, 0, 6, 1, 0)))
    assert [tuple(b.input_ids.shape) for b in build(group, max_tokens=12)] == [(1, 9), (2, 4), (2, 3)]
    shapes = [[tuple(b.input_ids.shape) for b in build(group, max_tokens=n, packed=True)] for n in (11, 10, 8)]
    assert shapes == [[(5, 9)], [(1, 9), (4, 4)], [(1, 9), (4, 4)]]


@for_each("packed", [False, True])
def test_a_sequence_over_the_budget_goes_alone(packed):
    batches = build(make_group(episode_of(9), episode_of(1)), max_tokens=8, packed=packed)
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(1, 12), (1, 4)]


def test_the_padding_share_is_that_of_the_tokens_that_run():
    batches = build(make_group(episode_of(7), episode_of(2)), make_group(episode_of(1)))  # rows of 10, 5 and 4 tokens
    assert padding_share(batches, packed=False) == pytest.approx(11 / 30)
    assert padding_share(batches, packed=True) == 0.0


def test_the_order_is_a_function_of_the_groups():
    first, second = (build(*random_groups(3), max_tokens=40) for _ in range(2))
    assert [b.advantages.tolist() for b in first] == [b.advantages.tolist() for b in second]
    equal = build(make_group(episode_of(2), episode_of(2)), make_group(episode_of(2)))
    assert equal[0].advantages.tolist() == [0.0, 1.0, 2.0]


def test_the_normaliser_counts_what_the_aggregation_divides_by():
    unscored = episode_of(2, reward=None)
    batches = build(
        make_group(episode_of(5), episode_of(2, finish_reason="length"), episode_of(0), unscored), max_tokens=8
    )
    assert step_normaliser([b.loss_mask for b in batches], aggregation="token_mean") == 7
    assert step_normaliser([b.loss_mask for b in batches], aggregation="sequence_mean") == 2
    assert step_normaliser([b.loss_mask for b in batches], aggregation="fixed_horizon") == 2


def test_no_reference_is_none_and_a_batch_moves_as_a_whole():
    (batch,) = build(make_group(episode_of(2)))
    assert batch.ref_logprobs is None
    moved = batch.to("meta")
    assert moved.ref_logprobs is None
    assert moved.input_ids.device.type == moved.loss_mask.device.type == "meta"


def test_advantages_that_do_not_match_the_episodes_are_refused():
    with pytest.raises(ValueError, match="zip"):
        build_micro_batches([make_group(episode_of(2))], [torch.zeros(2)], max_tokens=8)


def test_the_logprobs_of_a_sequence_are_found_in_whichever_micro_batch_it_is():
    groups = random_groups(3)
    batches = build(*groups, max_tokens=24)
    assert len(batches) > 2
    # each token's "logprob" is its own rollout logprob, so that a wrong row or a wrong width shows
    scored = [(batch, batch.rollout_logprobs) for batch in batches]
    episodes = [(group, episode) for group in groups for episode in group.episodes]
    found = find_logprobs(scored, [(group.prompt_ids, e.completion.token_ids) for group, e in episodes])
    for (_, episode), row in zip(episodes, found, strict=True):
        assert row.tolist() == episode.completion.rollout_logprobs.tolist()
    assert find_logprobs(scored, [(np.full(3, 51, np.int32), episodes[0][1].completion.token_ids)]) == [None]
