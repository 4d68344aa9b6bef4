"""Where the bytes of a policy version are stored: a shared directory, or Redis.

A version has `weights` (all tensors), a `delta` (patches on an earlier version, `common/policies/delta.py`), or both; each is
one set of tensors in safetensors format:

* DirectoryTransport: one file, written under a temporary name and renamed.
* RedisTransport: the same bytes in 2 MiB chunks (larger ones are 2-7x slower), for machines without a shared folder.

Another one is a class with the methods of `Transport`, a value of `policy_store.transport` in `common/config/schema.py`, and a
line in `open_transport` (docs/extending.md).
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Literal, Protocol, get_args

import redis
import safetensors
import safetensors.torch
import torch

from sluice.common.config import PolicyStoreConfig
from sluice.common.disk import needing_room
from sluice.common.errors import ConfigError, DigestMismatch, PolicyNotFound, SerializationError
from sluice.common.keys import Keys
from sluice.common.policies.lineage import read_versions
from sluice.common.serialization import decode_int

CHUNK_BYTES = 2 * 1024 * 1024
_UNLINKED = 256
"""Chunks deleted per command."""

Kind = Literal["weights", "delta"]
Loaded = tuple[dict[str, torch.Tensor], int]
"""Tensors, and the number of bytes read."""


class Transport(Protocol):
    """Carries the bytes of a version."""

    def write(self, version: int, tensors: Mapping[str, torch.Tensor], kind: Kind = "weights") -> int:
        """Store tensors of a version, replacing leftovers of a crash. Returns bytes. Raises DiskFull."""

    def read(self, version: int, kind: Kind = "weights", *, renew: Callable[[], None]) -> Loaded:
        """Return unverified tensors, and the bytes read; call `renew` between pieces. Raises PolicyNotFound, DigestMismatch."""

    def delete(self, version: int) -> None:
        """Free a version, complete or not; do nothing if there is none."""

    def sweep(self, is_garbage: Callable[[int], bool]) -> None:
        """Free every version of which this is true; versions are found by their bytes."""


class DirectoryTransport:
    """One safetensors file per version and kind in a folder that trainer and workers share."""

    def __init__(self, folder: Path, *, is_private: bool = False) -> None:
        """Use a folder. is_private: it is in a folder of all users, so that its owner is checked before each use."""
        self._folder, self._is_private = folder, is_private

    def write(self, version: int, tensors: Mapping[str, torch.Tensor], kind: Kind = "weights") -> int:
        self._check()  # before: nothing is made behind a link; and after, for what another user made meanwhile
        if self._is_private:
            self._folder.parent.mkdir(exist_ok=True, mode=0o700)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._check()
        path = self._path(version, kind)
        for leftover in self._folder.glob(f"{path.stem}.tmp*"):  # of a trainer killed while it wrote this version
            leftover.unlink(missing_ok=True)
        temporary = path.with_suffix(f".tmp{os.getpid()}")
        with needing_room(self._folder, what=f"policy version {version}"):
            try:
                safetensors.torch.save_file(dict(tensors), temporary)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        temporary.rename(path)
        return path.stat().st_size

    def read(self, version: int, kind: Kind = "weights", *, renew: Callable[[], None]) -> Loaded:
        self._check()
        path = self._path(version, kind)
        try:
            # mapped; a file that is deleted or replaced meanwhile stays readable
            return safetensors.torch.load_file(path), path.stat().st_size
        except FileNotFoundError:
            raise PolicyNotFound(
                f"policy version {version} is not at {path}: is policy_store.path shared with the trainer's machine? "
                "If not, use policy_store.transport=redis"
            ) from None
        except safetensors.SafetensorError as error:
            raise DigestMismatch(f"policy version {version} at {path} is damaged: {error}") from None

    def delete(self, version: int) -> None:
        for path in self._folder.glob(f"*-{version:08d}.*"):  # of every kind, and what a killed trainer left of them
            path.unlink(missing_ok=True)

    def sweep(self, is_garbage: Callable[[int], bool]) -> None:
        versions = {int(path.stem.rpartition("-")[2]) for path in self._folder.glob(f"*-{'[0-9]' * 8}.*")}
        for version in filter(is_garbage, versions):
            self.delete(version)

    def _check(self) -> None:
        if self._is_private:
            check_private(self._folder)

    def _path(self, version: int, kind: Kind) -> Path:
        return self._folder / f"{'policy' if kind == 'weights' else kind}-{version:08d}.safetensors"


class RedisTransport:
    """The safetensors bytes in chunks under `<kind>:<version>:<i>`; how many bytes under `<kind>:<version>`.

    The number is written first, so that the chunks of a killed trainer can be deleted.
    """

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys

    def write(self, version: int, tensors: Mapping[str, torch.Tensor], kind: Kind = "weights") -> int:
        data = memoryview(safetensors.torch.save(dict(tensors)))
        self._client.set(self._keys.tensors(kind, version), len(data))
        for i, start in enumerate(range(0, len(data), CHUNK_BYTES)):
            self._client.set(self._keys.tensors(kind, version, i), data[start : start + CHUNK_BYTES])
        return len(data)

    def read(self, version: int, kind: Kind = "weights", *, renew: Callable[[], None]) -> Loaded:
        written = self._client.get(self._keys.tensors(kind, version))
        if written is None:
            raise PolicyNotFound(f"policy version {version} is not in Redis: it was removed, or never written")
        try:
            size = decode_int(written)
        except SerializationError as error:
            raise DigestMismatch(f"the size of policy version {version} in Redis cannot be read: {error}") from None
        data = bytearray()  # grows with what is there: a wrong size takes no memory
        for i, start in enumerate(range(0, size, CHUNK_BYTES)):
            chunk = self._client.get(self._keys.tensors(kind, version, i))
            if chunk is None:
                raise PolicyNotFound(f"policy version {version}: chunk {i} is missing in Redis")
            if len(chunk) != min(CHUNK_BYTES, size - start):
                raise DigestMismatch(f"policy version {version}: chunk {i} in Redis has {len(chunk)} bytes")
            data += chunk
            renew()
        try:
            return safetensors.torch.load(bytes(data)), len(data)
        except safetensors.SafetensorError as error:
            raise DigestMismatch(f"policy version {version} in Redis is damaged: {error}") from None

    def delete(self, version: int) -> None:
        for kind in get_args(Kind):
            for start in count(step=_UNLINKED):  # what is there, whatever the size says; the size goes last
                chunks = [self._keys.tensors(kind, version, i) for i in range(start, start + _UNLINKED)]
                if self._client.unlink(*chunks) < _UNLINKED:
                    break
            self._client.unlink(self._keys.tensors(kind, version))

    def sweep(self, is_garbage: Callable[[int], bool]) -> None:
        """Free versions by one scan over all keys of the server."""
        for kind in get_args(Kind):
            root = self._keys.tensors(kind, "")
            for key in self._client.scan_iter(match=root + "*", count=10_000):
                named = read_versions([key.removeprefix(root.encode()).partition(b":")[0]], where=repr(key))
                if any(map(is_garbage, named)):
                    self._client.unlink(key)


def open_transport(client: redis.Redis, keys: Keys, config: PolicyStoreConfig) -> Transport:
    """Return the transport of a run's policies. Raises ConfigError for a folder that another user could write to."""
    if config.transport == "redis":
        return RedisTransport(client, keys)
    return DirectoryTransport(store_folder(config, keys.run), is_private=not config.path)


def store_folder(config: PolicyStoreConfig, run: str) -> Path:
    """Return the folder of a run's directory transport. Raises ConfigError where another user could write to it."""
    if config.path:
        return Path(config.path) / run
    folder = everyones_folder() / f"sluice-{os.getuid()}" / run
    check_private(folder)
    return folder


def everyones_folder() -> Path:
    """Return the folder of all users in which policies are kept without `policy_store.path`: in memory, where there is one."""
    return Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


def check_private(folder: Path) -> None:
    """Check that what exists of `<folder of all users>/<ours>/<run>` is ours alone, and no link. Raises ConfigError."""
    for path in (folder.parent, folder):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(found.st_mode):
            wrong = "is a link"
        elif not stat.S_ISDIR(found.st_mode):
            wrong = "is not a folder"
        elif found.st_uid != os.getuid():
            wrong = f"belongs to user {found.st_uid}"
        elif found.st_mode & 0o022:
            wrong = f"may be written to by others (mode {stat.S_IMODE(found.st_mode):o})"
        else:
            continue
        raise ConfigError(
            f"policies cannot be kept in {folder}: {path} {wrong}. Remove it, or name another folder with policy_store.path"
        )
