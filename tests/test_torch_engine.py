"""What the torch engine does beyond the contract (tests/test_engine_contract.py): a real tiny Qwen3, fp32."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from served import (
    EOS,
    WAIT_S,
    Served,
    assert_close,
    assert_scored_by,
    build_model,
    expected_logprobs,
    logits_under,
    policy,
    request,
    scratch_model,
    sequence,
)

import sluice.workers.engine.torch.split_batch
from sluice.common.errors import ConfigError, EngineError
from sluice.common.models.causal_lm import load_weights
from sluice.workers.engine.torch.engine import TorchEngine
from sluice.workers.engine.torch.kv_cache import bytes_per_token
from sluice.workers.engine.torch.sampling import sample
from sluice.workers.engine.torch.stop_strings import StopStrings


@pytest.mark.parametrize("seed", [1, 2])
def test_random_traffic_under_many_swaps_keeps_every_token_exact(serve: Callable[..., Served], seed: int) -> None:
    """Rows come, go and move while policies change: each token must still be scored by the version stamped on it."""
    rng = np.random.default_rng(seed)
    served = serve(in_flight="recompute", max_sequences=12)
    first, before = served.serve(0), served.engine.stats()
    requests = [
        request(
            int(rng.integers(1, 30)), group_id=str(k), n=int(rng.integers(1, 6)), max_tokens=int(rng.integers(1, 40)),
            seed=k, temperature=float(rng.choice([0.0, 0.6, 1.0])),
        )
        for k in range(60)
    ]  # fmt: skip
    with served.standing():
        futures = served.wait(*requests)
        for other in range(1, 6):
            served.advance_by_tokens(int(rng.integers(50, 300)))
            served.stage(other)
    num_spans = 0
    groups = [future.result(WAIT_S) for future in futures]
    for what, group in zip(requests, groups, strict=True):
        assert len(group) == what.sampling.n
        for completion in group:
            start, tokens = 0, sequence(what, completion)
            for version, count in completion.policy_versions:
                expected = expected_logprobs(logits_under(policy(version - first), tokens), what, completion)
                span = slice(start, start + count)
                assert_close(completion.rollout_logprobs[span], expected[span])
                start += count
                num_spans += 1
            assert start == len(completion.token_ids)
    assert num_spans > sum(what.sampling.n for what in requests), "some completion saw a swap"
    assert max(served.rows_per_step) == 12
    stats = served.engine.stats()
    assert (stats.running_sequences, stats.waiting_requests) == (0, 0)
    num_tokens = sum(len(completion.token_ids) for group in groups for completion in group)
    assert stats.generated_tokens - before.generated_tokens == num_tokens
    assert stats.busy_s > before.busy_s


def test_a_swap_pauses_generation_for_less_than_a_decode_step_and_a_copy_of_the_weights(
    serve: Callable[..., Served],
) -> None:
    """Medians of one run, with a factor for what else the machine does."""
    served = serve(eos=())
    served.serve(0)
    stats = []
    with served.standing():
        [running] = served.wait(request(5, max_tokens=40))
        served.advance(lambda: served.engine.stats().running_sequences > 0)
        for seed in (1, 0) * 15:
            served.stage(seed)
            served.advance_by_passes(1)
            stats.append(served.engine.stats())
        assert not running.done()
    assert np.diff([s.num_updates for s in stats]).tolist() == [1] * 29
    copies = []
    for _ in range(9):
        started = time.monotonic()
        load_weights(scratch_model(), policy(0))
        copies.append(time.monotonic() - started)
    step_s = statistics.median(np.diff([s.busy_s for s in stats]))
    assert statistics.median(s.last_pause_s for s in stats) < 2 * (step_s + statistics.median(copies))


def test_scoring_counts_as_a_pause_of_generation_but_not_as_the_swap(serve: Callable[..., Served]) -> None:
    served = serve()
    served.serve(0)
    before, started = served.engine.stats(), time.monotonic()
    served.engine.score([(np.array([5], np.int32), np.full(250, 6, np.int32))] * 8)
    elapsed, after = time.monotonic() - started, served.engine.stats()
    assert 0 < after.update_pause_s - before.update_pause_s < elapsed
    assert after.last_pause_s == before.last_pause_s


def test_staged_tensors_are_served_and_never_written_to(serve: Callable[..., Served]) -> None:
    """The policy store keeps them as what the next delta rests on."""
    served = serve()
    first = {name: weight.clone() for name, weight in policy(1).items()}
    served.serve(1, weights=first)
    served.run(request(5))
    rounded = {name: weight.bfloat16() for name, weight in policy(2).items()}
    served.serve(2, weights=rounded)
    [group] = served.run(request(5))
    for name, weight in policy(1).items():
        assert torch.equal(first[name], weight), name
    assert_scored_by({name: weight.float() for name, weight in rounded.items()}, request(5), group)


def test_requests_over_the_kv_budget_wait_and_one_that_never_fits_is_refused(serve: Callable[..., Served]) -> None:
    per_token = bytes_per_token(build_model())
    assert per_token == 2 * 2 * 1 * 32 * 4  # keys and values, layers, heads, head size, bytes
    served = serve(eos=(), kv_cache_mib=1, max_sequences=128)  # 64 rows of 32 tokens
    served.serve(0)
    with pytest.raises(EngineError, match=r"12 completions of 5 prompt \+ 300 new .* raise rollout.kv_cache_mib"):
        served.engine.generate(request(5, n=12, max_tokens=300))
    sizes = [(24, 20)] * 4 + [(5, 300)] + [(24, 20)] * 3
    requests = [request(5, group_id=str(k), n=n, max_tokens=length) for k, (n, length) in enumerate(sizes)]
    with served.standing():
        futures = served.wait(*requests)
    for what, future in zip(requests, futures, strict=True):
        assert_scored_by(0, what, future.result(WAIT_S))
    cache = served.engine._batch._cache
    assert max(served.rows_per_step) == 48, "72 rows of 25 tokens take more than the budget"
    assert sum(t.nbytes for t in (*cache._keys, *cache._values)) <= 2**20


def test_short_requests_are_admitted_and_finish_beside_a_very_long_one(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sluice.workers.engine.torch.split_batch.SPLIT_SAVES, "cpu", 200)  # rows are few here
    served = serve(eos=(), max_sequences=12)
    served.serve(0)
    long = request(5, group_id="long", n=1, max_tokens=300)
    short = [request(3 + k, group_id=str(k), n=1 + k % 5, max_tokens=5 + k) for k in range(20)]
    with served.standing():
        first, *others = served.wait(long, *short)
    for what, future in zip(short, others, strict=True):
        assert_scored_by(0, what, future.result(WAIT_S))
    assert not first.done()
    assert_scored_by(0, long, first.result(WAIT_S))
    assert 1 in served.rows_per_step[: len(served.rows_per_step) // 2], "the long row ran in a pass of its own"


def test_prompts_of_very_different_lengths_keep_their_own_keys_and_values(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Admitted together, to an empty batch and beside running rows."""
    monkeypatch.setitem(sluice.workers.engine.torch.split_batch.SPLIT_SAVES, "cpu", 50)
    served = serve(eos=(), max_sequences=15)
    served.serve(0)
    first = [request(p, group_id=str(k), n=1 + k % 2, max_tokens=40) for k, p in enumerate([5, 5, 200, 5, 5])]
    late = [request(p, group_id=f"late{p}", n=1 + p % 2, max_tokens=6) for p in (9, 60, 5, 200, 120, 30)]
    with served.standing():
        futures = served.wait(*first)
        served.advance_by_tokens(3 * 7)
        futures += served.wait(*late)
    for what, future in zip([*first, *late], futures, strict=True):
        assert_scored_by(0, what, future.result(WAIT_S))
    assert min(served.rows_per_step) < 5, "the long rows ran in a pass of their own"


def test_what_the_engine_cannot_do_is_refused() -> None:
    model = build_model(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(ConfigError, match="full attention over all tokens"):
        TorchEngine(model, eos_token_ids=EOS, max_sequences=4, max_model_len=64)
    engine = TorchEngine(build_model(), eos_token_ids=EOS, max_sequences=4, max_model_len=64)
    with pytest.raises(EngineError, match="stop texts need a tokenizer"):
        engine.generate(request(5, stop=("x",)))
    engine.close()


def test_extreme_uniforms_never_draw_a_token_of_probability_zero() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(2, 1)
    tokens, logprobs = sample(logits, uniforms=torch.tensor([0.0, 1 - 2**-24]))
    assert tokens.tolist() == [1, 2]
    assert logprobs.tolist() == pytest.approx([np.log(0.5)] * 2)


def test_a_stop_text_is_completed_by_exactly_the_token_that_adds_one() -> None:
    """With tokens that are letters, pairs of letters and nothing."""

    def letters(tokens: list[int]) -> str:
        return "".join("" if token == 3 else chr(65 + token % 8) * (1 + token % 2) for token in tokens)

    stop, num_completed = ("DD", "EF", "AAB"), 0
    for seed in range(20):
        tokens = np.random.default_rng(seed).integers(0, 16, 60).tolist()
        strings = StopStrings(stop, letters)
        for end, token in enumerate(tokens, start=1):
            text, before = letters(tokens[:end]), letters(tokens[: end - 1])
            is_completed = any(text.count(s) > before.count(s) for s in stop)
            assert strings.completed_by(token) == is_completed
            num_completed += is_completed
    assert num_completed > 50
