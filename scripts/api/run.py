"""A run, as a program sees it."""

from __future__ import annotations

import atexit
import json
import shutil
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis

from sluice.common.config.file import config_file, load_config
from sluice.common.errors import RunFailed, SluiceError
from sluice.common.ledger.ledger import read_counters
from sluice.common.monitoring.heartbeats import is_silent, read_heartbeats
from sluice.common.operations import control
from sluice.common.paths import expanded
from sluice.common.run import Run as OpenedRun
from sluice.common.run import RunRecord
from sluice.dashboard.run_state import collect_status
from sluice.dashboard.samples import read_samples
from sluice.scripts.api.call import dotted
from sluice.scripts.api.process import Follower, RunProcess
from sluice.scripts.api.shown import is_interactive, shown
from sluice.scripts.launcher.redis_server import running_url
from sluice.scripts.launcher.run_folder import opened_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from sluice.scripts.api.chat import Chat

POLL_S = 0.2
GONE_S = 60.0
"""How long no process of a run on a common Redis may send a heartbeat, until it counts as ended."""
START_S = 3600.0
"""How long a run may take until it has checked everything: a model may have to be downloaded."""
HAS_ENDED = ("finished", "drained", "stopped", "failed")


class Run:
    """A run, in progress or ended: what `train`, `start` and `load` return."""

    folder: Path
    "absolute path of the run folder"
    name: str
    "the folder's name, and the run's in Redis"

    def __init__(self, folder: Path, *, process: RunProcess | None = None) -> None:
        self.folder = folder
        self.name = folder.name
        self._process = process
        self._chat: Chat | None = None
        self._alive_at = 0.0
        if process:
            _ours.add(self)

    def __repr__(self) -> str:
        return f"<sluice run {self.name} in {self.folder}{', in progress' if self._is_ours else ''}>"

    @property
    def _is_ours(self) -> bool:
        return self._process is not None and self._process.is_alive

    def wait(self, *, timeout_s: float | None = None) -> Run:
        """Show the progress until the run has ended; return the run. Raises ConfigError, RunFailed, SluiceError on a time-out.

        Ctrl-C, or a notebook's interrupt, ends a run that this program started: the trainer finishes its step and writes a
        checkpoint. A second one ends it at once. Where a person types the run is then returned, in a script KeyboardInterrupt is
        raised.
        """
        self._alive_at = time.monotonic()
        num_interrupts, deadline = 0, None if timeout_s is None else time.monotonic() + timeout_s
        with self._followed() as follower:
            while self._is_in_progress():
                try:
                    follower.update()
                    if deadline is not None and time.monotonic() > deadline:
                        raise SluiceError(
                            f"run {self.name} has not ended within {timeout_s:g} s; `wait` again, or `stop` it"
                        )
                    time.sleep(POLL_S)
                except KeyboardInterrupt:
                    if not self._process:  # it is another program's
                        raise
                    num_interrupts += 1
                    self._process.interrupt()
            follower.update()
        self._check()
        if num_interrupts and not is_interactive():
            raise KeyboardInterrupt
        return self

    def _wait_for_start(self) -> None:
        """Wait until everything is checked, and the run can be asked. Raises what it refuses, SluiceError on a time-out."""
        deadline = time.monotonic() + START_S
        with self._followed() as follower:
            while self._is_in_progress() and not self._can_be_asked():
                follower.update()
                if time.monotonic() > deadline:
                    raise SluiceError(
                        f"run {self.name} has not begun within {START_S:.0f} s: see {self.folder / 'logs'}"
                    )
                time.sleep(POLL_S)
            follower.update()
        self._check()

    def _can_be_asked(self) -> bool:
        """Return whether it has stored its config, and has its Redis."""
        data = self.folder / "redis"
        return (self.folder / "config.yaml").exists() and (not data.is_dir() or bool(running_url(data)))

    @contextmanager
    def _followed(self) -> Iterator[Follower]:
        given = self.folder / "run.yaml"
        total = load_config(given if given.exists() else config_file(self.folder)).trainer.num_steps
        with shown(total=total) as display:

            def step(metrics: dict[str, Any]) -> None:
                display.step(metrics, int(metrics.get("setting/trainer.num_steps", total)))

            yield Follower(self.folder, process=self._process, say=display.say, step=step)

    def _is_in_progress(self) -> bool:
        if self._process:
            return self._process.is_alive
        data = self.folder / "redis"
        if data.is_dir() and running_url(data) is None:  # its supervisor would hold it
            return False
        with self._opened() as (client, run):
            status = RunRecord(client, run.keys).status
            if data.is_dir() or any(not is_silent(stats) for stats in read_heartbeats(client, run.keys).values()):
                self._alive_at = time.monotonic()
        return status not in HAS_ENDED and time.monotonic() - self._alive_at < GONE_S

    def _check(self) -> None:
        """Raise what the run has ended with, if that was no success."""
        if self._process:
            try:
                self._process.check(name=self.name)
            finally:
                if not self._process.is_alive and not (self.folder / "config.yaml").exists():
                    shutil.rmtree(self.folder, ignore_errors=True)  # nothing has begun, and the reason is raised
            return
        with self._opened() as (client, run):
            record = RunRecord(client, run.keys)
            status, failure = record.status, record.failure
        if status == "failed":
            raise RunFailed(failure or f"run {self.name} has failed: its logs are in {self.folder / 'logs'}")
        if status not in HAS_ENDED:
            raise RunFailed(
                f"run {self.name} was killed: resume={str(self.folder)!r} continues it from its newest checkpoint"
            )

    def stop(self) -> Run:
        """End the run in order and wait for that: the trainer finishes its step and writes a checkpoint.

        `sluice.train(resume=run.folder)` continues it.
        A run that another program drives is drained: what is in flight is trained first.
        """
        if not self._process:
            with self._opened() as (client, run):
                control.drain(client, run, who=control.default_who())
            return self.wait()
        self._process.interrupt()
        return self.wait()

    def status(self) -> dict[str, Any]:
        """Return what `sluice status --json` prints: status, step, queues, processes, and what the run waits for."""
        with self._opened() as (client, run):
            return collect_status(client, run)

    def pause(self) -> None:
        """Pause the run: nothing is admitted and no step begins until `resume`."""
        with self._opened() as (client, run):
            control.pause(client, run, who=control.default_who())

    def resume(self) -> None:
        """Undo `pause`."""
        with self._opened() as (client, run):
            control.resume(client, run, who=control.default_who())

    def set(self, settings: Mapping[str, Any] | None = None, /, **more: Any) -> dict[str, Any]:
        """Change settings without a restart, as `sluice set`: `run.set(learning_rate=1e-6)`; return those that were changed.

        Raises ConfigError, which lists what can be changed.
        """
        asked = [f"{key}={json.dumps(value)}" for key, value in dotted({**(settings or {}), **more})]
        with self._opened() as (client, run):
            if asked:
                control.change(client, run, asked, who=control.default_who())
            return {key: json.loads(value) for key, value in control.read_settings(client, run.keys).items()}

    def metrics(self) -> DataFrame:
        """Return a row per trainer step, a column per metric (docs/reference/metrics.md)."""
        from sluice.scripts.api.frames import read_metrics

        return read_metrics(self.folder)

    def plot(self, *names: str, file: str | PathLike[str] | None = None) -> Figure:
        """Draw metrics over steps, by default the reward and pass@1 of evaluations. `file` saves it as well."""
        from sluice.scripts.api.frames import draw

        figure = draw(self.metrics(), names, title=self.name)
        if file is not None:
            figure.savefig(file)
        return figure

    def samples(self, *, count: int = 10, step: int | None = None) -> DataFrame:
        """Return the completions of the newest trained groups, or of one step: prompt, completion, rewards, advantage."""
        from sluice.scripts.api.frames import samples_frame

        with self._opened() as (client, run):
            return samples_frame(read_samples(client, run.keys, count=count, step=step))

    def ledger(self) -> dict[str, Any]:
        """Return the accounting of all prompts: admitted, trained, dropped, dead, in_flight, and whether the identity holds."""
        with self._opened() as (client, run):
            train, evals = (read_counters(client, run.keys, kind) for kind in ("train", "eval"))
        return {**train.to_dict(), "eval": evals.to_dict(), "holds": train.holds and evals.holds}

    def export(
        self,
        folder: str | PathLike[str],
        *,
        checkpoint: int | str = "latest",
        dtype: str = "float32",
        adapter: bool = False,
        push_to_hub: str | None = None,
    ) -> Path:
        """Write a checkpoint (a step, `latest` or `best`) as a model folder that `transformers` loads; return it.

        push_to_hub: also upload it to this repository. Raises ConfigError, DiskFull.
        """
        from sluice.scripts.api.export import checkpoint_step, export_model, upload

        target = expanded(Path(folder))
        step = checkpoint_step(self.folder, str(checkpoint))
        exported = export_model(self.folder, target, step=step, dtype=dtype, adapter=adapter)
        if push_to_hub:
            upload(target, push_to_hub, run_folder=self.folder, step=exported)
        return target

    def chat(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        checkpoint: int | str = "latest",
        temperature: float = 0.0,
        max_tokens: int | None = None,
    ) -> str:
        """Return the answer of a checkpoint (a step, `latest` or `best`) to a text, or to chat messages.

        temperature: 0 = the likeliest token each time. max_tokens: none = as in training.
        """
        from sluice.scripts.api.chat import Chat
        from sluice.scripts.api.export import checkpoint_step

        step = checkpoint_step(self.folder, str(checkpoint))
        if self._chat is None or self._chat.step != step:
            self._chat = Chat(self.folder, step=step)
        return self._chat.answer(prompt, temperature=temperature, max_tokens=max_tokens)

    @contextmanager
    def _opened(self) -> Iterator[tuple[redis.Redis, OpenedRun]]:
        with opened_run(str(self.folder)) as (client, run, _):
            yield client, run


_ours: weakref.WeakSet[Run] = weakref.WeakSet()
"""Runs that this program started."""


@atexit.register
def _stop_ours() -> None:
    """End what this program started, in order, before it ends."""
    for run in list(_ours):
        if run._is_ours:
            print(f"the program ends, and run {run.name} with it; `wait` lets it train to its end", file=sys.stderr)
            with suppress(SluiceError, KeyboardInterrupt):
                run.stop()


def load(folder: str | PathLike[str]) -> Run:
    """Return the run of a folder, in progress or ended. Raises ConfigError where it is no run folder."""
    path = expanded(Path(folder)).resolve()
    config_file(path)
    return Run(path)
