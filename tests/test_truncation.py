"""Truncated distributions: thresholds against a walk down the order, and the trainer's logprobs against the engine's."""

from __future__ import annotations

import numpy as np
import torch
from builders import for_each
from transformers import Qwen3Config, Qwen3ForCausalLM

import sluice.common.models.truncation
from sluice.common.models.causal_lm import named_weights
from sluice.common.models.logprobs import completion_logprobs, pad_sequences
from sluice.common.models.truncation import Truncation, thresholds
from sluice.common.types import SamplingParams
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.torch.engine import TorchEngine

EOS = (1, 2)
VOCAB = 300
NAMES = ("top_k", "top_p", "min_p")


def model(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, initializer_range=0.15)).eval()


def naive_kept(logits, *, top_k, top_p, min_p):
    """Ids kept of logits [V]: min_p and top_k cut, then the smallest prefix of the rest that has mass top_p."""
    probs = logits.double().softmax(-1)
    order = sorted(range(len(probs)), key=lambda token: -float(probs[token]))
    left = [t for t in order if probs[t] >= min_p * probs.max()][: top_k or None]
    mass = probs[left].sum()
    kept = []
    while left and probs[kept].sum() < top_p * mass:
        kept.append(left.pop(0))
    return set(kept)


@for_each("candidates", [4, 64])
def test_thresholds_keep_what_a_walk_down_the_order_keeps(monkeypatch, candidates):
    monkeypatch.setattr(sluice.common.models.truncation, "_CANDIDATES", candidates)
    torch.manual_seed(3)
    cuts = [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (10, 0.5, 0.0), (0, 0.9, 0.05), (7, 0.7, 0.3)]
    logits = torch.randn(len(cuts), 200) * 3
    columns = [torch.tensor(column) for column in zip(*cuts, strict=True)]
    kept = logits >= thresholds(logits, **dict(zip(NAMES, columns, strict=True)))
    for row, values, mask in zip(logits, cuts, kept, strict=True):
        cut = dict(zip(NAMES, values, strict=True))
        assert set(mask.nonzero().flatten().tolist()) == naive_kept(row, **cut), cut
        alone = Truncation(**cut).kept(row[None])
        assert alone is None or alone[0].tolist() == mask.tolist()


def test_the_likeliest_token_always_stays_and_so_do_those_equal_to_the_last():
    logits = torch.tensor([[0.0, 3.0, 1.0, 1.0]])
    for cut, kept in [({"top_p": 1e-6}, [1]), ({"min_p": 1.0}, [1]), ({"top_k": 1}, [1]), ({"top_k": 2}, [1, 2, 3])]:
        assert Truncation(**cut).kept(logits)[0].nonzero().flatten().tolist() == kept


def generate(policy, **sampling):
    """Prompts, and the engine's completions of 6 groups under the policy's weights."""
    engine = TorchEngine(model(seed=1), eos_token_ids=EOS, max_sequences=64, max_model_len=128)
    engine.stage(0, "", {name: weight.detach().clone() for name, weight in named_weights(policy).items()})
    prompts, completions = [], []
    for seed in range(6):
        ids = np.random.default_rng(seed).integers(3, VOCAB, 4 + seed, dtype=np.int32)
        params = SamplingParams(**{"n": 8, "max_tokens": 24, "seed": seed, **sampling})
        group = engine.generate(GenerationRequest(group_id=str(seed), prompt_ids=ids, sampling=params))
        prompts += [ids] * len(group)
        completions += group
    engine.close()
    return prompts, completions


def score(policy, prompts, completions, **how):
    """Log-ratios [tokens] of the scored logprobs to those of the engine."""
    batch = pad_sequences(prompts, [c.token_ids for c in completions])
    with torch.no_grad():
        logprobs, _ = completion_logprobs(policy, *batch, **how)
    pairs = zip(logprobs, completions, strict=True)
    return np.concatenate([row[: len(c.token_ids)].numpy() - c.rollout_logprobs for row, c in pairs])


@for_each("cut", [{"top_p": 0.8}, {"top_k": 8}, {"min_p": 0.2}, {"top_k": 40, "top_p": 0.9, "min_p": 0.02}])
@for_each("temperature", [1.0, 0.7])
def test_the_trainer_reproduces_the_logprobs_of_truncated_sampling(cut, temperature):
    policy = model()
    sampled = generate(policy, temperature=temperature, **cut)
    difference = score(policy, *sampled, temperature=temperature, truncation=Truncation(**cut))
    # a token at the very edge of the kept set may be in it for one side only: two programs round differently
    assert np.mean(np.abs(difference) > 1e-4) <= 0.01 and np.abs(difference).max() <= 0.02
    assert abs(np.exp(difference).mean() - 1.0) <= 1e-3
    naive_ratio = np.exp(score(policy, *sampled, temperature=temperature)).mean()
    if cut == {"top_p": 0.8}:
        assert 0.75 < naive_ratio < 0.87, "the kept mass: at least top_p"
    assert naive_ratio < 0.95


def test_the_trainer_reproduces_min_tokens():
    policy = model()
    with torch.no_grad():  # a policy that loves to end
        policy.lm_head.weight[list(EOS)] = policy.lm_head.weight.mean(0) * 4
    prompts, completions = generate(policy, min_tokens=10)
    assert min(len(c.token_ids) for c in completions) >= 10
    truncation = Truncation(min_tokens=10, end_token_ids=EOS)
    assert np.abs(score(policy, prompts, completions, truncation=truncation)).max() <= 1e-4
    assert np.exp(score(policy, prompts, completions)).mean() < 0.999


def test_a_token_that_another_policy_sampled_stays_and_the_set_is_constant_for_the_gradient():
    policy = model()
    prompt, tokens = np.array([5, 6, 7], np.int32), np.arange(10, 40, dtype=np.int32)
    batch = pad_sequences([prompt], [tokens])
    truncation = Truncation(top_k=5)
    logprobs, entropy = completion_logprobs(policy, *batch, truncation=truncation, with_entropy=True)
    assert torch.isfinite(logprobs).all() and torch.isfinite(entropy).all()
    assert (entropy <= np.log(6) + 1e-5).all()
    logprobs.sum().backward()
    ours = policy.lm_head.weight.grad.clone()
    policy.zero_grad()
    logits = policy(input_ids=batch[0]).logits[0, 2:-1]
    targets = torch.from_numpy(tokens).long()
    kept = logits.topk(5).indices
    total = sum(
        row[token] - row[torch.tensor(sorted({*ids.tolist(), int(token)}))].logsumexp(0)
        for row, ids, token in zip(logits, kept, targets, strict=True)
    )
    torch.testing.assert_close(logprobs.sum(), total, atol=1e-3, rtol=1e-4)
    total.backward()
    torch.testing.assert_close(ours, policy.lm_head.weight.grad, atol=1e-4, rtol=1e-3)
