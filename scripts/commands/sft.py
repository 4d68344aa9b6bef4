"""`sluice sft`: supervised training in this process, with live progress; it writes the model to begin a run with."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from sluice.common.config.file import config_file, config_name, load_as
from sluice.common.config.sft import SftConfig
from sluice.common.errors import ConfigError
from sluice.common.paths import with_absolute_paths
from sluice.scripts.launcher.processes import interrupted_by_signals
from sluice.scripts.launcher.progress import Display
from sluice.scripts.launcher.run_folder import default_name, newest_run
from sluice.scripts.options import ConfigFile, Overrides, Resume, example


@click.command(epilog=example("sluice sft sft/sums num_epochs=1"))
@ConfigFile
@Overrides
@click.option("--name", help="Name of the run's folder; default: the config's name and the time.")
@Resume
def sft(config: str, overrides: tuple[str, ...], name: str | None, resume: str | None) -> None:
    """Train supervised on prompts and completions, in this process, without Redis: a model to begin a run with."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("sluice sft trains in one process: start it without torchrun")
    made = _new(config, list(overrides), name) if resume is None else _old(config, list(overrides), resume)
    sft_config, folder = made
    with interrupted_by_signals() as interrupted:
        from transformers.utils import logging as transformers_logging

        from sluice.trainer.sft import SftTrainer  # torch loads here, after the config was checked

        transformers_logging.disable_progress_bar()
        trainer = SftTrainer(sft_config, folder)
        with _Shown(total=trainer.config.trainer.num_steps, done=trainer.step) as shown:
            shown.say(f"supervised training in {folder}" + (f", from step {trainer.step} on" if trainer.step else ""))
            is_finished = trainer.train(shown.step, stop=interrupted)
    if is_finished:
        shown.say(f"{shown.summary()}\n  model      {folder / 'model'}   (sluice run CONFIG model.path=...)")
    else:
        shown.say(f"stopped after step {trainer.step}; resume with: sluice sft {config} --resume {folder.name}")


def _new(config_path: str, overrides: list[str], name: str | None) -> tuple[SftConfig, Path]:
    config = with_absolute_paths(load_as(SftConfig, config_path, overrides))
    name = name or f"sft-{default_name(config_path)}"  # never the name of a run
    folder = Path(config.output_dir) / name
    if folder.exists():
        raise ConfigError(f"{folder} exists: choose another --name, or resume it with --resume {folder.name}")
    return config, folder


def _old(config_path: str, overrides: list[str], resume: str) -> tuple[SftConfig, Path]:
    """Read the config in the run's folder; the config file only says where run folders are."""
    if overrides or "=" in resume:
        raise ConfigError("--resume uses the config in the run's folder: give no key=value with it")
    config = with_absolute_paths(load_as(SftConfig, config_path))
    folder = Path(config.output_dir) / (
        resume or newest_run(config.output_dir, prefix=f"sft-{config_name(config_path)}")
    )
    return load_as(SftConfig, config_file(folder)), folder


class _Shown(Display):
    """Progress of supervised training, and its summary."""

    def __init__(self, *, total: int, done: int) -> None:
        super().__init__(total=total, done=done)
        self._total, self._step = total, done
        self._losses: list[float] = []
        self._held_out: list[float] = []

    def step(self, metrics: dict[str, float]) -> None:
        """Show the metrics of one step, or of the held-out set before the first."""
        step = int(metrics["step"])
        if "held_out/loss" in metrics:
            self._held_out.append(metrics["held_out/loss"])
            self.say(f"held-out loss {self._held_out[-1]:.4f} (step {step})")
        if "loss" not in metrics:
            self.begin(step)
            return
        self._step = step
        self._losses.append(metrics["loss"])
        text = f"loss {metrics['loss']:.4f}  {metrics['throughput/trained_tokens_per_s']:,.0f} tokens/s"
        if metrics["num_skipped"]:
            text += f"  skipped {metrics['num_skipped']:.0f}"
        self.show(step, self._total, text)

    def summary(self) -> str:
        seconds = time.monotonic() - self._started_at
        lines = [f"{self._step} steps, the last {len(self._losses)} of them in {seconds:.1f} s"]
        if self._losses:
            lines.append(f"  loss       {self._losses[0]:.4f} -> {self._losses[-1]:.4f}")
        if len(self._held_out) > 1:
            lines.append(f"  held out   {self._held_out[0]:.4f} -> {self._held_out[-1]:.4f}")
        return "\n".join(lines)
