"""A program's reward functions for other processes: as source with what they use; what no source stands for is refused."""

from __future__ import annotations

import functools
import linecache
import math
import runpy
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import for_each

from sluice.common.errors import ConfigError
from sluice.scripts.api.functions import find_reward, literal
from sluice.workers.rewards import MathReward

Cells = Callable[..., dict[str, Any]]


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cells]:
    """Runs cells as a notebook does: in one module `__main__`, and the text of each where `linecache` finds it."""
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    namespace = vars(main)
    names: list[str] = []

    def run(*texts: str) -> dict[str, Any]:
        for text in texts:
            text, name = textwrap.dedent(text), f"<ipython-input-{len(names)}>"
            linecache.cache[name] = len(text), None, text.splitlines(True), name
            names.append(name)
            exec(compile(text, name, "exec"), namespace)
        return namespace

    yield run
    for name in names:
        linecache.cache.pop(name, None)


def travelled(reward: object, folder: Path) -> Any:
    """What other processes load."""
    found = find_reward(reward, where="rewards[0]")
    (name,) = found.files
    (folder / name).write_text(found.files[name])
    module = runpy.run_path(str(folder / name))
    return module[found.path.rpartition(":")[2]]


def refused(reward: object) -> str:
    with pytest.raises(ConfigError) as caught:
        find_reward(reward, where="rewards[0]")
    assert str(caught.value).startswith("rewards[0]: ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_function_travels_with_imports_constants_helpers_and_their_own(cells: Cells, tmp_path: Path) -> None:
    made = cells(
        """
        import math, re
        import xml.etree.ElementTree
        import numpy as np
        from collections import Counter as Bag
        from math import sqrt
        """,
        """
        PATTERN = re.compile(r"<a>(.*?)</a>", re.DOTALL)
        WORDS, LIMITS, NOTHING = {"yes": 1, "no": (2.5, None)}, [1, math.inf], frozenset({"x"})
        """,
        '''
        class Scale:
            """Doubles."""
            factor = 2

            def of(self, value):
                return self.factor * value

        def deep(text: "Unknown") -> float:
            """Text
            of two lines"""
            return sqrt(len(text)) + len(Bag(text)) + len(NOTHING)  # a comment
        strip = lambda text: text.strip()
        also = deep
        ''',
        """
        def score(completions, scale=Scale(), **columns):
            found = [PATTERN.search(strip(text)) for text in completions]
            root = xml.etree.ElementTree.fromstring("<r/>").tag
            return [scale.of(also(m[1])) + WORDS["yes"] + float(np.exp(0)) + len(root) if m else LIMITS[0] for m in found]
        """,
    )
    completions = ["<a>abca</a>", " nothing "]
    expected = [2 * (2.0 + 3 + 1) + 1 + 1 + 1, 1]
    assert made["score"](completions) == expected
    loaded = travelled(made["score"], tmp_path)
    assert loaded(completions) == expected
    assert "# a comment" in next(tmp_path.glob("rewards_*.py")).read_text()


def test_names_have_the_values_that_they_have_now(cells: Cells, tmp_path: Path) -> None:
    made = cells("LIMIT = 1", "def f(completions, **k): return [LIMIT for _ in completions]", "LIMIT = 5")
    assert travelled(made["f"], tmp_path)(["x"]) == [5]


def test_a_class_a_decorated_function_an_async_one_and_a_closure_over_constants_travel(
    cells: Cells, tmp_path: Path
) -> None:
    made = cells(
        """
        import functools, dataclasses

        def doubled(function):
            @functools.wraps(function)
            def wrapper(*given, **more):
                return [2 * value for value in function(*given, **more)]
            return wrapper

        @dataclasses.dataclass
        class Config:
            weight: float = 3.0

        class Judge:
            def __init__(self, k=1):
                self.config = Config(k)
            def __call__(self, prompt, response, target):
                return self.config.weight

        @doubled
        def twice(completions, **k):
            return [1.0 for _ in completions]

        @functools.lru_cache
        def cached(prompt, response, target):
            return 7.0

        async def waits(prompt, response, target):
            return 1.0

        def make(weight):
            def weighted(completions, **k):
                return [weight * len(text) for text in completions]
            return weighted
        weighted = make(0.5)
        """
    )
    assert travelled(made["Judge"], tmp_path)(4)("", "", "") == 4
    assert travelled(made["twice"], tmp_path)(["x"]) == [2.0]
    assert travelled(made["cached"], tmp_path)("", "", "") == 7.0
    assert travelled(made["waits"], tmp_path).__name__ == "waits"
    assert travelled(made["weighted"], tmp_path)(["abcd"]) == [2.0]


def test_a_cell_that_is_run_again_counts_as_it_is_now(cells: Cells, tmp_path: Path) -> None:
    made = cells(
        "def helper(): return 1",
        "def f(completions, **k): return [helper()]",
        "def helper(): return 2",
        "class A:\n def g(self): return 1",
    )
    assert travelled(made["f"], tmp_path)(["x"]) == [2]


def test_what_lies_in_a_module_is_named_and_its_folder_is_that_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_reward(MathReward, where="r").path == "sluice.workers.rewards.math_reward:MathReward"
    (tmp_path / "judges_of_mine.py").write_text("def fair(completions, **k): return [1.0]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import judges_of_mine  # type: ignore[import-not-found]

    found = find_reward(judges_of_mine.fair, where="r")
    assert (found.path, found.files, found.folders) == ("judges_of_mine:fair", {}, {str(tmp_path.resolve())})
    del sys.modules["judges_of_mine"]


LIVE = """
import threading, functools
lock = threading.Lock()
class Judge:
    def __init__(self): self.seen = []
    def score(self, completions, **k): return [0.0]
    def __call__(self, prompt, response, target): return 0.0
def locked(completions, **k):
    with lock: return [0.0]
def around(thing):
    def inner(completions, **k): return [thing.x]
    return inner
def counting():
    count = 0
    def counted(completions, **k):
        nonlocal count
        count += 1
        return [count]
    return counted
def bad(function):
    def wrapper(completions, **k): return function(completions)
    return wrapper
@bad
def decorated(completions): return [0.0]
def helper_of_nothing(completions, **k): return [nowhere(completions)]
def f(completions, **k): return [0.0]
"""


def test_what_no_source_stands_for_is_refused_with_what_to_do(cells: Cells) -> None:
    made = cells(LIVE, "rewards = [lambda completions, **k: [0.0], 1]")
    for reward, *parts in (
        (
            made["locked"],
            "locked uses 'lock', an object of type _thread.lock",
            "make it inside the function",
            "__init__ of a class",
        ),
        (made["around"](object()), "uses 'thing', an object of type object"),
        (made["counting"](), "nonlocal", "write it as a class"),
        (made["decorated"], "functools.wraps"),
        (made["helper_of_nothing"], "uses 'nowhere', which is not defined"),
        (made["rewards"][0], "is a lambda inside of a statement", "`def name(...):`"),
        (made["Judge"]().score, "is a method of an object", "{'function': Class, 'kwargs': {...}}"),
        (made["Judge"](), "is an object", "{'function': Judge, 'kwargs': {...}}"),
        (functools.partial(made["f"], x=1), "is a partial", "{'function': f, 'kwargs': {...}}"),
        (math.sqrt, "is not written in Python", "call it from a function of yours"),
        (7, "is of type int, no reward", "'rewards.py:f'"),
    ):
        text = refused(reward)
        assert all(part in text for part in parts), text


def test_a_function_without_a_source_or_with_another_is_refused(cells: Cells) -> None:
    exec(compile("def typed(completions, **k): return [0.0]", "<stdin>", "exec"), made := {"__name__": "__main__"})
    assert "define it in a file, in IPython or in a notebook" in refused(made["typed"])
    changed = cells("def f(completions, **k): return [0.0]")["f"]
    text = "def f(completions, **k): return [1.0]\n"
    linecache.cache["<ipython-input-0>"] = len(text), None, [text], "<ipython-input-0>"
    assert "was changed" in refused(changed)


@for_each(
    "value",
    [
        1,
        -2.5,
        math.inf,
        "a'\n\"é",
        b"\0",
        None,
        True,
        (),
        (1,),
        [],
        {},
        set(),
        {1},
        frozenset(),
        {"a": [{"b": (1, 2)}]},
    ],
)
def test_a_constant_is_an_expression_of_the_same_value(value: Any) -> None:
    text = literal(value)
    assert text is not None
    assert eval(text) == value and type(eval(text)) is type(value)


def test_what_is_no_constant_has_no_expression() -> None:
    assert literal([object()]) is literal({"a": print}) is literal(object()) is None
