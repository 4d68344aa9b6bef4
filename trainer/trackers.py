"""Trackers that a run reports to besides Redis and metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

    Reporter -> TrackerQueue.log (never waits) -> bounded queue -> its own thread -> the library

A tracker never stops or slows the run: an error of its library or a full queue costs lines of this tracker, logged once and
counted. It is opened on its thread too, and every wait at the end is bounded.

A run is one run of its tracker, over all its trainers. Steps that are trained again after a crash are not sent again to
W&B and Trackio, which cannot take back what they hold; TensorBoard drops them at its next start (purge_step), and shows the
second training. Keys and addresses come from the libraries' own environment variables and files, never from the config.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from sluice.common.config.operations import MetricsConfig
from sluice.common.errors import ConfigError

log = logging.getLogger("sluice.trainer")

LINES_HELD = 1000
"""Steps that a tracker may be behind; further ones are dropped."""
OPEN_S = 30
"""How long W&B's server may take to answer at the start; then the run is recorded offline."""
FINISH_S = 15
"""How long W&B may upload at the end; the rest stays in the run folder, for `wandb sync`."""
CLOSE_S = 20.0
"""How long the trainer waits for a tracker at the end, and for room in its queue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """What a tracker is opened with."""

    name: str
    run_id: str
    "the same for every trainer of the run"
    project: str
    folder: Path
    config: Mapping[str, Any]
    "the one in force"
    resumed_step: int = 0
    "the trainer resumes from it"
    told_step: int = -1
    "the highest that earlier trainers have reported"


class Tracker(Protocol):
    """One open tracker; both may raise anything."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in <run folder>/tensorboard."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = run.resumed_step + 1 if run.told_step >= 0 else None
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; recorded in <run folder>/wandb where its server cannot be reached, or WANDB_MODE=offline."""

    def __init__(self, run: TrackedRun) -> None:
        self._wandb = _wandb()
        options: dict[str, Any] = {"project": run.project, "name": run.name, "id": run.run_id, "dir": str(run.folder)}
        settings = self._wandb.Settings(
            console="off",
            silent=True,
            init_timeout=OPEN_S,
            finish_timeout=FINISH_S,
            x_transaction_log_flush_interval=1.0,  # by default a kill would lose the last 15 seconds
        )
        options |= {"config": dict(run.config), "settings": settings}
        if self._wandb.setup().settings.mode == "online":
            try:
                self._run = self._wandb.init(**options, resume="allow")
            except Exception as error:  # any network error; offline nothing is lost
                log.warning("W&B: %s; recorded offline: `wandb sync` uploads it from %s/wandb", error, run.folder)
                self._wandb.teardown()  # it would refuse to open the same run a second time
                self._run = self._wandb.init(**options, mode="offline")
        else:
            self._run = self._wandb.init(**options)
        log.info("W&B: %s", f"offline, in {run.folder}/wandb" if self._run.offline else self._run.url)
        self._run.define_metric("*", step_metric="step")  # its own steps cannot be written to twice

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # ends its service process


class Trackio:
    """A run of Trackio; in <run folder>/trackio unless its own variables (TRACKIO_DIR, TRACKIO_SPACE_ID) say otherwise."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(run.folder / "trackio"))  # it reads that when it is imported
        import trackio

        name = f"{run.name}-{run.run_id[:4]}"  # a project may hold a run of the same name from another Redis
        self._run = trackio.init(
            project=run.project,
            name=name,
            config=dict(run.config),
            resume="allow",
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
"""By their keys in `metrics`, which are also the names of package and extra."""


@dataclass(kw_only=True)
class TrackerQueue:
    """One tracker, its queue and its thread."""

    name: str
    open: Callable[[TrackedRun], Tracker]
    run: TrackedRun
    dropped: int = 0
    "steps that were not sent"
    _lines: queue.Queue[tuple[int, dict[str, float]] | None] = field(default_factory=lambda: queue.Queue(LINES_HELD))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _has_said: bool = False

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._work, name=f"sink {self.name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Never waits, never raises."""
        try:
            self._lines.put_nowait((step, dict(metrics)))
        except queue.Full:
            self._lose(f"it is {LINES_HELD} steps behind")

    def close(self) -> None:
        """Send what is queued and close, within CLOSE_S; what is left then stays unsent."""
        with suppress(queue.Full):
            self._lines.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.error("%s did not finish in %.0f s: the end of the run may be missing there", self.name, CLOSE_S)
        if self.dropped:
            log.error("%s: %d steps are missing there; metrics.jsonl has all", self.name, self.dropped)

    def _work(self) -> None:
        tracker: Tracker | None = None
        try:
            tracker = self.open(self.run)
        except Exception as error:  # of a library, about anything: it must not reach the run
            self._lose(error, steps=0)
        while (line := self._lines.get()) is not None:
            step, metrics = line
            if self.open is not TensorBoard and self.run.resumed_step < step <= self.run.told_step:
                log.info("%s has step %d from before: not sent again", self.name, step)
                metrics = {name: value for name, value in metrics.items() if name.startswith("eval/")}  # told once
            if not metrics:
                continue
            try:
                if tracker is None:
                    raise ConnectionError("it could not be opened")
                tracker.log(step, metrics)
            except Exception as error:
                self._lose(error)
        if tracker is not None:
            try:
                tracker.close()
            except Exception as error:
                log.error("%s did not close: %s", self.name, error)

    def _lose(self, why: object, *, steps: int = 1) -> None:
        with self._lock:
            self.dropped += steps
            if self._has_said:
                return
            self._has_said = True
        log.error("%s fails: %s. The run continues without it (logged once; metric trackers/dropped)", self.name, why)


def open_trackers(config: MetricsConfig, run: TrackedRun) -> list[TrackerQueue]:
    """Open all trackers that a config names."""
    return [TrackerQueue(name=name, open=TRACKERS[name], run=run) for name in chosen(config)]


def chosen(config: MetricsConfig) -> list[str]:
    return [name for name in TRACKERS if getattr(config, name)]


def tracked_id(name: str, created_at: str) -> str:
    """Return the tracker's id of a run: the same after every restart, another for a later run of the same name."""
    return hashlib.sha256(f"{name} {created_at}".encode()).hexdigest()[:16]


def check_packages(config: MetricsConfig) -> None:
    """Check that the package of every tracker is installed. Raises ConfigError."""
    for name in chosen(config):
        if find_spec(name) is None:
            raise ConfigError(f"metrics.{name}=true needs the extra: pip install 'sluice-rl[{name}]'")


def check_trackers(config: MetricsConfig) -> None:
    """Check, before anything starts, packages, and that W&B's server accepts our key (at most 10 s). Raises ConfigError."""
    check_packages(config)
    if not config.wandb:
        return
    wandb = _wandb()
    instead = "WANDB_MODE=offline records into the run folder without an account"
    try:
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=True):
            raise ConfigError(
                f"metrics.wandb=true, but there is no API key: WANDB_API_KEY, or `wandb login`; {instead}"
            )
    except wandb.Error as error:
        raise ConfigError(f"metrics.wandb=true, but the login failed: {error}; {instead}") from None
    finally:
        wandb.teardown()


def _wandb() -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # without a network it would hold the exit up for 20 s
    import wandb

    return wandb
