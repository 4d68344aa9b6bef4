"""Back-pressure and fairness in one torch engine: who waits for room, who goes first, what a long row costs the others."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from served import (
    WAIT_S,
    Served,
    build_model,
    eventually,
    expected_logprobs,
    logits_under,
    policy,
    request,
    sequence,
)
from transformers import DynamicCache

import sluice.workers.engine.torch.split_batch
from sluice.common.errors import EngineError
from sluice.common.types import Completion
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.serving import SequenceGroup
from sluice.workers.engine.torch.kv_cache import SlotCache, bytes_per_token
from sluice.workers.engine.torch.scheduler import PATIENCE, schedule
from sluice.workers.engine.torch.split_batch import saved_positions, split_batch


def test_a_group_larger_than_max_sequences_runs_alone(serve: Callable[..., Served]) -> None:
    served = serve(max_sequences=3)
    groups = served.run([request(4, n=2, group_id="a"), request(4, n=7, group_id="b"), request(4, n=3, group_id="c")])
    assert [len(group) for group in groups] == [2, 7, 3]
    assert max(served.rows_per_step) == 7 and served.rows_per_step.index(7) > 0


def test_higher_priority_goes_first_and_equal_ones_in_order_of_arrival(serve: Callable[..., Served]) -> None:
    served = serve(eos_token_ids=(), max_sequences=4)
    started = admissions(served)
    requests = [request(5, group_id=f"{p}{k}", priority=p, max_tokens=4) for k, p in enumerate([0, 5, 0, 9, 5])]
    served.run(requests)
    assert started == ["93", "51", "54", "00", "02"]


def test_nobody_starves_behind_higher_priority(serve: Callable[..., Served]) -> None:
    served = serve(eos_token_ids=(), max_sequences=4)
    started = admissions(served)
    requests = [request(5, group_id="patient", max_tokens=1)]
    requests += [request(5, group_id=str(k), priority=9, max_tokens=1) for k in range(PATIENCE + 8)]
    served.run(requests)
    assert started.index("patient") == PATIENCE


def admissions(served: Served) -> list[str]:
    """Group ids in the order in which they are admitted from now on; the list fills while the engine runs."""
    started: list[str] = []
    admit = served.engine._batch.admit

    def watched(groups: list[SequenceGroup], *, version: int) -> None:
        started.extend(group.request.group_id for group in groups)
        admit(groups, version=version)

    served.engine._batch.admit = watched  # type: ignore[assignment, method-assign]
    return started


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    groups = [SequenceGroup(request=request(5, group_id=str(k), n=n)) for k, n in enumerate([2, 8, 1])]
    chosen = schedule(groups, num_rows=4, longest=25, max_sequences=8, max_positions=None)
    assert [group.size for group in chosen] == [2], "the group of 8 waits, and the one of 1 waits behind it"
    assert [group.num_bypassed for group in groups] == [0, 0, 0]


def test_requests_over_the_kv_budget_wait_and_one_that_never_fits_is_refused(serve: Callable[..., Served]) -> None:
    per_token = bytes_per_token(build_model())
    assert per_token == 2 * 2 * 1 * 16 * 4  # keys and values, layers, heads, head size, bytes
    budget = 20 * 32 * per_token  # 20 rows of 32 tokens
    served = serve(eos_token_ids=(), kv_cache_bytes=budget, max_sequences=64)
    with pytest.raises(EngineError, match=r"12 completions of 5 prompt \+ 60 new tokens .* raise rollout.kv_cache_mib"):
        served.engine.generate(request(5, n=12, max_tokens=60))
    requests = [request(5, group_id=str(k), n=8, max_tokens=20) for k in range(4)]
    requests.append(request(5, group_id="long", n=2, max_tokens=200))
    requests += [request(5, group_id=f"late{k}", n=8, max_tokens=20) for k in range(3)]
    groups = served.run(requests)
    for what, group in zip(requests, groups, strict=True):
        assert_scored(what, group)
    cache = served.engine._batch._cache
    assert max(served.rows_per_step) == 16, "24 rows of 25 tokens take more than the budget"
    assert sum(t.nbytes for t in (*cache._keys, *cache._values)) <= budget


def test_short_requests_are_admitted_and_finish_beside_a_very_long_one(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sluice.workers.engine.torch.split_batch.SPLIT_SAVES, "cpu", 200)  # rows are few here
    served = serve(eos_token_ids=(), max_sequences=12, max_model_len=512)
    long = request(5, group_id="long", n=1, max_tokens=300)
    short = [request(3 + k, group_id=str(k), n=1 + k % 5, max_tokens=5 + k) for k in range(20)]
    first, *others = served.together([long, *short])
    for what, future in zip(short, others, strict=True):
        assert_scored(what, future.result(WAIT_S))
    assert not first.done()
    assert_scored(long, first.result(WAIT_S))
    assert 1 in served.rows_per_step[: served.num_steps // 2], "the long row ran in a pass of its own"


@pytest.mark.parametrize("lengths", [[5, 5, 200, 5, 5], [9, 60, 5, 200, 120, 30]])
def test_prompts_of_very_different_lengths_admitted_together_keep_their_own_keys_and_values(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, lengths: list[int]
) -> None:
    monkeypatch.setitem(sluice.workers.engine.torch.split_batch.SPLIT_SAVES, "cpu", 50)
    served = serve(eos_token_ids=())
    requests = [request(p, group_id=str(k), n=1 + k % 2, max_tokens=6) for k, p in enumerate(lengths)]
    for what, group in zip(requests, served.run(requests), strict=True):
        assert_scored(what, group)
    assert min(served.rows_per_step) < 5, "the long rows ran in a pass of their own"


def test_long_prompts_admitted_beside_running_short_rows_keep_their_keys_and_values(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sluice.workers.engine.torch.split_batch.SPLIT_SAVES, "cpu", 50)
    served = serve(eos_token_ids=())
    late = [request(p, group_id=f"late{p}", n=2, max_tokens=6) for p in (7, 200, 90, 6)]
    arrived: list[Future[list[Completion]]] = []

    def arrive() -> None:
        for count, what in enumerate(late, start=1):
            arrived.append(served.submit(what))
            eventually(lambda expected=count: served.engine.stats().waiting_requests == expected)  # type: ignore[misc]

    served.at_step[3] = arrive
    short = request(5, group_id="short", n=5, max_tokens=40)
    [group] = served.run([short])
    assert_scored(short, group)
    for what, future in zip(late, arrived, strict=True):
        assert_scored(what, future.result(WAIT_S))


def assert_scored(what: GenerationRequest, group: list[Completion]) -> None:
    """Every completion has the logprobs that a fresh forward pass of policy 0 gives."""
    for completion in group:
        logits = logits_under(policy(0), sequence(what, completion))
        np.testing.assert_allclose(completion.rollout_logprobs, expected_logprobs(logits, what, completion), atol=1e-4)


def test_short_rows_take_no_memory_for_the_length_of_a_long_one() -> None:
    """Filled, grown and moved: what is resident is near what is stored, not rows times longest."""
    rows, long, short = 256, 2048, 60
    cache = SlotCache(max_rows=2 * rows, max_length=2 * long, device=torch.device("cpu"))
    prefilled = DynamicCache()
    states = torch.randn(2, 4, long, 64)
    prefilled.update(states, states, 0)
    held = [short] * (rows - 1) + [long]
    before = resident_bytes()
    cache.reserve(rows=rows, length=long, held=[])
    cache.fill(prefilled, first_row=0, source=torch.tensor([0] * (rows - 1) + [1]), held=held)
    cache.reserve(rows=rows + 1, length=long + 1, held=held)
    cache.move(sources=torch.tensor([rows - 1, 0]), targets=torch.tensor([0, rows - 1]), held=[long, short])
    [keys] = cache._keys
    assert torch.equal(keys[0, :, :long], states[1]) and torch.equal(keys[rows - 1, :, :short], states[0, :, :short])
    assert keys.shape[0] > rows and keys.shape[2] > long
    assert resident_bytes() - before < keys.nbytes / 4


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_a_plan_puts_long_rows_first_and_counts_what_a_split_saves() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        offsets = rng.integers(0, 1000, rng.integers(2, 12))
        n = len(offsets)
        for a, saved in enumerate(saved_positions(offsets)):
            naive = sum(len(part) * int(part.max()) for part in (offsets[:a], offsets[a:]) if len(part))
            assert saved == n * offsets.max() - naive
    offsets = np.array([10, 20, 900, 15])
    assert split_batch(offsets, split_saves=10_000) == (None, [(slice(0, 4), 900)])
    order, passes = split_batch(offsets, split_saves=1000)
    assert order == [2, 1, 3, 0] and passes == [(slice(0, 1), 900), (slice(1, 4), 20)]
    assert split_batch(offsets[:0], split_saves=1) == (None, [])
