"""Deltas of a synthetic bf16 model of 0.6 B parameters after one AdamW step: size, time, and the pause of a worker that swaps.

    OMP_NUM_THREADS=1 python benchmarks/publication.py

Shapes are those of Qwen3-0.6B, weights normal with std 0.02, gradients standard normal, AdamW in fp32 (betas 0.9, 0.95)
on `--steps` steps, so that its moments are warm; compared are the bf16 copies before and after the last one. For every
learning rate:

* encode and apply, each with the digests of all tensors, beside `np.copyto` of all weights into memory already used and
  `tensor.clone()`, which touches new memory as `apply` must: seconds of CPU of the one thread, in turn, the best of
  `--repeats` rounds and the median ratio within a round;
* publication and fetch through a directory in memory and through a Redis of its own: wall seconds, of the delta, and of
  full weights (`first_*`);
* the pause: what generation waits for at a swap on the CPU, where the model takes the fetched tensors themselves
  (`adopt_weights`), and beside it the copy that this saves (`load_weights`); seconds, as a share of those of `publish`, and
  as one of those from `publish` to the end of `fetch`.

Needs about 9 GB of memory and, with the default settings, ten minutes.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names would hide others

import numpy as np
import torch

from benchmarks.shared.models import SHAPES, build_model, fastest
from benchmarks.shared.report import new_parser, parse, publish
from sluice.common.config import PolicyStoreConfig
from sluice.common.connections.client import connect
from sluice.common.keys import Keys
from sluice.common.models.causal_lm import adopt_weights, load_weights, named_weights
from sluice.common.policies import delta
from sluice.common.policies.digest import tensor_digest
from sluice.common.policies.store import PolicyStore
from sluice.scripts.launcher.redis_server import start_server

Weights = dict[str, torch.Tensor]

PIECE = 2**20
"""Elements that are trained at a time: their optimizer state stays in the cache."""


# The CPU seconds are those of one thread: time that other processes have on the machine does not count.
cpu_s = partial(fastest, repeats=1, clock=time.thread_time)
wall_s = partial(fastest, repeats=1, clock=time.monotonic)


def train(size: str, *, lr: float, num_steps: int) -> tuple[Weights, Weights]:
    """bf16 weights before and after the last of `num_steps` steps; in pieces, because AdamW treats every element separately."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(64 * PIECE).normal_(generator=generator)  # gradients: pieces of it from random places
    before, after = {}, {}
    with torch.device("meta"):
        shapes = {name.replace(".", "_"): weight.shape for name, weight in named_weights(build_model(size)).items()}
    for name, shape in shapes.items():
        old, new = (torch.empty(shape.numel(), dtype=torch.bfloat16) for _ in range(2))
        for start in range(0, shape.numel(), PIECE):
            count = min(PIECE, shape.numel() - start)
            weight = torch.nn.Parameter(torch.empty(count).normal_(std=0.02, generator=generator))
            optimizer = torch.optim.AdamW([weight], lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
            for place in torch.randint(0, len(pool) - count, (num_steps,), generator=generator).tolist():
                old[start : start + count] = weight.detach()
                weight.grad = pool[place : place + count]
                optimizer.step()
            new[start : start + count] = weight.detach()
        before[name], after[name] = old.reshape(shape), new.reshape(shape)
    return before, after


def measure_codec(before: Weights, after: Weights, *, repeats: int) -> dict[str, float]:
    source = [delta._words(tensor) for tensor in after.values()]
    target = [words.copy() for words in source]
    digests, patches = delta.encode(after, base=before)
    assert patches is not None

    def apply() -> None:
        for name, base in before.items():
            _, digest = delta.apply(base, [patches[name]] if name in patches else [])
            assert digest == digests[name]

    works: dict[str, Callable[[], Any]] = {
        "copy": lambda: [np.copyto(t, s) for t, s in zip(target, source, strict=True)],
        "clone": lambda: [tensor.clone() for tensor in after.values()],
        "digest": lambda: [tensor_digest(tensor) for tensor in after.values()],
        "sample": lambda: delta._sampled_share(after, before),
        "encode": lambda: delta.encode(after, base=before),
        "apply": apply,
    }
    rounds = [{name: cpu_s(work) for name, work in works.items()} for _ in range(repeats)]
    best = {name: min(found[name] for found in rounds) for name in works}
    num_bytes = sum(tensor.nbytes for tensor in after.values())
    num_parameters = sum(tensor.numel() for tensor in after.values())
    changed = sum(int(np.count_nonzero(delta._words(after[n]) != delta._words(before[n]))) for n in after)
    return {
        "num_parameters": num_parameters,
        "full_bytes": num_bytes,
        "changed_share": changed / num_parameters,
        "payload_share": sum(map(len, patches.values())) / num_bytes,
        **{f"{name}_s": seconds for name, seconds in best.items()},
        "copy_gb_per_s": num_bytes / best["copy"] / 1e9,
        **{f"{work}_to_{copy}": best[work] / best[copy] for work in ("encode", "apply") for copy in ("copy", "clone")},
        **{
            f"{work}_to_copy_median": median(found[work] / found["copy"] for found in rounds)
            for work in ("encode", "apply")
        },
    }


@contextmanager
def stores(transport: str, url: str) -> Iterator[tuple[PolicyStore, PolicyStore]]:
    """Of a trainer and of a worker."""
    client, keys = connect(url), Keys(f"publication-{transport}")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        config = PolicyStoreConfig(transport=transport, path=folder)  # type: ignore[arg-type]
        yield PolicyStore(client, keys, config), PolicyStore(client, keys, config)
        for key in client.scan_iter(match=keys.root + "*", count=1000):
            client.unlink(key)
    client.close()


class Served(torch.nn.Module):
    """A model that consists of its weights."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        for name, tensor in weights.items():
            self.register_parameter(name, torch.nn.Parameter(tensor.clone(), requires_grad=False))


def measure_transport(before: Weights, after: Weights, *, transport: str, url: str, repeats: int) -> dict[str, float]:
    """Versions go to and fro between both weights, so that every one after the first is a delta of the same size."""
    with stores(transport, url) as (trainer, worker):
        publish = lambda v: trainer.publish(v, (before, after)[v % 2], step=v, parent=v - 1)  # noqa: E731
        first_publish_s = wall_s(lambda: publish(0))
        first_fetch_s = wall_s(lambda: worker.fetch(0))
        publish_s, fetch_s = [], []
        for version in range(1, 1 + repeats):
            publish_s.append(wall_s(lambda: publish(version)))  # noqa: B023
            fetch_s.append(wall_s(lambda: worker.fetch(version)))  # noqa: B023
            assert worker.last_fetch_bytes == trainer.manifest(version).delta_bytes
        _, tensors = worker.fetch(version)
        served = Served(tensors)
        swaps_s = {  # the copy first: afterwards the model serves the very tensors
            name: fastest(partial(swap, served, tensors), repeats=repeats, clock=time.monotonic)
            for name, swap in (("load_weights", load_weights), ("pause", adopt_weights))
        }
        both_s = min(publish_s) + min(fetch_s)
        return {
            "first_publish_s": first_publish_s,
            "first_fetch_s": first_fetch_s,
            "delta_bytes": trainer.manifest(version).delta_bytes,
            "publish_s": min(publish_s),
            "fetch_s": min(fetch_s),
            **{f"{name}_s": seconds for name, seconds in swaps_s.items()},
            **{f"{name}_to_publish": seconds / min(publish_s) for name, seconds in swaps_s.items()},
            **{f"{name}_to_publish_and_fetch": seconds / both_s for name, seconds in swaps_s.items()},
        }


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--size", choices=list(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 3e-6])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=6)
    arguments = parse(parser, argv, quick={"size": "1M", "lr": [1e-6], "steps": 3, "repeats": 2})
    torch.set_num_threads(1)
    by_lr: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        server = start_server(Path(folder))
        try:
            for lr in arguments.lr:
                before, after = train(arguments.size, lr=lr, num_steps=arguments.steps)
                by_lr[f"{lr:g}"] = {"codec": measure_codec(before, after, repeats=arguments.repeats)} | {
                    transport: measure_transport(
                        before, after, transport=transport, url=server.url, repeats=arguments.repeats
                    )
                    for transport in ("directory", "redis")
                }
        finally:
            server.stop()
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    publish("publication", arguments, {"by_lr": by_lr, "peak_memory_gb": peak_gb})


if __name__ == "__main__":
    main()
