"""Sluice: asynchronous RL post-training for language models on Celery and Redis.

Every module is imported as `sluice.<layer>.<module>`. The layers lie as folders beside this one, which links to them.
`celery -A sluice` finds the Celery app here, as `app`.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Load the Celery app when Celery asks for it: it reads SLUICE_RUN, which nothing else that imports `sluice` needs."""
    if name == "app":
        from sluice.workers.app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
