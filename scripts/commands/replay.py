"""`sluice replay`: recorded steps next to the same steps computed again."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sluice.scripts.options import Json, UserPath, example

if TYPE_CHECKING:
    from sluice.trainer.replay import ReplayedStep


@click.command(epilog=example("sluice replay runs/gsm8k --step 100"))
@click.argument("run_folder", type=UserPath(exists=True, file_okay=False, path_type=Path))
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
        click.echo(json.dumps({"steps": [asdict(replayed) for replayed in steps], "agrees": agrees}))
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
