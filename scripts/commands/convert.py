"""`sluice export` and `sluice replay`: what a run folder holds, without Redis."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sluice.common.errors import ConfigError
from sluice.scripts.options import Json, UserPath, echo_json, example

if TYPE_CHECKING:
    from sluice.trainer.replay import ReplayedStep

RunFolder = click.argument("run_folder", type=UserPath(exists=True, file_okay=False, path_type=Path))


@click.command(
    epilog=example(
        "sluice export runs/gsm8k exported --best --dtype bfloat16",
        "sluice export runs/gsm8k --push-to-hub me/gsm8k-qwen3",
    )
)
@RunFolder
@click.argument("target", required=False, type=UserPath(path_type=Path), metavar="[TARGET]")
@click.option("--step", type=int, help="Checkpoint to export; default: the newest.")
@click.option("--best", is_flag=True, help="The checkpoint that is best by checkpoint.keep_best.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--adapter", is_flag=True, help="Of a run with trainer.lora: the adapter alone, as a peft folder.")
@click.option(
    "--push-to-hub", metavar="REPO", help="Upload it to this repository of the Hugging Face Hub; a new one is private."
)
def export(
    run_folder: Path,
    target: Path | None,
    step: int | None,
    best: bool,
    dtype: str,
    adapter: bool,
    push_to_hub: str | None,
) -> None:
    """Write a checkpoint as a Hugging Face model folder that `transformers` loads; a LoRA adapter is merged into it.

    With --push-to-hub TARGET may be left out: the folder is then removed once it is uploaded.
    """
    from sluice.scripts.api.export import check_login, checkpoint_step, export_model, upload

    if best and step is not None:
        raise ConfigError("--best and --step name two checkpoints: give one of them")
    if target is None and push_to_hub is None:
        raise ConfigError("say where the model goes: a folder, --push-to-hub REPO, or both")
    if push_to_hub:
        check_login(push_to_hub)
    step = checkpoint_step(run_folder, "best") if best else step
    with tempfile.TemporaryDirectory(prefix="sluice-export-") as temporary:
        folder = target or Path(temporary)
        exported = export_model(run_folder, folder, step=step, dtype=dtype, adapter=adapter)
        if push_to_hub:
            address = upload(folder, push_to_hub, run_folder=run_folder, step=exported)
            click.echo(f"step {exported} of {run_folder.name} is at {address}")
    if target:
        click.echo(f"step {exported} of {run_folder.name} is in {target}")


@click.command(epilog=example("sluice replay runs/gsm8k --step 100"))
@RunFolder
@click.option(
    "--step", type=int, help="Only this step, from the nearest checkpoint before it; default: all that can be."
)
@Json
def replay(run_folder: Path, step: int | None, as_json: bool) -> None:
    """Compute recorded steps again from the groups that `audit` kept. Exit code 1 when a loss differs by over 1e-6."""
    from sluice.trainer.replay import replay as replay_steps  # torch loads here

    steps = []
    for replayed in replay_steps(run_folder, step=step):
        steps.append(replayed)
        if not as_json:
            click.echo(_line(replayed))
    agrees = all(replayed.agrees for replayed in steps)
    if as_json:
        echo_json({"steps": [asdict(replayed) for replayed in steps], "agrees": agrees})
    else:
        same = sum(replayed.began_with_same_weights for replayed in steps)
        verdict = "agree to 1e-6" if agrees else "DIFFER"
        click.echo(f"{len(steps)} steps, {same} began with the recorded weights bit for bit; losses {verdict}")
    sys.exit(0 if agrees else 1)


def _line(replayed: ReplayedStep) -> str:
    weights = {True: "same bits as the checkpoint", False: "DIFFERENT BITS than the checkpoint", None: ""}
    return (
        f"step {replayed.step}  loss {replayed.recorded_loss:.9f} recorded, {replayed.replayed_loss:.9f} replayed"
        f"  grad_norm {replayed.recorded_grad_norm:.6f}, {replayed.replayed_grad_norm:.6f}"
        f"  began with {'the same' if replayed.began_with_same_weights else 'OTHER'} weights"
        f"  {weights[replayed.ended_with_same_weights]}".rstrip()
    )
