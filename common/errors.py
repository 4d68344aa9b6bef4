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
  Diverged               the gradients of many steps in a row are not finite: training ends (exit code 3)
  RewardError            a reward function raised, ran out of time or returned nonsense: infrastructure, never a score
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


class Diverged(SluiceError):
    """Training cannot continue: no gradient is finite any more, and a restart would not change that."""

    EXIT_CODE = 3


class RewardError(SluiceError):
    """A reward function failed: an infrastructure failure, never a score of 0."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return a question that names the nearest of the known names; "" where none is near."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else ""
