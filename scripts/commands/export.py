"""`sluice export`."""

from __future__ import annotations

from pathlib import Path

import click

from sluice.common.errors import ConfigError
from sluice.scripts.options import UserPath, example


@click.command(epilog=example("sluice export runs/gsm8k exported --best --dtype bfloat16"))
@click.argument("run_folder", type=UserPath(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=UserPath(path_type=Path))
@click.option("--step", type=int, help="Checkpoint to export; default: the newest.")
@click.option("--best", is_flag=True, help="The checkpoint that is best by checkpoint.keep_best.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--adapter", is_flag=True, help="Of a run with trainer.lora: the adapter alone, as a peft folder.")
def export(run_folder: Path, target: Path, step: int | None, best: bool, dtype: str, adapter: bool) -> None:
    """Write a checkpoint as a Hugging Face model folder that `transformers` loads; a LoRA adapter is merged into it."""
    from sluice.trainer.best import best_step
    from sluice.trainer.export import export_checkpoint

    if best and step is not None:
        raise ConfigError("--best and --step name two checkpoints: give one of them")
    step = best_step(run_folder / "checkpoints") if best else step
    exported = export_checkpoint(run_folder, target, step=step, dtype=dtype, adapter=adapter)
    click.echo(f"step {exported} of {run_folder.name} is in {target}")
