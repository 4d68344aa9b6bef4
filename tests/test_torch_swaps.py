"""Policy swaps in the torch engine: which weights score each token, what a swap costs, what it leaves alone."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from served import (
    WAIT_S,
    Served,
    expected_logprobs,
    logits_under,
    policy,
    request,
    scratch_model,
    sequence,
)

from sluice.common.models.causal_lm import load_weights


@pytest.mark.parametrize("in_flight", ["keep", "recompute"])
def test_policy_swapped_in_flight_stamps_and_scores_every_token(serve: Callable[..., Served], in_flight: str) -> None:
    served = serve(in_flight=in_flight, eos_token_ids=())
    swapped_after = 6
    served.at_step[swapped_after] = lambda: served.stage(1)
    requests = [request(length, group_id=str(length), n=3, max_tokens=12 + length) for length in (1, 5, 11)]
    old, new = policy(0), policy(1)
    for what, group in zip(requests, served.run(requests), strict=True):
        for completion in group:
            tokens = sequence(what, completion)
            assert completion.policy_versions == ((0, swapped_after), (1, len(completion.token_ids) - swapped_after))
            cached = len(what.prompt_ids) + swapped_after - 1
            before = expected_logprobs(logits_under(old, tokens), what, completion)[:swapped_after]
            after_logits = (
                logits_under(new, tokens, old=old, split=cached) if in_flight == "keep" else logits_under(new, tokens)
            )
            after = expected_logprobs(after_logits, what, completion)[swapped_after:]
            np.testing.assert_allclose(completion.rollout_logprobs, np.concatenate([before, after]), atol=1e-4)
    assert (served.engine.version, served.engine.digest) == (1, "digest-1")
    assert served.engine.stats().num_updates == 2 and served.engine.stats().update_pause_s > 0


@pytest.mark.parametrize("seed", [1, 2])
def test_random_traffic_under_many_swaps_keeps_every_token_exact(serve: Callable[..., Served], seed: int) -> None:
    """Rows come, go and move while policies change: each token must still be scored by the version stamped on it."""
    rng = np.random.default_rng(seed)
    served = serve(in_flight="recompute", max_sequences=16)
    for version, step in enumerate(sorted(rng.choice(np.arange(3, 60), 5, replace=False).tolist()), start=1):
        served.at_step[step] = functools.partial(served.stage, version)
    requests = [
        request(
            int(rng.integers(1, 30)), group_id=str(k), n=int(rng.integers(1, 6)), max_tokens=int(rng.integers(1, 40)),
            seed=k, temperature=float(rng.choice([0.0, 0.6, 1.0])),
        )
        for k in range(30)
    ]  # fmt: skip
    num_spans = 0
    for what, group in zip(requests, served.run(requests), strict=True):
        for completion in group:
            start, tokens = 0, sequence(what, completion)
            for version, count in completion.policy_versions:
                expected = expected_logprobs(logits_under(policy(version), tokens), what, completion)
                span = slice(start, start + count)
                np.testing.assert_allclose(completion.rollout_logprobs[span], expected[span], atol=1e-4)
                start += count
                num_spans += 1
            assert start == len(completion.token_ids)
    assert num_spans > sum(what.sampling.n for what in requests), "some completion saw a swap"


def test_a_group_admitted_after_a_swap_sees_only_the_new_policy(serve: Callable[..., Served]) -> None:
    served = serve()
    what = request(9)
    served.run([what])
    served.stage(1)
    [group] = [served.submit(request(9, min_version=1)).result(WAIT_S)]
    for completion in group:
        logits = logits_under(policy(1), sequence(what, completion))
        np.testing.assert_allclose(completion.rollout_logprobs, expected_logprobs(logits, what, completion), atol=1e-4)


def test_scoring_counts_as_a_pause_of_generation_but_not_as_the_swap(serve: Callable[..., Served]) -> None:
    served = serve()
    served.run([request(5)])
    before = served.engine.stats()
    started = time.monotonic()
    served.engine.score([(np.array([5], np.int32), np.full(250, 6, np.int32))] * 8)
    elapsed = time.monotonic() - started
    after = served.engine.stats()
    assert 0 < after.update_pause_s - before.update_pause_s < elapsed
    assert after.last_pause_s == before.last_pause_s


def test_a_swap_pauses_generation_for_less_than_a_decode_step_and_a_copy_of_the_weights(
    serve: Callable[..., Served],
) -> None:
    """Medians of one run, with a factor for what else the machine does."""
    served = serve(eos_token_ids=())
    policies = [{name: weight.clone() for name, weight in policy(seed).items()} for seed in range(2)]
    pauses: list[float] = []
    busy: list[float] = []

    def swap(version: int) -> None:
        stats = served.engine.stats()
        pauses.append(stats.last_pause_s)
        busy.append(stats.busy_s)
        served.engine.stage(version, str(version), policies[version % 2])

    for version in range(1, 32):
        served.at_step[1 + version] = functools.partial(swap, version)
    served.run([request(5, max_tokens=40)])
    assert served.engine.stats().num_updates == 32
    copies = []
    for _ in range(9):
        started = time.monotonic()
        load_weights(scratch_model(), policies[0])
        copies.append(time.monotonic() - started)
    assert statistics.median(pauses) < 2 * (statistics.median(np.diff(busy)) + statistics.median(copies))


def test_staged_tensors_are_served_and_never_written_to(serve: Callable[..., Served]) -> None:
    """The policy store keeps them as what the next delta rests on."""
    served = serve()
    first = {name: weight.clone() for name, weight in policy(1).items()}
    served.engine.stage(1, "float32", first)
    served.engine.generate(request(5, min_version=1))
    rounded = {name: weight.bfloat16() for name, weight in policy(2).items()}
    served.engine.stage(2, "bfloat16", rounded)
    what = request(5, min_version=2)
    group = served.engine.generate(what)
    for name, weight in policy(1).items():
        assert torch.equal(first[name], weight), name
    for completion in group:
        logits = logits_under({n: w.float() for n, w in rounded.items()}, sequence(what, completion))
        np.testing.assert_allclose(completion.rollout_logprobs, expected_logprobs(logits, what, completion), atol=1e-4)
