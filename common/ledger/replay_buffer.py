"""The replay buffer: complete groups in Redis streams, one stream per policy version.

Rules (torchforge's, made durable; see docs/algorithms.md for the age through a fork):

    keep a group iff  age(group) <= max_policy_age  and  sample_count < max_resample_count + 1
    sample = evict first, then `groups_per_step` complete groups, oldest version first, or none at all

What `sample` returns for a trainer step is recorded in a manifest, so that asking again for the same step, after a crash
or a lost reply, returns the same groups. They are freed by `acknowledge`, once a durable checkpoint names the step.

The bound is a guarantee, also for a batch that was sampled before a roll-back: one that holds a group too old for the
trainer's current branch is dissolved (stale groups are dropped, the others may be sampled again), and so are those after it.
A batch with a group that cannot be decoded is dissolved too: that group is dead-lettered, and never stops the trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from secrets import token_hex

import redis

from sluice.common.connections.client import BLOCK_S
from sluice.common.errors import SluiceError, StateLost
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import Ledger, read_fields
from sluice.common.pipeline import STAGES, stages_for
from sluice.common.run import process_name
from sluice.common.serialization import decode
from sluice.common.types import Group

log = logging.getLogger("sluice.replay_buffer")

_RESULTS = tuple(stage.name for stage in STAGES)
_STAMPS = ("admitted", *(name + end for name in _RESULTS for end in ("_started", "")), "ready", "leased")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The answer to one `sample`."""

    groups: list[Group] | None
    "None: fewer than a full batch is ready; nothing was consumed"
    evicted: int
    "groups dropped as stale on the way"
    available: int
    "ready groups that are young enough"


class ReplayBuffer:
    """The trainer's side of the buffer."""

    def __init__(
        self, ledger: Ledger, *, groups_per_step: int, max_policy_age: int, max_resample_count: int | None = 0
    ) -> None:
        self._ledger = ledger
        self._mark = ""
        self._k = groups_per_step
        self.max_policy_age = max_policy_age
        "may be changed between two samples"
        self.vocab_size = 1 << 31
        "of the model that is trained: a group with other token ids is dead-lettered"
        self._max_resample_count = -1 if max_resample_count is None else max_resample_count

    def sample(self, curr_policy_version: int, *, step: int, published: int = -1) -> Sample:
        """Sample the batch of a trainer step: evict, then k complete groups or none. Does not wait.

        `published` is the newest version that the trainer has seen published. Raises StateLost when Redis does not know it,
        the current version, or the last batch of this buffer.
        """
        mark = token_hex(8)
        reply = self._ledger.scripts(
            "sample", step, self._k, curr_policy_version, self.max_policy_age, published, self._mark, mark
        )
        if int(reply[0]) < 0:
            self._mark = ""
            raise StateLost("Redis has lost the trainer's last writes: it was restarted, or another server took over")
        group_ids = [group.decode() for group in reply[2:]]
        groups, damaged = self._read(group_ids)
        self._mark = mark if group_ids else self._mark
        evicted, available = int(reply[0]), int(reply[1]) - len(damaged)
        if damaged:
            self._dead_letter(step, damaged)
        return Sample(groups=None if damaged else groups or None, evicted=evicted, available=available)

    def wait(self, timeout_s: float) -> bool:
        """Block until a full batch may be ready, at most `timeout_s`. `sample` decides whether it is."""
        block = max(0.01, min(timeout_s, BLOCK_S))
        return self._ledger.client.blpop([self._ledger.keys.wake], timeout=block) is not None

    def acknowledge(self, step: int, *, trained: Sequence[str] = ()) -> int:
        """Free the groups of every step up to this one. Call it only when a durable checkpoint holds that step.

        `trained` are the groups that the checkpoint names: one whose sampling Redis has lost is settled too.
        """
        return int(self._ledger.scripts("acknowledge", step, self._max_resample_count, *trained))

    def roll_back(self, step: int) -> int:
        """Count what was acknowledged after this step as dropped: no later checkpoint can be read."""
        return int(self._ledger.scripts("roll_back", step))

    def num_untrained(self) -> int:
        """Return the number of groups in flight that no trained and not yet acknowledged batch holds."""
        client, keys = self._ledger.client, self._ledger.keys
        steps = client.zrange(keys.batches, 0, -1)
        with client.pipeline(transaction=False) as pipe:
            pipe.scard(keys.live("train"))
            for step in steps:
                pipe.llen(keys.batch(step.decode()))
            live, *held = pipe.execute()
        return int(live) - sum(held)

    def sizes(self) -> dict[int, int]:
        """Return policy version -> groups in its stream, leased ones included."""
        return read_sizes(self._ledger.client, self._ledger.keys)

    def _dead_letter(self, step: int, damaged: dict[str, str]) -> None:
        pairs: list[str] = []
        for group_id, detail in damaged.items():
            log.error("group %s is dead-lettered (undecodable): %s", group_id, detail)
            pairs += [group_id, detail[:4000]]
        limit = self._ledger.config.replay_buffer.max_dead_bytes
        self._ledger.scripts("dead_letter", step, process_name("trainer"), limit, *pairs)

    def _read(self, group_ids: list[str]) -> tuple[list[Group], dict[str, str]]:
        """Return the groups, and the error of each that cannot be decoded."""
        names = ["version", *_RESULTS, *(f"t:{stamp}" for stamp in _STAMPS)]
        needed = {stage.name for stage in stages_for(self._ledger.config)}
        rows = read_fields(self._ledger.client, self._ledger.keys, group_ids, names)
        groups, damaged = [], {}
        for group_id, row in zip(group_ids, rows, strict=True):
            try:
                groups.append(_decode_group(row, needed, self.vocab_size))
            except (SluiceError, LookupError, TypeError, ValueError, AttributeError) as error:
                damaged[group_id] = f"{type(error).__name__}: {error}"
        return groups, damaged


def read_sizes(client: redis.Redis, keys: Keys) -> dict[int, int]:
    """Return policy version -> complete groups in the buffer, leased ones included."""
    versions = [int(v) for v in client.zrange(keys.versions, 0, -1)]
    with client.pipeline(transaction=False) as pipe:
        for version in versions:
            pipe.xlen(keys.stream(version))
        return dict(zip(versions, pipe.execute(), strict=True))


def _decode_group(row: list[bytes | None], needed: set[str], vocab_size: int) -> Group:
    version, *values = row
    results = {name: value for name, value in zip(_RESULTS, values, strict=False) if value is not None}
    if version is None or not needed <= results.keys():
        raise SluiceError("it is in the buffer without all of its results: was its key deleted by hand?")
    stamps = zip(_STAMPS, values[len(_RESULTS) :], strict=True)
    return Group.from_results(
        {name: decode(value) for name, value in results.items()},
        policy_version=int(version),
        timestamps={stamp: float(value) for stamp, value in stamps if value is not None},
        vocab_size=vocab_size,
    )
