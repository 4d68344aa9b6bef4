"""What the torch engine does beyond the contract (tests/test_engine_contract.py): a real tiny Qwen3, fp32."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from served import (
    EOS,
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

from sluice.common.errors import EngineClosed, EngineError
from sluice.workers.engine.torch.engine import TorchEngine


def test_greedy_equals_transformers_generate(serve: Callable[..., Served]) -> None:
    requests = [request(length, group_id=str(length), n=2, temperature=0.0) for length in (1, 4, 9)]
    groups = serve().run(requests)
    model: Any = build_model()
    for what, group in zip(requests, groups, strict=True):
        ids = torch.from_numpy(what.prompt_ids).long()[None]
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=list(EOS),
            pad_token_id=0,
        )[0, ids.shape[1] :]
        logits = logits_under(policy(0), sequence(what, group[0]))
        for completion in group:
            assert completion.token_ids.tolist() == theirs.tolist()
            np.testing.assert_allclose(
                completion.rollout_logprobs, expected_logprobs(logits, what, completion), atol=1e-4
            )


def test_many_threads_get_their_own_completions(serve: Callable[..., Served]) -> None:
    served = serve(max_sequences=12)
    served.stage(0)
    requests = [request(1 + k % 17, group_id=str(k), n=1 + k % 5, max_tokens=1 + k % 23, seed=k) for k in range(60)]
    futures = [served.submit(what) for what in requests]
    for what, future in zip(requests, futures, strict=True):
        group = future.result(WAIT_S)
        assert len(group) == what.sampling.n
        for completion in group:
            assert len(completion.token_ids) <= what.sampling.max_tokens
            logits = logits_under(policy(0), sequence(what, completion))
            np.testing.assert_allclose(
                completion.rollout_logprobs, expected_logprobs(logits, what, completion), atol=1e-4
            )
    assert max(served.rows_per_step) <= 12
    stats = served.engine.stats()
    assert (stats.running_sequences, stats.waiting_requests, stats.num_updates) == (0, 0, 1)
    assert stats.generated_tokens == sum(len(c.token_ids) for f in futures for c in f.result())
    assert stats.busy_s > 0


def test_score_equals_the_logprobs_of_generation_and_follows_the_swap(serve: Callable[..., Served]) -> None:
    served = serve()
    with pytest.raises(EngineError, match="no policy is served"):
        served.engine.score([])
    requests = [request(length, group_id=str(length), n=3) for length in (1, 4, 30)]
    groups = served.run(requests)
    sequences = [(r.prompt_ids, c.token_ids) for r, group in zip(requests, groups, strict=True) for c in group]
    version, scored = served.engine.score(sequences)
    assert version == 0 and all(logprobs.dtype == np.float32 for logprobs in scored)
    for logprobs, completion in zip(scored, [c for group in groups for c in group], strict=True):
        np.testing.assert_allclose(logprobs, completion.rollout_logprobs, atol=1e-4)
    served.stage(1)
    version, after = served.engine.score(sequences)
    assert version == 1
    assert np.abs(np.concatenate(after) - np.concatenate(scored)).max() > 0.1


def test_score_runs_between_the_steps_of_others_and_refuses_nonsense(serve: Callable[..., Served]) -> None:
    served = serve(eos_token_ids=(), max_model_len=64)
    scores: list[Future[Any]] = []
    served.at_step[5] = lambda: scores.append(
        served.threads.submit(served.engine.score, [(np.array([5], np.int32), np.array([6, 7], np.int32))])
    )
    [group] = served.run([request(5, max_tokens=50)])
    assert {c.policy_versions for c in group} == {((0, 50),)}
    assert scores[0].result(WAIT_S)[1][0].shape == (2,)
    empty, long = np.array([], np.int32), np.zeros(65, np.int32)
    for prompt, tokens, problem in [
        (empty, long, "empty"),
        (long, empty, "65 tokens"),
        (long[:1] - 1, empty, "ids -1"),
    ]:
        with pytest.raises(EngineError, match=problem):
            served.engine.score([(prompt, tokens)])
    served.engine.close()
    with pytest.raises(EngineClosed):
        served.engine.score([])


def test_pinned_requests_run_at_exactly_their_version(serve: Callable[..., Served]) -> None:
    served = serve(eos_token_ids=())
    pinned = [served.submit(request(5, group_id=str(version), pinned_version=version)) for version in (5, 4)]
    eventually(lambda: served.engine.stats().waiting_requests == 2)
    served.stage(6)
    assert served.submit(request(3)).result(WAIT_S)[0].policy_versions == ((6, 20),)
    assert served.engine.stats().waiting_requests == 2
    at_five = served.num_steps + 3
    served.at_step[at_five] = lambda: served.stage(7)
    served.stage(5)
    assert {c.policy_versions for c in pinned[0].result(WAIT_S)} == {((5, 20),)}, "the swap waited"
    eventually(lambda: served.engine.version == 7)
    served.stage(4)
    assert {c.policy_versions for c in pinned[1].result(WAIT_S)} == {((4, 20),)}


def test_cancel_removes_one_group_and_leaves_the_others(serve: Callable[..., Served]) -> None:
    def cancel_some() -> None:
        for name in ("running", "waiting", "unknown"):
            served.engine.cancel(name)

    served = serve(eos_token_ids=(), max_sequences=8)
    served.at_step[3] = cancel_some
    requests = [request(5, group_id=name) for name in ("running", "stays", "waiting")]
    running, stays, waiting = served.together(requests)
    for cancelled in (running, waiting):
        with pytest.raises(EngineClosed, match="cancelled"):
            cancelled.result(WAIT_S)
    for completion in stays.result(WAIT_S):
        logits = logits_under(policy(0), sequence(requests[1], completion))
        np.testing.assert_allclose(
            completion.rollout_logprobs, expected_logprobs(logits, requests[1], completion), atol=1e-4
        )
    assert served.rows_per_step == [8] * 3 + [4] * 17


def test_sliding_window_models_are_refused() -> None:
    model = build_model(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(ValueError, match="full-attention"):
        TorchEngine(model, eos_token_ids=EOS, max_sequences=4, max_model_len=64)
