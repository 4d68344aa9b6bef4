"""What a step was trained on, kept in the run folder: enough to compute the step again without Redis.

    <run folder>/audit/step-00000040.zst      zstd(wire format of a StepRecord)

Written into a temporary file and renamed; a step that is trained again after a roll-back replaces its
record, so the records are those of the branch that the weights come from. The ledger does not depend on records: a full
disk costs records, never the run.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import zstandard

from sluice.common.config import Config
from sluice.common.errors import ConfigError, SerializationError
from sluice.common.serialization import decode, encode
from sluice.common.types import Group

log = logging.getLogger("sluice.trainer")

_LEVEL = 3
"Token ids shrink to a half; float logprobs hardly shrink at any level."


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One optimizer step, before and after."""

    step: int
    parent_digest: str
    "digest of the policy, in the sampling precision, that the step began with"
    groups: list[Group]
    "in the order they were trained in"
    metrics: dict[str, float]
    settings: dict[str, str] = field(default_factory=dict)
    "keys of the config that an operator had set to other values than the stored ones, as JSON"


class Audit:
    """Writes the records of a run, as `audit` says: `all`, `sample` (the step after each checkpoint), `none`."""

    def __init__(self, run_folder: Path, config: Config) -> None:
        self._folder = audit_folder(run_folder)
        self._kept = config.audit

    def record(self, record: StepRecord, *, saved_step: int) -> None:
        """Keep a step, if it is one that is kept. saved_step: that of the newest checkpoint; 0 = the base model."""
        if self._kept == "none" or (self._kept == "sample" and record.step - 1 != saved_step):
            return
        path = _path(self._folder, record.step)
        temporary = path.with_suffix(".tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            wire = {f.name: getattr(record, f.name) for f in fields(record)}
            wire["groups"] = [group.to_wire() for group in record.groups]
            temporary.write_bytes(zstandard.compress(encode(wire), _LEVEL))
            temporary.rename(path)
        except OSError as error:
            log.error("step %d is not in the audit: %s", record.step, error)
            with suppress(OSError):
                temporary.unlink()

    def forget_after(self, step: int) -> None:
        """Remove the records after this step, from which the run resumes: they belong to an abandoned branch."""
        for later in [s for s in recorded_steps(self._folder) if s > step]:
            _path(self._folder, later).unlink(missing_ok=True)

    def keep_only_replayable(self, checkpoints: list[int]) -> None:
        """Remove, with `sample`, the records whose checkpoint is gone."""
        if self._kept == "sample":
            for step in recorded_steps(self._folder):
                if step - 1 not in (0, *checkpoints):
                    _path(self._folder, step).unlink(missing_ok=True)


def audit_folder(run_folder: Path) -> Path:
    return run_folder / "audit"


def recorded_steps(folder: Path) -> list[int]:
    """Return the steps that have a record, ascending."""
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.zst"))


def read_record(folder: Path, step: int) -> StepRecord:
    """Read the record of a step. Raises ConfigError when it is missing or damaged."""
    path = _path(folder, step)
    try:
        wire = decode(zstandard.ZstdDecompressor().decompress(path.read_bytes()))
        return StepRecord(**{**wire, "groups": [Group.from_wire(group) for group in wire["groups"]]})
    except FileNotFoundError:
        steps = ", ".join(map(str, recorded_steps(folder))) or "none"
        raise ConfigError(
            f"step {step} is not in {folder} (recorded steps: {steps}); audit=all records every step"
        ) from None
    except (zstandard.ZstdError, SerializationError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.zst"
