"""Signed manifests: a worker that has the run's key serves no policy that was published without it.

The key is in SLUICE_RUN_KEY, or in the file that SLUICE_RUN_KEY_FILE names. The trainer has it, and the roles that load
policies (rollout, eval, reference). `sluice run` makes one per run; roles started separately get it from their environment.
It is never in Redis. Without a key nothing is signed and nothing refused.

    signed manifest = b"SL+" | HMAC-SHA256 (32 bytes) | manifest as encoded         over b"sluice manifest" 0 run 0 manifest

The manifest names its version, and the digest of every tensor, so nothing else of a policy needs a signature. HMAC: RFC 2104.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from sluice.common.errors import ConfigError, SignatureRefused

RUN_KEY = "SLUICE_RUN_KEY"
MIN_LENGTH = 32
_MARK = b"SL+"
_HEAD = len(_MARK) + hashlib.sha256().digest_size


class Signer:
    """Signs and verifies for one run."""

    def __init__(self, run: str, key: str | None) -> None:
        """Take a run's key, or none. Raises ConfigError for a key that is too short."""
        if key is not None and len(key) < MIN_LENGTH:
            raise ConfigError(f"{RUN_KEY} has {len(key)} characters: use {MIN_LENGTH} random ones or more")
        self._run = run
        self._key = None if key is None else key.encode()

    def sign(self, manifest: bytes) -> bytes:
        """Return the manifest with its signature; unchanged without a key."""
        return manifest if self._key is None else _MARK + self._mac(manifest) + manifest

    def verify(self, signed: bytes, *, version: int) -> bytes:
        """Return the manifest, verified if there is a key. Raises SignatureRefused."""
        manifest = unsigned_bytes(signed)
        if self._key is None:
            return manifest
        if manifest is signed:
            raise SignatureRefused(
                f"policy version {version} is not signed, and this process has the run's key: was it published by a trainer "
                f"that was started without {RUN_KEY}, or by another process?"
            )
        if not hmac.compare_digest(signed[len(_MARK) : _HEAD], self._mac(manifest)):
            raise SignatureRefused(
                f"policy version {version} is not signed with this process' {RUN_KEY}: it has another key than the trainer, or "
                "another process has published it"
            )
        return manifest

    def _mac(self, manifest: bytes) -> bytes:
        assert self._key is not None
        return hmac.digest(self._key, b"\0".join([b"sluice manifest", self._run.encode(), manifest]), "sha256")


def unsigned_bytes(signed: bytes) -> bytes:
    """Return the manifest, not verified: for display only."""
    return signed[_HEAD:] if signed.startswith(_MARK) else signed


def make_key(file: Path) -> None:
    """Write a new random key, readable by its owner only."""
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32) + "\n")
