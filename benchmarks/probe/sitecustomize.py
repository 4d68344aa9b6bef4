"""Thread CPU seconds per kind of work, inside every process of a benchmarked run. Changes no file of the product.

With this folder on PYTHONPATH, Python imports this module at start-up of every process. If SLUICE_PROBE names a folder,
the functions in TARGETS are wrapped as their modules load, and each process keeps its sums in FOLDER/<pid>.bin.
Sums are exclusive (`encode` inside `send` counts as codec, not as publish), so they add up. One call costs about 1 us.
"""

from __future__ import annotations

import functools
import importlib.abc
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

TARGETS = {
    "sluice.workers.engine.torch.engine": {"TorchEngine._pass": "generation"},
    "sluice.workers.reference": {"ReferenceModel._compute": "reference"},
    "sluice.trainer.trained_policy": {"TrainedPolicy.optimize": "training", "TrainedPolicy.snapshot": "weights"},
    "sluice.trainer.checkpoint": {"save_checkpoint": "checkpoint"},
    "sluice.common.policies.store": {"PolicyStore.publish": "weights", "PolicyStore.fetch": "weights"},
    "sluice.workers.rewards.scoring": {"score_group": "reward_functions"},
    "sluice.workers.prompt_source": {"PromptSource.prompt_at": "prompts"},
    "sluice.common.serialization": {"encode": "codec", "decode": "codec"},
    "sluice.common.ledger.scripts": {"Scripts.__call__": "ledger_calls"},
    "sluice.common.connections.broker": {"send": "publish_message"},
    "sluice.workers.context": {"Context.perform": "task_rest", "Context._send_heartbeats": "heart"},
    "sluice.trainer.loop": {"Trainer._train_on": "step_rest", "Trainer._next_batch": "take_batch"},
    "sluice.trainer.report": {
        "Reporter.report": "metrics",
        "Reporter.keep_samples": "metrics",
        "flow_metrics": "metrics",
    },
}
"""Module -> qualified name -> kind."""
KINDS = tuple(dict.fromkeys(kind for names in TARGETS.values() for kind in names.values()))

_SIZE = len(KINDS) * 2 * 8


class _Sums:
    """This process' file of doubles: CPU seconds and calls of each kind."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._values: Any = None
        self._pid = 0

    def add(self, index: int, cpu_s: float) -> None:
        with self._lock:
            if self._pid != os.getpid():  # also after a fork: the parent's file is the parent's
                self._open()
            self._values[2 * index] += cpu_s
            self._values[2 * index + 1] += 1

    def _open(self) -> None:
        self._pid = os.getpid()
        descriptor = os.open(f"{self._folder}/{self._pid}.bin", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(descriptor, _SIZE)
        self._values = memoryview(mmap.mmap(descriptor, _SIZE)).cast("d")
        os.close(descriptor)


class _Inner(threading.local):
    cpu_s = 0.0


def read(folder: Path) -> dict[int, dict[str, tuple[float, int]]]:
    """Process id -> kind -> (CPU seconds, calls) so far."""
    found = {}
    for path in folder.glob("*.bin"):
        data = path.read_bytes()
        if len(data) == _SIZE:
            values = memoryview(data).cast("d")
            found[int(path.stem)] = {kind: (values[2 * i], int(values[2 * i + 1])) for i, kind in enumerate(KINDS)}
    return found


def _measured(function: Callable[..., Any], kind: str, sums: _Sums, inner: _Inner) -> Callable[..., Any]:
    index, clock = KINDS.index(kind), time.thread_time

    @functools.wraps(function)
    def measured(*args: Any, **kwargs: Any) -> Any:
        outer, inner.cpu_s = inner.cpu_s, 0.0
        started = clock()
        try:
            return function(*args, **kwargs)
        finally:
            cpu_s = clock() - started
            sums.add(index, cpu_s - inner.cpu_s)
            inner.cpu_s = outer + cpu_s

    return measured


class _Hook(importlib.abc.MetaPathFinder):
    """Wraps the targets of a module when it is loaded."""

    def __init__(self, folder: str) -> None:
        self._sums, self._inner = _Sums(folder), _Inner()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name not in TARGETS:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in finders if (found := finder.find_spec(name, path, target))), None)
        if spec and spec.loader:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                self._wrap(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _wrap(self, module: ModuleType) -> None:
        for qualified, kind in TARGETS[module.__name__].items():
            *owners, name = qualified.split(".")
            owner = functools.reduce(getattr, owners, module)
            setattr(owner, name, _measured(getattr(owner, name), kind, self._sums, self._inner))


if _folder := os.environ.get("SLUICE_PROBE"):
    sys.meta_path.insert(0, _Hook(_folder))
