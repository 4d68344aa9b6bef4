"""The processes that train one policy together (ranks): which one this is, and what they exchange.

    rank 0                                  rank 1 ... N-1
    send_calls(bodies) -- key in store -->  next_call(): polls for its key, for hours if need be, and logs that
                        -- bytes (gloo) -->  its body
    gather(value)       <-- all ranks -->    gather(value)

Everything is msgpack (`sluice.common.serialization`), no pickle. Between two calls no rank waits inside a collective, so
`COLLECTIVE_TIMEOUT_S` bounds the work of one call alone.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from sluice.common.errors import ConfigError
from sluice.common.models.causal_lm import resolve_device
from sluice.common.serialization import decode, encode

log = logging.getLogger("sluice.trainer")

COLLECTIVE_TIMEOUT_S = 600.0
"""How much later than the others a rank may be at any point of a call; then all ranks end."""
POLL_S = 0.05
"""How late a rank may notice a call."""
REPORTED_EVERY_S = 60.0
"""How often a rank that waits for rank 0 says so."""


class Ranks:
    """This process among the ranks; by default the only one, which needs no process group."""

    def __init__(self, *, rank: int = 0, size: int = 1, local_rank: int = 0, store: dist.Store | None = None) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store = store
        self._num_calls = 0

    @classmethod
    def join(cls) -> Ranks:
        """Join the ranks that the environment names (RANK, WORLD_SIZE, ...); without it, be the only one.

        They meet in the file SLUICE_RANKS_STORE (`launcher.ranks`), else as torchrun says (MASTER_ADDR, MASTER_PORT).
        """
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        store: dist.Store
        if path := os.environ.get("SLUICE_RANKS_STORE"):
            store = dist.FileStore(path, size)
            store.set_timeout(timeout)
        else:
            store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        if rank == 0:
            store.set("sluice/rank0", f"{socket.gethostname()} {os.getpid()}")
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        return cls(rank=rank, size=size, local_rank=local_rank, store=dist.PrefixStore("sluice", store))

    def device(self, wanted: str) -> torch.device:
        """Resolve `trainer.device` for this rank: each of several has its own GPU. Raises ConfigError."""
        device = resolve_device(wanted)
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise ConfigError(f"trainer.device={wanted} is one GPU for {self.size} ranks: set trainer.device=cuda")
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {self.rank} needs GPU {self.local_rank}, this machine has {torch.cuda.device_count()}: start fewer ranks"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def gather(self, value: Any) -> list[Any]:
        """Return the small value of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        body = _bytes_of(encode(value))
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([body.numel()]))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: body.numel()] = body
        bodies = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(bodies, padded)
        return [decode(body[: int(size)].numpy().tobytes()) for body, size in zip(bodies, sizes, strict=True)]

    def send_calls(self, bodies: list[dict[str, Any]]) -> None:
        """Send a call from rank 0, one body for each other rank."""
        if self._store is None:
            return
        self._num_calls += 1
        messages = [_bytes_of(encode(body)) for body in bodies]
        for rank, message in enumerate(messages, start=1):
            self._store.set(f"call/{self._num_calls}/{rank}", str(message.numel()))
        for rank, message in enumerate(messages, start=1):
            dist.send(message, dst=rank)

    def next_call(self, *, given_up: Callable[[], bool]) -> dict[str, Any] | None:
        """Wait, on another rank, for its body of rank 0's next call. None = `given_up` returned true first."""
        assert self._store is not None
        self._num_calls += 1
        key, delay_s, since = f"call/{self._num_calls}/{self.rank}", 0.001, time.monotonic()
        reported = since
        while not self._store.check([key]):
            if given_up():
                return None
            if time.monotonic() - reported > REPORTED_EVERY_S:
                reported = time.monotonic()
                log.info("waits for rank 0, %.0f min so far", (reported - since) / 60)
            time.sleep(delay_s)
            delay_s = min(1.5 * delay_s, POLL_S)
        message = torch.empty(int(self._store.get(key)), dtype=torch.uint8)
        dist.recv(message, src=0)
        self._store.delete_key(key)
        body: dict[str, Any] = decode(message.numpy().tobytes(), max_bytes=None)
        return body

    def rank_0_is_gone(self) -> bool:
        """Return whether rank 0 ran on this machine and has ended; on another one, its starter ends all ranks."""
        assert self._store is not None
        host, pid = self._store.get("rank0").decode().split()
        return host == socket.gethostname() and not psutil.pid_exists(int(pid))

    def leave(self) -> None:
        """Leave together after the last call: the store ends with the first machine that does."""
        if self.size > 1:
            # A barrier holds no tensor. gloo's thread needs the GIL to let go of the last work's tensors, and whoever drops
            # the process group last (DDP's reducer, at the end of `main`) joins that thread with the GIL in its hand.
            dist.barrier()
            dist.destroy_process_group()


def _bytes_of(message: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)
