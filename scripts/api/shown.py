"""The progress of a run where a person sees it: a bar in a terminal, a part of the page in a notebook, lines elsewhere."""

from __future__ import annotations

import html
import re
import sys
import time
from contextlib import AbstractContextManager
from typing import Any, Protocol

from sluice.common.monitoring.printable import printable
from sluice.scripts.launcher.progress import Display, step_text

EVERY_S = 0.5
"""How often a notebook's page changes at most."""
LINES_SHOWN = 40
_LINK = re.compile(r"https?://\S+")
_WIDTH, _HEIGHT = 480, 80


class Shown(Protocol):
    """What shows progress."""

    def say(self, text: str) -> None: ...

    def step(self, metrics: dict[str, Any], total: int) -> None: ...


def is_notebook() -> bool:
    """Return whether this program is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")


def is_interactive() -> bool:
    """Return whether a person types here: a notebook, IPython, or Python's own prompt."""
    ipython = sys.modules.get("IPython")
    return (
        hasattr(sys, "ps1")
        or bool(sys.flags.interactive)
        or (ipython is not None and ipython.get_ipython() is not None)
    )


def shown(*, total: int) -> AbstractContextManager[Shown]:
    """Return what shows progress here."""
    return NotebookDisplay(total=total) if is_notebook() else TerminalDisplay(total=total)


class TerminalDisplay(Display):
    """A bar, or lines."""

    def step(self, metrics: dict[str, Any], total: int) -> None:
        self.show(int(metrics["step"]), total, step_text(metrics))


class NotebookDisplay:
    """A part of a notebook's page that changes: bar, curve of the reward, what was said."""

    def __init__(self, *, total: int) -> None:
        self._step, self._total, self._text = 0, total, "starting"
        self._lines: list[str] = []
        self._rewards: list[float] = []
        self._due = 0.0

    def __enter__(self) -> NotebookDisplay:
        from IPython.display import display

        self._handle: Any = display(self, display_id=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.update(self)

    def say(self, text: str) -> None:
        self._lines.append(printable(text))
        self._changed()

    def step(self, metrics: dict[str, Any], total: int) -> None:
        self._step, self._total, self._text = int(metrics["step"]), total, step_text(metrics)
        self._rewards.append(metrics["reward/mean"])
        self._changed()

    def _changed(self) -> None:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + EVERY_S
            self._handle.update(self)

    def _repr_html_(self) -> str:
        said = _LINK.sub(
            r'<a href="\g<0>" target="_blank">\g<0></a>', html.escape("\n".join(self._lines[-LINES_SHOWN:]))
        )
        return (
            f'<div><progress value="{self._step}" max="{self._total}"></progress> '
            f"step {self._step}/{self._total}&ensp;{html.escape(self._text)}</div>{self._curve()}"
            f'<pre style="max-height: 18em; overflow: auto">{said}</pre>'
        )

    def _curve(self) -> str:
        """Draw the rewards so far, from the lowest to the highest."""
        if len(self._rewards) < 2:
            return ""
        drawn = self._rewards[:: 1 + len(self._rewards) // _WIDTH]
        low, high = min(drawn), max(drawn)
        scale = _HEIGHT / ((high - low) or 1.0)
        every = _WIDTH / (len(drawn) - 1)
        points = " ".join(f"{i * every:.1f},{_HEIGHT - (r - low) * scale:.1f}" for i, r in enumerate(drawn))
        return (
            f'<svg viewBox="-2 -2 {_WIDTH + 4} {_HEIGHT + 4}" width="{_WIDTH}" height="{_HEIGHT}" role="img" '
            f'aria-label="reward from {low:.3f} to {high:.3f}"><polyline points="{points}" fill="none" stroke="#2a78d6" '
            f'stroke-width="2"/></svg><div>reward: {low:.3f} to {high:.3f}, now {self._rewards[-1]:.3f}</div>'
        )

    def __repr__(self) -> str:
        return "\n".join([f"step {self._step}/{self._total}  {self._text}", *self._lines[-LINES_SHOWN:]])
