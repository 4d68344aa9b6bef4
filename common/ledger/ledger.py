"""The ledger: where every group is, and the only way it moves.

     admitted --task--> rollout --> reward, reference --> ready --> leased --> trained
        |                                                  |
        |  any part: lease expired or failed -> sent again; after max_attempts -> dead(reason)
        +--> dropped(prompt_too_long, bad_row)             +--> dropped(stale)
   reward: equal rewards, where trainer.filter_zero_variance is on --> dropped(zero_variance)

A trained group of which no readable checkpoint is left counts as dropped(rolled_back).

Invariant, at every instant and for both kinds of group (train, eval):

    admitted = trained + scored + sum(dropped) + sum(dead) + in_flight

`in_flight` is not a counter: it is the size of the set of groups that are not settled. A part (`task`, `rollout`,
`reward`, `reference`) is owed from the moment the one before it is stored; a worker claims it, renews the lease while it
makes progress, and stores its result, which is accepted once whichever attempt it came from. Celery messages are hints:
losing or repeating one changes nothing but time.

    >>> claim = ledger.claim("t7", "rollout", fields=("task",))     # None: somebody else has it, or it is done
    >>> ledger.store("t7", "rollout", payload, version=3)           # ["reward"]: the stages to send next
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

import redis

from sluice.common.config import Config
from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts

Stage = Literal["task", "rollout", "reward", "reference"]
Kind = Literal["train", "eval"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """The right to work on one part of one group, until the lease ends."""

    group_id: str
    stage: str
    holder: str
    "worker and claim, so that a message delivered twice to one worker runs once"
    attempt: int
    fields: dict[str, bytes | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """Groups handed out by `admit`; the caller holds the claim on their task part."""

    stopped_by: str
    "most | no_credit | run_complete | max_bytes | no_policy | paused | draining"
    policy_version: int
    cursors: list[int]
    holder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """One consistent reading of a kind's counters."""

    kind: str
    admitted: int
    in_flight: int
    trained: int = 0
    scored: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dead: dict[str, int] = field(default_factory=dict)
    retried: int = 0
    resent: int = 0
    refused: int = 0
    reconciled: int = 0
    "groups that Redis had forgotten it dealt out for training, settled by the checkpoint that names them"
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
        names = (
            "admitted",
            "trained",
            "scored",
            "dropped",
            "dead",
            "in_flight",
            "retried",
            "resent",
            "refused",
            "reconciled",
            "kept_for_bound",
            "holds",
        )
        return {name: getattr(self, name) for name in names}


class Ledger:
    """Every transition, one round trip each. All methods are idempotent and safe to retry."""

    def __init__(self, client: redis.Redis, keys: Keys, config: Config, *, worker: str = "trainer") -> None:
        self.client = client
        self.keys = keys
        self.config = config
        "may be replaced by one with other settings in force"
        self._worker = worker
        self._claims = itertools.count()
        self.scripts = Scripts(client, keys)

    def admit(self, max_count: int) -> Admission:
        """Up to `max_count` new groups, as far as credit, memory and the run's length allow."""
        holder = self._new_holder()
        config = self.config
        reply = self.scripts(
            "admit",
            max_count,
            config.max_in_flight,
            config.replay_buffer.max_bytes,
            config.trainer.num_steps,
            config.groups_per_step,
            _ms(config.lease.running_s),
            holder,
        )
        cursors = [int(cursor) for cursor in reply[2:]]
        return Admission(stopped_by=reply[0].decode(), policy_version=int(reply[1]), cursors=cursors, holder=holder)

    def admit_eval(self, evaluation: str, *, dataset: str, version: int, tasks: dict[str, bytes]) -> list[str]:
        """Groups of an evaluation, pinned to a version. Returns those to send."""
        flat = itertools.chain.from_iterable(tasks.items())
        reply = self.scripts("admit_eval", evaluation, dataset, version, self._queued_ms, *flat)
        return [group.decode() for group in reply]

    def claim(
        self, group_id: str, stage: str, *, fields: tuple[str, ...], lease_s: float | None = None
    ) -> Claim | None:
        """Take on a part, reading `fields` of the group in the same round trip. None: not owed, or held by another."""
        holder = self._new_holder()
        lease_s = lease_s or self.config.lease.running_s
        reply = self.scripts("claim", group_id, stage, holder, _ms(lease_s), *fields)
        if not reply[0]:
            return None
        values = dict(zip(fields, reply[2:], strict=True))
        return Claim(group_id=group_id, stage=stage, holder=holder, attempt=int(reply[1]), fields=values)

    def renew(self, claims: list[Claim], *, lease_s: float | None = None) -> list[str]:
        """Let leases end so long from now. Returns the "group|part" that were taken over in the meantime."""
        if not claims:
            return []
        lease_s = lease_s or self.config.lease.running_s
        flat = itertools.chain.from_iterable((c.group_id, c.stage, c.holder) for c in claims)
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
        """Hand in a finished part; a rollout names its oldest version and its tokens.

        A reward part with `is_zero_variance` drops its group instead, and its credit returns, unless so many were dropped
        for the next batch that the trainer would starve (`Config.max_filtered`). Groups of evaluations are never dropped.

        Returns the parts to send next, or None when the result was refused (too late).

        With a pipeline as `client` the reply comes from its `execute`; read it with `stored_stages`.
        """
        complete = self._complete(group_id)
        following = {"task": ("rollout",), "rollout": complete}.get(stage, ())
        reply = self.scripts(
            "store",
            group_id,
            stage,
            payload,
            "" if version is None else version,
            self._queued_ms,
            ",".join(following),
            ",".join(complete),
            num_tokens,
            self.config.groups_per_step,
            self.config.max_filtered if is_zero_variance else "",
            client=client,
        )
        return None if client is not None else stored_stages(reply)

    def fail(self, claim: Claim, *, reason: str, detail: str) -> bool:
        """The part could not be done: spend an attempt. True: send it again; False: it is dead or was taken over."""
        return self._fail_or_release("failed", claim, reason, detail)

    def release(self, claim: Claim) -> bool:
        """Hand the part back unharmed (shutdown). True: send it again."""
        return self._fail_or_release("released", claim, "released", "")

    def _fail_or_release(self, mode: str, claim: Claim, reason: str, detail: str) -> bool:
        reply = self.scripts(
            "fail_or_release",
            mode,
            claim.group_id,
            claim.stage,
            claim.holder,
            reason,
            detail[:4000],
            self.config.lease.max_attempts,
            self._queued_ms,
        )
        return reply == b"again"

    def reap(self, max_count: int = 200) -> list[tuple[str, str, Kind]]:
        """Overdue parts to send again: (group, part, kind)."""
        reply = self.scripts("reap", self.config.lease.max_attempts, self._queued_ms, max_count)
        flat = [item.decode() for item in reply]
        return list(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))

    def drop(self, group_ids: list[str], *, reason: str) -> int:
        """Settle training groups that will never be trained."""
        return int(self.scripts("drop", reason, *group_ids)) if group_ids else 0

    def requeue(self, group_id: str) -> list[str]:
        """Give a dead-lettered group fresh attempts. Returns the parts to send; none when it is not dead."""
        complete = self._complete(group_id)
        return [stage.decode() for stage in self.scripts("requeue", group_id, self._queued_ms, ",".join(complete))]

    def counters(self, kind: Kind = "train") -> Counters:
        """One atomic reading of the counters and the in-flight set."""
        return read_counters(self.client, self.keys, kind)

    def _complete(self, group_id: str) -> tuple[str, ...]:
        """Parts that a complete group has after its rollout."""
        return self.config.stages if kind_of(group_id) == "train" else ("reward",)

    @property
    def _queued_ms(self) -> int:
        return _ms(self.config.lease.queued_s)

    def _new_holder(self) -> str:
        return f"{self._worker}/{next(self._claims)}"


def kind_of(group_id: str) -> Kind:
    """Training groups are named t<cursor>, evaluation groups e<...>."""
    return "eval" if group_id.startswith("e") else "train"


def read_counters(client: redis.Redis, keys: Keys, kind: Kind = "train") -> Counters:
    """As Ledger.account, for readers that have no config."""
    flat, in_flight = Scripts(client, keys)("counters", kind)
    counts = zip(flat[0::2], flat[1::2], strict=True)
    plain: dict[str, int] = {}
    reasons: dict[str, dict[str, int]] = {"dropped": {}, "dead": {}}
    for name, value in sorted((key.decode(), int(value)) for key, value in counts):
        outcome, colon, reason = name.partition(":")
        if colon:
            reasons[outcome][reason] = value
        else:
            plain[name] = value
    known: dict[str, Any] = {**plain, **reasons}
    return Counters(kind=kind, in_flight=in_flight, **{"admitted": 0, **known})


def stored_stages(reply: list[bytes]) -> list[str] | None:
    """What a `store` script answered: parts to send next, or None when the result was refused."""
    state, *following = (item.decode() for item in reply)
    return None if state == "refused" else following


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
