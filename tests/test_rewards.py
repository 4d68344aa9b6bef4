"""The shipped rewards against every worked case of their definition, and the edges around it."""

from __future__ import annotations

from builders import for_each

from sluice.workers.rewards import MathReward, ThinkingReward

MATH_CASES = [
    # worked cases of the definition
    ("<answer>42</answer>", "42", 1.0),
    ("I counted 142 apples", "42", 0.1),
    ("<answer>42", "42", 0.1),
    ("<answer>41</answer> no, <answer>42</answer>", "42", 0.0),
    ("<answer>42 apples</answer>", "42", 0.0),
    ("<answer>1/2</answer>", "0.5", 0.0),
    ("<answer>nan</answer>", "nan", 0.0),
    ("<answer>inf</answer>", "inf", 0.0),
    ("<ANSWER>42</ANSWER>", "42", 0.1),
    # the number's decoration, on both sides
    ("<answer>$1,234</answer>", "1234", 1.0),
    ("<answer>1234</answer>", " $1,234.00\n", 1.0),
    ("<answer>\n  7 \n</answer>", "7", 1.0),
    ("<answer>1 000</answer>", "1000", 1.0),
    ("<answer>-3</answer>", "-3", 1.0),
    ("<answer>3</answer>", "-3", 0.0),
    ("<answer>1e3</answer>", "1000", 1.0),
    # tolerance: exclusive, absolute
    ("<answer>0.3333333</answer>", "0.33333335", 1.0),
    ("<answer>42.00001</answer>", "42", 0.0),
    # partial credit: the target's own text, outside of answers
    ("it is 42", "42.0", 0.1),
    ("it is -42", "42", 0.1),
    ("it is 3.5, <answer>9</answer>", "3.50", 0.1),
    ("it is 1,234", "1234", 0.0),
    ("42 <answer>41</answer>", "42", 0.1),
    ("<answer>4</answer>2", "42", 0.0),
    ("<answer></answer>", "42", 0.0),
    ("", "42", 0.0),
    ("nothing here", "42", 0.0),
    # not finite: never equal to anything
    ("inf, <answer>1</answer>", "inf", 0.0),
    ("nan", "nan", 0.0),
    ("<answer>nan</answer>", "42", 0.0),
    ("<answer>-inf</answer>", "-inf", 0.0),
    ("42 <answer>inf</answer>", "42", 0.1),
    # targets that are no number
    ("<answer>x</answer>", "x", 0.0),
    ("<answer></answer>", "", 0.0),
    ("None", None, 0.0),
    ("<answer>42</answer>", 42, 1.0),
]

THINKING_CASES = [
    ("<think>two and two</think>4", 1.0),
    ("<THINK>x</Think>", 1.0),
    ("< think >x< / think >", 1.0),
    ("<\tthink\n>x<\n/\tthink >", 1.0),
    ("<think>a\nb\n</think>", 1.0),
    ("<think></think>", 0.2),
    ("<think> \n\t</think>", 0.2),
    ("<think></think> again <think>x</think>", 1.0),
    ("<think>never closed", 0.2),
    ("only closed</think>", 0.2),
    ("</think>x<think>", 0.2),
    ("<thinking>x</thinking>", 0.0),
    ("think", 0.0),
    ("", 0.0),
]


@for_each(("response", "target", "expected"), MATH_CASES)
def test_math_reward_gives_the_defined_value(response: str, target: str, expected: float) -> None:
    assert MathReward()("How many?", response, target) == expected


@for_each(("response", "expected"), THINKING_CASES)
def test_thinking_reward_gives_the_defined_value(response: str, expected: float) -> None:
    assert ThinkingReward()("Why?", response, None) == expected
    assert ThinkingReward()("Why?", response) == expected


def test_rewards_are_configurable() -> None:
    assert MathReward(tolerance=0.5)("", "<answer>42.4</answer>", "42") == 1.0
    assert MathReward(partial_credit=0.0)("", "42", "42") == 0.0
    assert ThinkingReward(partial_reward=0.0)("", "<think>") == 0.0
    assert ThinkingReward(full_reward=2.0)("", "<think>x</think>") == 2.0
