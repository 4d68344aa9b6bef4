"""A checkpoint as a model folder, and a model folder on the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sluice.common.config.file import read_training_config
from sluice.common.errors import ConfigError
from sluice.common.ledger.evaluations import read_best

HUB_ERRORS_SHOWN = 300
"""Characters of what the hub answers."""


def checkpoint_step(run_folder: Path, which: str) -> int | None:
    """Return the step that `latest`, `best` or a number means; none = the newest. Raises ConfigError."""
    if which == "latest":
        return None
    if which == "best":
        from sluice.trainer.best import best_step

        return best_step(run_folder / "checkpoints")
    if which.isdecimal():
        return int(which)
    raise ConfigError(f"checkpoint {which!r}: give a step, `latest` or `best`")


def export_model(
    run_folder: Path, target: Path, *, step: int | None, dtype: str = "float32", adapter: bool = False
) -> int:
    """Write a checkpoint as a model folder that anyone may read; return its step. Raises ConfigError, DiskFull."""
    from sluice.trainer.export import export_checkpoint  # torch loads here

    before = set(target.iterdir()) if target.is_dir() else set()
    with without_bars():
        exported = export_checkpoint(run_folder, target, step=step, dtype=dtype, adapter=adapter)
    target.chmod(0o755)  # a model is made to be handed on
    for path in set(target.iterdir()) - before:
        path.chmod(0o644)
    return exported


@contextmanager
def without_bars() -> Iterator[None]:
    """Let transformers load and write models without its progress bars."""
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows_bars:
            logging.enable_progress_bar()


def check_login(repo: str) -> None:
    """Refuse a repository that cannot be one, or a machine without a token, before a model is loaded. Raises ConfigError."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"upload to {repo!r}: {error}; write OWNER/NAME") from None
    if get_token() is None:
        raise ConfigError(
            f"upload to {repo}: no token of the Hugging Face Hub is here: `hf auth login`, or set HF_TOKEN"
        )


def upload(folder: Path, repo: str, *, run_folder: Path, step: int) -> str:
    """Upload a model folder with a card; return the address. A repository that is made for it is private.

    Raises ConfigError where the hub refuses it, or cannot be reached.
    """
    from huggingface_hub import HfApi

    check_login(repo)
    api = HfApi(library_name="sluice")
    try:
        made = api.create_repo(repo, private=True, exist_ok=True)
        if not api.file_exists(made.repo_id, "README.md"):  # a card that a person wrote stays
            (folder / "README.md").write_text(_card(run_folder, step))
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=f"Step {step} of {run_folder.name}")
    except Exception as error:  # its own, and those of the HTTP library that it uses, which changes with its version
        reason = " ".join(str(error).split())[:HUB_ERRORS_SHOWN] or type(error).__name__
        raise ConfigError(f"upload to {repo}: {reason}; the model is not lost, it can be exported again") from None
    return str(made)


def _card(run_folder: Path, step: int) -> str:
    """Return a model card: what it was made from, and what was measured."""
    config = read_training_config(run_folder)
    kept: dict[str, Any] = {"library_name": "transformers", "tags": ["sluice", "reinforcement-learning"]}
    if not Path(config.model.path).exists():
        kept["base_model"] = config.model.path
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in kept.items())
    lines = [f"Step {step} of the run `{run_folder.name}`, trained with [Sluice](https://pypi.org/project/sluice-rl/)."]
    best = read_best(run_folder / "checkpoints")
    if best and best.step == step:
        lines.append(f"{best.metric}: {best.value:.4f}.")
    return f"---\n{head}\n---\n\n# {run_folder.name}\n\n" + "\n".join(lines) + "\n"
