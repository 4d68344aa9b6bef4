"""Signed manifests: a worker that has the run's key serves no policy that was published without it.

The key is in SLUICE_RUN_KEY, or in the file that SLUICE_RUN_KEY_FILE names. The trainer has it, and the roles that load
policies (rollout, eval, reference). `sluice run` makes one per run; roles started separately get it from their environment.
It is never in Redis. Without a key nothing is signed and nothing refused.

    signed manifest = b"SL+" | MAC of "manifest", manifest | manifest as encoded
    confirmation    = seconds of Redis' clock : MAC of "pointer", when the run was created:version:seconds, digest, in hex
    MAC             = HMAC-SHA256 (RFC 2104) over the run's name and these, with 0 between

The manifest names its version, the digest of every tensor, and when the run was created, so nothing else of a policy needs a
signature, and that of a deleted run is not valid in another one of its name. Within a run it stays valid, so who can write to
Redis could move the pointer back: a worker that starts serves the version that the pointer names only while the trainer confirms
it, every CONFIRM_S. A running one never goes back.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from sluice.common.errors import ConfigError, SignatureRefused

RUN_KEY = "SLUICE_RUN_KEY"
MIN_LENGTH = 32
CONFIRM_S = 10.0
MAX_UNCONFIRMED_S = 60.0
"""Older confirmations count for nothing."""
_MARK = b"SL+"
_HEAD = len(_MARK) + hashlib.sha256().digest_size


class Signer:
    """Signs and verifies for one run."""

    def __init__(self, run: str, key: str | None, *, created_us: int | None = None) -> None:
        """Take a run's key, or none. Raises ConfigError for a key that is too short.

        created_us: when the run was created, which tells it from another one of its name; none = any.
        """
        if key is not None and len(key) < MIN_LENGTH:
            raise ConfigError(f"{RUN_KEY} has {len(key)} characters: use {MIN_LENGTH} random ones or more")
        self._run, self.created_us = run, created_us
        self._key = None if key is None else key.encode()

    def of_run(self, created_at: str) -> Signer:
        """Return the signer of the run of this name that was created then: seconds, as its record says."""
        created_us = round(float(created_at) * 1e6) if created_at else 0
        return Signer(self._run, None if self._key is None else self._key.decode(), created_us=created_us)

    def check_run(self, created_us: int, *, version: int) -> None:
        """Check, if there is a key, when the run of a manifest was created. Raises SignatureRefused."""
        if self._key is not None and self.created_us not in (None, created_us):
            raise SignatureRefused(
                f"policy version {version} is signed for another run of this name: it was published before this run was created"
            )

    def sign(self, manifest: bytes) -> bytes:
        """Return the manifest with its signature; unchanged without a key."""
        return manifest if self._key is None else _MARK + self._mac(b"manifest", manifest) + manifest

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
        if not hmac.compare_digest(signed[len(_MARK) : _HEAD], self._mac(b"manifest", manifest)):
            raise SignatureRefused(
                f"policy version {version} is not signed with this process' {RUN_KEY}: it has another key than the trainer, or "
                "another process has published it"
            )
        return manifest

    def confirm(self, version: int, digest: str, *, now_s: int) -> bytes:
        """Return the confirmation that this version is served; empty without a key."""
        return b"" if self._key is None else b"%d:%s" % (now_s, self._confirmation(version, digest, now_s))

    def check_confirmed(self, version: int, digest: str, confirmation: bytes, *, now_s: int) -> None:
        """Check, if there is a key, that the trainer has confirmed this version a moment ago. Raises SignatureRefused."""
        if self._key is None:
            return
        at, _, given = confirmation.partition(b":")
        at_s = int(at) if at.isdigit() and len(at) < 12 else 0
        if not hmac.compare_digest(given, self._confirmation(version, digest, at_s)):
            raise SignatureRefused(
                f"the pointer names policy version {version}, which the trainer does not confirm: has the trainer another "
                f"{RUN_KEY}, or has another process moved the pointer?"
            )
        if abs(now_s - at_s) > MAX_UNCONFIRMED_S:
            raise SignatureRefused(
                f"the trainer last confirmed policy version {version} {now_s - at_s} s ago: waiting until it does again"
            )

    def _confirmation(self, version: int, digest: str, at_s: int) -> bytes:
        return (
            self._mac(b"pointer", b"%d:%d:%d" % (self.created_us or 0, version, at_s), digest.encode()).hex().encode()
        )

    def _mac(self, what: bytes, *parts: bytes) -> bytes:
        assert self._key is not None
        return hmac.digest(self._key, b"\0".join([b"sluice " + what, self._run.encode(), *parts]), "sha256")


def unsigned_bytes(signed: bytes) -> bytes:
    """Return the manifest, not verified: for display only."""
    return signed[_HEAD:] if signed.startswith(_MARK) else signed


def make_key(file: Path) -> None:
    """Write a new random key, readable by its owner only."""
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32) + "\n")
