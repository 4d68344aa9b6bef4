"""Live progress of a run: a bar in a terminal, one line every few seconds elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Self

import redis
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from sluice.common.monitoring.diagnosis import explain
from sluice.common.monitoring.losses import read_losses
from sluice.common.monitoring.metric_stream import last_entry, read_metrics
from sluice.common.monitoring.printable import printable
from sluice.common.monitoring.queues import read_queues
from sluice.common.operations.control import effective
from sluice.common.pipeline import QUEUES
from sluice.common.run import Run
from sluice.dashboard.terminal import PrintableConsole

LINE_EVERY_S = 5.0
READ_EVERY_S = 0.5
STALLED_AFTER_S = 10.0
SOON_S = 1.0
"""How soon what is loading, or that groups are lost, is said."""


class Display:
    """Progress on standard error: a bar in a terminal, one line every few seconds elsewhere."""

    def __init__(self, *, total: int, done: int = 0) -> None:
        self._console = PrintableConsole(file=sys.stderr, soft_wrap=True, highlight=False)
        self._bar: Bar | None = None
        if self._console.is_terminal:
            columns = MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}"), TimeRemainingColumn()
            self._bar = Bar(TextColumn("step"), *columns, console=self._console)
            self._task = self._bar.add_task("starting", total=total, completed=done)
        self._line_at = 0.0
        self.begin(done)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def begin(self, step: int) -> None:
        """Measure the rate of steps from this one and this moment on."""
        self._first_step, self._started_at = step, time.monotonic()

    def say(self, text: str) -> None:
        self._console.print(printable(text), markup=False)

    def show(self, step: int, total: int, text: str, *, more: Callable[[], str] = str) -> None:
        """Show a step; `more` is asked only for a line that is printed."""
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=step, total=total, description=text)
        elif now - self._line_at >= LINE_EVERY_S or step == total:
            self._line_at = now
            rate = (step - self._first_step) / max(now - self._started_at, 1e-9)
            eta = f"{(total - step) / rate:.0f} s" if rate > 0 else "?"
            self.say(f"step {step}/{total}  {text}{more()}  eta {eta}")


class Progress(Display):
    """Reads the run's metrics stream and shows progress."""

    def __init__(self, client: redis.Redis, run: Run) -> None:
        super().__init__(total=run.config.trainer.num_steps)
        self._client, self._run = client, run
        self._last_entry = last_entry(client, run.keys, "metrics")  # of a resumed run, only what is new
        self._read_at = self._reported_at = self._said_at = 0.0
        self._moved_at = time.monotonic()
        self._has_begun, self._said = False, ""

    def say_throttled(self, text: str) -> None:
        """Print as `say`, at most every LINE_EVERY_S: for what may be true many times a second."""
        if time.monotonic() - self._said_at >= LINE_EVERY_S:
            self._said_at = time.monotonic()
            self.say(text)

    def update(self) -> None:
        """Read and print, at most every READ_EVERY_S; to be called often."""
        now = time.monotonic()
        if now - self._read_at < READ_EVERY_S:
            return
        self._read_at = now
        entries = read_metrics(self._client, self._run.keys, after=self._last_entry)
        for entry, metrics in entries:
            self._last_entry = entry
            self._say_evaluation(metrics)
        steps = [metrics for _, metrics in entries if "reward/mean" in metrics]
        if steps:
            self._moved_at = now
            self._show(steps[-1])
        self._say_what_is_wrong(now)

    def _say_what_is_wrong(self, now: float) -> None:
        """Say what is loading and that groups are lost, as soon as that is so, and after STALLED_AFTER_S why there is no step."""
        said_s, waited_s = now - self._reported_at, now - self._moved_at
        if said_s < SOON_S:
            return
        cause = explain(self._client, self._run) if waited_s > STALLED_AFTER_S or not self._has_begun else None
        is_starting = cause is not None and cause.kind == "starting"
        losses = read_losses(self._client, self._run)
        losing = None if is_starting else losses.alarm(self._run.config)
        kind = "losing groups" if losses.num_lost else "losing attempts"
        text = f"losing groups: {losing}" if losing else cause.text if cause else ""
        is_news = cause.text != self._said if is_starting and cause else losing is not None and self._said != kind
        if not text or not (is_news or (said_s > STALLED_AFTER_S and (losing or waited_s > STALLED_AFTER_S))):
            return
        self._reported_at, self._said = now, kind if losing else text
        waiting = f"no step for {waited_s:.0f} s" if self._has_begun else f"starting, {waited_s:.0f} s so far"
        self.say(text if losing else f"{waiting}: {text}")

    def _say_evaluation(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if name.startswith("eval/") and "@" in name.rpartition("/")[2] and not name.endswith("_stderr"):
                version = metrics[name.rpartition("/")[0] + "/version"]
                error = metrics.get(f"{name}_stderr", math.nan)
                spread = "" if math.isnan(error) else f" ± {error:.3f}"
                self.say(f"{name} = {value:.3f}{spread} (policy version {version:.0f})")

    def _show(self, metrics: dict[str, float]) -> None:
        step, total = int(metrics["step"]), effective(self._client, self._run).trainer.num_steps
        if not self._has_begun:
            self._has_begun = True
            self.begin(step)
        text = (
            f"reward {metrics['reward/mean']:.3f}  age {metrics['staleness/mean']:.1f}  "
            f"{metrics['throughput/trained_tokens_per_s']:,.0f} tokens/s  credits {metrics['admission/credits']:.0f}"
        )
        self.show(step, total, text, more=self._queued)

    def _queued(self) -> str:
        queues = read_queues(self._client, self._run, QUEUES).items()
        return "  queued " + (" ".join(f"{name}={queue.depth}" for name, queue in queues if queue.depth) or "none")
