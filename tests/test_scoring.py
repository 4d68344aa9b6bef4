"""Loading reward functions and scoring a group: ours and TRL's, sync and async, and every way they go wrong."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import for_each

from sluice.common.config import RewardFunction
from sluice.common.errors import ConfigError, RewardError
from sluice.common.serialization import decode, encode
from sluice.common.types import Scores
from sluice.workers.rewards.scoring import load_reward_functions, score_group

FUNCTIONS = """
import asyncio
from decimal import Decimal
from fractions import Fraction
import numpy as np

# Three functions as TRL's documentation writes them, unmodified.
def longer_ids(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

def matches_ground_truth(completions, ground_truth, **kwargs):
    return [1.0 if c == gt else 0.0 for c, gt in zip(completions, ground_truth)]

def content_length(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]

started = 0

async def _both_started():
    global started
    started += 1
    while started < 2:
        await asyncio.sleep(0.001)

async def first_async(prompts, completions, **kwargs):
    await _both_started()
    return [1.0 for _ in completions]

async def second_async(prompts, completions, **kwargs):
    await _both_started()
    return [3.0 for _ in completions]

async def async_per_sample(prompt, response, target):
    await asyncio.sleep(0)
    return float(response == target)

def runs_its_own_loop(completions, **kwargs):
    return asyncio.run(asyncio.sleep(0, [0.5 for _ in completions]))

seen = {}
def records(**kwargs):
    seen.update(kwargs)
    return [0.0 for _ in kwargs["completions"]]

def strict(prompts, completions):
    return [2.0, 2.0]

def only_short(completions, **kwargs):
    return [1.0 if len(c) < 3 else None for c in completions]

def never(prompts, completions, **kwargs):
    return [None] * len(completions)

def spoils(prompts, completions, answers, **kwargs):
    for prompt, answer in zip(prompts, answers):
        prompt.append("spoilt")
        answer.append("spoilt")
    return [float(len(prompt) + len(answer)) for prompt, answer in zip(prompts, answers)]

def lazily(completions, **kwargs):
    return (np.array([len(c)]) for c in completions)

def lazily_fails(completions, **kwargs):
    return (1 / 0 for c in completions)

def rows(completions, **kwargs):
    return [np.array([1, 2]), np.array([1, 2])]

def arrays(completions, **kwargs):
    return np.array([1, 2], dtype=np.float32)

def scalars(completions, **kwargs):
    return [np.float32(1.5), True]

def by_step(completions, trainer_state, **kwargs):
    return [float(trainer_state.global_step) for _ in completions]

def scaled(prompt, response, target, scale=1.0):
    return scale

def exits(prompt, response, target):
    raise SystemExit(0)

async def exits_async(completions, **kwargs):
    raise SystemExit(0)

def fails(prompt, response, target):
    raise ZeroDivisionError("no denominator")

async def fails_async(completions, **kwargs):
    raise ZeroDivisionError("no denominator")

# One client, semaphore or task for all groups, as a function that calls a service has it.
LIMIT = asyncio.Semaphore(2)
served = []

async def limited(completions, **kwargs):
    async def one(text):
        async with LIMIT:
            await asyncio.sleep(0.001)
            return float(len(text))
    served.append(asyncio.get_running_loop())
    return await asyncio.gather(*map(one, completions))

async def first_of_two_fails(prompt, response, target):
    if response == "4":
        raise ZeroDivisionError("no denominator")
    async with LIMIT:
        await asyncio.sleep(1000)

# TRL's newer hooks, and annealing.
def logs(completions, log_metric, log_extra, trainer_state, **kwargs):
    log_metric("mean_length", np.float32(sum(map(len, completions)) / len(completions)))
    log_extra("length", [len(text) for text in completions])
    log_extra("object", [object, 2**70])
    log_extra("odd", [float("nan"), "\\ud800"])
    return [trainer_state.global_step / trainer_state.max_steps for _ in completions]

async def logs_async(completions, log_metric, log_extra, **kwargs):
    for text in completions:
        log_metric("mean_length", 0)
        log_extra("kind", ["short"])
    return [0.0 for _ in completions]

def logs_too_few(completions, log_extra, **kwargs):
    log_extra("length", [1])
    return [0.0 for _ in completions]

def logs_an_evaluation(completions, log_metric, **kwargs):
    log_metric("eval/heldout/version", 1)
    return [0.0 for _ in completions]

def logs_a_line(completions, log_metric, **kwargs):
    log_metric("length\\x1b[2J\\n", 1)
    return [0.0 for _ in completions]

def logs_a_hidden_column(completions, log_extra, **kwargs):
    log_extra("", [1, 2])
    return [0.0 for _ in completions]

def exact(completions, **kwargs): return [Fraction(1, 4), Decimal("0.5")]
def signals(completions, **kwargs): return [Decimal("sNaN"), 1.0]
def by_position(completions, /, **kwargs): return [0.0 for _ in completions]
def huge(completions, **kwargs): return [1e39, 1.0]
def huge_int(completions, **kwargs): return [10**5000, 1.0]
def nearly_huge(completions, **kwargs): return [3e38, 1.0]
def too_few(completions, **kwargs): return [1.0]
def text(completions, **kwargs): return ["good", 1.0]
def not_a_number(completions, **kwargs): return [float("nan"), 1.0]
def infinite(completions, **kwargs): return [1.0, float("-inf")]
def a_number(completions, **kwargs): return 1.0
def foreign(a, b): return 0.0
constant = 3

class Uncallable:
    pass

class Brevity:
    def __init__(self, limit):
        self.limit = limit
    def __call__(self, prompt, response, target=None):
        return float(len(response) <= self.limit)

class AsyncBrevity(Brevity):
    async def __call__(self, completions, **kwargs):
        return [float(len(c) <= self.limit) for c in completions]
"""


@pytest.fixture
def rewards_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of reward functions in the working directory."""
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return "my_rewards.py"


def score(*functions: str | RewardFunction, file: str = "", aggregation: Any = "mean", **group: Any) -> Scores:
    entries = [f if isinstance(f, RewardFunction) else RewardFunction(function=f"{file}:{f}") for f in functions]
    defaults: dict[str, Any] = {
        "prompt": "2 + 2?",
        "completions": ["4", "five"],
        "completion_ids": [[7], [8, 9]],
        "target": "4",
        "columns": {"ground_truth": "4", "level": 3},
        "trainer_state": {"global_step": 12, "max_steps": 48},
    }
    return score_group(load_reward_functions(entries), aggregation=aggregation, **{**defaults, **group})


def globals_of(file: str) -> dict[str, Any]:
    """The module of a file of reward functions."""
    (reward,) = load_reward_functions([RewardFunction(function=f"{file}:strict")])
    assert isinstance(reward.function, functools.partial)
    return reward.function.func.__globals__


def test_shipped_rewards_score_a_group() -> None:
    scores = score(
        RewardFunction(function="sluice.workers.rewards.MathReward"),
        RewardFunction(function="sluice.workers.rewards:ThinkingReward", name="format"),
        completions=["<think>2+2</think><answer>4</answer>", "4"],
    )
    assert scores.by_function == {"MathReward": [1.0, 0.1], "format": [1.0, 0.0]}
    assert scores.reward == [1.0, 0.05]


SCORED: list[tuple[list[str], dict[str, Any], list[float | None]]] = [
    (["longer_ids", "matches_ground_truth"], {}, [1.0, 1.0]),  # written for TRL, unmodified
    (["strict"], {}, [2.0, 2.0]),  # no **kwargs: it gets only what it names
    (["first_async", "second_async"], {}, [2.0, 2.0]),  # each waits for the other to have started
    (["runs_its_own_loop", "async_per_sample", "strict"], {"aggregation": "sum"}, [3.5, 2.5]),
    (["only_short", "longer_ids"], {}, [1.0, 2.0]),  # (1 + 1) / 2, and 2 alone: None is left out of the mean
    (["never"], {}, [None, None]),  # a sample to which nothing applies is unscorable
    (["never", "only_short"], {"aggregation": "sum"}, [1.0, None]),
    (["arrays"], {}, [1.0, 2.0]),
    (["lazily"], {}, [1.0, 4.0]),
    (["scalars"], {}, [1.5, 1.0]),
    (["exact"], {}, [0.25, 0.5]),
    (["by_step"], {}, [12.0, 12.0]),
]


@for_each(("names", "settings", "expected"), SCORED)
def test_functions_of_every_kind_make_the_reward(
    rewards_py: str, names: list[str], settings: dict[str, Any], expected: list[float | None]
) -> None:
    scores = score(*names, file=rewards_py, **settings)
    assert scores.reward == expected
    assert list(scores.by_function) == names
    assert all(type(value) in (float, type(None)) for values in scores.by_function.values() for value in values)


def test_trl_functions_get_columns_as_lists(rewards_py: str) -> None:
    score("records", file=rewards_py, columns={"level": 3, "answer": "so it is #### 4", "prompt": "not a column"})
    seen = globals_of(rewards_py)["seen"]
    assert seen.pop("trainer_state").global_step == 12
    assert callable(seen.pop("log_metric")) and callable(seen.pop("log_extra"))
    assert seen == {
        "prompts": ["2 + 2?"] * 2,
        "completions": ["4", "five"],
        "completion_ids": [[7], [8, 9]],
        "level": [3, 3],
        "answer": ["so it is #### 4"] * 2,
        "target": ["4", "4"],
    }
    score("records", file=rewards_py, target=None, columns={"target": [1, 2]})
    assert seen["target"] == [[1, 2], [1, 2]], "the column, where no target was extracted"


def test_conversational_prompts_make_conversational_completions(rewards_py: str) -> None:
    messages = [{"role": "user", "content": "2 + 2?"}]
    scores = score("content_length", "records", file=rewards_py, prompt=messages)
    assert scores.by_function["content_length"] == [1.0, 4.0]
    seen = globals_of(rewards_py)["seen"]
    assert seen["prompts"] == [messages, messages]
    assert seen["completions"][1] == [{"role": "assistant", "content": "five"}]


def test_sum_is_weighted(rewards_py: str) -> None:
    entries = [
        RewardFunction(function=f"{rewards_py}:longer_ids", weight=0.5),
        RewardFunction(function=f"{rewards_py}:only_short", weight=-3.0),
    ]
    assert score(*entries, aggregation="sum").reward == [0.5 * 1 - 3.0 * 1, 0.5 * 2]


def test_a_function_that_changes_its_arguments_spoils_nothing(rewards_py: str) -> None:
    prompt, columns = [{"role": "user", "content": "?"}], {"answers": ["4"]}
    again = RewardFunction(function=f"{rewards_py}:spoils", name="again")
    scores = score("spoils", again, file=rewards_py, prompt=prompt, columns=columns)
    assert scores.by_function == {"spoils": [4.0, 4.0], "again": [4.0, 4.0]}
    assert (len(prompt), columns) == (1, {"answers": ["4"]})


def test_configured_kwargs_reach_classes_and_functions(rewards_py: str) -> None:
    entries = [
        RewardFunction(function=f"{rewards_py}:Brevity", kwargs={"limit": 1}),
        RewardFunction(function=f"{rewards_py}:AsyncBrevity", kwargs={"limit": 4}),
        RewardFunction(function=f"{rewards_py}:scaled", kwargs={"scale": 2.5}),
    ]
    expected = {"Brevity": [1.0, 0.0], "AsyncBrevity": [1.0, 1.0], "scaled": [2.5, 2.5]}
    assert score(*entries).by_function == expected
    entry = RewardFunction(function=f"{rewards_py}:matches_ground_truth", kwargs={"ground_truth": ["4", "five"]})
    assert score(entry, columns={"ground_truth": "x"}).reward == [1.0, 1.0], "they win over columns"


def test_modules_of_the_working_directory_are_importable(rewards_py: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert score(RewardFunction(function="my_rewards.strict")).reward == [2.0, 2.0]
    sys.modules.pop("my_rewards")
    assert globals_of(rewards_py) is globals_of(rewards_py), "a file is loaded once"


@for_each(
    ("name", "message"),
    [
        ("fails", "fails raised ZeroDivisionError: no denominator"),
        ("exits", r"exits raised SystemExit: 0 \(.*my_rewards.py:"),
        ("exits_async", r"exits_async raised SystemExit: 0 \(.*my_rewards.py:"),
        ("fails_async", "fails_async raised ZeroDivisionError: no denominator"),
        ("too_few", "too_few returned 1 rewards for 2 completions"),
        ("text", "text returned str 'good', which is neither"),
        ("not_a_number", "not_a_number returned nan"),
        ("lazily_fails", r"lazily_fails raised ZeroDivisionError: division by zero \(.*my_rewards.py:"),
        ("rows", "rows raised ValueError: can only convert"),
        ("infinite", "infinite returned -inf"),
        ("huge", r"huge returned 1e\+39: a reward is a float32, from -3.403e\+38 to 3.403e\+38"),
        ("huge_int", r"huge_int returned .*: a reward is a float32"),
        ("logs_too_few", r"log_extra\('length', ...\) was given 1 values for 2 completions"),
        (
            "logs_a_line",
            r"raised ValueError: log_metric\('length\\x1b\[2J\\n', ...\): a name is 1 to 200 printable characters in one line",
        ),
        ("logs_a_hidden_column", r"raised ValueError: log_extra\('', ...\): a name is"),
        ("signals", r"signals returned Decimal\('sNaN'\): a reward is a float32"),
        ("logs_an_evaluation", r"raised ValueError: log_metric\('eval/heldout/version'"),
        ("a_number", "a_number returned float 1.0, expected a list of 2"),
        ("spoils", r"spoils raised TypeError.*'answers'"),  # a column that the dataset lacks
    ],
)
def test_a_failing_function_is_an_error_and_never_a_score(rewards_py: str, name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        score("strict", name, file=rewards_py)
    assert ("raised" in message) == isinstance(caught.value.__cause__, (Exception, SystemExit))


def test_an_error_names_the_line_of_the_users_file(rewards_py: str) -> None:
    line = FUNCTIONS.splitlines().index("async def fails_async(completions, **kwargs):") + 2
    with pytest.raises(RewardError, match=rf"no denominator \(.*{rewards_py}:{line}\)"):
        score("fails_async", file=rewards_py)


def test_a_sum_beyond_float32_is_an_error_as_well(rewards_py: str) -> None:
    again = RewardFunction(function=f"{rewards_py}:nearly_huge", name="again")
    assert score("nearly_huge", file=rewards_py).reward == [3e38, 1.0]
    with pytest.raises(RewardError, match=r"the reward functions together returned 6e\+38"):
        score("nearly_huge", again, file=rewards_py, aggregation="sum")


def test_all_groups_of_a_process_share_one_event_loop(rewards_py: str) -> None:
    many = {"completions": ["x" * n for n in range(8)], "completion_ids": [[1]] * 8}
    for _ in range(3):  # a semaphore that has waited belongs to its loop
        assert score("limited", file=rewards_py, **many).reward == [float(n) for n in range(8)]
        score("runs_its_own_loop", file=rewards_py)
        with pytest.raises(RewardError, match="no denominator"):
            score("first_of_two_fails", file=rewards_py, completions=["4", "5", "6", "7"], completion_ids=[[1]] * 4)
    assert len(set(globals_of(rewards_py)["served"])) == 1


def test_what_functions_log_is_part_of_the_scores(rewards_py: str) -> None:
    scores = score("logs", "logs_async", file=rewards_py)
    assert scores.by_function["logs"] == [0.25, 0.25]
    assert scores.metrics == {"mean_length": (2.5, 3)}
    assert scores.extra == {
        "length": [1, 4],
        "object": ["<class 'object'>", str(2**70)],
        "odd": ["nan", "?"],
        "kind": ["short", "short"],
    }
    assert Scores(**decode(encode(scores.to_wire()))).extra == scores.extra


@for_each(
    ("function", "columns", "message"),
    [
        (
            "matches_ground_truth",
            ["ground_truths"],
            "takes ground_truth, but the columns are ground_truths: did you mean",
        ),
        ("strict", [], None),
        ("logs", [], None),
        ("async_per_sample", [], None),
        ("spoils", ["x"], "takes answers, but the columns are x: rename one of them"),
    ],
)
def test_a_column_that_a_function_needs_and_the_dataset_lacks_is_named(
    rewards_py: str, function: str, columns: list[str], message: str | None
) -> None:
    (reward,) = load_reward_functions([RewardFunction(function=f"{rewards_py}:{function}")])
    found = reward.missing(columns, has_target=True)
    assert found is None if message is None else message in str(found)


@for_each(
    ("function", "message"),
    [
        ("no_such_package.rewards.f", "importing no_such_package.rewards failed with ModuleNotFoundError"),
        ("sluice.workers.rewards.MathRewards", "has no 'MathRewards'; did you mean 'MathReward'"),
        ("workers.rewards.MathReward", r"did you mean 'sluice\.workers\.rewards\.MathReward'"),  # a former path of ours
        ("elsewhere.py:f", "there is no file .*elsewhere.py: relative paths start where the process runs"),
        ("broken.py:f", "importing broken.py failed with SyntaxError"),
        ("my_rewards.py:constant", "is of type int, not callable"),
        ("my_rewards.py:foreign", r"takes \(a, b\): name its parameters"),
        ("my_rewards.py:by_position", "takes parameters by position only.* remove the `/`"),
        ("my_rewards.py:Uncallable", r"its instances cannot be called: define __call__\(self, completions"),
        ("my_rewards.py:Brevity", "cannot be set up with kwargs {}: TypeError.*'limit'"),
        ("MathReward", r"is none of Sluice's rewards; did you mean 'math'\?"),
        ("my_rewards.py:", "names no function"),
    ],
)
def test_what_cannot_be_loaded_is_a_config_error(
    rewards_py: str, monkeypatch: pytest.MonkeyPatch, function: str, message: str
) -> None:
    Path("broken.py").write_text("def f(:\n")
    root = Path(__file__).parent.parent
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != root])  # as when installed
    with pytest.raises(ConfigError, match=message) as caught:
        load_reward_functions([RewardFunction(function=function)])
    assert "\n\n" not in str(caught.value)


def test_kwargs_and_names_that_do_not_fit_are_a_config_error(rewards_py: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be set up with kwargs {'weigth': 2}"):
        load_reward_functions([RewardFunction(function=f"{rewards_py}:scaled", kwargs={"weigth": 2})])
    with pytest.raises(ConfigError, match="names must differ, got strict, strict"):
        score("strict", "strict", file=rewards_py)
