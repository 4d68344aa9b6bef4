"""Names of everything a run keeps in Redis. The layout is documented at the top of `lua/prelude.lua`.

Everything of a run lives under `sluice:{run}:`, Celery's queues included, so that several runs share one server and one
run can be removed without touching another. No other module spells a key.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from sluice.common.errors import ConfigError

RUNS = "sluice:runs"
"Hash: run name -> seconds of creation."
ALL_RUNS = "sluice:{*}:*"
"Pattern of every key of every run."

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class _Name:
    """A key of fixed name: `_Name("cursor")` on a class with `root` is `sluice:{run}:cursor`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, keys: Keys, owner: type[Keys]) -> str:
        return keys.root + self.name


class _Family(_Name):
    """Keys of one kind: `_Family("g")` is a function, whose value for "t7" is `sluice:{run}:g:t7`."""

    def __get__(self, keys: Keys, owner: type[Keys]) -> Callable[[object], str]:  # type: ignore[override]
        return lambda which: f"{keys.root}{self.name}:{which}"


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names of one run."""

    run: str

    def __post_init__(self) -> None:
        if not _RUN_NAME.fullmatch(self.run):
            raise ConfigError(
                f"run name {self.run!r}: use letters, digits, '.', '_' and '-', at most 100, starting with a letter or digit"
            )

    @property
    def root(self) -> str:
        return f"sluice:{{{self.run}}}:"

    @property
    def celery_prefix(self) -> str:
        """Prefix of everything that Celery keeps."""
        return self.queue("")

    def tensors(self, kind: str, version: object, *chunk: int) -> str:
        """Return the key of the size of a version's `weights` or `delta`, or of one chunk; for version "", the prefix of all."""
        return ":".join([self.root + kind, str(version), *map(str, chunk)])

    run_record = _Name("run")
    settings = _Name("settings")
    controls = _Name("controls")
    cursor = _Name("cursor")
    ahead = _Name("ahead")
    counts = _Family("counts")
    settled = _Name("settled")
    totals = _Name("totals")
    live = _Family("live")
    credit = _Name("credit")
    group = _Family("g")
    pending = _Family("pending")
    deadlines = _Name("deadlines")
    stream = _Family("stream")
    versions = _Name("versions")
    batch = _Family("batch")
    batches = _Name("batches")
    want = _Name("want")
    wake = _Name("wake")
    filtered = _Name("filtered")
    ends = _Name("ends")
    lost = _Name("lost")
    readers = _Name("readers")
    processes = _Name("processes")
    process = _Family("process")
    tick = _Name("tick")
    policy = _Name("policy")
    manifests = _Name("manifests")
    full_requested = _Name("full_requested")
    lineage = _Name("lineage")
    publications = _Name("publications")
    events = _Name("events")
    metrics = _Name("metrics")
    samples = _Name("samples")
    autoscale = _Name("autoscale")
    payload_bytes = _Name("bytes")
    dead = _Name("dead")
    dead_bytes = _Name("dead_bytes")
    evaluations = _Name("evaluations")
    evaluation = _Family("eval")
    queue = _Family("mq")
    rejected = _Name("mq:rejected")
