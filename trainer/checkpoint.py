"""Durable state of the trainer: everything that a new process needs to continue as if nothing had happened.

    <run folder>/checkpoints/step-00000040/
        model.safetensors       float32 master weights; with trainer.lora the adapter's, as peft names them
        optimizer.safetensors   AdamW moments
        state.json              step, version, cursor, random state, groups trained since the checkpoint before, digests
        model-00001.safetensors, optimizer-00001.safetensors, ...      of ranks 1, ...: see below

Where weights are sharded over ranks, each rank writes its rows of every tensor, in the order of the ranks. So any number of ranks
reads what any other number wrote, each only the rows that it needs. (torch's distributed checkpoints do the same, but exchange
their plans as pickles.)

Written into a temporary folder, fsynced, renamed; the `latest` file is moved last (`best`: trainer/best.py). A damaged
checkpoint is one that has no state.json under its final name, or whose files do not have the digests that state.json names;
then the previous one is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sluice.common.disk import fsync, needing_room, replace_text
from sluice.common.errors import ConfigError
from sluice.trainer.adapter import check_base

if TYPE_CHECKING:
    from sluice.trainer.distributed.parallel import ParallelPolicy
    from sluice.trainer.trained_policy import TrainedPolicy

log = logging.getLogger("sluice.checkpoint")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """What a checkpoint holds besides tensors."""

    step: int
    "batches trained on"
    version: int
    "policy version of these weights"
    cursor: int
    "dataset cursor when it was written: where to resume if Redis has lost everything"
    random_state: str
    "hex of torch's CPU generator"
    trained_groups: list[str] = field(default_factory=list)
    "groups trained since the checkpoint before"
    recent_groups: list[str] = field(default_factory=list)
    "groups trained shortly before that: those that a restarted Redis may have lost"
    wall_s: float = 0.0
    "seconds of training so far, all incarnations"
    base_digest: str = ""
    "of the adapter's base weights and its scale; empty = full weights"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint read back."""

    path: Path
    state: TrainerState

    @property
    def weights(self) -> dict[str, Tensor]:
        """All of them, read now."""
        return SavedTensors(self.path, "model").all()


class SavedTensors:
    """The tensors of one kind in a checkpoint, over all its files."""

    def __init__(self, folder: Path, kind: str) -> None:
        paths = [folder / f"{kind}.safetensors", *sorted(folder.glob(f"{kind}-*.safetensors"))]
        self._holders: dict[str, list[Any]] = {}  # in the order of the ranks that wrote the files
        for file in (safe_open(path, "pt") for path in paths):
            for name in file.keys():  # noqa: SIM118  it is not a mapping
                self._holders.setdefault(name, []).append(file)

    @property
    def names(self) -> set[str]:
        return set(self._holders)

    def shape(self, name: str) -> torch.Size:
        first, *others = (file.get_slice(name).get_shape() for file in self._holders[name])
        return torch.Size([first[0] + sum(shape[0] for shape in others), *first[1:]] if others else first)

    def full(self, name: str) -> Tensor:
        parts: list[Tensor] = [file.get_tensor(name) for file in self._holders[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows start to stop of the full tensor from the files that hold them."""
        parts, begins = [], 0
        for file in self._holders[name]:
            part = file.get_slice(name)
            ends = begins + part.get_shape()[0]
            if max(start, begins) < min(stop, ends):
                parts.append(part[max(start, begins) - begins : min(stop, ends) - begins])
            begins = ends
        return torch.cat(parts) if parts else self._holders[name][0].get_slice(name)[:0]

    def all(self) -> dict[str, Tensor]:
        return {name: self.full(name) for name in self._holders}


def write_tensors(folder: Path, kind: str, tensors: dict[str, Tensor], *, rank: int) -> dict[str, str]:
    """Write one rank's tensors durably, if it has any; return the file's digest by its name. Raises DiskFull."""
    if not tensors and rank > 0:
        return {}
    path = folder / (f"{kind}-{rank:05d}.safetensors" if rank else f"{kind}.safetensors")
    with needing_room(folder, what=f"{path.name} of a checkpoint"):
        folder.mkdir(exist_ok=True)  # another machine may not see it yet
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        fsync(path)
    return {path.name: _digest(path)}


def save_checkpoint(
    folder: Path,
    state: TrainerState,
    *,
    write: Callable[[Path], dict[str, str]],
    keep: int,
    protected: Collection[int] = (),
) -> Path:
    """Write a checkpoint durably; it exists for readers only when complete. Older ones beyond `keep` are removed, but for
    those of `protected` steps.

    write: writes the tensors into a folder, durably, and returns the digests of its files by name (`TrainedPolicy.save`).
    Raises DiskFull; the folder is then removed, and the previous checkpoint is unchanged.
    """
    final = folder / f"step-{state.step:08d}"
    for leftover in folder.glob(".tmp-*"):  # of a trainer that was killed while it wrote
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    with needing_room(folder, what=f"the checkpoint of step {state.step}"), removed_on_failure(temporary):
        temporary.mkdir()
        state_file = temporary / "state.json"
        fields = {**asdict(state), "files": write(temporary)}
        state_file.write_text(json.dumps({**fields, "digest": _text_digest(fields)}, indent=1))
        fsync(state_file)
        fsync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        replace_text(folder / "latest", final.name)
        fsync(folder)
    remove_old_checkpoints(folder, keep=keep, protected=protected)
    return final


def remove_old_checkpoints(folder: Path, *, keep: int, protected: Collection[int] = ()) -> None:
    """Remove all but the newest `keep` and those of `protected` steps."""
    for step, old in list(_complete(folder).items())[:-keep]:
        if step not in protected:
            shutil.rmtree(old)


def saved_versions(folder: Path) -> dict[int, int]:
    """Return step -> policy version, of the checkpoints whose state is readable."""
    found = {}
    for step, path in _complete(folder).items():
        with suppress(OSError, ValueError, KeyError):
            found[step] = int(_read_state(path)["version"])
    return found


@contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Remove a folder that is not written to its end."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that loads; skip damaged ones with a warning."""
    for path in reversed(_complete(folder).values()):
        try:
            return read_checkpoint(path)
        except _DAMAGE as error:
            log.warning("checkpoint %s is damaged and skipped: %s", path, error)
    return None


_DAMAGE = (OSError, ValueError, TypeError, safetensors.SafetensorError)
"""What reading a damaged checkpoint raises."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises OSError, ValueError, TypeError or SafetensorError when it is damaged."""
    fields = _read_state(path)
    for name, digest in fields.pop("files").items():
        if _digest(path / name) != digest:
            raise ValueError(f"{name} does not have the digest that state.json names")
    return Checkpoint(path=path, state=TrainerState(**fields))


def checkpoint_at(folder: Path, step: int | None) -> Checkpoint:
    """Return the checkpoint of a step, or the newest. Raises ConfigError when there is none."""
    found = newest_checkpoint(folder) if step is None else None
    path = folder / f"step-{step or 0:08d}"
    if step is not None and (path / "state.json").is_file():
        try:
            found = read_checkpoint(path)
        except _DAMAGE as error:
            raise ConfigError(f"checkpoint {path} is damaged: {error}") from None
    if found is None:
        known = ", ".join(map(str, checkpoint_steps(folder))) or "none"
        raise ConfigError(f"no checkpoint of step {step or 'any'} in {folder} (steps there: {known})")
    return found


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps that have a complete checkpoint, ascending."""
    return list(_complete(folder))


def go_on_from(found: Checkpoint, policy: TrainedPolicy | ParallelPolicy) -> None:
    """Restore weights, optimizer and random state. Raises ConfigError, DigestMismatch: it is of another policy."""
    check_base(found.state.base_digest, policy.base_digest)
    policy.restore(found.path)
    restore_random_state(found.state.random_state)


def random_state() -> str:
    return bytes(torch.get_rng_state().numpy()).hex()


def restore_random_state(state: str) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8))


def _complete(folder: Path) -> dict[int, Path]:
    """Return the folders of the complete checkpoints by step, ascending."""
    complete = sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())
    return {int(path.name.removeprefix("step-")): path for path in complete}


def _read_state(path: Path) -> dict[str, Any]:
    """Return what a checkpoint's state.json holds, its digest checked. Raises OSError, ValueError."""
    fields = json.loads((path / "state.json").read_text())
    if not isinstance(fields, dict) or fields.pop("digest", None) != _text_digest(fields):
        raise ValueError("state.json does not have the digest that it names")
    return fields


def _text_digest(fields: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(fields).encode())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
