"""Run a module as `python -m` does, and SIGKILL the process at an exact place.

python tests/kill_at.py sluice.trainer.checkpoint:fsync before 2 sluice.trainer        # before the second call of fsync
python tests/kill_at.py sluice.trainer.trained_policy:TrainedPolicy.optimize after 3 sluice.trainer
"""

from __future__ import annotations

import functools
import os
import runpy
import signal
import sys
from importlib import import_module
from typing import Any


def kill_at(place: str, *, when: str, nth: int) -> None:
    """Wrap `module:name` or `module:Class.name` so that its nth call is the process' last."""
    module_name, _, path = place.partition(":")
    *parents, name = path.split(".")
    owner: Any = functools.reduce(getattr, parents, import_module(module_name))
    original, calls = getattr(owner, name), 0

    @functools.wraps(original)
    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **options)
        if calls == nth and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    place, when, nth, module = sys.argv[1:]
    kill_at(place, when=when, nth=int(nth))
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
