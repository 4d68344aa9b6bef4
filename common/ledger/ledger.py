"""The ledger: where every group is, and the only way it moves.

     admitted --task--> rollout --> reward, reference --> ready --> leased --> trained
        |                                                  |
        |  any stage: lease expired or failed -> resent; after max_attempts -> dead(reason);
        |  lease expired after progress -> resent, no attempt spent; after max_interruptions -> dead(interrupted)
        +--> dropped(prompt_too_long, bad_row, left_out)   +--> dropped(stale)
   reward: equal rewards, where trainer.filter_zero_variance is on --> dropped(zero_variance)

A group trained after the newest readable checkpoint counts as dropped(rolled_back).

Invariant, at every instant and for both kinds of group (train, eval):

    admitted = trained + scored + sum(dropped) + sum(dead) + in_flight

`in_flight` is not a counter: it is the size of the set of groups that are not settled. A stage (common/pipeline.py) is
pending as soon as all that it waits for is stored; a worker claims it, renews the lease while it makes progress, and stores
its result, which is accepted once whichever attempt it came from. Celery messages are hints: losing or repeating one costs
only time.

    >>> claim = ledger.claim("t7", "rollout", fields=("task",))     # None: another worker holds it, or it is done
    >>> ledger.store("t7", "rollout", payload, version=3)           # ["reward"]: the stages to send next
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import redis

from sluice.common.config import Config
from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts
from sluice.common.pipeline import EVALUATED, FIRST, KINDS, Kind, kind_of, plan_for

RETRY_WAITS_S = (0.5, 2.0, 8.0)
"""How long a stage that failed waits before its second attempt, its third, and every later one: what it needs may be away for
a moment, and attempts that fail at once would all be spent in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """The right to work on one stage of one group, until the lease ends."""

    group_id: str
    stage: str
    holder: str
    "worker and claim, so that a message delivered twice to one worker runs once"
    attempt: int
    fields: dict[str, bytes | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """Groups admitted by `admit`; the caller holds the claim on their first stage."""

    stopped_by: str
    "max_count | no_credit | run_complete | max_bytes | no_policy | failed | paused | draining"
    policy_version: int
    cursors: list[int]
    holder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """A consistent snapshot of a kind's counters."""

    kind: str
    admitted: int
    in_flight: int
    trained: int = 0
    scored: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dead: dict[str, int] = field(default_factory=dict)
    retried: int = 0
    interrupted: int = 0
    "claims that were lost after they had made progress: no attempt is spent"
    resent: int = 0
    refused: int = 0
    reconciled: int = 0
    "groups whose sampling Redis had lost, settled by the checkpoint that names them"
    recovered: int = 0
    "groups to which no key of Redis led any more, found and continued"
    discarded: int = 0
    "dead letters that were removed: by the cap on their bytes, or by `sluice dead --discard`"
    kept_for_bound: int = 0
    "groups of equal rewards that were not dropped, so that the trainer does not starve"

    @property
    def settled(self) -> int:
        return self.trained + self.scored + sum(self.dropped.values()) + sum(self.dead.values())

    @property
    def holds(self) -> bool:
        """The identity."""
        return self.admitted == self.settled + self.in_flight

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "kind"} | {"holds": self.holds}


class Ledger:
    """Every transition, one round trip each. All methods are idempotent and safe to retry."""

    def __init__(self, client: redis.Redis, keys: Keys, config: Config, *, worker: str = "trainer") -> None:
        self.client = client
        self.keys = keys
        self.config = config
        "may be replaced by one with other settings in force"
        self._worker = worker
        self._claims = itertools.count()
        self._scanned: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self.scripts = Scripts(client, keys)

    def admit(self, max_count: int) -> Admission:
        """Admit up to `max_count` groups, as far as credit, memory and the run's length allow."""
        config, holder = self.config, self._new_holder()
        room = config.max_credits, config.replay_buffer.max_bytes
        needed = config.trainer.num_steps, config.groups_per_step
        reply = self.scripts("admit", max_count, *room, *needed, _ms(config.lease.running_s), holder, FIRST.name)
        cursors = [int(cursor) for cursor in reply[2:]]
        return Admission(stopped_by=reply[0].decode(), policy_version=int(reply[1]), cursors=cursors, holder=holder)

    def admit_eval(
        self, evaluation: str, *, dataset: str, version: int, tasks: dict[str, bytes]
    ) -> list[tuple[str, str]]:
        """Admit groups of an evaluation, pinned to a version, their first stage done. Returns (group, stage) to send."""
        flat = itertools.chain.from_iterable(tasks.items())
        plan = plan_for(self.config, "eval")
        reply = self.scripts("admit_eval", evaluation, dataset, version, self._queued_ms, plan, FIRST.name, *flat)
        return _rows(reply, 2)

    def claim(
        self, group_id: str, stage: str, *, fields: tuple[str, ...], lease_s: float | None = None
    ) -> Claim | None:
        """Claim a stage, reading `fields` of the group in the same round trip. None: not pending, or held by another."""
        holder = self._new_holder()
        lease_s = lease_s or self.config.lease.running_s
        reply = self.scripts("claim", group_id, stage, holder, _ms(lease_s), *fields)
        if not reply[0]:
            return None
        values = dict(zip(fields, reply[2:], strict=True))
        return Claim(group_id=group_id, stage=stage, holder=holder, attempt=int(reply[1]), fields=values)

    def renew(
        self, claims: list[Claim], *, lease_s: float | None = None, progress: Mapping[str, int] | None = None
    ) -> list[str]:
        """Let leases end `lease_s` from now. Returns the "group|stage" that were reassigned in the meantime.

        progress: group -> tokens generated, or turns made, since it was claimed; if such a claim is lost, no attempt is spent.
        """
        if not claims:
            return []
        lease_s, made = lease_s or self.config.lease.running_s, progress or {}
        flat = itertools.chain.from_iterable((c.group_id, c.stage, c.holder, made.get(c.group_id, 0)) for c in claims)
        return [lost.decode() for lost in self.scripts("renew", _ms(lease_s), *flat)]

    def store(
        self,
        group_id: str,
        stage: str,
        payload: bytes,
        *,
        version: int | None = None,
        num_tokens: int = 0,
        is_zero_variance: bool = False,
        client: Any = None,
    ) -> list[str] | None:
        """Store a result; a rollout names its oldest version and its tokens.

        A reward with `is_zero_variance` drops its group instead, and its credit returns, unless `Config.max_filtered` were
        dropped for the next batch, or the trainer would starve. Groups of evaluations are never dropped.

        Returns the stages to send next, or None when the result was refused (too late).

        With a pipeline as `client` the reply comes from its `execute`; read it with `stored_stages`.
        """
        result = group_id, stage, payload, "" if version is None else version
        following = self._queued_ms, plan_for(self.config, kind_of(group_id)), EVALUATED
        max_filtered = self.config.max_filtered if is_zero_variance else ""
        reply = self.scripts(
            "store", *result, *following, num_tokens, self.config.groups_per_step, max_filtered, client=client
        )
        return None if client is not None else stored_stages(reply)

    def fail(self, claim: Claim, *, reason: str, detail: str) -> bool:
        """Spend an attempt of a stage that failed. True: the reaper sends it again after a wait of RETRY_WAITS_S; False: it is
        dead-lettered or was reassigned."""
        return self._fail_or_release("failed", claim, reason, detail) == b"waits"

    def release(self, claim: Claim) -> bool:
        """Release a stage without spending an attempt (shutdown). True: send it again."""
        return self._fail_or_release("released", claim, "released", "") == b"again"

    def _fail_or_release(self, mode: str, claim: Claim, reason: str, detail: str) -> Any:
        held = claim.group_id, claim.stage, claim.holder
        limits = self.config.lease.max_attempts, self._queued_ms, self._max_dead_bytes
        return self.scripts("fail_or_release", mode, *held, reason, detail[:4000], *limits, *map(_ms, RETRY_WAITS_S))

    def is_last_chance(self, group_id: str, stage: str) -> bool:
        """Return whether the group dies if the next claim of a stage is lost, and an earlier one was."""
        spent = self.client.hmget(self.keys.group(group_id), [f"n:{stage}", f"i:{stage}"])
        bounds = self.config.lease.max_attempts, self.config.lease.max_interruptions
        return any(1 < bound <= int(count or 0) + 1 for count, bound in zip(spent, bounds, strict=True))

    def holder(self, group_id: str, stage: str) -> str:
        """Return the holder of a running stage; "" = none."""
        return (self.client.hget(self.keys.group(group_id), f"by:{stage}") or b"").decode()

    def begin_tick(self, *, lasts_s: float) -> bool:
        """Return whether this process is the one that ticks for the next `lasts_s`."""
        return bool(self.client.set(self.keys.tick, self._worker, nx=True, px=round(lasts_s * 1000)))

    def reap(self, max_count: int = 200) -> list[tuple[str, str, Kind]]:
        """Reassign what expired leases held. Returns overdue stages to send again: (group, stage, kind)."""
        lease = self.config.lease
        bounds = lease.max_attempts, lease.max_interruptions
        return _rows(self.scripts("reap", *bounds, self._queued_ms, self._max_dead_bytes, max_count), 3)

    def recover(self) -> list[tuple[str, str]]:
        """Find groups in flight that nothing would ever move, since the key that led to them is gone; a few hundred a call.

        Returns the stages to send: (group, stage).
        """
        found: list[tuple[str, str]] = []
        for kind in KINDS:
            self._scanned[kind], group_ids = self.client.sscan(self.keys.live(kind), self._scanned[kind], count=200)
            if group_ids:
                limits = self._queued_ms, self._max_dead_bytes
                found += _rows(self.scripts("recover", kind, plan_for(self.config, kind), *limits, *group_ids), 2)
        return found

    def drop(self, group_ids: list[str], *, reason: str, detail: str = "", num_rows: int = 0) -> int:
        """Settle training groups whose prompts cannot be used. num_rows: of an epoch; 0 = not known."""
        return int(self.scripts("drop", reason, detail[:1000], num_rows, *group_ids)) if group_ids else 0

    def discard(self, group_ids: Sequence[str]) -> int:
        """Remove dead letters and what they hold; their groups stay counted as dead. Returns the number removed."""
        return int(self.scripts("discard", *group_ids))

    def requeue(self, group_id: str) -> list[str]:
        """Give a dead-lettered group fresh attempts. Returns the stages to send; none when it is not dead."""
        plan = plan_for(self.config, kind_of(group_id))
        return [stage.decode() for stage in self.scripts("requeue", group_id, self._queued_ms, plan)]

    def counters(self, kind: Kind = "train") -> Counters:
        """Return an atomic snapshot of the counters and the in-flight set."""
        return read_counters(self.client, self.keys, kind)

    @property
    def _max_dead_bytes(self) -> int:
        return self.config.replay_buffer.max_dead_bytes

    @property
    def _queued_ms(self) -> int:
        return _ms(self.config.lease.queued_s)

    def _new_holder(self) -> str:
        return f"{self._worker}/{next(self._claims)}"


def read_counters(client: redis.Redis, keys: Keys, kind: Kind = "train") -> Counters:
    """Return what Ledger.counters does, without a config."""
    flat, in_flight = Scripts(client, keys)("counters", kind)
    known: dict[str, Any] = {"admitted": 0, "dropped": {}, "dead": {}}
    for name, value in sorted(_rows(flat, 2)):
        outcome, _, reason = name.partition(":")
        (known[outcome] if reason else known)[reason or outcome] = int(value)
    return Counters(kind=kind, in_flight=in_flight, **known)


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What the groups of a run hold and have generated."""

    payload_bytes: int
    credits: int
    generated_tokens: int


def read_usage(client: redis.Redis, keys: Keys) -> Usage:
    """Read the usage of a run in one round trip."""
    with client.pipeline(transaction=False) as pipe:
        pipe.get(keys.payload_bytes)
        pipe.scard(keys.credit)
        pipe.hget(keys.totals, "generated_tokens")
        held, credits, generated = pipe.execute()
    return Usage(payload_bytes=int(held or 0), credits=int(credits), generated_tokens=int(generated or 0))


def read_cursor(client: redis.Redis, keys: Keys) -> int:
    """Return the next dataset cursor."""
    return int(client.get(keys.cursor) or 0)


def restore_cursor(client: redis.Redis, keys: Keys, cursor: int) -> None:
    """Set the cursor in a Redis that has none: nothing has been admitted in it."""
    client.set(keys.cursor, cursor, nx=True)


def read_pending(client: redis.Redis, keys: Keys) -> list[tuple[str, str]]:
    """Return (group, stage) of every pending stage."""
    lines = (line.decode().rpartition("|") for line in client.zrange(keys.deadlines, 0, -1))
    return [(group, stage) for group, _, stage in lines]


def read_dead(client: redis.Redis, keys: Keys) -> dict[str, float]:
    """Return dead-lettered groups -> seconds when that happened, newest first."""
    return {name.decode(): at_ms / 1000 for name, at_ms in client.zrevrange(keys.dead, 0, -1, withscores=True)}


def read_group(client: redis.Redis, keys: Keys, group_id: str) -> dict[str, bytes]:
    """Return all fields of a group; empty for one that is settled."""
    return {name.decode(): value for name, value in client.hgetall(keys.group(group_id)).items()}


def read_fields(
    client: redis.Redis, keys: Keys, group_ids: Sequence[str], fields: Sequence[str]
) -> list[list[bytes | None]]:
    """Return these fields of several groups, in one round trip."""
    with client.pipeline(transaction=False) as pipe:
        for group_id in group_ids:
            pipe.hmget(keys.group(group_id), fields)
        return pipe.execute()


def stored_stages(reply: list[bytes]) -> list[str] | None:
    """Decode the reply of a `store` script: stages to send next, or None when the result was refused."""
    state, *following = (item.decode() for item in reply)
    return None if state == "refused" else following


def _rows(flat: list[bytes], width: int) -> list[Any]:
    """Return the tuples of a script's flat reply, as text."""
    return list(zip(*[(item.decode() for item in flat)] * width, strict=True))


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
