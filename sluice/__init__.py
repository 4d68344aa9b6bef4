"""Sluice: asynchronous RL post-training for language models on Celery and Redis.

    run = sluice.train(model="Qwen/Qwen3-0.6B", dataset=rows, rewards=[score, "math"], steps=100)  # docs/tutorials/python.ipynb

Every module is imported as `sluice.<layer>.<module>`. The layers lie as folders beside this one, which links to them.
`celery -A sluice` finds the Celery app here, as `app`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sluice.common.errors import ConfigError, RunFailed, SluiceError
    from sluice.scripts.api.run import Run, load
    from sluice.scripts.api.train import start, train

__all__ = ["ConfigError", "Run", "RunFailed", "SluiceError", "load", "start", "train"]

_FOUND_IN = dict.fromkeys(("train", "start"), "scripts.api.train")
_FOUND_IN |= dict.fromkeys(("Run", "load"), "scripts.api.run")
_FOUND_IN |= dict.fromkeys(("SluiceError", "ConfigError", "RunFailed"), "common.errors")
_FOUND_IN |= {"app": "workers.app"}


def __getattr__(name: str) -> Any:
    """Load what is asked for, when it is: importing `sluice` costs nothing, and the Celery app reads SLUICE_RUN."""
    if name in _FOUND_IN:
        return getattr(importlib.import_module(f"sluice.{_FOUND_IN[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
