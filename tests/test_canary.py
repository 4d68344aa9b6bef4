"""The canary: what the trainer scores is what a sampler with the same weights scores, and who differs is named."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from builders import make_completion, make_config
from transformers import Qwen3Config, Qwen3ForCausalLM

from sluice.common.models.logprobs import completion_logprobs, pad_sequences
from sluice.common.policies.canary import (
    MAX_TOKENS,
    NUM_SEQUENCES,
    WORST,
    choose_sequences,
    mean_difference,
    mismatch_bound,
    random_sequences,
)
from sluice.common.types import Episode, Group
from sluice.trainer.trained_policy import TrainedPolicy

VOCAB = 48


def make_policy(**trainer: Any) -> TrainedPolicy:
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, initializer_range=0.3, **heads
    )
    return TrainedPolicy.of_run(Qwen3ForCausalLM(config), make_config(trainer=trainer))


def group_of(*, prompt_length: int, length: int) -> Group:
    episode = Episode(completion=make_completion(length=length), reward=0.0, rewards={}, ref_logprobs=None)
    prompt_ids = np.arange(prompt_length, dtype=np.int32)
    others: dict[str, Any] = {"policy_version": 0, "prompt": "", "target": None, "timestamps": {}}
    return Group(group_id="t0", prompt_ids=prompt_ids, episodes=[episode], **others)


def test_the_shortest_sequences_are_chosen_and_long_completions_cut():
    groups = [group_of(prompt_length=p, length=t) for p, t in [(9, 9), (2, 3), (4, 90), (1, 0)]]
    chosen = choose_sequences(groups)
    assert [(len(prompt), len(tokens)) for prompt, tokens in chosen] == [(2, 3), (9, 9)]
    assert len(chosen) == NUM_SEQUENCES
    assert len(choose_sequences(groups[2:3])[0][1]) == MAX_TOKENS


def test_the_trainers_canary_is_reproduced_by_the_published_weights_only():
    policy = make_policy()
    canary = policy.score(random_sequences(VOCAB))
    rows = pad_sequences([s.prompt_ids for s in canary], [s.token_ids for s in canary])

    def difference() -> float:
        with torch.no_grad():
            logprobs, _ = completion_logprobs(policy.model.eval(), *rows)
        return mean_difference([s.logprobs for s in canary], list(logprobs.numpy()))

    assert difference() <= 1e-6
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(1.05)  # a head that was not reloaded is further off
    assert difference() > mismatch_bound("float32", "float32")


def test_bfloat16_weights_stay_within_their_bound_and_logprobs_that_are_not_finite_are_a_mismatch():
    policy = make_policy()
    expected = [s.logprobs for s in policy.score(random_sequences(VOCAB))]
    policy.model.bfloat16().float()
    difference = mean_difference(expected, [s.logprobs for s in policy.score(random_sequences(VOCAB))])
    assert mismatch_bound("float32", "float32") < difference < mismatch_bound("bfloat16", "float32")
    for odd in (math.nan, math.inf):
        assert mean_difference(expected, [np.full_like(row, odd) for row in expected]) == WORST
