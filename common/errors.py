"""What a caller can act on.

SluiceError
  ConfigError            a config key or value, or an input file, is wrong: names what, where, what to do (exit code 2)
  ConnectionFailed       Redis cannot be reached, or is older than 6.2 (exit code 2)
  SerializationError     bytes that are not ours, or of another schema version
  PolicyError            a policy version cannot be published, found or verified
    PolicyNotFound       no such version in the store
    DigestMismatch       the bytes are not those that the manifest names
    SignatureRefused     the manifest is not signed with the run's key
  EngineError            an engine could not generate; the group is retried elsewhere
    EngineClosed         the engine is shutting down; the group is returned, no attempt is spent
  StateLost              Redis has lost the trainer's last writes: it was restarted, or replaced by another server
  DiskFull               a file could not be written: the trainer pauses until there is room
  Hopeless               training ends, and a restart would not change why (exit code 3)
    Diverged             the gradients of many steps in a row are not finite
    OnlyLosing           every group of a whole window was lost, and no step was made
  RunFailed              a run has ended before its last step; the message holds the reason, or the end of a role's log
  RewardError            a reward function raised, ran out of time or returned nonsense: infrastructure, never a score
"""

from __future__ import annotations

import difflib
import os
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

_OURS = f"{Path(__file__).parents[1]}{os.sep}"
_INSTALLED = tuple({f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class SluiceError(Exception):
    """Root of all errors that Sluice raises on purpose."""


class ConfigError(SluiceError, ValueError):
    """A config key or value, or an input that it names, is wrong."""


class ConnectionFailed(SluiceError):
    """Redis cannot be reached or used."""


class SerializationError(SluiceError, ValueError):
    """Bytes that cannot be decoded as a Sluice message."""


class PolicyError(SluiceError):
    """A policy version cannot be published, found or verified."""


class PolicyNotFound(PolicyError):
    """The store does not hold this version."""


class DigestMismatch(PolicyError):
    """The bytes read are not those that the manifest names."""


class SignatureRefused(PolicyError):
    """The manifest is not signed with the run's key."""


class EngineError(SluiceError):
    """The engine could not serve a request."""


class EngineClosed(EngineError):
    """The engine is shutting down; the request was not served."""


class StateLost(SluiceError):
    """Redis has lost writes that this process made."""


class DiskFull(SluiceError):
    """There is no room for a file; existing files are intact."""


class Hopeless(SluiceError):
    """Training cannot continue, and a restart would not change that."""

    EXIT_CODE = 3


class Diverged(Hopeless):
    """No gradient is finite any more."""


class OnlyLosing(Hopeless):
    """Every group of a whole window was lost, and no step was made."""


class RunFailed(SluiceError):
    """A role cannot be kept alive, or training cannot continue."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RewardError(SluiceError):
    """A reward function failed: an infrastructure failure, never a score of 0."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return a question that names the nearest of the known names; "" where none is near."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else ""


def raised_at(error: BaseException) -> str:
    """Return "file:line" of where an error began: the last line of a user's own file, else the first line outside of Sluice,
    else the innermost one; "" for an error that was never raised here."""
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith((_OURS, "<"))]
    own = [frame for frame in outside if not frame.filename.startswith(_INSTALLED)]
    chosen = next(iter([*own[-1:], *outside[:1], *frames[-1:]]), None)
    return f"{chosen.filename}:{chosen.lineno}" if chosen else ""
