"""How the torch engine draws tokens and ends completions: truncation, min_tokens, stop tokens, stop texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from served import (
    EOS,
    Served,
    logits_under,
    policy,
    request,
    sequence,
)

from sluice.common.errors import EngineError
from sluice.workers.engine.torch.sampling import sample


def naive_truncation(logits: torch.Tensor, *, top_k: int, top_p: float) -> list[float]:
    """Logprobs [V] of the renormalised distribution, -inf where cut, by walking down from the likeliest."""
    order = sorted(range(len(logits)), key=lambda token: -float(logits[token]))[: top_k or None]
    mass = logits[order].double().softmax(-1).tolist()
    kept: list[int] = []
    while order and sum(mass[: len(kept)]) < top_p:
        kept.append(order.pop(0))
    result = torch.full((len(logits),), -torch.inf, dtype=torch.double)
    result[kept] = logits[kept].double().log_softmax(-1)
    return result.tolist()


@pytest.mark.parametrize("cut", [{"top_p": 0.8}, {"top_k": 5}, {"top_k": 10, "top_p": 0.5}])
def test_truncated_sampling_reports_the_renormalised_distribution(
    serve: Callable[..., Served], cut: dict[str, Any]
) -> None:
    what = request(6, n=8, temperature=0.9, **cut)
    untouched = request(6, n=8, group_id="beside")
    group, beside = serve().run([what, untouched])
    [alone] = serve().run([untouched])
    assert [c.token_ids.tolist() for c in beside] == [c.token_ids.tolist() for c in alone]
    for completion in group:
        rows = logits_under(policy(0), sequence(what, completion))[len(what.prompt_ids) - 1 : -1] / 0.9
        expected = [
            naive_truncation(row, **{"top_k": 0, "top_p": 1.0, **cut})[token]
            for row, token in zip(rows, completion.token_ids, strict=True)
        ]
        np.testing.assert_allclose(completion.rollout_logprobs, expected, atol=1e-4)


def test_extreme_uniforms_never_draw_a_token_of_probability_zero() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(2, 1)
    tokens, logprobs = sample(logits, uniforms=torch.tensor([0.0, 1 - 2**-24]))
    assert tokens.tolist() == [1, 2]
    assert logprobs.tolist() == pytest.approx([np.log(0.5)] * 2)


def letters(tokens: list[int]) -> str:
    """A tokenizer's decode in which tokens are letters, pairs of letters and nothing."""
    return "".join("" if token == 3 else chr(65 + token % 26) * (1 + token % 2) for token in tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_token_comes_before_min_tokens_and_logprobs_are_renormalised(
    serve: Callable[..., Served], temperature: float
) -> None:
    ends = tuple(range(1, 30))
    what = request(6, n=8, min_tokens=7, temperature=temperature)
    group, beside = serve(eos_token_ids=ends).run([what, request(6, n=8, group_id="beside")])
    assert min(len(c.token_ids) for c in beside) < 7
    for completion in group:
        tokens = completion.token_ids
        assert len(tokens) >= 7 and not np.isin(tokens[:7], ends).any()
        logits = logits_under(policy(0), sequence(what, completion))[len(what.prompt_ids) - 1 : -1]
        logits[:7, list(ends)] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, torch.from_numpy(tokens).long()[:, None])[:, 0]
        np.testing.assert_allclose(completion.rollout_logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("min_tokens", [0, 6])
def test_stop_texts_end_a_completion_with_the_token_that_completes_one(
    serve: Callable[..., Served], min_tokens: int
) -> None:
    stop = ("DD", "EF", "R")
    free = request(6, n=16, max_tokens=40, group_id="beside", min_tokens=min_tokens)
    what = request(6, n=16, max_tokens=40, stop=stop, min_tokens=min_tokens)
    group, beside = serve(decode=letters).run([what, free])
    reasons = []
    for ours, theirs in zip(group, beside, strict=True):
        length = len(theirs.token_ids)
        for end in range(1, length + 1):
            text, before = (letters(theirs.token_ids[:stop_at].tolist()) for stop_at in (end, end - 1))
            if end >= min_tokens and any(text.count(s) > before.count(s) for s in stop):
                length = end
                break
        assert ours.token_ids.tolist() == theirs.token_ids[:length].tolist()
        np.testing.assert_array_equal(ours.rollout_logprobs, theirs.rollout_logprobs[:length])
        text = letters(ours.token_ids.tolist())
        reasons.append(ours.finish_reason == "stop" and ours.token_ids[-1] not in EOS and any(s in text for s in stop))
    assert sum(reasons) >= 5


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], found 1.5"),
        ({"min_tokens": 21}, r"min_tokens must be in \[0, max_tokens=20\], found 21"),
        ({"stop": ("",)}, "stop must be texts that are not empty"),
        ({"stop": ("x",)}, "stop texts need a tokenizer"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
    ],
)
def test_nonsense_is_refused_with_its_name(serve: Callable[..., Served], asked: dict[str, Any], problem: str) -> None:
    with pytest.raises(EngineError, match=problem):
        serve().engine.generate(request(5, **asked))
