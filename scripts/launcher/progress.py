"""Live progress of a run: a bar in a terminal, one line every few seconds elsewhere.

    what loads, which processes are ready, the first batch --> steps, evaluations --> why there is no step, that groups are lost
    Redis is unreachable --> Redis is reachable again

Only what is wrong sounds so: processes that load, and a step that takes its time, are told as work.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Self

import redis
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from sluice.common.ledger.ledger import read_counters
from sluice.common.ledger.replay_buffer import read_sizes
from sluice.common.monitoring.diagnosis import explain
from sluice.common.monitoring.heartbeats import is_silent, read_heartbeats
from sluice.common.monitoring.losses import read_losses
from sluice.common.monitoring.metric_stream import last_entry, read_metrics
from sluice.common.monitoring.printable import printable
from sluice.common.monitoring.queues import read_queues
from sluice.common.operations.control import effective
from sluice.common.pipeline import QUEUES
from sluice.common.run import Run
from sluice.dashboard.terminal import PrintableConsole
from sluice.scripts.launcher.roles import planned_workers

LINE_EVERY_S = 5.0
READ_EVERY_S = 0.5
STALLED_AFTER_S = 10.0
SOON_S = 1.0
"""How soon what is loading, or that groups are lost, is said."""
_WORKING = ("starting", "working", "admission", "queue_backed_up")
"""Causes that are no trouble before the first step."""


def step_text(metrics: Mapping[str, float]) -> str:
    """Say in a few words how a step went."""
    speed = metrics.get("throughput/trained_tokens_per_s", 0.0)
    return f"reward {metrics['reward/mean']:.3f}  age {metrics.get('staleness/mean', 0.0):.1f}  {speed:,.0f} tokens/s"


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

    def describe(self, text: str) -> None:
        """Show beside the bar what happens before the first step."""
        if self._bar:
            self._bar.update(self._task, description=text)

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

    def __init__(self, client: redis.Redis, run: Run, *, done: int = 0) -> None:
        """`done`: the step that a resumed run is at."""
        super().__init__(total=run.config.trainer.num_steps, done=done)
        self._client, self._run, self._step = client, run, done
        self._last_entry = last_entry(client, run.keys, "metrics")  # of a resumed run, only what is new
        self._read_at = self._reported_at = 0.0
        self._moved_at = time.monotonic()
        self._unreachable_since: float | None = None
        self._has_begun, self._said = False, ""
        planned = [queue.partition(",")[0] for queue, _ in planned_workers(run.config)]
        self._planned = Counter([*planned, "trainer"])

    def say_unreachable(self, error: Exception) -> None:
        """Say that every role waits for Redis, at most every LINE_EVERY_S; `update` says when it is over."""
        now = time.monotonic()
        if self._unreachable_since is None:
            self._unreachable_since = now
            self._reported_at = 0.0
        if now - self._reported_at >= LINE_EVERY_S:
            self._reported_at = now
            self.say(f"Redis is unreachable, every role waits for it: {error}")

    def update(self) -> None:
        """Read and print, at most every READ_EVERY_S; to be called often."""
        now = time.monotonic()
        if now - self._read_at < READ_EVERY_S:
            return
        self._read_at = now
        entries = read_metrics(self._client, self._run.keys, after=self._last_entry)
        if self._unreachable_since is not None:
            self.say(f"Redis is reachable again, after {now - self._unreachable_since:.1f} s")
            self._unreachable_since = None
        for entry, metrics in entries:
            self._last_entry = entry
            self._say_evaluations(metrics)
        steps = [metrics for _, metrics in entries if "reward/mean" in metrics]
        if steps:
            self._moved_at = now
            self._show(steps[-1])
        self._say_what_happens(now)

    def _say_what_happens(self, now: float) -> None:
        """Say what is loading and that groups are lost, as soon as that is so, and after STALLED_AFTER_S why there is no step."""
        said_s, waited_s = now - self._reported_at, now - self._moved_at
        if said_s < SOON_S:
            return
        losses = read_losses(self._client, self._run)
        loading = "" if self._has_begun else self._loading()
        if loading:
            news, text = loading, f"starting, {waited_s:.0f} s so far: {loading}"
        elif losing := losses.alarm(self._run.config):
            news, text = f"losing {'groups' if losses.num_lost else 'attempts'}", f"losing groups: {losing}"
        elif self._has_begun and waited_s <= STALLED_AFTER_S:
            return
        else:
            news, text = self._waiting(waited_s)
        is_news = bool(news) and news != self._said
        if is_news or (said_s > STALLED_AFTER_S and (waited_s > STALLED_AFTER_S or news.startswith("losing "))):
            self._reported_at, self._said = now, news
            self.say(text)

    def _loading(self) -> str:
        """Describe which processes are ready, and which load; "" when all are ready."""
        heartbeats = [stats for stats in read_heartbeats(self._client, self._run.keys).values() if not is_silent(stats)]
        ready = Counter(stats["role"] for stats in heartbeats if not stats.get("doing"))
        missing = {role: count for role, count in self._planned.items() if ready[role] < count}
        if not missing:
            return ""
        names = [f"{role} ({ready[role]} of {count})" if count > 1 else role for role, count in missing.items()]
        doing = [f"the {stats['role']} is {stats['doing']}" for stats in heartbeats if stats.get("doing")]
        total = self._planned.total()
        num_ready = total - sum(count - ready[role] for role, count in missing.items())
        self.describe(f"starting: {num_ready} of {total} processes ready")
        return "; ".join([f"{num_ready} of {total} processes ready, loading: {', '.join(names)}", *doing])

    def _waiting(self, waited_s: float) -> tuple[str, str]:
        """Return why there is no step yet: what makes it news ("" = nothing does), and the text."""
        cause = explain(self._client, self._run)
        if not self._has_begun and cause.kind in _WORKING:
            batch = self._first_batch()
            self.describe(f"starting: {batch}")
            return "first batch", f"starting, {waited_s:.0f} s so far: all processes are ready; {batch}"
        if not self._has_begun:
            return cause.text, f"starting, {waited_s:.0f} s so far: {cause.text}"
        if cause.kind == "working":
            return "", f"step {self._step + 1} has taken {waited_s:.0f} s so far: {cause.text}"
        return "", f"no step for {waited_s:.0f} s: {cause.text}"

    def _first_batch(self) -> str:
        keys, size = self._run.keys, self._run.config.groups_per_step
        num_complete = sum(read_sizes(self._client, keys).values())
        in_flight = read_counters(self._client, keys).in_flight
        return f"the first batch has {min(num_complete, size)} of {size} groups, {in_flight - num_complete} are in progress"

    def _say_evaluations(self, metrics: dict[str, float]) -> None:
        """Print a line per evaluation."""
        for dataset in self._run.config.evaluation.datasets:
            prefix = f"eval/{dataset.name}/"
            if (version := metrics.get(f"{prefix}version")) is None:
                continue
            words = []
            for score in dataset.scores:
                value, error = metrics[prefix + score], metrics.get(f"{prefix}{score}_stderr", math.nan)
                words.append(f"{score} {value:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}"))
            self.say(f"eval {dataset.name}, policy version {version:.0f}: {'  '.join(words)}")

    def _show(self, metrics: dict[str, float]) -> None:
        step, total = int(metrics["step"]), effective(self._client, self._run).trainer.num_steps
        self._step = step
        if not self._has_begun:
            self._has_begun = True
            self.begin(step)
        text = f"{step_text(metrics)}  credits {metrics['admission/credits']:.0f}"
        self.show(step, total, text, more=self._queued)

    def _queued(self) -> str:
        queues = read_queues(self._client, self._run, QUEUES).items()
        return "  queued " + (" ".join(f"{name}={queue.depth}" for name, queue in queues if queue.depth) or "none")
