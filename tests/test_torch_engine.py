"""The torch engine against plain forward passes of the same weights (a real tiny Qwen3, fp32)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from served import (
    EOS,
    VOCAB,
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


def test_completions_have_the_promised_shapes_lengths_and_reasons(serve: Callable[..., Served]) -> None:
    groups = serve().run([request(length, group_id=str(length), n=length, seed=length) for length in (1, 2, 5, 13)])
    reasons = set()
    for length, group in zip((1, 2, 5, 13), groups, strict=True):
        assert len(group) == length
        for completion in group:
            tokens = completion.token_ids
            assert tokens.dtype == np.int32 and completion.rollout_logprobs.dtype == np.float32
            assert tokens.shape == completion.rollout_logprobs.shape and 1 <= len(tokens) <= 20
            assert completion.policy_versions == ((0, len(tokens)),)
            assert (completion.finish_reason == "stop") == (tokens[-1] in EOS)
            assert not np.isin(tokens[:-1], EOS).any()
            assert completion.finish_reason == "stop" or len(tokens) == 20
            reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_fresh_forward_pass(serve: Callable[..., Served], temperature: float) -> None:
    requests = [request(length, group_id=str(length), temperature=temperature) for length in (1, 3, 8, 30)]
    for what, group in zip(requests, serve().run(requests), strict=True):
        for completion in group:
            logits = logits_under(policy(0), sequence(what, completion))
            np.testing.assert_allclose(
                completion.rollout_logprobs, expected_logprobs(logits, what, completion), atol=1e-4
            )


def test_noise_does_not_depend_on_the_batch(serve: Callable[..., Served]) -> None:
    what = request(9, group_id="same", seed=5)
    others = [request(k, group_id=str(k), seed=k, n=k, max_tokens=3 * k) for k in range(1, 9)]
    [alone] = serve().run([what])
    crowded = serve().run([*others, what])[-1]
    late = serve(max_sequences=4).run([*others, what])[-1]
    for group in (crowded, late):
        assert [c.token_ids.tolist() for c in group] == [c.token_ids.tolist() for c in alone]
    assert len({tuple(c.token_ids) for c in alone}) == len(alone), "completions of a group differ"


def test_first_token_follows_the_model_distribution(serve: Callable[..., Served]) -> None:
    what = request(5, n=4000, max_tokens=1, seed=3)
    [group] = serve().run([what])
    probs = logits_under(policy(0), what.prompt_ids)[-1].double().softmax(-1).numpy()
    observed = np.bincount([c.token_ids[0] for c in group], minlength=VOCAB)
    common = probs * 4000 >= 5
    expected = np.append(probs[common], probs[~common].sum()) * 4000
    counts = np.append(observed[common], observed[~common].sum())
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), common.sum()
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


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


def test_min_version_waits_without_holding_up_others(serve: Callable[..., Served]) -> None:
    served = serve()
    demanding = request(5, group_id="demanding", min_version=2)
    waiting, other = served.together([demanding, request(5, group_id="other")], version=1)
    assert other.result(WAIT_S)[0].policy_versions[0][0] == 1
    assert not waiting.done()
    served.stage(2)
    assert {c.policy_versions[0][0] for c in waiting.result(WAIT_S)} == {2}


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


def test_a_request_that_can_never_run_is_refused_alone(serve: Callable[..., Served]) -> None:
    served = serve(max_model_len=32)
    served.stage(0)
    with pytest.raises(EngineError, match=r"13 prompt \+ 20 new tokens = 33 > 32"):
        served.engine.generate(request(13))
    with pytest.raises(EngineError, match="outside the vocabulary"):
        served.engine.generate(request([5, VOCAB]))
    with pytest.raises(EngineError, match="at least 1"):
        served.engine.generate(request([]))
    assert len(served.engine.generate(request(12))) == 4


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


def test_close_releases_running_and_waiting_requests(serve: Callable[..., Served]) -> None:
    served = serve(eos_token_ids=(), max_sequences=4, max_model_len=1024)
    reached = threading.Event()
    served.at_step[2] = reached.set
    futures = served.together([request(5, group_id=name, max_tokens=1000) for name in ("running", "waiting")])
    assert reached.wait(WAIT_S)
    served.engine.close()
    served.engine.close()
    for future in futures:
        with pytest.raises(EngineClosed):
            future.result(WAIT_S)
    with pytest.raises(EngineClosed):
        served.engine.generate(request(5))


def test_a_failed_step_costs_the_running_requests_only(serve: Callable[..., Served]) -> None:
    def explode() -> None:
        raise RuntimeError("out of memory, say")

    served = serve(max_sequences=4)
    served.at_step[3] = explode
    running, waiting = served.together([request(5, group_id="running"), request(6, group_id="waiting")])
    with pytest.raises(EngineError, match="out of memory, say") as caught:
        running.result(WAIT_S)
    assert isinstance(caught.value.__cause__, RuntimeError) and not isinstance(caught.value, EngineClosed)
    assert len(waiting.result(WAIT_S)) == 4
    assert "out of memory" in (served.engine.last_error or "")


def test_a_policy_of_nan_fails_its_requests_and_the_next_policy_serves(serve: Callable[..., Served]) -> None:
    served = serve()
    served.engine.stage(0, "nan", {name: torch.full_like(weight, torch.nan) for name, weight in policy(0).items()})
    with pytest.raises(EngineError, match="not finite"):
        served.engine.generate(request(5))
    served.stage(1)
    assert all(np.isfinite(c.rollout_logprobs).all() for c in served.engine.generate(request(5, min_version=1)))


def test_a_policy_that_does_not_fit_leaves_the_old_one_serving(serve: Callable[..., Served]) -> None:
    served = serve()
    served.stage(0)
    served.engine.generate(request(5))
    served.engine.stage(1, "bad", {"no.such.weight": torch.zeros(1)})
    eventually(lambda: served.engine.last_error is not None)
    assert "version 1" in (served.engine.last_error or "")
    assert (served.engine.version, served.engine.digest) == (0, "digest-0")
    assert served.engine.generate(request(5))[0].policy_versions[0][0] == 0


def test_an_idle_engine_shows_progress(serve: Callable[..., Served]) -> None:
    engine = serve().engine
    seen = engine.progress_at
    eventually(lambda: engine.progress_at > seen)
    assert engine.version == -1


def test_sliding_window_models_are_refused() -> None:
    model = build_model(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(ValueError, match="full-attention"):
        TorchEngine(model, eos_token_ids=EOS, max_sequences=4, max_model_len=64)
