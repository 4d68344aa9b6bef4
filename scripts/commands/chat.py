"""`sluice chat`: a conversation with a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sluice.common.monitoring.printable import printable
from sluice.scripts.commands.convert import RunFolder
from sluice.scripts.options import example


@click.command(
    epilog=example("sluice chat runs/gsm8k", 'echo "What is 2+2?" | sluice chat runs/gsm8k --checkpoint best')
)
@RunFolder
@click.option("--checkpoint", default="latest", show_default=True, metavar="STEP|best|latest", help="Whom to talk to.")
@click.option(
    "--temperature", type=click.FloatRange(0, 10), default=0.0, show_default=True, help="0 = the likeliest token."
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Bound on an answer; default: sampling.max_res_tokens.")
@click.option(
    "--history",
    is_flag=True,
    help="Earlier lines are part of each prompt; default: every line stands alone, as in training.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1.")
def chat(
    run_folder: Path, checkpoint: str, temperature: float, max_tokens: int | None, history: bool, device: str
) -> None:
    """Talk to a checkpoint of a run folder, line by line, also while the run trains. Needs no Redis."""
    from sluice.scripts.api.chat import Chat, Message  # torch loads here
    from sluice.scripts.api.export import checkpoint_step

    talk = Chat(run_folder, step=checkpoint_step(run_folder, checkpoint), device=device)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        click.echo(f"step {talk.loaded_step} of {run_folder.name}; Ctrl-D ends the conversation", err=True)
    messages: list[Message] = []
    while True:
        if is_terminal:
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            break
        if not (text := line.strip()):
            continue
        messages = [*messages, {"role": "user", "content": text}] if history else []
        streamer = talk.streamer() if is_terminal else None
        said = talk.answer(messages or text, temperature=temperature, max_tokens=max_tokens, streamer=streamer)
        if not is_terminal:
            click.echo(printable(said))
        messages = [*messages, {"role": "assistant", "content": said}] if history else []
