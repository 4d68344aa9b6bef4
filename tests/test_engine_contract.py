"""The engine contract, the same tests for every engine: a real tiny Qwen3 against plain forward passes of the same weights.

`torch` runs wherever the tests run; `vllm` where vLLM is importable: `scripts/test_vllm` makes such an environment (CPU build)
and runs this file in it. SLUICE_TEST_DEVICE and SLUICE_TEST_DTYPE run it on a GPU (`scripts/gpu_check`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from builders import for_each, make_config
from served import (
    DEVICE,
    DTYPE,
    EOS,
    MAX_MODEL_LEN,
    MAX_SEQUENCES,
    VOCAB,
    WAIT_S,
    Served,
    assert_close,
    assert_scored_by,
    eventually,
    expected_logprobs,
    logits_under,
    policy,
    request,
    sequence,
    tokens_of,
)

from sluice.common.errors import ConfigError, EngineClosed, EngineError
from sluice.common.types import Completion
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.vllm.core import check_config

ENGINES = ["torch", "vllm"] if find_spec("vllm") else ["torch"]
UNTIED = {"tied": False, "in_flight": "recompute"}
exact = pytest.mark.skipif(DTYPE != "float32", reason="in half precision the batch moves the last bits")


@pytest.fixture(params=ENGINES)
def served(request: pytest.FixtureRequest, serve: Callable[..., Served]) -> Served:
    return serve(request.param)


def test_completions_have_the_promised_shapes_lengths_and_reasons(served: Served) -> None:
    version = served.serve(0)
    requests = [request(size, group_id=str(size), n=size, seed=size, max_tokens=60) for size in (1, 2, 5, 40)]
    reasons = set()
    for what, group in zip(requests, served.run(*requests), strict=True):
        assert len(group) == what.sampling.n
        for completion in group:
            tokens = completion.token_ids
            assert tokens.dtype == np.int32 and completion.rollout_logprobs.dtype == np.float32
            assert tokens.shape == completion.rollout_logprobs.shape and 1 <= len(tokens) <= 60
            assert completion.policy_versions == ((version, len(tokens)),)
            assert (completion.finish_reason == "stop") == (tokens[-1] in EOS)
            assert not np.isin(tokens[:-1], EOS).any()
            assert completion.finish_reason == "stop" or len(tokens) == 60
            reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}
    assert (served.engine.version, served.engine.digest) == (version, f"digest-{version}-0")


@exact
def test_greedy_takes_the_likeliest_tokens_and_reports_temperature_one(served: Served) -> None:
    served.serve(0)
    requests = [request(size, group_id=str(size), n=2, temperature=0.0) for size in (1, 4, 9)]
    for what, group in zip(requests, served.run(*requests), strict=True):
        assert tokens_of(group)[0] == tokens_of(group)[1]
        logits = logits_under(policy(0), sequence(what, group[0]))
        assert logits[len(what.prompt_ids) - 1 : -1].argmax(-1).tolist() == group[0].token_ids.tolist()
        assert_scored_by(0, what, group)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("settings", [{}, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ENGINES)
def test_logprobs_equal_a_fresh_forward_pass_after_every_policy(
    serve: Callable[..., Served], name: str, settings: dict[str, Any], temperature: float
) -> None:
    served = serve(name, **settings)
    for seed in (2, 3):
        served.serve(seed)
        requests = [request(size, group_id=str(size), temperature=temperature) for size in (1, 8, 300)]
        for what, group in zip(requests, served.run(*requests), strict=True):
            assert_scored_by(policy(seed, tied=served.tied), what, group)


@pytest.mark.parametrize("cut", [{"top_p": 0.8}, {"top_k": 5}, {"top_k": 50, "top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_truncated_sampling_reports_the_distribution_that_was_sampled(served: Served, cut: dict[str, Any]) -> None:
    served.serve(0)
    what = request(6, n=8, temperature=0.9, **cut)
    [group] = served.run(what)
    num_renormalised = 0
    for completion in group:
        rows = (logits_under(policy(0), sequence(what, completion))[len(what.prompt_ids) - 1 : -1] / 0.9).log_softmax(
            -1
        )
        for row, token, logprob in zip(rows, completion.token_ids, completion.rollout_logprobs, strict=True):
            kept = _kept(row.exp().double(), **cut)
            assert kept[token] or DTYPE != "float32"
            expected = float(row[token]) - math.log(float(row.exp()[kept].sum()))
            assert logprob == pytest.approx(expected, abs=1e-3 if DTYPE == "float32" else 1.0)
            num_renormalised += abs(expected - float(row[token])) > 0.01
    assert num_renormalised > 20


def _kept(probs: torch.Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """[V] bool: the tokens that stay, by walking down from the likeliest."""
    kept, mass = torch.zeros(len(probs), dtype=torch.bool), 0.0
    values, order = probs.sort(descending=True)
    ranked = list(zip(order.tolist(), values.tolist(), strict=True))[: top_k or None]
    total = sum(value for _, value in ranked)
    for token, value in ranked:
        if mass >= top_p * total or value < min_p * ranked[0][1]:
            break
        kept[token], mass = True, mass + value
    return kept


@exact
def test_noise_depends_on_seed_and_place_only(served: Served) -> None:
    served.serve(0)
    what = request(9, group_id="same", seed=5)
    [alone] = served.run(what)
    others = [request(k, group_id=str(k), seed=k, n=k, max_tokens=3 * k, top_k=k // 2 * k) for k in range(1, 9)]
    crowded = served.run(*others, what)[-1]
    assert tokens_of(crowded) == tokens_of(alone), "also beside rows that cut their distribution"
    neighbours = served.run(*[request(9, group_id=str(seed), seed=seed) for seed in (5, 6, 7)])
    completions = [tuple(tokens) for group in neighbours for tokens in tokens_of(group)]
    assert len(set(completions)) == len(completions), "completions differ in a group, and between neighbouring seeds"


def test_first_token_follows_the_model_distribution(served: Served) -> None:
    """Also that noise differs between prompts' seeds: one stream for all would give a handful of tokens."""
    served.serve(0)
    prompt = request(5).prompt_ids.tolist()
    groups = served.run(*[request(prompt, group_id=str(seed), n=50, max_tokens=1, seed=seed) for seed in range(20)])
    tokens = [completion.token_ids[0] for group in groups for completion in group]
    probs = logits_under(policy(0), np.array(prompt, np.int32))[-1].double().softmax(-1).numpy()
    observed = np.bincount(tokens, minlength=VOCAB)
    common = probs * len(tokens) >= 5
    expected = np.append(probs[common], probs[~common].sum()) * len(tokens)
    counts = np.append(observed[common], observed[~common].sum())
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), common.sum()
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("settings", [{}, UNTIED], ids=["keep", "recompute"])
@pytest.mark.parametrize("name", ENGINES)
def test_a_policy_swapped_in_mid_generation_stamps_and_scores_every_token(
    serve: Callable[..., Served], name: str, settings: dict[str, Any]
) -> None:
    served = serve(name, **settings)
    before, stats = served.serve(4), served.engine.stats()
    older, newer = policy(4, tied=served.tied), policy(5, tied=served.tied)
    requests = [request(size, group_id=str(size), n=3, max_tokens=120) for size in (1, 20, 300)]
    with served.standing():
        futures = served.wait(*requests)
        served.advance_by_tokens(150)
        after = served.stage(5)
    num_swapped = 0
    for what, future in zip(requests, futures, strict=True):
        for completion in future.result(WAIT_S):
            tokens, counts = sequence(what, completion), dict(completion.policy_versions)
            assert list(counts) in ([before], [after], [before, after])
            assert sum(counts.values()) == len(completion.token_ids)
            old = counts.get(before, 0)
            first = expected_logprobs(logits_under(older, tokens), what, completion)[:old]
            cached = len(what.prompt_ids) + old - 1 if old and served.tied else 0  # recompute: nothing is left of it
            logits = logits_under(newer, tokens, old=older, split=cached)
            second = expected_logprobs(logits, what, completion)[old:]
            assert_close(completion.rollout_logprobs, np.concatenate([first, second]))
            num_swapped += len(counts) == 2
    assert num_swapped >= 5, "some end before, most see both policies"
    assert served.engine.stats().num_updates == stats.num_updates + 1
    assert 0 < served.engine.stats().last_pause_s < served.engine.stats().update_pause_s


@pytest.mark.parametrize("name", ENGINES)
def test_drain_finishes_running_rows_before_the_swap(serve: Callable[..., Served], name: str) -> None:
    served = serve(name, in_flight="drain")
    before = served.serve(4)
    with served.standing():
        running = served.wait(*[request(size, group_id=str(size), max_tokens=150) for size in (5, 3)])
        served.advance_by_tokens(20)
        after = served.stage(5)
        [late] = served.wait(request(4, group_id="late"))
    for future in running:
        assert {version for c in future.result(WAIT_S) for version, _ in c.policy_versions} == {before}
    assert {version for c in late.result(WAIT_S) for version, _ in c.policy_versions} == {after}
    assert_scored_by(5, request(4), late.result())


def test_no_cached_prefix_crosses_a_swap(served: Served) -> None:
    served.serve(6)
    what = request(300)
    assert_scored_by(6, what, served.run(what)[0])
    with served.standing():
        beside, again = _beside(served, 7, what)
    assert_scored_by(7, what, again.result(WAIT_S))
    beside.result(WAIT_S)


def _beside(served: Served, seed: int, what: GenerationRequest, **version: int) -> list[Future[list[Completion]]]:
    """A request that runs over the swap to that policy, so that there is no idle moment, and one that follows the swap."""
    [running] = served.wait(request(3, group_id="beside", n=1, max_tokens=120, min_tokens=120))
    served.advance_by_tokens(1)
    served.stage(seed, **version)
    [following] = served.wait(what)
    served.advance(lambda: served.engine.stats().waiting_requests == 0)
    assert served.engine.version == served.version
    assert not running.done()
    return [running, following]


def test_a_version_that_comes_back_does_not_find_what_another_computed_meanwhile(served: Served) -> None:
    first = served.serve(6)
    what = request(150, n=1, max_tokens=110, min_tokens=110)
    with served.standing():
        [grown] = served.wait(what)
        served.advance_by_tokens(2)
        newest = served.stage(7)  # computes the rest, in blocks that began under the first
    [completion] = grown.result(WAIT_S)
    again = request(sequence(what, completion).tolist(), n=1)
    with served.standing():
        beside, scored = _beside(served, 6, again, version=first)
    served.version = newest
    assert_scored_by(6, again, scored.result(WAIT_S))
    beside.result(WAIT_S)


def test_what_has_no_token_at_a_swap_begins_under_the_new_policy(served: Served) -> None:
    """More prompt tokens than one step computes: some requests are admitted, and still without a token when it swaps."""
    served.serve(6)
    what = request(400, n=1)
    served.run(what)
    requests = [request(401 - k, group_id=str(k), n=1, max_tokens=8) for k in range(1, 20)]
    with served.standing():
        futures = served.wait(*requests, what)
        served.advance(lambda: served.engine.stats().running_sequences > 0)
        after = served.stage(7)
    num_begun_after = 0
    for each, future in zip([*requests, what], futures, strict=True):
        [completion] = future.result(WAIT_S)
        if completion.policy_versions[0][0] == after:
            assert_scored_by(7, each, [completion])
            num_begun_after += 1
    assert num_begun_after > 0 or DEVICE != "cpu", "on a CPU they take more than one step"


def test_long_prompts_that_share_a_step_are_computed_right(served: Served) -> None:
    served.serve(0)
    requests = [request(380 + k, group_id=str(k), n=1, seed=k) for k in range(12)]
    for what, group in zip(requests, served.run(*requests), strict=True):
        assert_scored_by(0, what, group)


def test_min_version_waits_without_holding_up_others(served: Served) -> None:
    version = served.serve(0)
    waiting = served.submit(request(5, group_id="demanding", min_version=version + 1))
    eventually(lambda: served.engine.stats().waiting_requests == 1)
    assert served.run(request(5))[0][0].policy_versions[0][0] == version
    assert not waiting.done()
    served.serve(1)
    assert {c.policy_versions[0][0] for c in waiting.result(WAIT_S)} == {version + 1}


def test_a_pinned_request_holds_the_swap_until_it_is_done(served: Served) -> None:
    version = served.serve(0)
    with served.standing():
        pinned, other = served.wait(
            request(5, group_id="pinned", pinned_version=version, max_tokens=100),
            request(5, group_id="other", pinned_version=version + 7),
        )
        served.advance_by_tokens(8)
        after = served.stage(1)
    assert {span[0] for c in pinned.result(WAIT_S) for span in c.policy_versions} == {version}
    eventually(lambda: served.engine.version == after)
    late = served.submit(request(5, group_id="late", pinned_version=version))
    eventually(lambda: served.engine.stats().waiting_requests == 2)
    served.run(request(3))
    assert served.engine.stats().waiting_requests == 2, "one for an older version, one for a newer"
    served.serve(0, version=version)
    assert {span[0] for c in late.result(WAIT_S) for span in c.policy_versions} == {version}
    served.serve(1, version=version + 7)
    assert {span[0] for c in other.result(WAIT_S) for span in c.policy_versions} == {version + 7}


def test_a_request_that_can_never_run_is_refused_alone(served: Served) -> None:
    served.serve(0)
    for prompt, asked, problem in [
        (MAX_MODEL_LEN, {}, rf"{MAX_MODEL_LEN} prompt \+ 20 new tokens"),
        ([5, VOCAB], {}, "outside the vocabulary"),
        ([], {}, "at least 1"),
        (5, {"min_p": 1.5}, r"min_p must be in \[0, 1\], found 1.5"),
        (5, {"min_tokens": 21}, r"min_tokens must be in \[0, max_tokens=20\], found 21"),
        (5, {"stop": ("",)}, "stop must be texts that are not empty"),
        (5, {"top_p": 0.0}, "top_p must be"),
        (5, {"temperature": -1.0}, "temperature must be at least 0"),
    ]:
        with pytest.raises(EngineError, match=problem):
            served.engine.generate(request(prompt, **asked))
    empty, long = np.array([], np.int32), np.zeros(MAX_MODEL_LEN + 1, np.int32)
    for pair, problem in [
        ((empty, long), "empty"),
        ((long, empty), f"{len(long)} tokens"),
        ((long[:1] - 1, empty), "ids -1"),
    ]:
        with pytest.raises(EngineError, match=problem):
            served.engine.score([pair])
    assert len(served.engine.generate(request(MAX_MODEL_LEN - 20))) == 4


def test_more_sequences_than_fit_wait_their_turn(served: Served) -> None:
    served.serve(0)
    requests = [request(5, group_id=str(k), n=n, seed=k) for k, n in enumerate([10, 10, MAX_SEQUENCES + 3, 2, 10])]
    for what, group in zip(requests, served.run(*requests), strict=True):
        assert len(group) == what.sampling.n
        assert_scored_by(0, what, group[:2])


def test_higher_priority_goes_first_among_those_that_wait(served: Served) -> None:
    served.serve(0)
    served.admitted.clear()
    with served.standing():
        [blocker] = served.wait(request(5, group_id="blocker", n=MAX_SEQUENCES, max_tokens=60))
        served.advance(lambda: served.engine.stats().running_sequences > 0)
        priorities = {"low": 0, "lower": -1, "high": 1}
        futures = served.wait(
            *[request(5, group_id=k, n=MAX_SEQUENCES, max_tokens=3, priority=p) for k, p in priorities.items()]
        )
    for future in [blocker, *futures]:
        future.result(WAIT_S)
    assert served.admitted == ["blocker", "high", "low", "lower"]


def test_cancel_removes_one_group_and_leaves_the_others(served: Served) -> None:
    served.serve(0)
    requests = [request(5, group_id=name, n=8, max_tokens=60) for name in ("running", "stays", "waiting")]
    with served.standing():
        futures = served.wait(*requests)
        served.advance_by_tokens(16)
        for name in ("running", "waiting", "unknown"):
            served.engine.cancel(name)
        served.advance_by_passes(1)
        assert 0 < served.engine.stats().running_sequences <= 8, "its sequences left at once"
    for future in (futures[0], futures[2]):
        with pytest.raises(EngineClosed, match="cancelled"):
            future.result(WAIT_S)
    assert_scored_by(0, requests[1], futures[1].result(WAIT_S))
    eventually(lambda: served.engine.stats().running_sequences == 0)


@pytest.mark.parametrize("min_tokens", [9, 60])
def test_a_stop_text_ends_a_completion_and_belongs_to_it(served: Served, min_tokens: int) -> None:
    served.serve(0)
    [[free]] = served.run(request(5, n=1, max_tokens=60, min_tokens=min_tokens))
    tokens = free.token_ids.tolist()
    end = next(place for place in range(10, len(tokens)) if tokens[place] not in tokens[:place])
    stop = ("".join(chr(0x4E00 + token) for token in tokens[end - 1 : end + 1]),)
    what = request(5, n=1, max_tokens=60, min_tokens=min_tokens, stop=stop)
    beside = request(5, n=1, max_tokens=end + 1, min_tokens=min(min_tokens, end + 1))
    with served.standing():
        futures = served.wait(what, beside)
    [stopped], [ended] = (future.result(WAIT_S) for future in futures)
    assert ended.token_ids.tolist() == tokens[: end + 1], "another that ends in the same step, by its length"
    is_early = end < min_tokens
    assert stopped.token_ids.tolist() == (tokens if is_early else tokens[: end + 1])
    assert stopped.finish_reason == ("length" if is_early else "stop")
    assert_scored_by(0, what, [stopped])


def test_min_tokens_keeps_the_ends_away_and_out_of_the_distribution(served: Served) -> None:
    served.serve(0)
    asked = [request(5, group_id=str(t), n=8, max_tokens=40, min_tokens=40, temperature=t) for t in (1.0, 0.0)]
    for what, group in zip(asked, served.run(*asked), strict=True):
        assert {len(completion.token_ids) for completion in group} == {40}
        assert not any(np.isin(completion.token_ids[:39], EOS).any() for completion in group)
        assert_scored_by(0, what, group)


def test_score_is_a_fresh_forward_of_the_served_policy_while_others_run(served: Served) -> None:
    served.serve(2)
    what = request(300, n=2)
    [group] = served.run(what)
    sequences = [(what.prompt_ids, completion.token_ids) for completion in group]
    with served.standing():
        [running] = served.wait(request(3, group_id="running", n=MAX_SEQUENCES, max_tokens=80, min_tokens=80))
        served.advance_by_tokens(16)
        version = served.stage(3)
        served.advance(lambda: served.engine.version == version)
        scoring = served.threads.submit(served.engine.score, sequences)
        eventually(lambda: len(served.engine._scoring) == 1)
        served.advance_by_passes(20)
        scored_by, logprobs = scoring.result(WAIT_S)
        assert not running.done(), "scoring goes first"
    assert scored_by == version
    for completion, scored in zip(group, logprobs, strict=True):
        assert scored.dtype == np.float32
        assert_close(scored, expected_logprobs(logits_under(policy(3), sequence(what, completion)), what, completion))
    running.result(WAIT_S)
    full = request(MAX_MODEL_LEN - 20, n=1, min_tokens=20)
    [[completion]] = served.run(full)
    _, [scored] = served.engine.score([(full.prompt_ids, completion.token_ids)])
    assert len(scored) == 20
    assert served.engine.score([]) == (version, [])


def test_a_policy_of_nan_fails_its_requests_and_the_next_policy_serves(served: Served) -> None:
    served.serve(0)
    broken = {name: torch.full_like(weight, torch.nan) for name, weight in policy(0).items()}
    served.version += 1
    served.engine.stage(served.version, "nan", broken)
    with pytest.raises(EngineError, match="not finite"):
        served.engine.generate(request(5, min_version=served.version))
    served.serve(1)
    assert_scored_by(1, request(5), served.run(request(5))[0])


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_policy_that_does_not_fit_leaves_the_old_one_serving(served: Served, damage: str) -> None:
    version = served.serve(0)
    name = "model.norm.weight"
    wrong = {**policy(1), name: torch.zeros(7)} if damage == "shape" else {name: policy(1)[name]}
    served.engine.stage(version + 1, "bad", wrong)
    eventually(lambda: (served.engine.refused or (-1, ""))[0] == version + 1)
    assert (served.engine.version, served.engine.digest) == (version, f"digest-{version}-0")
    assert_scored_by(0, request(5), served.run(request(5))[0])


def test_an_idle_engine_shows_progress(served: Served) -> None:
    served.serve(0)
    seen = served.engine.progress_at
    eventually(lambda: served.engine.progress_at > seen)


@for_each(
    ("section", "said"),
    [
        ({"sampling": {"temperature": 2.5}}, "vLLM samples at 0.01 to 2.0"),
        ({"rollout": {"device": "cuda:1"}}, "CUDA_VISIBLE_DEVICES=1"),
    ],
)
def test_vllm_is_refused_before_it_loads_what_it_cannot_do(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_config(make_config(**section))


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_whose_step_fails_costs_the_running_requests_only(
    serve: Callable[..., Served], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The torch engine goes on; vLLM is dead: what waited is handed back, and the process is told to end itself."""
    served = serve(name, in_flight="drain")
    served.serve(0)

    def explode(*_: Any, **__: Any) -> Any:
        monkeypatch.undo()  # for one step only: what waits is admitted to the next one at once
        raise RuntimeError("out of memory, say")

    with served.standing():
        [running] = served.wait(request(5, group_id="running", n=MAX_SEQUENCES, max_tokens=300, min_tokens=300))
        served.advance_by_tokens(16)
        [waiting] = served.wait(request(5, group_id="waiting"))
        if name == "torch":
            monkeypatch.setattr(served.engine._model, "forward", explode)
        else:
            served.engine._core._engine.model_executor.execute_model = explode
    with pytest.raises(EngineError, match="out of memory, say") as caught:
        running.result(WAIT_S)
    assert isinstance(caught.value.__cause__, RuntimeError) and not isinstance(caught.value, EngineClosed)
    if name == "torch":
        assert len(waiting.result(WAIT_S)) == 4
        return
    with pytest.raises(EngineClosed, match="out of memory"):
        waiting.result(WAIT_S)
    assert served.engine.progress_at == -math.inf
    held = served.submit(request(5, group_id="held"))
    served.engine.close()
    with pytest.raises(EngineClosed, match="out of memory"):
        held.result(WAIT_S)


@pytest.mark.parametrize("name", ENGINES)
def test_close_releases_running_and_waiting_requests(name: str) -> None:
    """The last test: closing one vLLM engine takes the process groups of every other in this process."""
    served = Served(name)
    assert served.engine.version == -1
    with pytest.raises(EngineError, match="no policy"):
        served.engine.score([])
    waiting = served.submit(request(5, group_id="early", n=1, max_tokens=3))
    served.serve(0)
    assert waiting.result(WAIT_S), "it waited for the first policy"
    with served.standing():
        requests = [request(5, group_id=n, n=MAX_SEQUENCES, max_tokens=400) for n in ("running", "waiting")]
        futures = served.wait(*requests)
        served.advance_by_tokens(16)
        served.engine.close()
    served.close()
    for future in futures:
        with pytest.raises(EngineClosed):
            future.result(WAIT_S)
    with pytest.raises(EngineClosed):
        served.engine.generate(request(5))
    with pytest.raises(EngineClosed):
        served.engine.score([])
