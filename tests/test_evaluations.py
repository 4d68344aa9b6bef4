"""Evaluations: estimators against brute force, the vote, and what the reward role keeps of each completion."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from statistics import fmean

import pytest
import redis
from builders import (
    evaluated_payload,
    for_each,
    make_completion,
    make_config,
    make_ledger,
    publish_policy,
    rollout_payload,
    task_payload,
)
from consistency import assert_consistent

from sluice.common.config import EvalDataset
from sluice.common.config.evaluation import DEFAULT_ANSWER
from sluice.common.connections.broker import make_app
from sluice.common.errors import ConfigError
from sluice.common.keys import Keys
from sluice.common.ledger import evaluations as evaluation
from sluice.common.ledger.ledger import Ledger
from sluice.common.ledger.scripts import Scripts
from sluice.common.run import create_run
from sluice.common.serialization import decode, encode
from sluice.dashboard.evaluations import describe
from sluice.scripts.launcher.preflight import preflight
from sluice.trainer.control_state import ControlReader
from sluice.trainer.evaluations import Evaluations
from sluice.workers.context import Context
from sluice.workers.reward import RewardRole
from sluice.workers.rewards.answers import read_answer
from sluice.workers.rewards.loading import load_reward_functions


@for_each("n", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
    for correct, k in itertools.product(itertools.product([False, True], repeat=n), range(1, n + 1)):
        subsets = list(itertools.combinations(correct, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert evaluation.pass_at_k(list(correct), k=k) == pytest.approx(expected)


@for_each("n", range(6))
def test_the_vote_is_what_drawing_among_the_most_frequent_answers_gives_on_average(n):
    """Who gives no answer does not vote; the reward may look at more than the answer."""
    for answers in itertools.product([None, "1", "2", "3"], repeat=n):
        for correct in itertools.product([False, True], repeat=n):
            counts = {a: answers.count(a) for a in answers if a is not None}
            winners = [a for a in counts if counts[a] == max(counts.values())]
            draws = [fmean(c for a, c in zip(answers, correct, strict=True) if a == winner) for winner in winners]
            assert evaluation.majority_vote(answers, correct) == pytest.approx(fmean(draws) if draws else 0.0)


@for_each(
    ("text", "pattern", "expected"),
    [
        ("so <answer>42</answer>", DEFAULT_ANSWER, "42.0"),
        ("<answer> $1,042.00\n</answer>", DEFAULT_ANSWER, "1042.0"),
        ("<answer>-0</answer>", DEFAULT_ANSWER, "0.0"),
        ("<answer>1</answer> <answer>2</answer>", DEFAULT_ANSWER, "1.0"),  # the first, as MathReward
        ("<answer>to\n  the left </answer>", DEFAULT_ANSWER, "to the left"),
        ("<answer>  </answer>", DEFAULT_ANSWER, None),
        ("<answer>42", DEFAULT_ANSWER, None),
        ("\\boxed{1} then \\boxed{2/3}", r"(?s).*\\boxed\{([^{}]*)\}", "2/3"),  # the last
        ("yes", r"no|maybe (.)", None),
        ("no", r"no|maybe (.)", None),
    ],
)
def test_equal_answers_are_equal_text(text, pattern, expected):
    assert read_answer(text, pattern) == expected


def test_a_long_answer_is_kept_as_a_digest_that_votes_as_it_does():
    long = "left " * 1000
    first, same, other = (read_answer(f"<answer>{text}</answer>", DEFAULT_ANSWER) for text in (long, long, long + "x"))
    assert first == same != other
    assert first is not None and len(first) < 50


SET = {"name": "sums", "dataset": {"path": "x"}, "num_samples": 4, "pass_at": [1, 2, 4], "function": "MathReward"}


@pytest.fixture
def role(
    client: redis.Redis, keys: Keys, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RewardRole:
    """The reward role of a run with one evaluation set."""
    monkeypatch.setenv("SLUICE_REDIS_URL", redis_url)
    monkeypatch.setenv("SLUICE_RUN", keys.run)
    config = make_config(evaluation={"datasets": [SET], "every_steps": 5})
    create_run(client, keys.run, config, assets={}, folder=str(tmp_path))
    publish_policy(client, keys, 0)
    return RewardRole(
        Context.open(make_app(keys.run, url=redis_url), "reward"), load_reward_functions(config.reward.functions)
    )


def completions(*texts: str, finish_reason: str = "stop", length: int = 3) -> bytes:
    made = [make_completion(length=length).to_wire() for _ in texts]
    wires = [{**c, "text": text, "finish_reason": finish_reason} for c, text in zip(made, texts, strict=True)]
    return encode({"completions": wires, "worker": "w"})


def test_a_result_is_made_of_what_the_reward_role_stored(role: RewardRole) -> None:
    client, run = role.context.client, role.context.run
    ledger = make_ledger(client, run.keys, lease={"max_attempts": 1})
    right, wrong, none = "<answer>2</answer>", "<answer>3</answer>", "two"  # the target is 2
    payloads = {
        "0g": completions(right),
        "1g": completions(wrong, finish_reason="length", length=8),
        "2g": completions("<answer>2.0</answer>", length=4),
        "0s": completions("<answer>2.00</answer>", right, wrong, none),
        "1s": completions(right, wrong, none, none),
        "2s": completions(none, none, none, none),
    }
    dataset = run.config.evaluation.datasets[0]
    evaluation.request(client, run.keys, dataset, version=0)
    tasks = {f"e0.sums.{name}": task_payload(name) for name in [*payloads, "3g", "3s"]}
    ledger.admit_eval("0.sums", dataset="sums", version=0, tasks=tasks)
    for name, payload in payloads.items():
        assert ledger.store(f"e0.sums.{name}", "rollout", payload, version=0) == ["reward"]
        role.score(f"e0.sums.{name}")
    assert evaluation.read_all(client, run) == [], "two groups are missing"
    for name in ("3g", "3s"):
        ledger.fail(ledger.claim(f"e0.sums.{name}", "rollout", fields=()), reason="EngineError", detail="x")
    assert evaluation.unreported(client, run) == {("sums", 0)}
    evaluation.mark_reported(client, run.keys, dataset="sums", version=0)
    assert evaluation.unreported(client, run) == set()
    (entry,) = evaluation.read_all(client, run)
    stderr = {name: entry.pop(name) for name in list(entry) if name.endswith("_stderr")}
    expected = {
        "dataset": "sums",
        "version": 0,
        "step": 0,
        "pass@1": 2 / 3,
        "sampled_pass@1": (2 / 4 + 1 / 4 + 0) / 3,
        "pass@2": ((1 - 1 / 6) + (1 - 3 / 6) + 0) / 3,  # C(2,2)/C(4,2), C(3,2)/C(4,2)
        "pass@4": 2 / 3,
        "maj@4": (1 + 0.5 + 0) / 3,  # two to one, one to one, no votes
        "mean_length": (3 + 8 + 4) / 3,
        "clipped_ratio": 1 / 3,
        "logged": {},
        "num_prompts": 3,
        "num_dead": 1,  # the fourth prompt is in no mean
        "num_asked": 4,
        "best": False,
    }
    assert entry == {name: pytest.approx(v) if isinstance(v, float) else v for name, v in expected.items()}
    # 1, 0, 1: s^2 = (1/9 + 4/9 + 1/9) / 2 = 1/3, divided by 3 prompts. 1/2, 1/4, 0: s = 1/4
    assert stderr["pass@1_stderr"] == pytest.approx(math.sqrt(1 / 9))
    assert stderr["sampled_pass@1_stderr"] == pytest.approx(0.25 / math.sqrt(3))
    assert list(stderr) == [f"{name}_stderr" for name in dataset.scores]
    assert describe({**entry, **stderr}) == (
        "eval sums at step 0:  pass@1 0.667±0.333  sampled_pass@1 0.250±0.144  pass@2 0.444±0.242  pass@4 0.667±0.333  "
        "maj@4 0.500±0.289  length 5.0  clipped 0.333  dead 1 of 4"
    )
    counters = ledger.counters("eval")
    assert (counters.scored, counters.dead, counters.holds) == (6, {"EngineError": 2}, True)
    assert client.zcard(run.keys.versions) == 0, "nothing is in the buffer"


PLAIN = EvalDataset.model_validate({"dataset": {"path": "x"}, "num_samples": 2})


def scored_evaluation(
    client: redis.Redis, keys: Keys, *, num_prompts: int, dead: frozenset[str] = frozenset()
) -> Ledger:
    """Version 0 on PLAIN: the greedy completion of every second prompt is right; the groups named die."""
    publish_policy(client, keys, 0)
    ledger = make_ledger(client, keys, lease={"max_attempts": 1})
    evaluation.request(client, keys, PLAIN, version=0)
    groups = [f"e0.heldout.{i}{mode}" for i in range(num_prompts) for mode in "gs"]
    tasks = {group: task_payload(group) for group in groups}
    ledger.admit_eval("0.heldout", dataset="heldout", version=0, tasks=tasks)
    for i, group in enumerate(groups):
        if group in dead:
            claim = ledger.claim(group, "rollout", fields=())
            assert claim is not None
            ledger.fail(claim, reason="EngineError", detail="x")
        else:
            score(ledger, group, *([float(i % 4 == 0)] if group.endswith("g") else [1.0, 0.0]))
    return ledger


def score(ledger: Ledger, group: str, *rewards: float) -> None:
    ledger.store(group, "rollout", rollout_payload(), version=0)
    ledger.store(group, "reward", evaluated_payload(rewards=rewards))


def test_what_is_kept_of_a_finished_evaluation_does_not_grow_with_its_prompts(client: redis.Redis, keys: Keys) -> None:
    ledger = scored_evaluation(client, keys, num_prompts=30)
    before = client.hlen(keys.evaluation("0.heldout"))
    first = evaluation.result(client, keys, PLAIN, version=0)
    assert before > 100
    assert {field.decode() for field in client.hkeys(keys.evaluation("0.heldout"))} == {
        "dataset", "version", "total", "done", "summary",
    }  # fmt: skip
    assert client.hstrlen(keys.evaluation("0.heldout"), "summary") < 200
    assert first is not None and first.scores["pass@1"] == 0.5 and first.num_asked == 30
    assert evaluation.result(client, keys, PLAIN, version=0) == first
    late = {"e0.heldout.0g": task_payload("x")}
    assert ledger.admit_eval("0.heldout", dataset="heldout", version=0, tasks=late) == [], "the message came once more"
    assert_consistent(client, keys)


def test_a_dead_group_that_is_sent_again_after_its_evaluation_was_folded_still_counts(
    client: redis.Redis, keys: Keys
) -> None:
    dead = "e0.heldout.0g"
    ledger = scored_evaluation(client, keys, num_prompts=3, dead=frozenset([dead]))
    before = evaluation.result(client, keys, PLAIN, version=0)
    assert before is not None
    assert (before.num_prompts, before.num_dead, before.scores["pass@1"]) == (2, 1, 0.5)
    assert ledger.requeue(dead) == ["rollout"]
    assert evaluation.result(client, keys, PLAIN, version=0) is None, "its groups are not all in"
    assert evaluation.pending(client, keys) == ["0.heldout"], "so its version is kept"
    score(ledger, dead, 1.0)
    whole = evaluation.result(client, keys, PLAIN, version=0)
    assert whole is not None
    assert (whole.num_prompts, whole.num_dead, whole.scores["pass@1"]) == (3, 0, pytest.approx(2 / 3))
    assert whole == evaluation.result(client, keys, PLAIN, version=0)
    assert evaluation.pending(client, keys) == []
    assert_consistent(client, keys)


def test_two_readers_that_fold_at_once_lose_no_result(client: redis.Redis, keys: Keys) -> None:
    """One has read before a group was sent again, and writes after the other has folded that as well."""
    scored_evaluation(client, keys, num_prompts=2)
    assert evaluation.result(client, keys, PLAIN, version=0) is not None
    summary = client.hget(keys.evaluation("0.heldout"), "summary")
    assert Scripts(client, keys)("fold_eval", "0.heldout", b"", b"older") == 0
    assert client.hget(keys.evaluation("0.heldout"), "summary") == summary


def test_a_prompt_of_which_one_group_died_is_counted_once(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    config = make_config(evaluation={"datasets": [PLAIN.model_dump(exclude_unset=True)]})
    run = create_run(client, keys.run, config, assets={}, folder=str(tmp_path))
    scored_evaluation(client, keys, num_prompts=4, dead=frozenset(["e0.heldout.1s"]))
    (entry,) = evaluation.read_all(client, run)
    assert (entry["num_prompts"], entry["pass@1"], entry["sampled_pass@1"]) == (4, 0.5, 0.5)
    assert describe(entry).endswith("dead 1 of 4")


LOGGING = """
def logged(completions, log_metric, **kwargs):
    log_metric("characters", sum(map(len, completions)) / len(completions))
    log_metric("pass@1", 77.0)
    log_metric("version", 77.0)
    return [1.0] * len(completions)
"""


def test_what_a_reward_logs_in_an_evaluation_is_a_metric_of_the_set(
    client: redis.Redis, keys: Keys, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over the greedy completions, before and after the groups are folded into a summary; it displaces no score."""
    monkeypatch.setenv("SLUICE_REDIS_URL", redis_url)
    monkeypatch.setenv("SLUICE_RUN", keys.run)
    (tmp_path / "rewards.py").write_text(LOGGING)
    functions = [{"function": f"{tmp_path / 'rewards.py'}:logged"}]
    dataset = {"name": "sums", "dataset": {"path": "x"}, "num_samples": 2}
    config = make_config(reward={"functions": functions}, evaluation={"datasets": [dataset]})
    run = create_run(client, keys.run, config, assets={}, folder=str(tmp_path))
    publish_policy(client, keys, 0)
    context = Context.open(make_app(keys.run, url=redis_url), "reward")
    role = RewardRole(context, load_reward_functions(config.reward.functions))
    ledger = make_ledger(client, keys)
    evaluation.request(client, keys, config.evaluation.datasets[0], version=0)
    texts = {"0g": ["four"], "1g": ["eleven char"], "0s": ["", ""], "1s": ["", ""]}
    tasks = {f"e0.sums.{name}": task_payload(name) for name in texts}
    ledger.admit_eval("0.sums", dataset="sums", version=0, tasks=tasks)
    for name, completed in texts.items():
        ledger.store(f"e0.sums.{name}", "rollout", completions(*completed), version=0)
        role.score(f"e0.sums.{name}")
    seen = Evaluations(client, run, ControlReader(client, run), retry_while_disk_full=lambda write: write())
    for _ in range(2):  # the second time from the summary
        (entry,) = evaluation.read_all(client, run)
        assert entry["logged"] == {"characters": (4 + 11) / 2, "pass@1": 77.0, "version": 77.0}
        assert (entry["pass@1"], entry["version"]) == (1.0, 0)
        assert describe(entry).endswith("characters 7.5  pass@1 77  version 77")
    metrics = seen.metrics()
    shown = ("characters", "pass@1", "version", "mean_length")
    assert [metrics[f"eval/sums/{name}"] for name in shown] == [7.5, 1.0, 0.0, 3.0]


def test_a_policy_that_is_published_again_is_not_evaluated_again(
    client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    config = make_config(evaluation={"datasets": [{"dataset": {"path": "x"}}], "every_steps": 5})
    run = create_run(client, keys.run, config, assets={}, folder=str(tmp_path))
    for version, parent, step, digest in ((0, -1, 0, "a"), (1, 0, 5, "b"), (2, 1, 5, "b"), (3, 2, 5, "c")):
        client.hset(keys.lineage, str(version), f"{parent}:{step}:{digest}")
    seen = Evaluations(client, run, ControlReader(client, run), retry_while_disk_full=lambda write: write())
    datasets = run.config.evaluation.datasets
    assert seen.begin(5, 1, same_as=None) == datasets
    evaluation.request(client, keys, datasets[0], version=1)
    assert seen.begin(5, 3, same_as=1) == seen.begin(5, 3, same_as=2) == (), "2 is 1, under another version"
    assert seen.begin(5, 4, same_as=3) == datasets, "3 was made at the same step, and differs"
    assert seen.begin(6, 5, same_as=None) == (), "not due"
    assert seen.unreported == {("heldout", 1), ("heldout", 4)}


def test_a_training_group_carries_its_scores_only(role: RewardRole) -> None:
    ledger = make_ledger(role.context.client, role.context.run.keys)
    (cursor,) = ledger.admit(1).cursors
    ledger.store(f"t{cursor}", "task", task_payload(f"t{cursor}"))
    ledger.store(f"t{cursor}", "rollout", rollout_payload(), version=0)
    role.score(f"t{cursor}")
    stored = role.context.client.hget(role.context.run.keys.group(f"t{cursor}"), "reward")
    assert set(decode(stored)) == {"reward", "by_function"}


@for_each(
    ("settings", "scores"),
    [
        ({}, ("pass@1",)),
        ({"num_samples": 1}, ("pass@1", "sampled_pass@1")),
        ({"num_samples": 8}, ("pass@1", "sampled_pass@1", "pass@8", "maj@8")),
        ({"num_samples": 8, "pass_at": [2, 4]}, ("pass@1", "pass@2", "pass@4", "maj@8")),
    ],
)
def test_scores_follow_from_the_samples(settings, scores):
    assert EvalDataset.model_validate({"dataset": {"path": "x"}, **settings}).scores == scores


def test_a_set_judged_by_a_reward_that_the_run_has_not_is_refused_before_it_starts():
    judged = {"dataset": {"path": "x"}, "function": "ThinkingReward"}
    with pytest.raises(
        ConfigError, match=r"function = 'ThinkingReward' is not a reward function.*use one of MathReward"
    ):
        preflight(make_config(evaluation={"datasets": [judged]}))
